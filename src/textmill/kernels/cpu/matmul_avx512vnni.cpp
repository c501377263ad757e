// The kernels for AVX-512 with VNNI, on 256-bit vectors: one instruction adds a quad's products in 32 bits.
// Compile flags: -O3 -ffp-contract=off -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512vnni
#if defined(__x86_64__)
#include <immintrin.h>

#include <cstdint>

namespace textmill {
namespace matmul_detail {
namespace {

struct Isa {
  static constexpr bool kSplitBytes = false;
  static __m256i first(__m256i codes, __m256i a) { return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, a); }
  static __m256i step(__m256i sum, __m256i codes, __m256i a) { return _mm256_dpbusd_epi32(sum, codes, a); }
  // Eight whole scales as `scaled` takes them: as floats.
  static __m256i load_whole(const uint8_t* scales) {
    const __m128i eight = _mm_load_si128(reinterpret_cast<const __m128i*>(scales));
    return _mm256_castps_si256(_mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(eight)));
  }
  static __m256 scaled(__m256i sum, __m256i scales) {
    return _mm256_mul_ps(_mm256_cvtepi32_ps(sum), _mm256_castsi256_ps(scales));
  }
  static __m256i finish(__m256i sum) { return sum; }
  static __m256i finish_halves(__m256i low, __m256i) { return low; }
};

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill

#include "matmul_x86.h"

namespace textmill {
namespace matmul_detail {

const Kernels kAvx512VnniKernels = {"avx512vnni", packed, dense, quantize};

}  // namespace matmul_detail
}  // namespace textmill
#endif
