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


// x times the normal distribution of x. Its tail is e^(-x²/2) P(q) / (a + 2) with a = |x| / sqrt(2) and q = (a - 2) / (a + 2),
// where P fits (a + 2) e^(a²) erfc(a) / 2 to 2e-8; so large negative x keep their relative precision too.
inline __m256 gelu_erf(__m256 x) {
  constexpr float kFit[] = {-2.2247362818e-5f, -2.6271767329e-4f, -3.6355614133e-4f, 1.5198818656e-3f, 3.2174477596e-3f,
                            -1.0750979988e-2f, -1.8217894499e-2f, 1.3973572160e-1f, -3.4358046541e-1f, 5.1079135754e-1f};
  const __m256 size = _mm256_min_ps(_mm256_andnot_ps(_mm256_set1_ps(-0.0f), x), _mm256_set1_ps(14.5f));
  const __m256 two = _mm256_set1_ps(2.0f), one = _mm256_set1_ps(1.0f);
  const __m256 r = _mm256_div_ps(one, _mm256_fmadd_ps(size, _mm256_set1_ps(0.70710678118654752f), two));
  const __m256 q = _mm256_fnmadd_ps(_mm256_set1_ps(4.0f), r, one);
  __m256 p = _mm256_set1_ps(kFit[0]);
  for (int i = 1; i < 10; ++i) p = _mm256_fmadd_ps(p, q, _mm256_set1_ps(kFit[i]));
  const __m256 half = _mm256_mul_ps(size, _mm256_set1_ps(0.5f));
  const __m256 square = _mm256_mul_ps(half, size);
  const __m256 lost = _mm256_fmsub_ps(half, size, square);  // what the square's rounding cost, which e^x would magnify
  __m256 tail = _mm256_mul_ps(_mm256_mul_ps(p, r), exponential(_mm256_xor_ps(square, _mm256_set1_ps(-0.0f))));
  tail = _mm256_fnmadd_ps(tail, lost, tail);
  return _mm256_mul_ps(x, _mm256_blendv_ps(_mm256_sub_ps(one, tail), tail, x));
}

template <Activation kActivation>
inline __m256 activate(__m256 x) {
  switch (kActivation) {
    case Activation::kSilu: return times_sigmoid(x, x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kGeluErf: return gelu_erf(x);
    case Activation::kRelu: return _mm256_max_ps(_mm256_setzero_ps(), x);
    default: return x;
  }
}

// Part of the results: columns [column, column + width) of rows [row, row + rows). y and up have `ld` floats between rows.
struct Strip {
  const float* y;
  const float* up;  // null if not gated
  int64_t ld, half;  // half: the first up column
  int64_t row, rows, column, width;
};

// 8 floats, or the lanes that `mask` names: masked accesses are slow, so they are kept for a matrix's last columns.
template <bool kFull>
inline __m256 load_lanes(const float* at, __m256i mask) {
  return kFull ? _mm256_loadu_ps(at) : _mm256_maskload_ps(at, mask);
}

template <Activation kActivation, bool kGated, bool kFull>
inline void finish_vector(const Strip& strip, const float* bias, const float* residual, int64_t r, int64_t c, float* to) {
  const __m256i mask = lanes_below(kFull ? 8 : strip.width - c);
  __m256 value = _mm256_loadu_ps(strip.y + r * strip.ld + c);
  if (bias) value = _mm256_add_ps(value, load_lanes<kFull>(bias + c, mask));
  value = activate<kActivation>(value);
  if (kGated) {
    __m256 factor = _mm256_loadu_ps(strip.up + r * strip.ld + c);
    if (bias) factor = _mm256_add_ps(factor, load_lanes<kFull>(bias + strip.half + c, mask));
    value = _mm256_mul_ps(value, factor);
  }
  if (residual) value = _mm256_add_ps(value, load_lanes<kFull>(residual + c, mask));
  if (kFull) {
    _mm256_storeu_ps(to + c, value);
  } else {
    _mm256_maskstore_ps(to + c, mask, value);
  }
}

template <Activation kActivation, bool kGated>
__attribute__((noinline)) void finish(const Epilogue& e, const Strip& at, float* out, int64_t stride) {
  const Strip strip = at;
  const float* bias = e.bias ? e.bias + strip.column : nullptr;
  const float* residual = e.residual ? e.residual + strip.row * e.residual_stride + strip.column : nullptr;
  const int64_t residual_stride = residual ? e.residual_stride : 0, whole = strip.width / 8 * 8;
  float* to = out + strip.row * stride + strip.column;
  for (int64_t r = 0; r < strip.rows; ++r) {
    for (int64_t c = 0; c < whole; c += 8) {
      finish_vector<kActivation, kGated, true>(strip, bias, residual, r, c, to);
    }
    if (whole < strip.width) finish_vector<kActivation, kGated, false>(strip, bias, residual, r, whole, to);
    to += stride;
    if (residual) residual += residual_stride;
  }
}

template <Activation kActivation>
void finish_activated(const Epilogue& e, const Strip& strip, float* out, int64_t stride) {
  (strip.up ? finish<kActivation, true> : finish<kActivation, false>)(e, strip, out, stride);
}

inline void finish_strip(const Epilogue& e, const Strip& strip, float* out, int64_t stride) {
  switch (e.activation) {
    case Activation::kSilu: return finish_activated<Activation::kSilu>(e, strip, out, stride);
    case Activation::kGeluTanh: return finish_activated<Activation::kGeluTanh>(e, strip, out, stride);
    case Activation::kGeluErf: return finish_activated<Activation::kGeluErf>(e, strip, out, stride);
    case Activation::kRelu: return finish_activated<Activation::kRelu>(e, strip, out, stride);
    default: return finish_activated<Activation::kNone>(e, strip, out, stride);
  }
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
