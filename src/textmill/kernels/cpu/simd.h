// Eight floats at a time, from the compiler's vector types: the same source serves AVX2 and plain machines.
// Included by the vector_*.cpp files only, each of which defines TEXTMILL_ISA, the namespace that keeps its copy apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace textmill {
namespace TEXTMILL_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));

inline f32x8 load(const float* from) {
  f32x8 v;
  __builtin_memcpy(&v, from, 32);
  return v;
}
inline void store(float* to, f32x8 v) { __builtin_memcpy(to, &v, 32); }
inline f32x8 splat(float x) { return f32x8{x, x, x, x, x, x, x, x}; }
inline i32x8 splat(int32_t x) { return i32x8{x, x, x, x, x, x, x, x}; }
inline i32x8 iota(int32_t first) { return splat(first) + i32x8{0, 1, 2, 3, 4, 5, 6, 7}; }

// The first `count` (below 8) floats, the rest `rest`.
inline f32x8 load_part(const float* from, int64_t count, float rest) {
  float v[8] = {rest, rest, rest, rest, rest, rest, rest, rest};
  for (int64_t i = 0; i < count; ++i) v[i] = from[i];
  return load(v);
}
inline void store_part(float* to, int64_t count, f32x8 x) {
  float v[8];
  store(v, x);
  for (int64_t i = 0; i < count; ++i) to[i] = v[i];
}

inline f32x8 fma(f32x8 a, f32x8 b, f32x8 c) {
#if defined(__FMA__)
  return (f32x8)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#else
  return a * b + c;
#endif
}
inline f32x8 select(i32x8 mask, f32x8 yes, f32x8 no) { return mask ? yes : no; }
// NaN in either operand: not specified.
inline f32x8 maximum(f32x8 a, f32x8 b) {
#if defined(__AVX2__)
  return (f32x8)_mm256_max_ps((__m256)a, (__m256)b);
#else
  return a > b ? a : b;
#endif
}
inline i32x8 bits(f32x8 v) { return (i32x8)v; }

// One fixed order for all: ((0+4)+(2+6)) + ((1+5)+(3+7)).
inline float sum(f32x8 v) {
#if defined(__AVX2__)
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)v), _mm256_extractf128_ps((__m256)v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
#else
  const float a = (v[0] + v[4]) + (v[2] + v[6]);
  const float b = (v[1] + v[5]) + (v[3] + v[7]);
  return a + b;
#endif
}
inline float largest(f32x8 v) {
  v = maximum(v, __builtin_shufflevector(v, v, 4, 5, 6, 7, 0, 1, 2, 3));
  v = maximum(v, __builtin_shufflevector(v, v, 2, 3, 0, 1, 6, 7, 4, 5));
  const float a = v[0], b = v[1];
  return a > b ? a : b;
}
inline bool any(i32x8 mask) {
#if defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  int32_t found = 0;
  for (int i = 0; i < 8; ++i) found |= mask[i];
  return found != 0;
#endif
}
// Bit i: lane i of the mask.
inline uint32_t lanes(i32x8 mask) {
#if defined(__AVX2__)
  return static_cast<uint32_t>(_mm256_movemask_ps((__m256)mask));
#else
  uint32_t found = 0;
  for (int i = 0; i < 8; ++i) found |= static_cast<uint32_t>(mask[i] & 1) << i;
  return found;
#endif
}

// Rounds x / ln 2 to n and gives e^(x - n ln 2), to about 1 ulp; `whole` becomes n. For x within +-126 ln 2.
inline f32x8 exp_fraction(f32x8 x, i32x8* whole) {
  const f32x8 magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const f32x8 shifted = fma(x, splat(1.44269504089f), magic);
  const f32x8 n = shifted - magic;
  f32x8 r = fma(n, splat(-0.693359375f), x);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x8 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  *whole = bits(shifted) - bits(magic);
  return fma(p, r * r, r) + splat(1.0f);
}

// e^x; 0 below -87.3, +Inf above 88.7; NaN stays. exp(0) is exactly 1.
inline f32x8 exp(f32x8 x) {
  const f32x8 low = splat(-87.33654f), high = splat(88.72283f);
  i32x8 whole;
  const f32x8 p = exp_fraction(x < low ? low : (x > high ? high : x), &whole);
  // 2^n in two factors, so that n = 128 does not overflow on the way.
  const i32x8 half = whole >> 1;
  const f32x8 first = (f32x8)((half + 127) << 23), second = (f32x8)((whole - half + 127) << 23);
  const f32x8 y = x < low ? splat(0.0f) : p * first * second;
  return x > high ? splat(INFINITY) : y;
}

