// Shared by the files of the binding.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <memory>
#include <stdexcept>

#include "matmul.h"

namespace textmill {

template <typename T, typename... Shape>
using Array = nanobind::ndarray<T, Shape..., nanobind::c_contig, nanobind::device::cpu>;
using Floats = Array<const float>;

struct Matrix {
  std::shared_ptr<const Weight> weight;
};

inline void require(bool condition, const char* message) {
  if (!condition) throw std::invalid_argument(message);
}

void bind_program(nanobind::module_& m);

}  // namespace textmill
