// The vector kernels for any machine.
#define TEXTMILL_ISA portable
#include "attention_impl.h"
#include "rows_impl.h"

namespace textmill {
const VectorKernels kPortableVector = TEXTMILL_ISA::table("portable");
}
