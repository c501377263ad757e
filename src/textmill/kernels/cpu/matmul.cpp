// The public functions of matmul.h: builds weights, and picks the instruction set once, at run time.
// Compile flags: -O3 -ffp-contract=off
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#include "matmul_impl.h"
#include "threads.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace textmill {
namespace {

using namespace matmul_detail;

bool machine_has(const Kernels* kernels) {
#if defined(__x86_64__)
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
  if (kernels == &kAvx2Kernels) return avx2;
  if (kernels == &kAvx512VnniKernels) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512vnni");
  }
#endif
  return kernels == &kPortableKernels;
}

// Best first.
const Kernels* const kCandidates[] = {
#if defined(__x86_64__)
    &kAvx512VnniKernels, &kAvx2Kernels,
#endif
    &kPortableKernels};

std::atomic<const Kernels*> chosen{nullptr};

const Kernels& kernels() {
  const Kernels* current = chosen.load(std::memory_order_acquire);
  if (current) return *current;
  for (const Kernels* candidate : kCandidates) {
    if (!machine_has(candidate)) continue;
    chosen.store(candidate, std::memory_order_release);
    return *candidate;
  }
  return kPortableKernels;
}

// Memory for several matrices on huge pages, where they can be had: on small ones every pass over the weights is a walk
// through page tables. It goes when its last matrix goes.
class Region {
 public:
  static constexpr size_t kHuge = size_t{2} << 20;
  static constexpr size_t kLeast = 16 * kHuge;

  explicit Region(size_t bytes) : size_((std::max(bytes, kLeast) + kHuge - 1) / kHuge * kHuge) {
    data_ = static_cast<uint8_t*>(std::aligned_alloc(kHuge, size_));
    if (!data_) throw std::bad_alloc();
#if defined(__linux__)
    madvise(data_, size_, MADV_HUGEPAGE);
#endif
  }
  ~Region() { std::free(data_); }
  Region(const Region&) = delete;
  Region& operator=(const Region&) = delete;

  // 64-byte aligned, null if there is no room left.
  uint8_t* take(size_t bytes) {
    const size_t rounded = (bytes + 63) / 64 * 64;
    if (size_ - used_ < rounded) return nullptr;
    used_ += rounded;
    return data_ + used_ - rounded;
  }

 private:
  size_t size_, used_ = 0;
  uint8_t* data_;
};

// Zeroed memory of one matrix.
class Buffer {
 public:
  explicit Buffer(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    region_ = newest_.lock();
    if (region_) data_ = region_->take(bytes);
    if (!data_) {
      region_ = std::make_shared<Region>(bytes);
      newest_ = region_;
      data_ = region_->take(bytes);
    }
    std::memset(data_, 0, bytes);
  }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  uint8_t* data() const { return data_; }

 private:
  static inline std::mutex mutex_;
  static inline std::weak_ptr<Region> newest_;
  std::shared_ptr<Region> region_;
  uint8_t* data_ = nullptr;
};

class PackedWeight final : public Weight {
 public:
  PackedWeight(const PackedView& view, size_t bytes, const std::vector<int8_t>& powers)
      : view_(view), buffer_(bytes + powers.size()), bytes_(bytes + powers.size()) {
    n = view.n;
    k = view.k;
    view_.data = buffer_.data();
    if (!view.whole) return;
    view_.powers = reinterpret_cast<int8_t*>(buffer_.data() + bytes);
    std::copy(powers.begin(), powers.end(), view_.powers);
  }
  uint8_t* data() { return buffer_.data(); }
  size_t bytes() const override { return bytes_; }
  bool quantized() const override { return true; }
  void matmul(const void* x, int64_t, int64_t rows, int64_t column_begin, int64_t column_end, float* out,
              int64_t out_stride, const Epilogue& epilogue) const override {
    kernels().packed(view_, static_cast<const uint8_t*>(x), rows, column_begin, column_end,
                     Output{out, out_stride, &epilogue});
  }
  void dequantize_row(int64_t row, float* out) const override { unpack_row(view_, row, out); }

 private:
  PackedView view_;
  Buffer buffer_;
  size_t bytes_;
};

class DenseWeight final : public Weight {
 public:
  DenseWeight(int64_t outputs, int64_t inputs)
      : buffer_(static_cast<size_t>((outputs + kColumnBlock - 1) / kColumnBlock * kColumnBlock * inputs) * 4) {
    n = outputs;
    k = inputs;
  }
  float* data() const { return reinterpret_cast<float*>(buffer_.data()); }
  size_t bytes() const override { return static_cast<size_t>(n * k) * 4; }
  bool quantized() const override { return false; }
  void matmul(const void* x, int64_t x_stride, int64_t rows, int64_t column_begin, int64_t column_end, float* out,
              int64_t out_stride, const Epilogue& epilogue) const override {
    kernels().dense(DenseView{data(), n, k}, static_cast<const float*>(x), x_stride, rows, column_begin, column_end,
                    Output{out, out_stride, &epilogue});
  }
  void dequantize_row(int64_t row, float* out) const override {
    const float* block = data() + row / kColumnBlock * kColumnBlock * k + row % kColumnBlock;
    for (int64_t i = 0; i < k; ++i) out[i] = block[i * kColumnBlock];
  }

