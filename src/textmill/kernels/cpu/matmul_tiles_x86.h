// Tiles of packed products on x86: a few rows times one or two blocks of 8 columns, over a range of chunks.
// Included by matmul_x86.h only (see there).
#pragma once

#include <immintrin.h>

#include "matmul_impl.h"

namespace textmill {
namespace matmul_detail {
namespace {

#define TEXTMILL_INLINE inline __attribute__((always_inline))

constexpr int64_t kStrip = 4;              // column blocks computed before their epilogue
constexpr int64_t kLd = 8 * (kStrip + 1);  // floats between rows of a strip's results; one block more for [up] columns

// How a tile finds codes: two a byte as packed, a byte each, in two planes of 4 bits (8-bit codes where bytes would
// saturate), or as centred 16-bit words (their panels there: fewer instructions a product than two planes).
enum class Codes { kNibbles, kBytes, kPlanes, kWords };

constexpr Codes packed_codes(int bits) {
  return bits == 4 ? Codes::kNibbles : Isa::kSplitBytes ? Codes::kPlanes : Codes::kBytes;
}
constexpr Codes panel_codes(int bits) { return bits == 8 && Isa::kSplitBytes ? Codes::kWords : Codes::kBytes; }

constexpr int units(bool half) { return half ? 2 : 1; }  // float steps a chunk

// A panel is what tiles of many rows read instead of the packed blocks: for each chunk the expanded codes of C blocks, then
// for each unit and block 8 scales and 8 offsets in 32 bits. With words, activations are 16-bit words too.
constexpr int64_t panel_code_bytes(int bits) { return panel_codes(bits) == Codes::kWords ? 512 : 256; }
constexpr int64_t panel_step(int blocks, int bits, bool half) {
  return blocks * (panel_code_bytes(bits) + units(half) * 64);
}
constexpr int64_t kPanelBytes = 16 << 10;
constexpr int64_t kWideRecord = 80;  // a record with words for codes
constexpr int64_t record_bytes(Codes codes) { return codes == Codes::kWords ? kWideRecord : kRecordBytes; }

// What a weight has beside its scales, known when tiles are compiled for the common kinds.
enum class Form { kWhole, kWholeZero, kOffsets, kZero, kAny };

// A tile: up to 6 rows times up to 2 column blocks over a range of chunks.
struct Tile {
  const PackedView* w;
  const uint8_t* blocks[2];  // packed blocks, or in [0] the panel
  const uint8_t* x;          // the first row's first record
  int64_t x_stride;          // bytes between rows
  int64_t chunks;
  float* y;          // read, added to and written; kLd floats between rows
  int64_t ahead;  // bytes to what is fetched meanwhile, 0: nothing; direct tiles only
};

// Vector of step `q` of a chunk: a quad of each column, or a pair with words; plane 1 is the high halves of 8-bit codes.
template <Codes kCodes>
TEXTMILL_INLINE __m256i load_codes(const uint8_t* codes, int q, int plane) {
  const int vector = kCodes == Codes::kNibbles ? q % 4 : q;
  const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + vector * kQuadBytes));
  if (kCodes == Codes::kBytes || kCodes == Codes::kWords) return bytes;
  const bool high = kCodes == Codes::kNibbles ? q >= 4 : plane == 1;
  return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, _mm256_set1_epi8(15));
}

// A set's eight offsets where scales are whole.
TEXTMILL_INLINE __m256 whole_offsets(bool has_offsets, __m256 zero, const uint8_t* set) {
  const __m128i* at = reinterpret_cast<const __m128i*>(set);
  if (has_offsets) return _mm256_cvtph_ps(_mm_load_si128(at + 1));
  const __m256 share = _mm256_mul_ps(zero, _mm256_set1_ps(-1.0f / kOffsetUnits));
  return _mm256_mul_ps(share, _mm256_cvtepi32_ps(_mm256_cvtepi16_epi32(_mm_load_si128(at))));
}

// The products of a step, added up to `sum` unless it is the first.
template <Codes kCodes>
TEXTMILL_INLINE __m256i add_products(bool first, __m256i sum, __m256i code, __m256i a) {
  if (kCodes != Codes::kWords) return first ? Isa::first(code, a) : Isa::step(sum, code, a);
  const __m256i products = _mm256_madd_epi16(code, a);
  if (first) return products;
  sum = _mm256_add_epi32(sum, products);
  asm("" : "+x"(sum));  // keeps GCC from computing all products before the first sum, which spills them
  return sum;
}

