// Mixtures of experts within a step: rows choose, are sorted by expert, go through their experts' two products, and are
// put together again. Every row's arithmetic is its own: neighbours only decide where in memory it happens.
#include <algorithm>
#include <cmath>

#include "step.h"

namespace textmill {
namespace {

int64_t stride_of(int64_t cols) { return (cols + 15) / 16 * 16; }

size_t row_bytes(int64_t cols, bool quantized) {
  return quantized ? quantized_bytes(1, cols) : static_cast<size_t>(stride_of(cols)) * 4;
}

enum Phase { kChoose, kFill, kUp, kQuantize, kDown, kMix };

}  // namespace

uint32_t Step::begin_experts() {
  const Op& op = program_.ops_[op_];
  const Experts& experts = *op.experts;
  const int64_t places = rows() * experts.top_k;
  if (phase_ == kQuantize && !experts.down_quantized()) ++phase_;
  switch (phase_) {
    case kChoose:
      for (auto* column : {&chosen_, &place_of_, &row_of_place_}) column->resize(static_cast<size_t>(places));
      shares_.resize(static_cast<size_t>(places));
      return chunks_of_rows(experts.count() * experts.top_k);
    case kFill: sort_by_expert(experts); return chunks_of(places, experts.outer());
    case kUp: return cut_experts(experts, false);
    case kQuantize: return chunks_of(places, experts.inner());
    case kDown: return cut_experts(experts, true);
    case kMix: return chunks_of_rows(experts.outer() * experts.top_k);
    default: return 0;
  }
}

// Places in order of experts, then of rows.
void Step::sort_by_expert(const Experts& experts) {
  const int64_t places = rows() * experts.top_k;
  first_place_.assign(static_cast<size_t>(experts.count()) + 1, 0);
  for (int64_t i = 0; i < places; ++i) ++first_place_[static_cast<size_t>(chosen_[static_cast<size_t>(i)]) + 1];
  for (size_t e = 1; e < first_place_.size(); ++e) first_place_[e] += first_place_[e - 1];
  std::vector<int64_t> next(first_place_.begin(), first_place_.end() - 1);
  for (int64_t i = 0; i < places; ++i) {
    const int64_t place = next[static_cast<size_t>(chosen_[static_cast<size_t>(i)])]++;
    place_of_[static_cast<size_t>(i)] = static_cast<int32_t>(place);
    row_of_place_[static_cast<size_t>(place)] = static_cast<int32_t>(i / experts.top_k);
  }
}

uint32_t Step::cut_experts(const Experts& experts, bool down) {
  const auto& matrices = down ? experts.down : experts.gate_up;
  const int64_t n = down ? matrices[0]->n : matrices[0]->n / 2, k = matrices[0]->k;
  const auto tall = [&](size_t e) {
    return rows_of_tile(first_place_[e + 1] - first_place_[e], k, matrices[0]->quantized());
  };
  int64_t tiles = 0;
  for (size_t e = 0; e < matrices.size(); ++e) {
    const int64_t places = first_place_[e + 1] - first_place_[e];
    if (places) tiles += (places + tall(e) - 1) / tall(e);
  }
  expert_chunks_.clear();
  for (size_t e = 0; e < matrices.size(); ++e) {
    const int64_t begin = first_place_[e], end = first_place_[e + 1];
    if (begin == end) continue;
    const int64_t height = tall(e), columns = columns_of_chunk(*matrices[e], n, std::min(height, end - begin), tiles);
    for (int64_t column = 0; column < n; column += columns) {
      for (int64_t first = begin; first < end; first += height) {
        expert_chunks_.push_back({static_cast<int32_t>(e), first, std::min(height, end - first), column,
                                  std::min(columns, n - column)});
      }
    }
  }
  return static_cast<uint32_t>(expert_chunks_.size());
}

void Step::run_experts(const Op& op, uint32_t chunk) {
  const int phase = phase_ - 1;
  if (phase == kUp || phase == kDown) return run_expert(op, phase == kDown, chunk);
  const Experts& experts = *op.experts;
  const bool by_place = phase == kFill || phase == kQuantize;
  const int64_t count = by_place ? rows() * experts.top_k : rows();
  const int64_t begin = chunk * grain_, end = std::min(begin + grain_, count);
  if (phase == kQuantize) {
    std::byte* scratch = program_.arena_.data() + op.scratch_offset;
    quantize_rows(reinterpret_cast<const float*>(scratch + experts.inner_offset), stride_of(experts.inner()), begin, end,
                  experts.inner(), scratch + experts.codes_offset);
    return;
  }
  for (int64_t i = begin; i < end; ++i) {
    if (phase == kChoose) choose_experts(op, i);
    if (phase == kFill) fill_place(op, i);
    if (phase == kMix) mix_experts(op, i);
  }
}

// The softmax over all experts, the best of it, the first of equals first.
void Step::choose_experts(const Op& op, int64_t row) {
  const Experts& experts = *op.experts;
  const float* scores = value_row(op.y, row);
  const int64_t count = experts.count();
  float most = scores[0], total = 0;
  for (int64_t e = 1; e < count; ++e) most = std::max(most, scores[e]);
  for (int64_t e = 0; e < count; ++e) total += vector_.exp(scores[e] - most);
  int32_t* chosen = chosen_.data() + row * experts.top_k;
  float* shares = shares_.data() + row * experts.top_k;
  float length = 0;
  for (int64_t rank = 0; rank < experts.top_k; ++rank) {
    int64_t best = -1;
    for (int64_t e = 0; e < count; ++e) {
      // A row that is not finite goes somewhere too.
      if (std::find(chosen, chosen + rank, e) == chosen + rank && (best < 0 || scores[e] > scores[best])) best = e;
    }
    chosen[rank] = static_cast<int32_t>(best);
    shares[rank] = vector_.exp(scores[best] - most) / total;
    length += experts.norm == 1.0f ? shares[rank] : std::pow(shares[rank], experts.norm);
  }
  if (experts.norm == 0) return;
  const float factor = experts.norm == 1.0f ? length : std::pow(length, 1.0f / experts.norm);
  for (int64_t rank = 0; rank < experts.top_k; ++rank) shares[rank] /= factor;
}

void Step::fill_place(const Op& op, int64_t place) const {
  const Experts& experts = *op.experts;
  const int64_t cols = experts.outer();
  const float* x = value_row(op.x, row_of_place_[static_cast<size_t>(place)]);
  const size_t at = static_cast<size_t>(place) * row_bytes(cols, experts.up_quantized());
  std::byte* to = program_.arena_.data() + op.scratch_offset + at;
  if (experts.up_quantized()) {
    quantize_rows(x, cols, 0, 1, cols, to);
  } else {
    std::copy_n(x, cols, reinterpret_cast<float*>(to));
  }
}

void Step::run_expert(const Op& op, bool down, uint32_t chunk) const {
  const Experts& experts = *op.experts;
  const ExpertChunk& cut = expert_chunks_[chunk];
  const Weight& matrix = *(down ? experts.down : experts.gate_up)[static_cast<size_t>(cut.expert)];
  std::byte* scratch = program_.arena_.data() + op.scratch_offset;
  std::byte* inner = scratch + experts.inner_offset;
  const std::byte* from = !down ? scratch : matrix.quantized() ? scratch + experts.codes_offset : inner;
  Epilogue epilogue;
  epilogue.gated = !down;
  epilogue.activation = down ? Activation::kNone : experts.activation;
  const int64_t stride = stride_of(down ? matrix.n : matrix.n / 2);
  float* out = reinterpret_cast<float*>(down ? scratch : inner) + cut.first * stride;
  matrix.matmul(from + static_cast<size_t>(cut.first) * row_bytes(matrix.k, matrix.quantized()), stride_of(matrix.k),
                cut.rows, cut.column, cut.column + cut.columns, out, stride, epilogue);
}

void Step::mix_experts(const Op& op, int64_t row) const {
  const int64_t top_k = op.experts->top_k, cols = op.experts->outer(), stride = stride_of(cols);
  const float* answers = reinterpret_cast<const float*>(program_.arena_.data() + op.scratch_offset);
  float* out = value_row(op.out, row);
  for (int64_t rank = 0; rank < top_k; ++rank) {
    const size_t i = static_cast<size_t>(row * top_k + rank);
    (rank ? vector_.add_scaled : vector_.scale)(answers + place_of_[i] * stride, shares_[i], cols, out);
  }
}

void Step::profile_experts(const Experts& experts, OpProfile* entry) const {
  for (size_t e = 0; e < experts.down.size(); ++e) {
    const int64_t places = first_place_[e + 1] - first_place_[e];
    if (places == 0) continue;
    for (const Weight* matrix : {experts.gate_up[e].get(), experts.down[e].get()}) {
      entry->bytes += static_cast<int64_t>(matrix->bytes());
      entry->macs += places * matrix->n * matrix->k;
    }
  }
}

}  // namespace textmill
