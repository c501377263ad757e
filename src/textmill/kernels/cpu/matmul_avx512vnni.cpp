// The kernels for AVX-512 with VNNI, on 256-bit vectors: one instruction adds a quad's products in 32 bits.
// Compile flags: -O3 -ffp-contract=off -mavx2 -mfma -mf16c -mavx512f -mavx512bw -mavx512vl -mavx512vnni
#if defined(__x86_64__)
#include <immintrin.h>

namespace textmill {
namespace matmul_detail {
namespace {

struct Isa {
  static constexpr bool kSplitBytes = false;
  static __m256i first(__m256i codes, __m256i a) { return _mm256_dpbusd_epi32(_mm256_setzero_si256(), codes, a); }
  static __m256i step(__m256i sum, __m256i codes, __m256i a) { return _mm256_dpbusd_epi32(sum, codes, a); }
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
