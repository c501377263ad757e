// The binding: textmill._native.
#include <nanobind/nanobind.h>

namespace nb = nanobind;

NB_MODULE(_native, m) { m.doc() = "textmill's CPU kernels and runtime"; }
