// Dense float32 products on x86. Included by matmul_x86.h only (see there).
#pragma once

#include "matmul_tiles_x86.h"

namespace textmill {
namespace matmul_detail {
namespace {

constexpr int64_t kDensePanel = 256;  // inputs of a dense strip kept in the first-level cache

// y += x w for R rows and C blocks over inputs [0, count), one accumulator each, in order.
template <int R, int C>
void dense_tile(const float* const* blocks, const float* x, int64_t x_stride, int64_t count, float* y) {
  __m256 sums[R][C];
  const float* at[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) at[c] = blocks[c];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = _mm256_loadu_ps(y + r * kLd + c * 8);
  }
  const float* rows[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    rows[r] = x + r * x_stride;
    asm("" : "+r"(rows[r]));  // or GCC steps four pointers as one vector, through memory
  }
  for (int64_t i = 0; i < count; ++i) {
    __m256 values[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      values[c] = _mm256_load_ps(at[c] + i * 8);
      if (R * C + C < 16) asm("" : "+x"(values[c]));  // in a register, not loaded again for every row
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 a = _mm256_broadcast_ss(rows[r] + i);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = _mm256_fmadd_ps(a, values[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(y + r * kLd + c * 8, sums[r][c]);
  }
}

using DenseFunction = void (*)(const float* const*, const float*, int64_t, int64_t, float*);
constexpr DenseFunction kDenseTiles[6][2] = {{dense_tile<1, 1>, dense_tile<1, 2>}, {dense_tile<2, 1>, dense_tile<2, 2>},
                                             {dense_tile<3, 1>, dense_tile<3, 2>}, {dense_tile<4, 1>, dense_tile<4, 2>},
                                             {dense_tile<5, 1>, dense_tile<5, 2>}, {dense_tile<6, 1>, dense_tile<6, 2>}};

struct DenseProducts {
  const DenseView& w;
  const float* x;
  int64_t x_stride;

  void operator()(int64_t block, int64_t count, int64_t row, int64_t rows, float* y) const {
    const int64_t panel = rows <= 6 ? w.k : kDensePanel;
    for (int64_t first = 0; first < w.k; first += panel) {
      const int64_t inputs = w.k - first < panel ? w.k - first : panel;
      run(block, count, x + row * x_stride + first, rows, first, inputs, y);
    }
  }

  void run(int64_t block, int64_t count, const float* rows_at, int64_t rows, int64_t first, int64_t inputs,
           float* y) const {
    const float* blocks[4];
    for (int64_t c = 0; c < 4; ++c) blocks[c] = w.data + ((block + (c < count ? c : 0)) * w.k + first) * 8;
    if (rows <= 3 && count == 4) {  // four blocks, or there would be too few sums under way
      const DenseFunction tile = rows == 1 ? dense_tile<1, 4> : rows == 2 ? dense_tile<2, 4> : dense_tile<3, 4>;
      tile(blocks, rows_at, x_stride, inputs, y);
      return;
    }
    for (int64_t b = 0; b < count; b += 2) {
      const bool pair = count - b >= 2;
      const float* at[2] = {w.data + ((block + b) * w.k + first) * 8,
                            pair ? w.data + ((block + b + 1) * w.k + first) * 8 : nullptr};
      for (int64_t r = 0, tiles = (rows + 5) / 6; tiles > 0; --tiles) {
        const int64_t some = (rows - r + tiles - 1) / tiles;
        kDenseTiles[some - 1][pair](at, rows_at + r * x_stride, x_stride, inputs, y + r * kLd + b * 8);
        r += some;
      }
    }
  }
};

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