TEXTMILL_INLINE __m256 load_scales(bool full, const uint8_t* set, int64_t index) {
  if (full) return _mm256_load_ps(reinterpret_cast<const float*>(set) + index * 8);
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(set) + index));
}

constexpr int planes(Codes codes) { return codes == Codes::kPlanes ? 2 : 1; }

// The products of a chunk, or of its half kPart, added up as `Isa` does it.
template <int R, int C, Codes kCodes, bool kHalf, int kPart>
TEXTMILL_INLINE void chunk_sums(const uint8_t* const* codes, const uint8_t* const* records,
                                __m256i sums[R][C][planes(kCodes)]) {
  constexpr int P = planes(kCodes);
  constexpr int kCount = (kCodes == Codes::kWords ? 16 : 8) / units(kHalf), kFirst = kPart * kCount;
#pragma GCC unroll 16
  for (int q = kFirst; q < kFirst + kCount; ++q) {
    __m256i code[C][P];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) code[c][p] = load_codes<kCodes>(codes[c], q, p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, records[r] + q * 4, 4);
      const __m256i a = _mm256_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) sums[r][c][p] = add_products<kCodes>(q == kFirst, sums[r][c][p], code[c][p], a);
      }
    }
  }
}

// The integer dots of a chunk, or of its half kPart.
template <int R, int C, Codes kCodes, bool kHalf, int kPart>
TEXTMILL_INLINE void chunk_dots(const uint8_t* const* codes, const uint8_t* const* records, __m256i dots[R][C]) {
  constexpr int P = planes(kCodes);
  __m256i sums[R][C][P];
  chunk_sums<R, C, kCodes, kHalf, kPart>(codes, records, sums);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      dots[r][c] = kCodes == Codes::kWords ? sums[r][c][0]
                   : P == 1                ? Isa::finish(sums[r][c][0])
                                           : Isa::finish_halves(sums[r][c][0], sums[r][c][P - 1]);
    }
  }
}

// What of a tile stays the same over its chunks; in registers, since stores to y might alias the tile itself.
struct Fixed {
  float* y;
  __m256 zero;
  bool has_offsets;
  bool half_floats;
};

// y += s * (scale * (dot - zero * sum) + offset * sum) for every row and block of the tile; see matmul_impl.h.
template <int R, int C, bool kZero, bool kOffsets>
TEXTMILL_INLINE void add_unit(const Fixed& fixed, const uint8_t* const* tails, int sum_index, const __m256i dots[R][C],
                              const __m256* scale, const __m256* offset) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* tail = reinterpret_cast<const float*>(tails[r]);
    const __m256 s = _mm256_broadcast_ss(tail);
    const __m256 sum = sum_index > 0 ? _mm256_broadcast_ss(tail + 1 + sum_index)
                                     : _mm256_set1_ps(tail[2] + tail[3]);
    const __m256 zero_sum = _mm256_mul_ps(fixed.zero, sum);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      __m256 t = _mm256_cvtepi32_ps(dots[r][c]);
      if (kZero) t = _mm256_sub_ps(t, zero_sum);
      t = _mm256_mul_ps(t, scale[c]);
      if (kOffsets) t = _mm256_fmadd_ps(offset[c], sum, t);
      float* at = fixed.y + r * kLd + c * 8;
      _mm256_store_ps(at, _mm256_fmadd_ps(s, t, _mm256_load_ps(at)));
    }
  }
}

// A chunk with whole scales; y += s * (scale * dot) + offset * (64 * s * sum), see matmul_impl.h.
template <int R, int C, Codes kCodes, bool kDirect, bool kOffsets>
TEXTMILL_INLINE void run_whole(const Fixed& fixed, const uint8_t* const* codes, const uint8_t* const* records,
                               const uint8_t* const* sets) {
  __m256i sums[R][C][planes(kCodes)], scale[C];
  chunk_sums<R, C, kCodes, false, 0>(codes, records, sums);
  __m256 offset[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    scale[c] = kDirect ? Isa::load_whole(sets[c]) : _mm256_load_si256(reinterpret_cast<const __m256i*>(sets[c]));
    offset[c] = kDirect ? whole_offsets(kOffsets, fixed.zero, sets[c]) : load_scales(true, sets[c], 1);
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* tail = reinterpret_cast<const float*>(records[r] + kRecordScale);
    const __m256 s = _mm256_broadcast_ss(tail), sum = _mm256_broadcast_ss(tail + 1);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      float* at = fixed.y + r * kLd + c * 8;
      const __m256 y = _mm256_fmadd_ps(s, Isa::scaled(sums[r][c][0], scale[c]), _mm256_load_ps(at));
      _mm256_store_ps(at, _mm256_fmadd_ps(offset[c], sum, y));
    }
  }
}

