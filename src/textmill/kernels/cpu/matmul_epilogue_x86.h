// The end of a product on x86, 8 columns at a time: bias, activation, gate times up, residual. Included by matmul_x86.h's
// users only, inside one instruction set's file; so everything is in an unnamed namespace.
#pragma once

#include <immintrin.h>

#include "matmul_impl.h"

namespace textmill {
namespace matmul_detail {
namespace {

inline __m256i lanes_below(int64_t count) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(count)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}

// e^x to about 1 ulp: x = n ln2 + r, a polynomial in r, then two exact steps of scaling, so that overflow gives Inf and
// underflow passes through the subnormals to 0. NaN stays NaN (min and max return their second operand for it).
inline __m256 exponential(__m256 x) {
  x = _mm256_min_ps(_mm256_set1_ps(89.0f), _mm256_max_ps(_mm256_set1_ps(-105.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504088896341f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);        // ln2 in two parts; the first has few bits,
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440054690583e-4f), r);  // so n times it is exact
  __m256 p = _mm256_set1_ps(1.0f / 5040);
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 720));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 120));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 24));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(1.0f / 6));
  p = _mm256_fmadd_ps(p, r, _mm256_set1_ps(0.5f));
  p = _mm256_fmadd_ps(p, _mm256_mul_ps(r, r), r);
  p = _mm256_add_ps(p, _mm256_set1_ps(1.0f));
  const __m256i exponent = _mm256_cvtps_epi32(n);
  const __m256i first = _mm256_srai_epi32(exponent, 1);
  const __m256i bias = _mm256_set1_epi32(127);
  const __m256i low = _mm256_slli_epi32(_mm256_add_epi32(first, bias), 23);
  const __m256i high = _mm256_slli_epi32(_mm256_add_epi32(_mm256_sub_epi32(exponent, first), bias), 23);
  return _mm256_mul_ps(_mm256_mul_ps(p, _mm256_castsi256_ps(low)), _mm256_castsi256_ps(high));
}

// x / (1 + e^-z)
inline __m256 times_sigmoid(__m256 x, __m256 z) {
  const __m256 e = exponential(_mm256_xor_ps(z, _mm256_set1_ps(-0.0f)));
  return _mm256_div_ps(x, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

inline __m256 gelu_tanh(__m256 x) {
  const __m256 cubic = _mm256_mul_ps(_mm256_mul_ps(_mm256_set1_ps(0.044715f), x), _mm256_mul_ps(x, x));
  return times_sigmoid(x, _mm256_mul_ps(_mm256_set1_ps(1.5957691216057308f), _mm256_add_ps(x, cubic)));
}

// Rare (the exact GELU): lane by lane with the C library.
inline __m256 gelu_erf(__m256 x) {
  alignas(32) float lanes[8];
  _mm256_store_ps(lanes, x);
  for (float& lane : lanes) lane = 0.5f * lane * __builtin_erfcf(-0.70710678118654752f * lane);
  return _mm256_load_ps(lanes);
}

inline __m256 activate(__m256 x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return times_sigmoid(x, x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kGeluErf: return gelu_erf(x);
    case Activation::kRelu: return _mm256_max_ps(_mm256_setzero_ps(), x);
    default: return x;
  }
}

// Writes columns [column, column + width) of `rows` rows from y (and up, if gated), `half` being the first up column.
inline void finish_strip(const Epilogue& e, const float* y, const float* up, int64_t ld, int64_t half, int64_t row,
                         int64_t rows, int64_t column, int64_t width, float* out, int64_t stride) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* residual = e.residual ? e.residual + (row + r) * e.residual_stride + column : nullptr;
    float* to = out + (row + r) * stride + column;
    for (int64_t c = 0; c < width; c += 8) {
      const __m256i mask = lanes_below(width - c);
      __m256 value = _mm256_loadu_ps(y + r * ld + c);
      if (e.bias) value = _mm256_add_ps(value, _mm256_maskload_ps(e.bias + column + c, mask));
      value = activate(value, e.activation);
      if (up) {
        __m256 factor = _mm256_loadu_ps(up + r * ld + c);
        if (e.bias) factor = _mm256_add_ps(factor, _mm256_maskload_ps(e.bias + half + column + c, mask));
        value = _mm256_mul_ps(value, factor);
      }
      if (residual) value = _mm256_add_ps(value, _mm256_maskload_ps(residual + c, mask));
      _mm256_maskstore_ps(to + c, mask, value);
    }
  }
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
