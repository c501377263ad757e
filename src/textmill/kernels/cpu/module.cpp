// The binding, textmill._native: checks what memory it is given, lets go of the GIL, and calls.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "machine_limits.h"
#include "module.h"
#include "threads.h"
#include "vector.h"

namespace nb = nanobind;

namespace textmill {
namespace {

Matrix pack_weight(Array<const uint8_t, nb::ndim<2>> codes, Array<const float, nb::ndim<2>> scales,
                   std::optional<Array<const float, nb::ndim<2>>> offsets, int zero, int bits, int64_t group) {
  const int64_t n = static_cast<int64_t>(codes.shape(0)), k = static_cast<int64_t>(codes.shape(1));
  require(group > 0 && scales.size() == static_cast<size_t>(n * (k / group)), "scales: one per row and group");
  require(!offsets || offsets->size() == scales.size(), "offsets: as many as scales");
  nb::gil_scoped_release release;
  return {make_packed_weight(codes.data(), scales.data(), offsets ? offsets->data() : nullptr, zero, n, k, bits, group)};
}

Matrix dense_weight(Array<const float, nb::ndim<2>> values) {
  nb::gil_scoped_release release;
  return {make_dense_weight(values.data(), static_cast<int64_t>(values.shape(0)), static_cast<int64_t>(values.shape(1)))};
}

void matrix_row(const Matrix& matrix, int64_t index, Array<float, nb::ndim<1>> out) {
  require(index >= 0 && index < matrix.weight->n && static_cast<int64_t>(out.size()) == matrix.weight->k,
          "row: out of range");
  matrix.weight->dequantize_row(index, out.data());
}

std::optional<std::tuple<int, int64_t, int, bool>> layout_of(int kind) {
  GgmlLayout layout;
  if (!ggml_layout(kind, &layout)) return std::nullopt;
  return std::make_tuple(layout.bits, layout.group, layout.zero, layout.has_offsets);
}

// Bytes of a row of k values in ggml's blocks.
int64_t ggml_row_bytes(int kind, int64_t k) {
  switch (kind) {
    case 2: return k / 32 * 18;
    case 3: return k / 32 * 20;
    case 8: return k / 32 * 34;
    case 12: return k / 256 * 144;
    default: return k / 256 * 210;
  }
}

void unpack(int kind, Array<const uint8_t, nb::ndim<1>> blocks, Array<uint8_t, nb::ndim<2>> codes,
            Array<float, nb::ndim<2>> scales, std::optional<Array<float, nb::ndim<2>>> offsets) {
  GgmlLayout layout;
  require(ggml_layout(kind, &layout), "this ggml type has no native reader");
  const int64_t n = static_cast<int64_t>(codes.shape(0)), k = static_cast<int64_t>(codes.shape(1));
  const int64_t row_bytes = ggml_row_bytes(kind, k), groups = k / layout.group;
  require(k % (kind >= 12 ? 256 : 32) == 0, "rows of this ggml type do not have so many inputs");
  require(static_cast<int64_t>(blocks.size()) == n * row_bytes, "the blocks are not as many bytes as the shape needs");
  require(static_cast<int64_t>(scales.size()) == n * groups && layout.has_offsets == offsets.has_value() &&
              (!offsets || offsets->size() == scales.size()),
          "scales and offsets: one per row and group");
  nb::gil_scoped_release release;
  // ggml_unpack writes the first row it reads to the start of what it is given.
  parallel_for(n, std::max<int64_t>(1, 65536 / k), [&](int64_t begin, int64_t end) {
    ggml_unpack(kind, blocks.data() + begin * row_bytes, 0, end - begin, k, codes.data() + begin * k,
                scales.data() + begin * groups, offsets ? offsets->data() + begin * groups : nullptr);
  });
}

bool set_instruction_set(const std::string& name) {
  if (!set_matmul_instruction_set(name.c_str())) return false;
  set_vector_kernels(name.c_str());
  return true;
}

}  // namespace
}  // namespace textmill

NB_MODULE(_native, m) {
  using namespace textmill;
  nb::set_leak_warnings(false);  // a model lives until the process ends
  m.doc() = "textmill's CPU kernels and runtime";
  m.def("instruction_set", [] { return std::string(matmul_instruction_set()); });
  m.def("set_instruction_set", &set_instruction_set);
  m.def("set_threads", &set_threads);
  m.def("measure_limits", [](size_t buffer_bytes, double seconds) {
    nb::gil_scoped_release release;
    const MachineLimits found = measure_limits(buffer_bytes, seconds);
    return std::tuple(found.threads, found.read_gb_s, found.byte_gmac_s, found.float_gmac_s);
  });
  m.def("pack_weight", &pack_weight, nb::arg("codes"), nb::arg("scales"), nb::arg("offsets").none(), nb::arg("zero"),
        nb::arg("bits"), nb::arg("group"));
  m.def("dense_weight", &dense_weight);
  m.def("ggml_layout", &layout_of);
  m.def("ggml_unpack", &unpack, nb::arg("kind"), nb::arg("blocks"), nb::arg("codes"), nb::arg("scales"),
        nb::arg("offsets").none());
  nb::class_<Matrix>(m, "Weight")
      .def_prop_ro("n", [](const Matrix& matrix) { return matrix.weight->n; })
      .def_prop_ro("k", [](const Matrix& matrix) { return matrix.weight->k; })
      .def_prop_ro("nbytes", [](const Matrix& matrix) { return matrix.weight->bytes(); })
      .def("row", &matrix_row);
  bind_program(m);
}
