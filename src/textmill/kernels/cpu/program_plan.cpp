// What a finished recording becomes: who reads which value last, what is fused, and where values lie in memory.
#include <algorithm>

#include "program.h"

namespace textmill {
namespace {

size_t aligned(size_t bytes) { return (bytes + 63) / 64 * 64; }

bool works_by_row(OpKind kind) { return kind < OpKind::kMatmul; }

// A buffer that lives from operation `first` to operation `last`, both included.
struct Buffer {
  size_t bytes;
  int first, last;
  size_t* offset;
};

// First fit at the lowest address, in order of birth.
size_t place(std::vector<Buffer>& buffers) {
  std::stable_sort(buffers.begin(), buffers.end(), [](const Buffer& a, const Buffer& b) { return a.first < b.first; });
  size_t total = 0;
  for (size_t i = 0; i < buffers.size(); ++i) {
    std::vector<std::pair<size_t, size_t>> taken;
    for (size_t j = 0; j < i; ++j) {
      if (buffers[j].last >= buffers[i].first) taken.emplace_back(*buffers[j].offset, buffers[j].bytes);
    }
    std::sort(taken.begin(), taken.end());
    size_t at = 0;
    for (const auto& [offset, bytes] : taken) {
      if (at + buffers[i].bytes <= offset) break;
      at = std::max(at, offset + bytes);
    }
    *buffers[i].offset = at;
    total = std::max(total, at + buffers[i].bytes);
  }
  return total;
}

}  // namespace

void Program::find_lifetimes() {
  for (Value& v : values_) v.readers = 0, v.last_reader = -1, v.producer = -1;
  body_ops_ = 0;
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    const Op& op = ops_[static_cast<size_t>(i)];
    values_[static_cast<size_t>(op.out)].producer = i;
    for (const int read : {op.x, op.y, op.bc, op.gate}) {
      if (read < 0) continue;
      Value& v = values_[static_cast<size_t>(read)];
      ++v.readers;
      // The head runs once per slice of output rows: what it gathers from must outlive it.
      v.last_reader = op.kind == OpKind::kOutputs ? static_cast<int>(ops_.size()) : i;
    }
    if (!op.head) ++body_ops_;
  }
  Value& logits = values_[static_cast<size_t>(logits_)];
  ++logits.readers;
  logits.last_reader = static_cast<int>(ops_.size());
}

// x + matmul(...) becomes that product's last step where nothing else reads the product.
void Program::fuse_residuals() {
  for (size_t i = 0; i < ops_.size(); ++i) {
    if (ops_[i].kind == OpKind::kAdd) fuse_into(i);
  }
  std::erase_if(ops_, [](const Op& op) { return op.out < 0; });
}

void Program::fuse_into(size_t add) {
  Op& sum = ops_[add];
  for (const auto& [product, other] : {std::pair{sum.y, sum.x}, std::pair{sum.x, sum.y}}) {
    const Value& value_of_product = values_[static_cast<size_t>(product)];
    Op& matmul = ops_[static_cast<size_t>(value_of_product.producer)];
    if (matmul.kind != OpKind::kMatmul || matmul.gated || matmul.y >= 0 || value_of_product.readers != 1) continue;
    if (values_[static_cast<size_t>(other)].producer >= value_of_product.producer) continue;
    matmul.y = other;
    matmul.out = sum.out;
    values_[static_cast<size_t>(sum.out)].producer = value_of_product.producer;
    sum.out = -1;
    return;
  }
}

void Program::plan_quantization() {
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    Op& op = ops_[static_cast<size_t>(i)];
    if (op.kind != OpKind::kMatmul || !op.matrix->quantized()) continue;
    Value& x = values_[static_cast<size_t>(op.x)];
    x.last_product = i;
    if (x.quantized) continue;
    x.quantized = true;
    x.first_product = i;
    op.quantizes = !works_by_row(ops_[static_cast<size_t>(x.producer)].kind);
  }
}

void Program::plan_memory() {
  std::vector<Buffer> buffers;
  for (Value& v : values_) {
    if (v.producer < 0) continue;
    const int64_t rows = v.head ? limits_.max_outputs : limits_.max_rows;
    const int last = std::max(v.last_reader, v.producer);
    buffers.push_back({aligned(static_cast<size_t>(rows * v.stride) * 4), v.producer, last, &v.offset});
    if (!v.quantized) continue;
    const int born = ops_[static_cast<size_t>(v.first_product)].quantizes ? v.first_product : v.producer;
    buffers.push_back({aligned(quantized_bytes(rows, v.cols)), born, v.last_product, &v.quantized_offset});
  }
  for (int i = 0; i < static_cast<int>(ops_.size()); ++i) {
    Op& op = ops_[static_cast<size_t>(i)];
    if (op.kind == OpKind::kExperts) buffers.push_back({op.experts->scratch_bytes, i, i, &op.scratch_offset});
    if (op.kind != OpKind::kAttention) continue;
    const int64_t floats = limits_.max_rows * op.attention.heads * op.attention.dim();
    buffers.push_back({aligned(static_cast<size_t>(floats) * 4), i, i, &op.scratch_offset});
  }
  arena_bytes_ = place(buffers);
}

}  // namespace textmill
