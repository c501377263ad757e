// The kernels in plain C++, for any machine: the meaning of matmul.h spelled out, one row and one block of 8 columns at a
// time. Gives the same quantized activations and integer dots as the fast ones.
// Compile flags: -O3 -ffp-contract=off
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

#include "matmul_impl.h"

namespace textmill {
namespace matmul_detail {
namespace {

float read_float(const uint8_t* at) {
  float value;
  std::memcpy(&value, at, 4);
  return value;
}

void read_set(const PackedView& w, const uint8_t* set, int first, float* values) {
  for (int lane = 0; lane < kColumnBlock; ++lane) {
    if (w.half_floats) {
      uint16_t half;
      std::memcpy(&half, set + (first + lane) * 2, 2);
      values[lane] = half_to_float(half);
    } else {
      values[lane] = read_float(set + (first + lane) * 4);
    }
  }
}

// Adds quads [first, last) of a chunk to the dots of the block's columns.
void add_quads(const PackedView& w, const uint8_t* codes, const int8_t* a, int first, int last, int32_t* dots) {
  for (int quad = first; quad < last; ++quad) {
    const uint8_t* bytes = codes + (w.bits == 4 ? quad % 4 : quad) * kQuadBytes;
    for (int i = 0; i < kQuadBytes; ++i) {
      const int code = w.bits == 8 ? bytes[i] : quad < 4 ? bytes[i] & 15 : bytes[i] >> 4;
      dots[i / 4] += code * a[quad * 4 + i % 4];
    }
  }
}

struct Unit {  // a chunk, or half of one
  const uint8_t* codes;
  const uint8_t* set;
  const uint8_t* record;
  int first_quad, last_quad;
  float sum;
};

// `sum`: 64 times the activations' scale and their codes' sum.
void add_whole(const PackedView& w, const Unit& unit, const int32_t* dots, float scale, float sum, float* y) {
  float offsets[kColumnBlock];
  if (w.has_offsets) read_set(w, unit.set, kColumnBlock, offsets);
  for (int lane = 0; lane < kColumnBlock; ++lane) {
    int16_t whole;
    std::memcpy(&whole, unit.set + lane * 2, 2);
    const float share = -static_cast<float>(w.zero) / kOffsetUnits;
    const float offset = w.has_offsets ? offsets[lane] : share * static_cast<float>(whole);
    y[lane] += scale * static_cast<float>(static_cast<int64_t>(dots[lane]) * whole);
    y[lane] += offset * sum;
  }
}

void add_unit(const PackedView& w, const Unit& unit, float* y) {
  int32_t dots[kColumnBlock] = {};
  add_quads(w, unit.codes, reinterpret_cast<const int8_t*>(unit.record), unit.first_quad, unit.last_quad, dots);
  const float scale = read_float(unit.record + kRecordScale);
  if (w.whole) return add_whole(w, unit, dots, scale, read_float(unit.record + kRecordScale + 4), y);
  float scales[kColumnBlock], offsets[kColumnBlock];
  read_set(w, unit.set, 0, scales);
  if (w.has_offsets) read_set(w, unit.set, kColumnBlock, offsets);
  for (int lane = 0; lane < kColumnBlock; ++lane) {
    float t = static_cast<float>(dots[lane]) - static_cast<float>(w.zero) * unit.sum;  // exact
    t *= scales[lane];
    if (w.has_offsets) t += offsets[lane] * unit.sum;
    y[lane] += scale * t;
  }
}

void block_products(const PackedView& w, const uint8_t* row, int64_t block, float* y) {
  const uint8_t* base = w.data + block * w.block_bytes;
  std::fill(y, y + kColumnBlock, 0.0f);
  for (int64_t c = 0; c < w.chunks; ++c) {
    const uint8_t* codes = base + c * w.code_bytes;
    const uint8_t* record = row + c * kRecordBytes;
    const uint8_t* sets = base + w.scales_at;
    const float low = read_float(record + kRecordScale + 8), high = read_float(record + kRecordScale + 12);
    if (w.half_groups) {
      add_unit(w, {codes, sets + 2 * c * w.set_bytes, record, 0, 4, low}, y);
      add_unit(w, {codes, sets + (2 * c + 1) * w.set_bytes, record, 4, 8, high}, y);
    } else {
      add_unit(w, {codes, sets + c / w.chunks_per_group * w.set_bytes, record, 0, 8, low + high}, y);
    }
  }
  for (int lane = 0; lane < kColumnBlock && w.whole; ++lane) {
    y[lane] = std::ldexp(y[lane], w.powers[block * kColumnBlock + lane]);
  }
}

void block_products(const DenseView& w, const float* row, int64_t block, float* y) {
  const float* base = w.data + block * kColumnBlock * w.k;
  std::fill(y, y + kColumnBlock, 0.0f);
  for (int64_t i = 0; i < w.k; ++i) {
    for (int lane = 0; lane < kColumnBlock; ++lane) y[lane] += row[i] * base[i * kColumnBlock + lane];
  }
}

float activate(float x, Activation activation) {
  switch (activation) {
    case Activation::kSilu: return x / (1.0f + std::exp(-x));
    case Activation::kGeluTanh: return x / (1.0f + std::exp(-1.5957691216057308f * (x + 0.044715f * x * x * x)));
    case Activation::kGeluErf: return 0.5f * x * std::erfc(-0.70710678118654752f * x);
    case Activation::kRelu: return x < 0.0f ? 0.0f : x;
    default: return x;
  }
}

// The products of columns [first, first + 8) of one row, wherever the block boundaries are.
template <class View, class Row>
void eight_columns(const View& w, Row row, int64_t first, float* y) {
  const int64_t shift = first % kColumnBlock;
  float both[2 * kColumnBlock] = {};
  block_products(w, row, first / kColumnBlock, both);
  const bool straddles = shift > 0 && first + kColumnBlock - shift < w.n;
  if (straddles) block_products(w, row, first / kColumnBlock + 1, both + kColumnBlock);
  std::copy(both + shift, both + shift + kColumnBlock, y);
}

template <class View, class Row>
void row_products(const View& w, Row row, int64_t r, int64_t column_begin, int64_t column_end, const Output& out) {
  const Epilogue& e = *out.epilogue;
  const int64_t half = w.n / 2;
  for (int64_t first = column_begin; first < column_end; first += kColumnBlock) {
    float y[kColumnBlock], up[kColumnBlock];
    eight_columns(w, row, first, y);
    if (e.gated) eight_columns(w, row, half + first, up);
    const int64_t count = std::min(kColumnBlock, column_end - first);
    for (int64_t lane = 0; lane < count; ++lane) {
      const int64_t column = first + lane;
      float value = activate(e.bias ? y[lane] + e.bias[column] : y[lane], e.activation);
      if (e.gated) value *= e.bias ? up[lane] + e.bias[half + column] : up[lane];
      if (e.residual) value += e.residual[r * e.residual_stride + column];
      out.data[r * out.stride + column] = value;
    }
  }
}

void packed(const PackedView& w, const uint8_t* x, int64_t rows, int64_t column_begin, int64_t column_end,
            const Output& out) {
  const int64_t row_bytes = w.chunks * kRecordBytes;
  for (int64_t r = 0; r < rows; ++r) row_products(w, x + r * row_bytes, r, column_begin, column_end, out);
}

void dense(const DenseView& w, const float* x, int64_t x_stride, int64_t rows, int64_t column_begin, int64_t column_end,
           const Output& out) {
  for (int64_t r = 0; r < rows; ++r) row_products(w, x + r * x_stride, r, column_begin, column_end, out);
}

// An Inf or NaN in the chunk makes its scale NaN, and so every output of the row.
float chunk_scale(const float* x, int64_t count) {
  float largest = 0.0f;
  bool finite = true;
  for (int64_t i = 0; i < count; ++i) {
    finite &= std::isfinite(x[i]);
    largest = std::max(largest, std::fabs(x[i]));
  }
  return finite ? largest / 127.0f : std::numeric_limits<float>::quiet_NaN();
}

void quantize_chunk(const float* x, int64_t count, uint8_t* record) {
  const float scale = chunk_scale(x, count);
  int sums[2] = {0, 0};
  int8_t codes[kChunk] = {};
  for (int64_t i = 0; i < count && scale > 0.0f; ++i) {
    const float code = std::nearbyint(x[i] / scale);
    codes[i] = static_cast<int8_t>(std::min(127.0f, std::max(-127.0f, code)));
    sums[i / 16] += codes[i];
  }
  const float tail[4] = {scale, kOffsetUnits * scale * static_cast<float>(sums[0] + sums[1]),
                         static_cast<float>(sums[0]), static_cast<float>(sums[1])};
  std::memcpy(record, codes, kChunk);
  std::memcpy(record + kRecordScale, tail, sizeof(tail));
}

void quantize(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* out) {
  const int64_t chunks = chunk_count(k);
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t c = 0; c < chunks; ++c) {
      quantize_chunk(x + r * x_stride + c * kChunk, std::min(kChunk, k - c * kChunk),
                     out + (r * chunks + c) * kRecordBytes);
    }
  }
}

}  // namespace

const Kernels kPortableKernels = {"portable", packed, dense, quantize};

}  // namespace matmul_detail
}  // namespace textmill
