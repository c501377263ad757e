// Shared between the matmul*.cpp files: the memory layouts and the table of kernels that each instruction set fills in.
//
// Packed matrix: blocks of 8 columns, one after another. A block holds the codes of all its chunks, then its scale sets.
//   A chunk is 32 inputs = 8 quads of 4 consecutive inputs; a quad of a block is 32 bytes: 8 columns x 4 inputs.
//   4 bits: 128 bytes a chunk; byte vector q (0..3) has quad q in its low nibbles, quad q + 4 in its high nibbles.
//   8 bits: 256 bytes a chunk; byte vector q (0..7) is quad q.
//   A scale set is 8 scales, then 8 offsets if there are any; 16- or 32-bit floats. There are two sets a chunk for groups
//   of 16, otherwise one set for each `chunks_per_group` chunks.
//   Whole scales: where nothing is lost by it, 4-bit matrices have 16-bit whole numbers for scales, multiples of a power of
//   two that a column's groups share (`powers`), and 16-bit floats for offsets, multiples of 64 such units.
// Dense matrix: blocks of 8 columns; a block is k vectors of 8 floats.
// Quantized activations: a row is `chunks` records of 48 bytes: 32 signed bytes, then the floats scale, 64 * scale * sum of
//   the codes, sum of the first 16 codes, sum of the last 16 codes.
//
// Float operations of one (row, column), for each unit (a chunk, or half a chunk for groups of 16) in order:
//   t = float(dot); if zero: t = fma(-zero, sum, t)  [exact]; t = t * scale; if offsets: t = fma(offset, sum, t);
//   y = fma(activation scale, t, y)
// With whole scales, where without offsets each is -zero * scale / 64:
//   t = float(dot * scale) [rounded once]; y = fma(activation scale, t, y); y = fma(offset, 64 * activation scale * sum, y)
//   and at the end y = y * the column's unit [exact]
// Every kernel of one instruction set does exactly these, so that y never depends on how the work was cut.
#pragma once

#include <cstdint>

#include "matmul.h"

namespace textmill {
namespace matmul_detail {

constexpr int64_t kQuadBytes = 32;    // 8 columns x 4 inputs
constexpr int64_t kRecordBytes = 48;  // one chunk of one row of quantized activations
constexpr int64_t kRecordScale = 32;  // byte offset of the scale; what is made of the sums follows
constexpr float kOffsetUnits = 64.0f;  // an offset beside whole scales is a multiple of so many units

struct PackedView {
  const uint8_t* data = nullptr;  // 64-byte aligned
  int64_t n = 0;
  int64_t k = 0;
  int64_t chunks = 0;            // ceil(k / 32)
  int64_t chunks_per_group = 1;  // groups of 32 and more
  int64_t code_bytes = 0;        // of one chunk of one block
  int64_t set_bytes = 0;         // of one scale set of one block
  int64_t scales_at = 0;         // byte offset of the first scale set in a block
  int64_t block_bytes = 0;       // a multiple of 64
  int bits = 4;
  int zero = 0;
  bool half_groups = false;  // groups of 16
  bool has_offsets = false;
  bool half_floats = false;  // scales and offsets take 16 bits
  bool whole = false;        // ... and scales are whole numbers
  int8_t* powers = nullptr;  // with whole scales: [n, padded to whole blocks], the exponents of the columns' units
};

struct DenseView {
  const float* data = nullptr;
  int64_t n = 0;
  int64_t k = 0;
};

struct Output {
  float* data;
  int64_t stride;
  const Epilogue* epilogue;
};

// What an instruction set provides. All work on [column_begin, column_end) as Weight::matmul says.
struct Kernels {
  const char* name;
  void (*packed)(const PackedView& w, const uint8_t* x, int64_t rows, int64_t column_begin, int64_t column_end,
                 const Output& out);
  void (*dense)(const DenseView& w, const float* x, int64_t x_stride, int64_t rows, int64_t column_begin,
                int64_t column_end, const Output& out);
  void (*quantize)(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* out);
};

extern const Kernels kPortableKernels;
#if defined(__x86_64__)
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512VnniKernels;
#endif

inline int64_t chunk_count(int64_t k) { return (k + kChunk - 1) / kChunk; }

// 16-bit floats without hardware help.
float half_to_float(uint16_t half);
// False if the value does not survive the round trip.
bool float_to_half_exact(float value, uint16_t* half);

// The exponent of the unit in which a column's scales are whole numbers of 16 bits and its offsets (or null) 16-bit floats
// of 64 units, nothing lost; false if there is none.
bool whole_power(const float* scales, const float* offsets, int64_t groups, int8_t* power);
// Fills a view's sizes from its n, k, bits, flags and group; data stays null. Returns the bytes of all blocks.
int64_t lay_out(PackedView* view, int64_t group);
// Writes the blocks of `view` to `data` (view.block_bytes * blocks, zeroed before); `view.powers` are read.
void pack_blocks(const PackedView& view, const uint8_t* codes, const float* scales, const float* offsets, int64_t group,
                 uint8_t* data);
void pack_dense(const float* values, int64_t n, int64_t k, float* data);
void unpack_row(const PackedView& view, int64_t row, float* out);

}  // namespace matmul_detail
}  // namespace textmill
