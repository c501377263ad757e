// Quantizes activations on x86. Included by matmul_x86.h only (see there).
#pragma once

#include "matmul_epilogue_x86.h"

namespace textmill {
namespace matmul_detail {
namespace {

TEXTMILL_INLINE __m256 load_some(const float* x, int64_t count) {  // up to 8 floats, zeros behind
  if (count >= 8) return _mm256_loadu_ps(x);
  return count <= 0 ? _mm256_setzero_ps() : _mm256_maskload_ps(x, lanes_below(count));
}

inline int32_t sum_bytes(__m128i bytes) {  // of 16 signed bytes
  const __m128i sums = _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), bytes), _mm_set1_epi16(1));
  const __m128i pairs = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xb1)));
}

// Largest |x| of 32 as bits: for magnitudes, integers order as floats do, and NaN above Inf above all.
inline uint32_t largest_bits(const __m256* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_and_si256(_mm256_castps_si256(x[0]), magnitude);
  for (int j = 1; j < 4; ++j) most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(x[j]), magnitude));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

// round(x / scale) of 32 floats as signed bytes in order.
TEXTMILL_INLINE __m256i chunk_codes(const __m256* x, float scale) {
  const __m256 divisor = _mm256_set1_ps(scale), most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
  __m256i parts[4];
  for (int j = 0; j < 4; ++j) {
    const __m256 ratio = _mm256_div_ps(x[j], divisor);
    parts[j] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ratio, least), most));
  }
  const __m256i low = _mm256_packs_epi32(parts[0], parts[1]), high = _mm256_packs_epi32(parts[2], parts[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantize_chunk(const float* x, int64_t count, uint8_t* record) {
  __m256 values[4];
  for (int j = 0; j < 4; ++j) values[j] = load_some(x + 8 * j, count - 8 * j);
  const uint32_t bits = largest_bits(values);
  const bool finite = bits < 0x7f800000u;
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const float scale = finite ? largest / 127.0f : __builtin_nanf("");
  const __m256i codes = scale > 0.0f ? chunk_codes(values, scale) : _mm256_setzero_si256();
  const int32_t low = sum_bytes(_mm256_castsi256_si128(codes)), high = sum_bytes(_mm256_extracti128_si256(codes, 1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(record), codes);
  _mm_storeu_ps(reinterpret_cast<float*>(record + kRecordScale),
                _mm_setr_ps(scale, kOffsetUnits * scale * static_cast<float>(low + high), static_cast<float>(low),
                            static_cast<float>(high)));
}

void quantize(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* out) {
  const int64_t chunks = chunk_count(k);
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t c = 0; c < chunks; ++c) {
      quantize_chunk(x + r * x_stride + c * kChunk, k - c * kChunk, out + (r * chunks + c) * kRecordBytes);
    }
  }
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