 private:
  Buffer buffer_;
};

bool all_halves(const float* values, int64_t count) {
  uint16_t half;
  for (int64_t i = 0; i < count; ++i) {
    if (!float_to_half_exact(values[i], &half)) return false;
  }
  return true;
}

// The columns' powers, padded to whole blocks; none if some column has none.
std::vector<int8_t> whole_powers(const float* scales, const float* offsets, int64_t n, int64_t groups) {
  std::vector<int8_t> powers(static_cast<size_t>((n + kColumnBlock - 1) / kColumnBlock * kColumnBlock));
  std::atomic<bool> whole{true};
  parallel_for(n, 64, [&](int64_t begin, int64_t end) {
    for (int64_t column = begin; column < end && whole.load(std::memory_order_relaxed); ++column) {
      const float* own = offsets ? offsets + column * groups : nullptr;
      if (!whole_power(scales + column * groups, own, groups, &powers[static_cast<size_t>(column)])) whole = false;
    }
  });
  if (!whole) powers.clear();
  return powers;
}

void check_packed(int zero, int64_t n, int64_t k, int bits, int64_t group) {
  if (bits != 4 && bits != 8) throw std::invalid_argument("packed weight: bits must be 4 or 8");
  if (zero < 0 || zero >= 1 << bits) throw std::invalid_argument("packed weight: zero does not fit in the code's bits");
  if (n < 1 || k < 16 || k % 16) throw std::invalid_argument("packed weight: k must be a positive multiple of 16");
  const bool known_group = group == k || (group > 0 && k % group == 0 && (group == 16 || group % kChunk == 0));
  if (!known_group) throw std::invalid_argument("packed weight: group must be 16, a multiple of 32, or k, and divide k");
}

}  // namespace

std::unique_ptr<Weight> make_packed_weight(const uint8_t* codes, const float* scales, const float* offsets, int zero,
                                           int64_t n, int64_t k, int bits, int64_t group) {
  check_packed(zero, n, k, bits, group);
  const int64_t count = n * (k / group);
  PackedView view;
  view.n = n;
  view.k = k;
  view.bits = bits;
  view.zero = zero;
  view.has_offsets = offsets != nullptr;
  const int64_t groups = k / group;
  std::vector<int8_t> powers;
  if (bits == 4 && group != 16 && (!offsets || zero == 0)) powers = whole_powers(scales, offsets, n, groups);
  view.whole = !powers.empty();
  view.half_floats = view.whole || (all_halves(scales, count) && (!offsets || all_halves(offsets, count)));
  const size_t bytes = static_cast<size_t>(lay_out(&view, group));
  auto weight = std::make_unique<PackedWeight>(view, bytes, powers);
  constexpr int64_t kAtOnce = 16 * kColumnBlock;
  parallel_for((n + kAtOnce - 1) / kAtOnce, 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin * kAtOnce;
    PackedView part = view;
    if (view.whole) part.powers = powers.data() + first;
    part.n = std::min(n, end * kAtOnce) - first;
    pack_blocks(part, codes + first * k, scales + first * groups, offsets ? offsets + first * groups : nullptr, group,
                weight->data() + first / kColumnBlock * view.block_bytes);
  });
  return weight;
}

std::unique_ptr<Weight> make_dense_weight(const float* values, int64_t n, int64_t k) {
  if (n < 1 || k < 1) throw std::invalid_argument("dense weight: n and k must be positive");
  auto weight = std::make_unique<DenseWeight>(n, k);
  pack_dense(values, n, k, weight->data());
  return weight;
}

size_t quantized_bytes(int64_t rows, int64_t k) { return static_cast<size_t>(rows * chunk_count(k) * kRecordBytes); }

void quantize_rows(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, void* out) {
  kernels().quantize(x, x_stride, row_begin, row_end, k, static_cast<uint8_t*>(out));
}

const char* matmul_instruction_set() { return kernels().name; }

bool set_matmul_instruction_set(const char* name) {
  for (const Kernels* candidate : kCandidates) {
    if (std::strcmp(candidate->name, name) != 0 || !machine_has(candidate)) continue;
    chosen.store(candidate, std::memory_order_release);
    return true;
  }
  return false;
}

}  // namespace textmill