// One unit; codes and sets point to it in each block.
template <int R, int C, Codes kCodes, bool kHalf, bool kDirect, Form kForm, int kPart>
TEXTMILL_INLINE void run_unit(const Fixed& fixed, const uint8_t* const* codes,
                              const uint8_t* const* records, const uint8_t* const* sets) {
  if constexpr (kForm == Form::kWhole || kForm == Form::kWholeZero) {
    return run_whole<R, C, kCodes, kDirect, kForm == Form::kWhole>(fixed, codes, records, sets);
  }
  constexpr int kSum = kHalf ? 1 + kPart : 0;
  constexpr bool kCentred = kCodes == Codes::kWords;
  __m256i dots[R][C];
  chunk_dots<R, C, kCodes, kHalf, kPart>(codes, records, dots);
  const bool full = !kDirect || !fixed.half_floats;
  const bool has_offsets = kForm == Form::kAny ? fixed.has_offsets : kForm == Form::kOffsets;
  __m256 scale[C], offset[C];
  const uint8_t* tails[R];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) tails[r] = records[r] + record_bytes(kCodes) - 16;
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    scale[c] = load_scales(full, sets[c], 0);
    offset[c] = has_offsets ? load_scales(full, sets[c], 1) : _mm256_setzero_ps();
  }
  if (kForm == Form::kOffsets) return add_unit<R, C, false, true>(fixed, tails, kSum, dots, scale, offset);
  if (kForm == Form::kZero) return add_unit<R, C, !kCentred, false>(fixed, tails, kSum, dots, scale, offset);
  if (!has_offsets) return add_unit<R, C, !kCentred, false>(fixed, tails, kSum, dots, scale, offset);
  add_unit<R, C, !kCentred, true>(fixed, tails, kSum, dots, scale, offset);
}

inline Fixed fix(const Tile& tile) {
  const PackedView& w = *tile.w;
  return {tile.y, _mm256_set1_ps(static_cast<float>(w.zero)), w.has_offsets, w.half_floats};
}

// Pointers to the records of R rows. GCC must not see how they hang together, or it keeps a pointer for each address that
// it can foresee, and results in registers that the sums need.
template <int R>
TEXTMILL_INLINE void find_records(const uint8_t* first, int64_t stride, const uint8_t** records) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    asm volatile("" : "+r"(first) : : "memory");
    records[r] = first;
    first += stride;
  }
}

template <int R, int C, int kBits, bool kHalf, Form kForm>
void run_panel_tile(const Tile& tile) {
  constexpr Codes kCodes = panel_codes(kBits);
  constexpr int64_t kBytes = panel_code_bytes(kBits);
  const Fixed fixed = fix(tile);
  const uint8_t* at = tile.blocks[0];
  const uint8_t *record = tile.x, *records[R];
  for (int64_t left = tile.chunks; left > 0; --left) {
    asm("" : "+r"(at));
    find_records<R>(record, tile.x_stride, records);
    const uint8_t *codes[C], *sets[C], *second[C];
    for (int c = 0; c < C; ++c) {
      codes[c] = at + c * kBytes;
      sets[c] = at + C * kBytes + c * 64;
      second[c] = sets[c] + C * 64;
    }
    run_unit<R, C, kCodes, kHalf, false, kForm, 0>(fixed, codes, records, sets);
    if (kHalf) run_unit<R, C, kCodes, kHalf, false, kForm, 1>(fixed, codes, records, second);
    at += panel_step(C, kBits, kHalf);
    record += record_bytes(kCodes);
  }
}

// Fetches memory ahead of a tile line by line, in one sequence through codes and scales whatever the order of their use:
// the hardware follows that with its own fetches, and only so the whole bandwidth of the memory is had.
struct Ahead {
  const char* at;
  const char* until;

  TEXTMILL_INLINE void fetch(int64_t bytes) {
    until += bytes;
    for (; at < until; at += 64) _mm_prefetch(at, _MM_HINT_T1);
  }
};

