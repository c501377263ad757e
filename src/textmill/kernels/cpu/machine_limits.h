// What this machine gives at most, measured on the pool's threads: the yardstick for profiles.
#pragma once

#include <cstddef>

namespace textmill {

struct MachineLimits {
  int threads = 1;
  double read_gb_s = 0;       // all threads read a buffer, each its own part
  double byte_gmac_s = 0;     // unsigned x signed bytes, as the packed kernels multiply; 0: not known here
  double float_gmac_s = 0;    // float32 multiply-adds; 0: not known here
};

// Best of several short passes, `seconds` for each of the three figures. std::bad_alloc.
MachineLimits measure_limits(size_t buffer_bytes, double seconds);

}  // namespace textmill
