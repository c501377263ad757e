// The vector kernels for machines with AVX2, FMA and F16C.
#define TEXTMILL_ISA avx2
#include "attention_impl.h"
#include "rows_impl.h"

namespace textmill {
const VectorKernels kAvx2Vector = TEXTMILL_ISA::table("avx2");
}