template <int R, int C, int kBits, bool kHalf, Form kForm>
void run_direct_tile(const Tile& tile) {
  constexpr Codes kCodes = packed_codes(kBits);
  const PackedView& w = *tile.w;
  const Fixed fixed = fix(tile);
  const int64_t set_bytes = w.set_bytes, chunks_per_set = w.chunks_per_group;
  const int64_t fetched_a_chunk = tile.ahead ? C * w.block_bytes / w.chunks : 0;
  const char* from = reinterpret_cast<const char*>(tile.blocks[0]) + tile.ahead;
  Ahead ahead = {from, from};
  const uint8_t* codes[2] = {tile.blocks[0], tile.blocks[C - 1]};
  const uint8_t* sets[2] = {tile.blocks[0] + w.scales_at, tile.blocks[C - 1] + w.scales_at};
  const uint8_t *record = tile.x, *records[R];
  int64_t left_in_set = chunks_per_set;
  for (int64_t left = tile.chunks; left > 0; --left) {
    find_records<R>(record, tile.x_stride, records);
    ahead.fetch(fetched_a_chunk);
    run_unit<R, C, kCodes, kHalf, true, kForm, 0>(fixed, codes, records, sets);
    if (kHalf) {
      for (int c = 0; c < C; ++c) sets[c] += set_bytes;
      run_unit<R, C, kCodes, kHalf, true, kForm, 1>(fixed, codes, records, sets);
    }
    const bool next_set = --left_in_set == 0;
    if (next_set) left_in_set = chunks_per_set;
    for (int c = 0; c < C; ++c) {
      codes[c] += kChunk * kColumnBlock * kBits / 8;
      if (next_set) sets[c] += set_bytes;
    }
    record += kRecordBytes;
  }
}

using TileFunction = void (*)(const Tile&);

constexpr int64_t kTileRows = 6;

// Tiles of 1..6 rows and 1 or 2 blocks.
struct TileTable {
  TileFunction of[kTileRows][2];
};

#define TEXTMILL_TILES(run, R) {run<R, 1, kBits, kHalf, kForm>, run<R, 2, kBits, kHalf, kForm>}
#define TEXTMILL_ALL_TILES(run)                                                                \
  {                                                                                            \
    {                                                                                          \
      TEXTMILL_TILES(run, 1), TEXTMILL_TILES(run, 2), TEXTMILL_TILES(run, 3),                  \
          TEXTMILL_TILES(run, 4), TEXTMILL_TILES(run, 5), TEXTMILL_TILES(run, 6),              \
    }                                                                                          \
  }
template <int kBits, bool kHalf, Form kForm>
constexpr TileTable kPanelTiles = TEXTMILL_ALL_TILES(run_panel_tile);
template <int kBits, bool kHalf, Form kForm>
constexpr TileTable kDirectTiles = TEXTMILL_ALL_TILES(run_direct_tile);

// The common kinds of weights have tiles of their own.
inline Form form_of(const PackedView& w) {
  if (w.whole) return w.has_offsets ? Form::kWhole : Form::kWholeZero;
  if (!w.has_offsets) return Form::kZero;
  return w.zero == 0 ? Form::kOffsets : Form::kAny;
}

const TileTable& panel_tiles(const PackedView& w) {
  if (w.half_groups) return w.bits == 4 ? kPanelTiles<4, true, Form::kAny> : kPanelTiles<8, true, Form::kAny>;
  const Form form = form_of(w);
  if (form == Form::kZero) return w.bits == 4 ? kPanelTiles<4, false, Form::kZero> : kPanelTiles<8, false, Form::kZero>;
  if (w.bits == 8) return kPanelTiles<8, false, Form::kAny>;
  if (w.whole) return kPanelTiles<4, false, Form::kWhole>;  // expanded scales are the same in both forms
  return form == Form::kOffsets ? kPanelTiles<4, false, Form::kOffsets> : kPanelTiles<4, false, Form::kAny>;
}

const TileTable& direct_tiles(const PackedView& w) {
  if (w.half_groups) return w.bits == 4 ? kDirectTiles<4, true, Form::kAny> : kDirectTiles<8, true, Form::kAny>;
  const Form form = form_of(w);
  if (form == Form::kZero) return w.bits == 4 ? kDirectTiles<4, false, Form::kZero> : kDirectTiles<8, false, Form::kZero>;
  if (w.bits == 8) return kDirectTiles<8, false, Form::kAny>;
  if (form == Form::kWhole) return kDirectTiles<4, false, Form::kWhole>;
  if (form == Form::kWholeZero) return kDirectTiles<4, false, Form::kWholeZero>;
  return form == Form::kOffsets ? kDirectTiles<4, false, Form::kOffsets> : kDirectTiles<4, false, Form::kAny>;
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
