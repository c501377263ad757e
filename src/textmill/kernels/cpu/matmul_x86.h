// The x86 kernels, written once over `Isa`, which each instruction set's .cpp defines before it includes this file:
//   kSplitBytes           8-bit codes need two 4-bit halves ("planes")
//   first(codes, a)       the products of one quad, unsigned codes times signed activations
//   step(sum, codes, a)   adds another quad's products; up to 8 quads in all
//   finish(sum)           the sums of 8 columns as int32; finish_halves(low, high): low + 16 * high
//   scaled(sum, scales)   the sums of 8 columns times whole scales, rounded to floats; load_whole(scales) makes the operand
// Everything is in an unnamed namespace and nothing of the standard library is instantiated: code compiled for one
// instruction set must not be merged by the linker with that of another.
#pragma once

#include <immintrin.h>

#include "matmul_dense_x86.h"
#include "matmul_epilogue_x86.h"
#include "matmul_impl.h"
#include "matmul_packed_x86.h"
#include "matmul_quantize_x86.h"

namespace textmill {
namespace matmul_detail {
namespace {

constexpr int64_t kMaxRows = 120;  // rows computed before the next strip

template <class Products>
void compute(const Products& products, int64_t block, int64_t count, int64_t row, int64_t rows, float* y) {
  for (float* at = y; at < y + rows * kLd; at += kLd) {  // whole rows: GCC makes a slow string instruction of anything else
#pragma GCC unroll 8
    for (int64_t c = 0; c < kLd; c += 8) _mm256_store_ps(at + c, _mm256_setzero_ps());
  }
  products(block, count, row, rows, y);
}

// Computes columns [begin, end) for all rows, strip by strip: products, then the epilogue straight into `out`.
template <class Products>
void drive(const Products& products, int64_t n, int64_t rows, int64_t row_block, int64_t begin, int64_t end,
           const Output& out) {
  alignas(64) float y[kMaxRows * kLd];
  alignas(64) float up[kMaxRows * kLd];
  const bool gated = out.epilogue->gated;
  const int64_t half = n / 2, shift = half % 8, blocks = (n + 7) / 8, strip = 8 * kStrip;
  for (int64_t row = 0; row < rows; row += row_block) {
    const int64_t some = rows - row < row_block ? rows - row : row_block;
    for (int64_t column = begin; column < end; column += strip) {
      const int64_t width = end - column < strip ? end - column : strip;
      for (int64_t r = row; r < row + some; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(out.data + r * out.stride + column), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out.data + r * out.stride + column + 16), _MM_HINT_T0);
      }
      compute(products, column / 8, (width + 7) / 8, row, some, y);
      if (gated) {
        const int64_t first = (half + column) / 8;
        const int64_t wanted = (shift + width + 7) / 8;
        compute(products, first, first + wanted > blocks ? blocks - first : wanted, row, some, up);
      }
      finish_strip(*out.epilogue, {y, gated ? up + shift : nullptr, kLd, half, row, some, column, width}, out.data,
                   out.stride);
    }
  }
}

// Rows of `row_bytes` that stay in the second-level cache while all columns pass; a multiple of 12, evenly cut.
inline int64_t rows_at_once(int64_t rows, int64_t row_bytes) {
  int64_t most = (int64_t{256} << 10) / row_bytes / 12 * 12;
  most = most < 12 ? 12 : most > kMaxRows ? kMaxRows : most;
  const int64_t parts = (rows + most - 1) / most;
  return ((rows + parts - 1) / parts + 11) / 12 * 12;
}

void packed(const PackedView& w, const uint8_t* x, int64_t rows, int64_t column_begin, int64_t column_end,
            const Output& out) {
  drive(PackedProducts{w, x}, w.n, rows, rows_at_once(rows, w.chunks * kRecordBytes), column_begin, column_end, out);
}

void dense(const DenseView& w, const float* x, int64_t x_stride, int64_t rows, int64_t column_begin, int64_t column_end,
           const Output& out) {
  drive(DenseProducts{w, x, x_stride}, w.n, rows, rows_at_once(rows, w.k * 4), column_begin, column_end, out);
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
