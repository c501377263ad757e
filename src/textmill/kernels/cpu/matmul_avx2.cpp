// The kernels for AVX2: unsigned codes of 4 bits times signed activations, eight products added in 16-bit lanes.
// Compile flags: -O3 -ffp-contract=off -mavx2 -mfma -mf16c
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

namespace textmill {
namespace matmul_detail {
namespace {

struct Isa {
  static constexpr bool kSplitBytes = true;  // 255 * 127 * 2 would saturate 16 bits; 15 * 127 * 2 * 8 = 30480 does not
  static __m256i first(__m256i codes, __m256i a) { return _mm256_maddubs_epi16(codes, a); }
  static __m256i step(__m256i sum, __m256i codes, __m256i a) {
    sum = _mm256_add_epi16(sum, _mm256_maddubs_epi16(codes, a));
    asm("" : "+x"(sum));  // keeps GCC from computing all products before the first sum, which spills them
    return sum;
  }
  // Eight whole scales as `scaled` takes them: twice each, for both sums of a column.
  static __m256i load_whole(const uint8_t* scales) {
    const __m256i twice = _mm256_setr_epi8(0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 4, 5, 6, 7, 6, 7,
                                           8, 9, 8, 9, 10, 11, 10, 11, 12, 13, 12, 13, 14, 15, 14, 15);
    const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(eight), twice);
  }
  static __m256 scaled(__m256i sum, __m256i scales) { return _mm256_cvtepi32_ps(_mm256_madd_epi16(sum, scales)); }
  static __m256i finish(__m256i sum) { return _mm256_madd_epi16(sum, _mm256_set1_epi16(1)); }
  static __m256i finish_halves(__m256i low, __m256i high) {
    return _mm256_add_epi32(finish(low), _mm256_madd_epi16(high, _mm256_set1_epi16(16)));
  }
};

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill

#include "matmul_x86.h"

namespace textmill {
namespace matmul_detail {

const Kernels kAvx2Kernels = {"avx2", packed, dense, quantize};

}  // namespace matmul_detail
}  // namespace textmill
#endif
