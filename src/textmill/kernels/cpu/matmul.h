// Matrix products over packed weights: what the runtime (program.cpp) needs from the matmul kernels.
//
// Meaning (the torch reference is kernels/reference.py):
//   Packed weight W [n, k], groups of `group` along k:  w[o, i] = scale[o, g] * (code[o, i] - zero) + offset[o, g]
//   x [rows, k] is first quantized: per row and chunk of 32 inputs  a = round(x / s),  s = max|x| / 127
//   y[r, o] = sum over chunks, in order of i, of  s * scale * (int dot)  +  s * offset * (sum of a)
//   Dense weight: y[r, o] = sum over i, in order of i, of fma(x[r, i], w[o, i]).
//
// Independence: y[r, o] is a function of row r of x alone. The order of float operations for one (r, o) is fixed: it
// may not depend on the number of rows, on the tile a row falls into, on the column range of a call or on the thread.
// A NaN or Inf in row r stays in row r.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

namespace textmill {

// Columns (outputs) are stored in blocks of this many; slices of work start and end on a multiple of it (or at n).
constexpr int64_t kColumnBlock = 8;
// Activations are quantized in chunks of this many inputs.
constexpr int64_t kChunk = 32;

enum class Activation : int32_t {
  kNone = 0, kSilu = 1, kGeluTanh = 2, kGeluErf = 3, kRelu = 4,
  kSigmoid = 5, kTanh = 6, kQuickGelu = 7,  // of rows only, not in an epilogue
};

// What happens to y on its way out, in this order; all optional.
struct Epilogue {
  const float* bias = nullptr;      // [n]
  // gated: columns come in pairs of halves: the matrix is [gate; up] (n even), out has n/2 columns:
  // out = act(gate) * up.  A slice of columns [b, e) then means gate columns [b, e) with up columns [n/2+b, n/2+e).
  bool gated = false;
  Activation activation = Activation::kNone;
  const float* residual = nullptr;  // [rows, n]: added last
  int64_t residual_stride = 0;      // floats between rows
};

class Weight {
 public:
  virtual ~Weight() = default;
  int64_t n = 0;  // outputs
  int64_t k = 0;  // inputs
  // Bytes that one pass over the matrix reads.
  virtual size_t bytes() const = 0;
  // True if matmul takes quantized activations (see quantize_rows), false if it takes float rows.
  virtual bool quantized() const = 0;
  // y[0:rows, column_begin:column_end] = x W^T with the epilogue. `x` is either float rows (stride = floats between rows)
  // or the buffer that quantize_rows filled (stride ignored). out_stride: floats between rows of out.
  // Called by several threads at once on disjoint column ranges. column_begin is a multiple of kColumnBlock.
  virtual void matmul(const void* x, int64_t x_stride, int64_t rows, int64_t column_begin, int64_t column_end,
                      float* out, int64_t out_stride, const Epilogue& epilogue) const = 0;
  // Writes row `row` of the matrix (an embedding) as k floats.
  virtual void dequantize_row(int64_t row, float* out) const = 0;
};

// codes: [n, k], one unsigned code per byte (bits = 4: 0..15, bits = 8: 0..255). scales, offsets: [n, k / group]
// row-major; offsets may be null. group: 16, 32, 64, 128, ... or k (per channel); k a multiple of 16 (padded inside).
// Scales and offsets are kept in 16 bits when all of a matrix survive the round trip (4-bit scales as whole numbers, if they
// can be, which is fastest), else as 32-bit floats.
std::unique_ptr<Weight> make_packed_weight(const uint8_t* codes, const float* scales, const float* offsets, int zero,
                                           int64_t n, int64_t k, int bits, int64_t group);

// values: [n, k] float32 row-major.
std::unique_ptr<Weight> make_dense_weight(const float* values, int64_t n, int64_t k);

// Quantized activations of up to `rows` rows of k inputs take this many bytes (64-byte aligned buffers).
size_t quantized_bytes(int64_t rows, int64_t k);
// Quantizes rows [row_begin, row_end) of x into `out`, the buffer of all rows.
void quantize_rows(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, void* out);

// Unpacks rows of a GGUF tensor into codes, scales and offsets as make_packed_weight takes them.
// type: the ggml type number. Supported: 2 Q4_0, 3 Q4_1, 8 Q8_0, 12 Q4_K, 14 Q6_K. offsets is filled for Q4_1, Q4_K.
// Returns false for an unsupported type.  bits/group/zero of a type: ggml_layout.
struct GgmlLayout {
  int bits = 0;
  int64_t group = 0;
  int zero = 0;
  bool has_offsets = false;
};
bool ggml_layout(int type, GgmlLayout* layout);
bool ggml_unpack(int type, const uint8_t* blocks, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* codes,
                 float* scales, float* offsets);

// Instruction set the kernels run with: "avx512vnni", "avx2" or "portable"; chosen once, at first use.
const char* matmul_instruction_set();
// For tests: forces one of the above (false if this machine lacks it).
bool set_matmul_instruction_set(const char* name);

}  // namespace textmill
