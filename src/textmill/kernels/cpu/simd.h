// Eight floats at a time, from the compiler's vector types: the same source serves AVX2 and plain machines.
// Included by the vector_*.cpp files only, each of which defines TEXTMILL_ISA, the namespace that keeps its copy apart.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace textmill {
namespace TEXTMILL_ISA {

typedef float f32x8 __attribute__((vector_size(32)));
typedef int32_t i32x8 __attribute__((vector_size(32)));
typedef uint16_t u16x8 __attribute__((vector_size(16)));

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
inline i32x8 load(const int32_t* from) {
  i32x8 v;
  __builtin_memcpy(&v, from, 32);
  return v;
}
inline void store(int32_t* to, i32x8 v) { __builtin_memcpy(to, &v, 32); }

// The words of which these are the upper halves.
inline i32x8 load_upper(const uint16_t* from) {
  u16x8 v;
  __builtin_memcpy(&v, from, 16);
  return __builtin_convertvector(v, i32x8) << 16;
}
inline f32x8 magnitude(f32x8 v) { return (f32x8)(bits(v) & 0x7fffffff); }

// Eight rows of eight, each joined by `join` in one fixed order.
template <typename F>
inline f32x8 fold_rows(const float* rows, F join) {
  f32x8 four[2];
  for (int i = 0; i < 2; ++i) {
    f32x8 two[2];
    for (int j = 0; j < 2; ++j) {
      const f32x8 a = load(rows + i * 32 + j * 16), b = load(rows + i * 32 + j * 16 + 8);
      two[j] = join(__builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13),
                    __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15));
    }
    four[i] = join(__builtin_shufflevector(two[0], two[1], 0, 1, 8, 9, 4, 5, 12, 13),
                   __builtin_shufflevector(two[0], two[1], 2, 3, 10, 11, 6, 7, 14, 15));
  }
  return join(__builtin_shufflevector(four[0], four[1], 0, 1, 2, 3, 8, 9, 10, 11),
              __builtin_shufflevector(four[0], four[1], 4, 5, 6, 7, 12, 13, 14, 15));
}

// Pairs of 16-bit integers, two to a word: the low halves of the words of two vectors...
inline i32x8 pair_up(i32x8 low, i32x8 high) {
#if defined(__AVX2__)
  return (i32x8)_mm256_blend_epi16((__m256i)low, (__m256i)(high << 16), 0xaa);
#else
  return (low & 0xffff) | (high << 16);
#endif
}
// ... and the sums of the two products of pairs.
inline i32x8 multiply_pairs(i32x8 a, i32x8 b) {
#if defined(__AVX2__)
  return (i32x8)_mm256_madd_epi16((__m256i)a, (__m256i)b);
#elif defined(__SSE2__)
  __m128i x[2], y[2];
  __builtin_memcpy(x, &a, 32);
  __builtin_memcpy(y, &b, 32);
  for (int i = 0; i < 2; ++i) x[i] = _mm_madd_epi16(x[i], y[i]);
  __builtin_memcpy(&a, x, 32);
  return a;
#else
  return ((a << 16) >> 16) * ((b << 16) >> 16) + (a >> 16) * (b >> 16);
#endif
}
// Loaded at this point of the program, not earlier: with add_products a loop keeps its order, and its registers.
inline i32x8 load_here(const int32_t* from) {
#if defined(__AVX2__)
  __m256i v;
  __asm__ volatile("vmovdqu %1, %0" : "=x"(v) : "m"(*reinterpret_cast<const __m256i_u*>(from)));
  return (i32x8)v;
#else
  return load(from);
#endif
}
// sum0 += multiply_pairs(a0, b), sum1 += multiply_pairs(a1, b) for the pair b at `factor`.
inline void add_products(const int32_t* factor, i32x8 a0, i32x8 a1, i32x8* sum0, i32x8* sum1) {
#if defined(__AVX2__)
  // In one piece: left to itself the compiler keeps more products in flight than there are registers.
  __m256i s0 = (__m256i)*sum0, s1 = (__m256i)*sum1, b, product;
  __asm__ volatile(
      "vpbroadcastd %6, %2\n\tvpmaddwd %4, %2, %3\n\tvpmaddwd %5, %2, %2\n\tvpaddd %3, %0, %0\n\tvpaddd %2, %1, %1"
      : "+x"(s0), "+x"(s1), "=&x"(b), "=&x"(product)
      : "x"((__m256i)a0), "x"((__m256i)a1), "m"(*factor));
  *sum0 = (i32x8)s0;
  *sum1 = (i32x8)s1;
#else
  const i32x8 b = splat(*factor);
  *sum0 += multiply_pairs(a0, b);
  *sum1 += multiply_pairs(a1, b);
#endif
}

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
// 2^x for x <= 0, N vectors step by step side by side: one vector's steps wait for each other, the processor need not.
// 0 from -127 down, NaN stays, exactly 1 for 0. Terms: 4 are right to 3e-6 of the result, 5 to 1e-7 and the last bit.
template <int Terms, int N>
inline void exp2_negative(f32x8 (&x)[N]) {
  static_assert(Terms == 4 || Terms == 5);
  constexpr float kBoth[2][6] = {
      {9.5828531689e-3f, 5.5906425036e-2f, 2.4024098611e-1f, 6.9312419337e-1f, 1.0f, 0.0f},
      {1.3264727247e-3f, 9.6715126882e-3f, 5.5507337436e-2f, 2.4022242085e-1f, 6.9314697760e-1f, 1.0f}};
  const float (&kTerms)[6] = kBoth[Terms - 4];
  const f32x8 low = splat(-127.0f), magic = splat(12582912.0f);
  f32x8 whole[N], p[N];
#define TEXTMILL_EACH _Pragma("GCC unroll 8") for (int i = 0; i < N; ++i)
  TEXTMILL_EACH x[i] = maximum(low, x[i]);  // NaN stays
  TEXTMILL_EACH whole[i] = x[i] + magic;
  TEXTMILL_EACH x[i] -= whole[i] - magic;
  TEXTMILL_EACH p[i] = fma(splat(kTerms[0]), x[i], splat(kTerms[1]));
#pragma GCC unroll 8
  for (int term = 2; term <= Terms; ++term) {
    TEXTMILL_EACH p[i] = fma(p[i], x[i], splat(kTerms[term]));
  }
  TEXTMILL_EACH x[i] = (f32x8)(bits(p[i]) + (bits(whole[i]) << 23));
#undef TEXTMILL_EACH
}
inline float exp(float x) { return exp(splat(x))[0]; }

inline f32x8 tanh(f32x8 x) { return splat(1.0f) - splat(2.0f) / (exp(x + x) + splat(1.0f)); }
inline f32x8 sigmoid(f32x8 x) { return splat(1.0f) / (splat(1.0f) + exp(-x)); }

}  // namespace TEXTMILL_ISA
}  // namespace textmill
