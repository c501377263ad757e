// Recording a program, and checking what a step asks of it.
#include "program.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <new>
#include <stdexcept>

namespace textmill {
namespace {

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t stride_of(int64_t cols) { return (cols + 15) / 16 * 16; }

void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

}  // namespace

Mapping::~Mapping() {
  if (data_) munmap(data_, bytes_);
}

void Mapping::map(size_t bytes) {
  if (data_) munmap(data_, bytes_);
  data_ = nullptr;
  bytes_ = std::max<size_t>(bytes, 4096);
  void* at = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (at == MAP_FAILED) throw std::bad_alloc();
  madvise(at, bytes_, MADV_HUGEPAGE);
  data_ = static_cast<std::byte*>(at);
}

Program::Program(const Limits& limits, const SlotTable& table) : limits_(limits), table_(table) {
  require(limits.max_rows > 0 && limits.max_outputs > 0 && limits.max_slots > 0 && limits.max_total_tokens > 0 &&
              limits.vocab_size > 0,
          "a program's limits must be positive");
  require(limits.block_size > 0 && limits.block_size % kKeyLanes == 0, "block_size must be a multiple of 16");
}

const Value& Program::value(int index) const {
  require(index >= 0 && index < static_cast<int>(values_.size()), "no such value in this program");
  return values_[static_cast<size_t>(index)];
}

void Program::check_input(int x) const {
  require(!finished_, "the program is finished");
  require(value(x).head == in_head_, "after outputs() only its rows may be read");
}

int Program::record(Op op, int64_t cols) {
  require(!finished_, "the program is finished");
  Value out;
  out.cols = cols;
  out.stride = stride_of(cols);
  out.head = in_head_;
  op.head = in_head_;
  op.out = static_cast<int>(values_.size());
  values_.push_back(out);
  ops_.push_back(std::move(op));
  return ops_.back().out;
}

int Program::embed(std::shared_ptr<const Weight> matrix, float scale) {
  require(!in_head_, "embed belongs to the body");
  require(matrix->n >= limits_.vocab_size, "the embedding has fewer rows than the vocabulary");
  const int64_t cols = matrix->k;
  Op op;
  op.kind = OpKind::kEmbed;
  op.matrix = std::move(matrix);
  op.number = scale;
  return record(std::move(op), cols);
}

int Program::embed_positions(const float* table, int64_t positions, int64_t cols, int64_t offset) {
  require(!in_head_, "embed_positions belongs to the body");
  require(offset >= 0 && positions >= limits_.max_total_tokens + offset,
          "the table of positions has fewer rows than max_total_tokens");
  Op op;
  op.kind = OpKind::kEmbedPositions;
  op.weight = table + offset * cols;
  return record(std::move(op), cols);
}

int Program::place_rows(int x) {
  check_input(x);
  require(!in_head_, "place belongs to the body");
  Op op;
  op.kind = OpKind::kPlace;
  op.x = x;
  return record(std::move(op), value(x).cols);
}

int Program::rms_norm(int x, const float* weight, int64_t size, float eps) {
  check_input(x);
  require(size == value(x).cols, "rms_norm: the weight is not as wide as the rows");
  Op op;
  op.kind = OpKind::kRmsNorm;
  op.x = x;
  op.weight = weight;
  op.number = eps;
  return record(std::move(op), size);
}

int Program::layer_norm(int x, const float* weight, int64_t size, const float* bias, float eps) {
  check_input(x);
  require(size == value(x).cols, "layer_norm: the weight is not as wide as the rows");
  Op op;
  op.kind = OpKind::kLayerNorm;
  op.x = x;
  op.weight = weight;
  op.bias = bias;
  op.number = eps;
  return record(std::move(op), size);
}

int Program::binary(OpKind kind, int x, int y) {
  check_input(x);
  check_input(y);
  require(value(x).cols == value(y).cols, "sums and products take rows of the same width");
  Op op;
  op.kind = kind;
  op.x = x;
  op.y = y;
  return record(std::move(op), value(x).cols);
}

int Program::unary(OpKind kind, int x, float number) {
  check_input(x);
  Op op;
  op.kind = kind;
  op.x = x;
  op.number = number;
  return record(std::move(op), value(x).cols);
}

int Program::activation(int x, Activation kind, bool gated) {
  check_input(x);
  require(!gated || value(x).cols % 2 == 0, "gated_activation: the width must be even");
  Op op;
  op.kind = gated ? OpKind::kGatedActivation : OpKind::kActivation;
  op.x = x;
  op.activation = kind;
  return record(std::move(op), gated ? value(x).cols / 2 : value(x).cols);
}

int Program::matmul(int x, std::shared_ptr<const Weight> matrix, const float* bias, Activation kind, bool gated) {
  check_input(x);
  require(kind <= Activation::kRelu, "matmul: this activation is an operation of its own");
  require(matrix->k == value(x).cols, "matmul: the matrix does not take rows of this width");
  require(!gated || matrix->n % 2 == 0, "matmul: a gated matrix has an even number of outputs");
  Op op;
  op.kind = OpKind::kMatmul;
  op.x = x;
  op.bias = bias;
  op.activation = kind;
  op.gated = gated;
  op.matrix = std::move(matrix);
  const int64_t cols = gated ? op.matrix->n / 2 : op.matrix->n;
  return record(std::move(op), cols);
}

int Program::attend(int x, int layer, const AttentionSpec& spec) {
  check_input(x);
  require(!in_head_, "attend belongs to the body");
  require(spec.heads > 0 && spec.kv_heads > 0 && spec.heads % spec.kv_heads == 0,
          "attend: heads must be a multiple of kv_heads");
  require(value(x).cols == (spec.heads + 2 * spec.kv_heads) * spec.head_dim, "attend: rows are not q | k | v");
  require(2 * spec.rotary_half <= spec.head_dim, "attend: rotary tables are wider than a head");
  for (const Op& op : ops_) require(op.kind != OpKind::kAttention || op.layer != layer, "attend: layer recorded twice");
  Op op;
  op.kind = OpKind::kAttention;
  op.x = x;
  op.layer = layer;
  op.attention = spec;
  op.attention.half_cache = limits_.half_cache;
  op.attention.block_size = limits_.block_size;
  const size_t bytes = static_cast<size_t>(spec.kv_heads * spec.dim() * limits_.block_size) * (limits_.half_cache ? 2 : 4);
  op.keys_offset = kv_bytes_per_block_;
  op.scales_offset = kv_bytes_per_block_ + 2 * bytes;
  kv_bytes_per_block_ += 2 * bytes;
  if (limits_.half_cache) {
    const int64_t scales = spec.kv_heads * (limits_.block_size / kKeyLanes) * kGroupScales * 2;
    kv_bytes_per_block_ += static_cast<size_t>((scales + 127) / 128 * 128);  // memory is fetched by two lines
  }
  const auto same = [&](const AttentionSpec& other) {
    return other.heads == spec.heads && other.kv_heads == spec.kv_heads && other.head_dim == spec.head_dim &&
           other.window == spec.window;
  };
  const auto found = std::find_if(plans_.begin(), plans_.end(), same);
  op.plan = static_cast<int>(found - plans_.begin());
  if (found == plans_.end()) plans_.push_back(op.attention);
  return record(std::move(op), spec.heads * spec.head_dim);
}

int Program::experts(int x, int scores, Experts experts) {
  check_input(x);
  check_input(scores);
  require(!in_head_, "experts belong to the body");
  require(experts.count() > 0 && experts.down.size() == experts.gate_up.size(), "experts: as many down as gate and up");
  require(value(scores).cols == experts.count(), "experts: one score per expert");
  require(experts.top_k > 0 && experts.top_k <= experts.count(), "experts: a row goes to at least one, at most to all");
  require(experts.activation <= Activation::kRelu, "experts: a product cannot end with this activation");
  const Weight &up = *experts.gate_up[0], &down = *experts.down[0];
  for (size_t i = 0; i < experts.down.size(); ++i) {
    const Weight &a = *experts.gate_up[i], &b = *experts.down[i];
    require(a.n == up.n && a.k == up.k && b.n == down.n && b.k == down.k, "experts: all must have one shape");
    require(a.quantized() == up.quantized() && b.quantized() == down.quantized(), "experts: all packed or none");
  }
  require(up.k == value(x).cols && down.n == up.k && up.n == 2 * down.k, "experts: matrices do not fit the rows");
  const auto bytes = [&](int64_t cols, bool quantized) {
    const size_t row = quantized ? quantized_bytes(1, cols) : static_cast<size_t>(stride_of(cols)) * 4;
    return aligned(static_cast<size_t>(limits_.max_rows * experts.top_k) * row);
  };
  experts.inner_offset = std::max(bytes(up.k, false), bytes(up.k, up.quantized()));
  experts.codes_offset = experts.inner_offset + bytes(down.k, false);
  experts.scratch_bytes = experts.codes_offset + (down.quantized() ? bytes(down.k, true) : 0);
  Op op;
  op.kind = OpKind::kExperts;
  op.x = x;
  op.y = scores;
  op.experts = std::make_shared<const Experts>(std::move(experts));
  return record(std::move(op), value(x).cols);
}

int Program::convolve(int x, const float* weight, int64_t taps, int64_t channels, const float* bias) {
  check_input(x);
  require(!in_head_, "convolve belongs to the body");
  require(taps > 0 && channels > 0 && channels <= value(x).cols, "convolve: more channels than columns");
  Op op;
  op.kind = OpKind::kConvolve;
  op.x = x;
  op.weight = weight;
  op.bias = bias;
  op.width = taps;
  op.state_offset = state_floats_;
  state_floats_ += stride_of(channels) * (taps - 1);
  return record(std::move(op), channels);
}

int Program::scan(int x, int step, int bc, int gate, const float* a, int64_t columns, int64_t channels,
                  const float* skip) {
  for (const int read : {x, step, bc, gate}) check_input(read);
  require(!in_head_, "scan belongs to the body");
  require(columns > 0 && value(x).cols == channels && value(step).cols == channels && value(bc).cols == 2 * columns &&
              value(gate).cols >= channels,
          "scan: rows do not fit the channels and their states");
  Op op;
  op.kind = OpKind::kScan;
  op.x = x;
  op.y = step;
  op.bc = bc;
  op.gate = gate;
  op.weight = a;
  op.bias = skip;
  op.width = columns;
  op.state_offset = state_floats_;
  state_floats_ += stride_of(channels) * columns;
  return record(std::move(op), channels);
}

int Program::outputs(int x) {
  check_input(x);
  require(!in_head_, "outputs() may be called once");
  in_head_ = true;
  Op op;
  op.kind = OpKind::kOutputs;
  op.x = x;
  return record(std::move(op), value(x).cols);
}

void Program::finish(int logits) {
  check_input(logits);
  require(in_head_, "outputs() is missing");
  require(value(logits).cols >= limits_.vocab_size, "the logits are narrower than the vocabulary");
  logits_ = logits;
  find_lifetimes();
  fuse_residuals();
  find_lifetimes();
  plan_quantization();
  plan_memory();
  arena_.map(arena_bytes_);
  if (state_floats_) states_.map(static_cast<size_t>(limits_.max_slots) * state_bytes_per_slot());
  profiles_.resize(ops_.size());
  reset_profile();
  finished_ = true;
}

void Program::allocate(int64_t num_blocks) {
  require(finished_, "allocate() comes after finish()");
  require(num_blocks > 0 && num_blocks <= INT32_MAX, "num_blocks must be positive");
  cache_.map(static_cast<size_t>(num_blocks) * kv_bytes_per_block_);
  num_blocks_ = num_blocks;
}

std::vector<OpProfile> Program::profile() const {
  std::map<std::string, OpProfile> by_name;
  for (const OpProfile& entry : profiles_) {
    OpProfile& sum = by_name[entry.name];
    sum.name = entry.name;
    sum.calls += entry.calls;
    sum.seconds += entry.seconds;
    sum.bytes += entry.bytes;
    sum.macs += entry.macs;
  }
  std::vector<OpProfile> out;
  for (auto& [name, entry] : by_name) {
    if (entry.calls) out.push_back(entry);
  }
  return out;
}

void Program::reset_profile() {
  static const char* const kNames[] = {
      "embed", "embed_positions", "place", "rms_norm", "layer_norm", "add", "multiply", "scale", "clip", "softcap", "activation",
      "gated_activation", "outputs", "matmul", "attention", "experts", "convolve", "scan"};
  profiles_.assign(ops_.size() + 1, OpProfile());
  for (size_t i = 0; i < ops_.size(); ++i) {
    profiles_[i].name = kNames[static_cast<int>(ops_[i].kind)];
    if (ops_[i].kind == OpKind::kMatmul) {
      const Weight& matrix = *ops_[i].matrix;
      profiles_[i].name.append(" ").append(std::to_string(matrix.n)).append("x").append(std::to_string(matrix.k));
    }
  }
  profiles_.back().name = "sample";
}

void Program::check_item(const WorkItem& item) const {
  require(item.slot >= 0 && item.slot < limits_.max_slots, "work: no such slot");
  const int64_t length = table_.length[item.slot];
  const int64_t end = static_cast<int64_t>(item.start) + item.count, guesses = item.places() - 1;
  require(length >= 0 && length <= limits_.max_total_tokens + 1, "work: a slot's length is out of range");
  require(item.start >= 0 && item.count > guesses && end - guesses <= length, "work: rows beyond the known tokens");
  require(end <= limits_.max_total_tokens, "work: rows beyond max_total_tokens");
  require(item.samples >= 0 && (!item.samples || end - guesses == length), "work: samples needs the last known token");
  const int32_t* tokens = table_.tokens + item.slot * (limits_.max_total_tokens + 1);
  for (int64_t i = item.start; i < end; ++i) {
    require(tokens[i] >= 0 && tokens[i] < limits_.vocab_size, "work: a token is not in the vocabulary");
  }
  const int32_t* blocks = table_.block_table + item.slot * table_.blocks_per_slot;
  for (int64_t i = 0; i * limits_.block_size < end; ++i) {
    require(blocks[i] >= 0 && blocks[i] < num_blocks_, "work: no such cache block");
  }
}

void Program::check_placed(int64_t rows) const {
  if (!placed_.row) return;
  require(placed_.rows == rows, "placed rows: one entry per row of the step");
  for (int64_t i = 0; i < rows; ++i) require(placed_.row[i] < placed_.count, "placed rows: no such row");
  for (const Op& op : ops_) {
    require(op.kind != OpKind::kPlace || value(op.x).cols == placed_.cols, "placed rows are not as wide as the model's");
  }
}

void Program::check_work(const WorkItem* work, int64_t count) const {
  require(finished_ && num_blocks_ > 0, "run() comes after finish() and allocate()");
  int64_t rows = 0;
  std::vector<bool> seen(static_cast<size_t>(limits_.max_slots));
  for (int64_t i = 0; i < count; ++i) {
    check_item(work[i]);
    require(!seen[static_cast<size_t>(work[i].slot)], "work: a slot comes twice");
    seen[static_cast<size_t>(work[i].slot)] = true;
    rows += work[i].count;
  }
  require(rows <= limits_.max_rows, "work: more rows than max_rows");
  check_placed(rows);
}

}  // namespace textmill
