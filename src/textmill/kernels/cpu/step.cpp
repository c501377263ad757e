// The order of a step: the body over all rows, then the head and the sampler over slices of the output rows.
#include "step.h"

#include <algorithm>
#include <limits>

namespace textmill {
namespace {

// A chunk of rows should take a few microseconds, far more than handing it out.
constexpr int64_t kChunkFloats = 12 * 1024;
// ... but the threads share what is worth sharing.
constexpr int64_t kLeastRows = 4;
// A chunk of a product takes at least as long as so many multiply-adds or so many bytes of weights, whichever is less...
constexpr int64_t kLeastMacs = 400 * 1024;
constexpr int64_t kLeastBytes = 56 * 1024;
// ... and not much longer than so many: the last chunk of a product is waited for.
constexpr int64_t kMostMacs = 1536 * 1024;
constexpr int64_t kMostBytes = 256 * 1024;
constexpr int64_t kFewRows = 4;

// Rows that a chunk of a product takes at once, so many at most: their input should stay in a core's second cache while the
// columns pass over it, and be enough for each column's codes to be worth unpacking.
constexpr int64_t kMostRows = 120;
constexpr int64_t kTileBytes = 256 * 1024;

int64_t round_up(int64_t value, int64_t unit) { return (value + unit - 1) / unit * unit; }

// Which of `count` chunks comes when: threads take turns, and so each reads a run of neighbouring chunks.
int64_t turn_of(int64_t turn, int64_t count, int64_t threads) {
  const int64_t run = count / threads;
  return turn < run * threads ? turn % threads * run + turn / threads : turn;
}

}  // namespace

void Program::run(const WorkItem* work, int64_t count, const StepOutput& output, const PlacedRows& placed) {
  std::lock_guard<std::mutex> lock(running_);
  placed_ = placed;
  check_work(work, count);
  if (count == 0) return;
  Step step(*this, work, count, output);
  run_job(step);
  if (output.sample) step.accept();
}

Step::Step(Program& program, const WorkItem* work, int64_t count, const StepOutput& output)
    : program_(program), work_(work), item_count_(count), out_(output), vector_(vector_kernels()) {
  place_rows();
  clear_results();
}

void Step::place_rows() {
  for (int64_t i = 0; i < item_count_; ++i) row_count_ += work_[i].count;
  for (auto* column : {&tokens_, &positions_, &slots_}) column->reserve(static_cast<size_t>(row_count_));
  items_.reserve(static_cast<size_t>(item_count_));
  row_count_ = 0;
  for (int64_t i = 0; i < item_count_; ++i) place_item(work_[i], static_cast<int32_t>(i));
}

void Step::place_item(const WorkItem& item, int32_t index) {
  const SlotTable& table = program_.table_;
  const bool prompt = table.prompt_logprobs[item.slot] != 0;
  const int32_t* tokens = table.tokens + item.slot * (program_.limits_.max_total_tokens + 1);
  const int32_t first_sample = item.count - item.samples;
  items_.push_back({row_count_, item.start, item.count, item.slot});
  for (int32_t r = 0; r < item.count; ++r) {
    const int32_t place = r < first_sample ? -1 : static_cast<int32_t>(place_count_) + r - first_sample;
    if (place >= 0 || prompt || out_.every_row) {
      outputs_.push_back({static_cast<int32_t>(row_count_), index, place, prompt});
    }
    tokens_.push_back(tokens[item.start + r]);
    positions_.push_back(item.start + r);
    slots_.push_back(item.slot);
    ++row_count_;
  }
  place_count_ += item.places();
}

void Step::clear_results() {
  std::fill_n(out_.token, place_count_, -1);
  std::fill_n(out_.logprob, place_count_, 0.0f);
  std::fill_n(out_.error, place_count_, uint8_t{0});
  std::fill_n(out_.top_count, place_count_, 0);
  std::fill_n(out_.top_ids, place_count_ * out_.top_width, -1);
  std::fill_n(out_.top_logprobs, place_count_ * out_.top_width, 0.0f);
  if (out_.prompt_logprobs) {
    std::fill_n(out_.prompt_logprobs, row_count_, std::numeric_limits<float>::quiet_NaN());
  }
}

void Step::prepare(int threads) {
  threads_ = threads;
  plans_.resize(program_.plans_.size());
  int64_t scratch = 0, partials = 0;
  int32_t counters = 0;
  for (size_t i = 0; i < plans_.size(); ++i) {
    const AttentionSpec& spec = program_.plans_[i];
    plan_attention(spec, items_, threads, &plans_[i]);
    const int64_t vectors = query_vectors(spec);
    const int64_t own = partial_floats(vectors, spec.dim());
    scratch = std::max(scratch, own + attend_scratch_floats(vectors, spec.dim()));
    partials = std::max(partials, plans_[i].partials * partial_floats(plans_[i].partial_vectors, spec.dim()));
    counters = std::max(counters, plans_[i].counters * static_cast<int32_t>(spec.kv_heads));
  }
  partials_.resize(static_cast<size_t>(partials));
  counters_ = std::vector<std::atomic<int32_t>>(static_cast<size_t>(counters));
  program_.scratch_.resize(static_cast<size_t>(threads));
  for (auto& memory : program_.scratch_) memory.resize(std::max(memory.size(), static_cast<size_t>(scratch)));
  while (program_.samplers_.size() < static_cast<size_t>(threads)) {
    program_.samplers_.push_back(std::make_unique<Sampler>(program_.limits_.vocab_size));
  }
}

// Phases

uint32_t Step::next_phase() {
  for (;;) {
    if (sampling_) {
      end_op();
      sampling_ = false;
      slice_ += slice_rows_;
      op_ = program_.body_ops_;
    }
    if (op_ == program_.body_ops_ && phase_ == 0) {
      slice_rows_ = std::min<int64_t>(program_.limits_.max_outputs, static_cast<int64_t>(outputs_.size()) - slice_);
      if (slice_rows_ <= 0) return 0;
    }
    if (phase_ == 0 && program_.profiling) started_ = std::chrono::steady_clock::now();
    if (op_ == program_.ops_.size()) {
      sampling_ = true;
      return static_cast<uint32_t>(slice_rows_);
    }
    const uint32_t chunks = begin_op();
    ++phase_;
    if (chunks) return chunks;
    end_op();
    phase_ = 0;
    ++op_;
  }
}

// Chunks of phase `phase_` of the operation, 0 when it has no more.
uint32_t Step::begin_op() {
  const Op& op = program_.ops_[op_];
  switch (op.kind) {
    case OpKind::kMatmul: return begin_matmul();
    case OpKind::kAttention: return begin_attention();
    case OpKind::kExperts: return begin_experts();
    case OpKind::kConvolve:
    case OpKind::kScan: return begin_recurrence();
    default: return phase_ == 0 ? chunks_of_rows(program_.value(op.out).cols) : 0;
  }
}

uint32_t Step::chunks_of(int64_t count, int64_t cols) {
  const int64_t shared = (count + threads_ - 1) / threads_;
  grain_ = std::clamp<int64_t>(kChunkFloats / cols, 1, std::max<int64_t>(kLeastRows, shared));
  return static_cast<uint32_t>((count + grain_ - 1) / grain_);
}

// All rows in tiles of about the same height, a multiple of 6 (what the kernels compute side by side).
int64_t Step::rows_of_tile(int64_t rows, int64_t cols, bool quantized) {
  if (!quantized) return std::max<int64_t>(16, kChunkFloats * 4 / cols);
  const int64_t fitting = kTileBytes / static_cast<int64_t>(quantized_bytes(1, cols)) / 6 * 6;
  const int64_t most = std::clamp<int64_t>(fitting, 24, kMostRows);
  const int64_t tiles = (rows + most - 1) / most;
  return round_up((rows + tiles - 1) / tiles, 6);
}

uint32_t Step::begin_matmul() {
  const Op& op = program_.ops_[op_];
  const Value& x = program_.value(op.x);
  const int phase = phase_ + (op.quantizes ? 0 : 1);
  if (phase == 0) return chunks_of_rows(x.cols);
  if (phase > 1) return 0;
  const int64_t n = program_.value(op.out).cols;
  tile_rows_ = rows_of_tile(rows(), x.cols, x.quantized && op.matrix->quantized());
  row_tiles_ = (rows() + tile_rows_ - 1) / tile_rows_;
  columns_ = columns_of_chunk(*op.matrix, n, std::min(rows(), tile_rows_), row_tiles_);
  return static_cast<uint32_t>((n + columns_ - 1) / columns_ * row_tiles_);
}

// How many of a product's n output columns a chunk takes, where tiles of rows are `tall` and there are so many of them.
int64_t Step::columns_of_chunk(const Weight& matrix, int64_t n, int64_t tall, int64_t tiles) const {
  const int64_t macs = std::max<int64_t>(1, tall * matrix.n * matrix.k / n);  // of one output column
  const int64_t bytes = std::max<int64_t>(1, static_cast<int64_t>(matrix.bytes()) / n);
  const int64_t least = std::max<int64_t>(1, std::min(kLeastMacs / macs, kLeastBytes / bytes));
  const int64_t most = std::max(least, std::min(kMostMacs / macs, kMostBytes / bytes));
  // Few rows wait for memory, which is fastest in long runs: two chunks a thread; many rows compute.
  const bool few = tall <= kFewRows;
  const int64_t shared = n * tiles / (threads_ * (few ? 2 : 16));
  const int64_t wanted = std::clamp(shared, least, most);
  if (few) return std::min(round_up(wanted, kColumnBlock), round_up(n, kColumnBlock));
  // Threads get the same number of chunks, and chunks whole tiles: two blocks of columns, or a strip where rows are many.
  const int64_t share = n / round_up((n + wanted - 1) / wanted, threads_);
  const int64_t unit = 2 * kColumnBlock, fewest = tall < 16 ? unit : 2 * unit;
  return std::min(std::max(fewest, share / unit * unit), round_up(n, kColumnBlock));
}

void Step::end_op() {
  if (!program_.profiling) return;
  OpProfile& entry = program_.profiles_[op_];
  ++entry.calls;
  entry.seconds += std::chrono::duration<double>(std::chrono::steady_clock::now() - started_).count();
  if (sampling_) return;
  const Op& op = program_.ops_[op_];
  if (op.kind == OpKind::kExperts) profile_experts(*op.experts, &entry);
  if (op.kind == OpKind::kMatmul) {
    entry.bytes += static_cast<int64_t>(op.matrix->bytes());
    entry.macs += rows() * op.matrix->n * op.matrix->k;
  } else if (op.kind == OpKind::kAttention) {
    const AttentionSpec& spec = op.attention;
    const int64_t keys = plans_[static_cast<size_t>(op.plan)].keys;
    entry.macs += 2 * keys * spec.heads * spec.head_dim;
    entry.bytes += 2 * keys * spec.kv_heads * spec.dim() * (spec.half_cache ? 2 : 4);
  }
}

// Chunks

void Step::run_chunk(uint32_t chunk, int thread) {
  if (sampling_) return run_output(slice_ + chunk, thread);
  const Op& op = program_.ops_[op_];
  const int64_t begin = chunk * grain_, end = std::min(begin + grain_, rows());
  if (op.kind == OpKind::kMatmul) {
    if (op.quantizes && phase_ == 1) return quantize(op.x, begin, end);
    return run_product(op, chunk);
  }
  if (op.kind == OpKind::kAttention) {
    if (phase_ == 1) return run_store(op, begin, end);
    return run_attention(op, chunk, thread);
  }
  if (op.kind == OpKind::kExperts) return run_experts(op, chunk);
  if (op.kind == OpKind::kConvolve || op.kind == OpKind::kScan) return run_recurrence(op, chunk);
  run_rows(op, begin, end);
}

float* Step::value_row(int index, int64_t row) const {
  const Value& v = program_.values_[static_cast<size_t>(index)];
  return reinterpret_cast<float*>(program_.arena_.data() + v.offset) + row * v.stride;
}

void Step::quantize(int index, int64_t begin, int64_t end) const {
  const Value& v = program_.values_[static_cast<size_t>(index)];
  quantize_rows(value_row(index, 0), v.stride, begin, end, v.cols, program_.arena_.data() + v.quantized_offset);
}

void Step::run_rows(const Op& op, int64_t begin, int64_t end) const {
  for (int64_t row = begin; row < end; ++row) run_row(op, row, value_row(op.out, row));
  if (program_.values_[static_cast<size_t>(op.out)].quantized) quantize(op.out, begin, end);
}

void Step::run_row(const Op& op, int64_t row, float* out) const {
  const int64_t cols = program_.values_[static_cast<size_t>(op.out)].cols;
  const int64_t from = op.kind == OpKind::kOutputs ? outputs_[static_cast<size_t>(slice_ + row)].row : row;
  const float* x = op.x >= 0 ? value_row(op.x, from) : nullptr;
  switch (op.kind) {
    case OpKind::kEmbed:
      op.matrix->dequantize_row(tokens_[static_cast<size_t>(row)], out);
      if (op.number != 1.0f) vector_.scale(out, op.number, cols, out);
      return;
    case OpKind::kEmbedPositions:
      std::copy_n(op.weight + positions_[static_cast<size_t>(row)] * cols, cols, out);
      return;
    case OpKind::kPlace: {
      const PlacedRows& placed = program_.placed_;
      const int64_t from = placed.row ? placed.row[row] : -1;
      std::copy_n(from < 0 ? x : placed.values + from * cols, cols, out);
      return;
    }
    case OpKind::kRmsNorm: return vector_.rms_norm(x, op.weight, op.number, cols, out);
    case OpKind::kLayerNorm: return vector_.layer_norm(x, op.weight, op.bias, op.number, cols, out);
    case OpKind::kAdd: return vector_.add(x, value_row(op.y, row), cols, out);
    case OpKind::kMultiply: return vector_.multiply(x, value_row(op.y, row), cols, out);
    case OpKind::kClip: return vector_.clip(x, op.number, cols, out);
    case OpKind::kScale: return vector_.scale(x, op.number, cols, out);
    case OpKind::kSoftcap: return vector_.softcap(x, op.number, cols, out);
    case OpKind::kActivation: return vector_.activation(x, op.activation, cols, out);
    case OpKind::kGatedActivation: return vector_.gated(x, op.activation, cols, out);
    case OpKind::kOutputs: std::copy_n(x, cols, out); return;
    default: return;
  }
}

void Step::run_product(const Op& op, uint32_t chunk) const {
  const Value& x = program_.values_[static_cast<size_t>(op.x)];
  const Value& y = program_.values_[static_cast<size_t>(op.out)];
  const int64_t first = chunk % row_tiles_ * tile_rows_, across = (y.cols + columns_ - 1) / columns_;
  const int64_t turn = chunk / row_tiles_, column = turn_of(turn, across, threads_) * columns_;
  Epilogue epilogue;
  epilogue.bias = op.bias;
  epilogue.gated = op.gated;
  epilogue.activation = op.activation;
  if (op.y >= 0) {
    epilogue.residual = value_row(op.y, first);
    epilogue.residual_stride = program_.values_[static_cast<size_t>(op.y)].stride;
  }
  const void* from = value_row(op.x, first);
  if (op.matrix->quantized()) {
    from = program_.arena_.data() + x.quantized_offset + quantized_bytes(first, x.cols);
  }
  op.matrix->matmul(from, x.stride, std::min(tile_rows_, rows() - first), column, std::min(column + columns_, y.cols),
                    value_row(op.out, first), y.stride, epilogue);
}

void Step::run_output(int64_t index, int thread) {
  const OutputRow& wanted = outputs_[static_cast<size_t>(index)];
  const int64_t vocabulary = program_.limits_.vocab_size;
  float* logits = value_row(program_.logits_, index - slice_);
  if (out_.logits) std::copy_n(logits, vocabulary, out_.logits + index * vocabulary);
  if (!out_.sample) return;
  if (wanted.is_prompt && out_.prompt_logprobs) {
    const int32_t slot = work_[wanted.item].slot, next = positions_[static_cast<size_t>(wanted.row)] + 1;
    if (next < program_.table_.length[slot]) {
      const int32_t* tokens = program_.table_.tokens + slot * (program_.limits_.max_total_tokens + 1);
      out_.prompt_logprobs[wanted.row] =
          program_.samplers_[static_cast<size_t>(thread)]->logprob(logits, tokens[next]);
    }
  }
  if (wanted.place >= 0) choose(wanted, logits, thread);
}

// As if the guesses up to this row were right; `accept` drops the choice if they are not.
void Step::choose(const OutputRow& wanted, float* logits, int thread) {
  const SlotTable& table = program_.table_;
  const int32_t slot = work_[wanted.item].slot, length = positions_[static_cast<size_t>(wanted.row)] + 1;
  const int32_t* tokens = table.tokens + slot * (program_.limits_.max_total_tokens + 1);
  SamplingParameters p;
  p.temperature = table.temperature[slot];
  p.top_p = table.top_p[slot];
  p.typical_p = table.typical_p[slot];
  p.repetition_penalty = table.repetition_penalty[slot];
  p.frequency_penalty = table.frequency_penalty[slot];
  p.top_k = table.top_k[slot];
  p.draws = table.draws[slot] != 0;
  p.seed = table.seed[slot];
  p.top_n = static_cast<int32_t>(std::min<int64_t>(table.top_n[slot], out_.top_width));
  const int64_t tops = wanted.place * out_.top_width;
  const Choice choice = program_.samplers_[static_cast<size_t>(thread)]->choose(
      logits, p, tokens, length, out_.top_ids + tops, out_.top_logprobs + tops);
  out_.token[wanted.place] = choice.token;
  out_.logprob[wanted.place] = choice.logprob;
  out_.error[wanted.place] = static_cast<uint8_t>(choice.error);
  out_.top_count[wanted.place] = choice.top_count;
}

void Step::accept() {
  const SlotTable& table = program_.table_;
  int64_t place = 0;
  for (int64_t i = 0; i < item_count_; place += work_[i].places(), ++i) {
    const WorkItem& item = work_[i];
    int32_t* tokens = table.tokens + item.slot * (program_.limits_.max_total_tokens + 1);
    int32_t& length = table.length[item.slot];
    bool right = true;
    for (int64_t at = place; at < place + item.samples; ++at) {
      right = right && out_.error[at] == 0;
      if (!right) {
        out_.token[at] = -1;
        continue;
      }
      right = at + 1 < place + item.samples && tokens[length] == out_.token[at];
      tokens[length++] = out_.token[at];
    }
  }
}

}  // namespace textmill
