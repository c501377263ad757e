// Chooses the vector kernels at run time.
#include "vector.h"

#include <atomic>
#include <cstring>

namespace textmill {
namespace {

const VectorKernels* best() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    return &kAvx2Vector;
  }
#endif
  return &kPortableVector;
}

std::atomic<const VectorKernels*> chosen{nullptr};

}  // namespace

const VectorKernels& vector_kernels() {
  const VectorKernels* current = chosen.load(std::memory_order_acquire);
  if (!current) {
    current = best();
    chosen.store(current, std::memory_order_release);
  }
  return *current;
}

void set_vector_kernels(const char* name) {
  chosen.store(std::strcmp(name, "portable") == 0 ? &kPortableVector : best(), std::memory_order_release);
}

}  // namespace textmill