// The same bits for x <= 0, in fewer steps.
inline f32x8 exp_negative(f32x8 x) {
  const f32x8 low = splat(-87.33654f);
  i32x8 whole;
  const f32x8 p = exp_fraction(maximum(low, x), &whole);  // NaN stays
  return select(x < low, splat(0.0f), p * (f32x8)((whole + 127) << 23));
}
// The same for N vectors step by step side by side: one vector's steps wait for each other, the processor need not.
template <int N>
inline void exp_negative(f32x8 (&x)[N]) {
  const f32x8 low = splat(-87.33654f), magic = splat(12582912.0f);
  constexpr float kTerms[] = {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f};
  i32x8 under[N], whole[N];
  f32x8 r[N], p[N];
#define TEXTMILL_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  TEXTMILL_EACH under[i] = x[i] < low;
  TEXTMILL_EACH x[i] = maximum(low, x[i]);
  TEXTMILL_EACH p[i] = fma(x[i], splat(1.44269504089f), magic);
  TEXTMILL_EACH whole[i] = (bits(p[i]) - bits(magic) + 127) << 23;
  TEXTMILL_EACH p[i] -= magic;
  TEXTMILL_EACH r[i] = fma(p[i], splat(-0.693359375f), x[i]);
  TEXTMILL_EACH r[i] = fma(p[i], splat(2.12194440e-4f), r[i]);
  TEXTMILL_EACH p[i] = splat(1.9875691500e-4f);
#pragma GCC unroll 8
  for (const float term : kTerms) {
    TEXTMILL_EACH p[i] = fma(p[i], r[i], splat(term));
  }
  TEXTMILL_EACH p[i] = fma(p[i], r[i] * r[i], r[i]) + splat(1.0f);
  TEXTMILL_EACH x[i] = select(under[i], splat(0.0f), p[i] * (f32x8)whole[i]);
#undef TEXTMILL_EACH
}
inline float exp(float x) { return exp(splat(x))[0]; }

inline f32x8 tanh(f32x8 x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }
inline f32x8 sigmoid(f32x8 x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

// 16-bit floats. Finite values beyond the largest half become it: one large key must not turn a sequence into NaN.
inline float from_half(uint16_t h) {
#if defined(__F16C__)
  return _cvtsh_ss(h);
#else
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16, exponent = (h >> 10) & 31u, mantissa = h & 1023u;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * static_cast<float>(mantissa) * 5.9604644775390625e-8f;
  const uint32_t word = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &word, 4);
  return value;
#endif
}
inline uint16_t to_half(float x) {
  constexpr float kLargest = 65504.0f;
  if (x > kLargest && x < INFINITY) x = kLargest;
  if (x < -kLargest && x > -INFINITY) x = -kLargest;
#if defined(__F16C__)
  return _cvtss_sh(x, 0);
#else
  uint32_t word;
  std::memcpy(&word, &x, 4);
  const uint32_t sign = (word >> 16) & 0x8000u, magnitude = word & 0x7fffffffu;
  if (magnitude >= 0x7f800000u) return static_cast<uint16_t>(sign | 0x7c00u | (magnitude > 0x7f800000u ? 0x200u : 0));
  if (magnitude < 0x38800000u) {  // subnormal: the float adder rounds to even at 2^-24
    const float scaled = std::fabs(x) + 0.5f;
    uint32_t rounded;
    std::memcpy(&rounded, &scaled, 4);
    return static_cast<uint16_t>(sign | (rounded - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13));
#endif
}
inline f32x8 load(const uint16_t* from) {
#if defined(__F16C__)
  __m128i h;
  __builtin_memcpy(&h, from, 16);
  return (f32x8)_mm256_cvtph_ps(h);
#else
  f32x8 v;
  for (int i = 0; i < 8; ++i) v[i] = from_half(from[i]);
  return v;
#endif
}
inline void put(uint16_t* to, float x) { *to = to_half(x); }
inline void put(float* to, float x) { *to = x; }

}  // namespace TEXTMILL_ISA
}  // namespace textmill
