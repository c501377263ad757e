// The x86 kernels, written once over `Isa`, which each instruction set's .cpp defines before it includes this file:
//   struct Isa { static constexpr bool kSplitBytes;                       // 8-bit codes need two 4-bit halves
//                static __m256i step(__m256i sum, __m256i codes, __m256i a);  // adds a quad's products
//                static __m256i finish(__m256i sum); };                       // sums of steps -> 8 int32
// Everything is in an unnamed namespace and nothing of the standard library is instantiated: code compiled for one
// instruction set must not be merged by the linker with that of another.
#pragma once

#include <immintrin.h>

#include "matmul_epilogue_x86.h"
#include "matmul_impl.h"

namespace textmill {
namespace matmul_detail {
namespace {

#define TEXTMILL_INLINE inline __attribute__((always_inline))

constexpr int64_t kStrip = 4;              // column blocks computed before their epilogue
constexpr int64_t kLd = 8 * (kStrip + 1);  // floats between rows of a strip's results; one block more for [up] columns
constexpr int64_t kMaxRows = 120;          // rows computed before the next strip
constexpr int64_t kDirectRows = 24;        // up to so many rows use the packed codes directly, without a panel
constexpr int64_t kLeastAhead = 8 << 10;   // bytes fetched ahead of direct tiles
constexpr int64_t kLargeBlock = 16 << 10;  // bytes
constexpr int64_t kDensePanel = 256;       // inputs of a dense strip kept in the first-level cache

constexpr int planes(int bits) { return bits == 8 && Isa::kSplitBytes ? 2 : 1; }
constexpr int units(bool half) { return half ? 2 : 1; }  // float steps a chunk

// ---- packed weights --------------------------------------------------------------------------------------------------

// A panel is what tiles of many rows read instead of the packed blocks: for each chunk the expanded codes of C blocks (256
// bytes a plane), then for each unit and block 8 scales and 8 offsets in 32 bits.
constexpr int64_t panel_step(int blocks, int bits, bool half) {
  return blocks * (planes(bits) * 256 + units(half) * 64);
}
constexpr int64_t kPanelBytes = 16 << 10;

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

// Vector of quad `q` of a chunk; plane 1 is the high halves of 8-bit codes.
template <int kBits, bool kDirect>
TEXTMILL_INLINE __m256i load_quad(const uint8_t* codes, int q, int plane) {
  const __m256i low_bits = _mm256_set1_epi8(15);
  if (!kDirect) return _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + plane * 256 + q * kQuadBytes));
  const int vector = kBits == 4 ? q % 4 : q;
  const __m256i bytes = _mm256_load_si256(reinterpret_cast<const __m256i*>(codes + vector * kQuadBytes));
  if (kBits == 8 && planes(kBits) == 1) return bytes;
  const bool high = kBits == 4 ? q >= 4 : plane == 1;
  return _mm256_and_si256(high ? _mm256_srli_epi16(bytes, 4) : bytes, low_bits);
}

TEXTMILL_INLINE __m256 load_scales(bool full, const uint8_t* set, int64_t index) {
  if (full) return _mm256_load_ps(reinterpret_cast<const float*>(set) + index * 8);
  return _mm256_cvtph_ps(_mm_load_si128(reinterpret_cast<const __m128i*>(set) + index));
}

// The integer dots of quads [kFirst, kFirst + kCount) of one chunk.
template <int R, int C, int kBits, bool kDirect, int kFirst, int kCount>
TEXTMILL_INLINE void chunk_dots(const uint8_t* const* codes, const uint8_t* const* records, __m256i dots[R][C]) {
  constexpr int P = planes(kBits);
  __m256i sums[R][C][P];
#pragma GCC unroll 8
  for (int q = kFirst; q < kFirst + kCount; ++q) {
    __m256i code[C][P];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) code[c][p] = load_quad<kBits, kDirect>(codes[c], q, p);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t four;
      __builtin_memcpy(&four, records[r] + q * 4, 4);
      const __m256i a = _mm256_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
#pragma GCC unroll 2
        for (int p = 0; p < P; ++p) {
          sums[r][c][p] = q == kFirst ? Isa::first(code[c][p], a) : Isa::step(sums[r][c][p], code[c][p], a);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      dots[r][c] = P == 1 ? Isa::finish(sums[r][c][0]) : Isa::finish_halves(sums[r][c][0], sums[r][c][P - 1]);
    }
  }
}

// What of a tile stays the same over its chunks; in registers, since stores to y might alias the tile itself.
struct Fixed {
  float* y;
  __m256 zero;
  bool has_zero;
  bool has_offsets;
  bool half_floats;
};

// y += s * (scale * (dot - zero * sum) + offset * sum) for every row and block of the tile; see matmul_impl.h.
template <int R, int C, bool kZero, bool kOffsets>
TEXTMILL_INLINE void add_unit(const Fixed& fixed, const uint8_t* const* records, int sum_index, const __m256i dots[R][C],
                              const __m256* scale, const __m256* offset) {
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    const float* tail = reinterpret_cast<const float*>(records[r] + kRecordScale);
    const __m256 s = _mm256_broadcast_ss(tail);
    const __m256 sum = _mm256_broadcast_ss(tail + 1 + sum_index);
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) {
      __m256 t = _mm256_cvtepi32_ps(dots[r][c]);
      if (kZero) t = _mm256_fnmadd_ps(fixed.zero, sum, t);
      t = _mm256_mul_ps(t, scale[c]);
      if (kOffsets) t = _mm256_fmadd_ps(offset[c], sum, t);
      float* at = fixed.y + r * kLd + c * 8;
      _mm256_store_ps(at, _mm256_fmadd_ps(s, t, _mm256_load_ps(at)));
    }
  }
}

// One unit; codes and sets point to it in each block.
template <int R, int C, int kBits, bool kHalf, bool kDirect, int kPart>
TEXTMILL_INLINE void run_unit(const Fixed& fixed, const uint8_t* const* codes,
                              const uint8_t* const* records, const uint8_t* const* sets) {
  constexpr int kFirst = kHalf ? 4 * kPart : 0;
  constexpr int kSum = kHalf ? 1 + kPart : 0;
  __m256i dots[R][C];
  chunk_dots<R, C, kBits, kDirect, kFirst, kHalf ? 4 : 8>(codes, records, dots);
  __m256 scale[C], offset[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) {
    scale[c] = load_scales(!kDirect || !fixed.half_floats, sets[c], 0);
    offset[c] = fixed.has_offsets ? load_scales(!kDirect || !fixed.half_floats, sets[c], 1) : _mm256_setzero_ps();
  }
  if (fixed.has_offsets) {
    if (fixed.has_zero) {
      add_unit<R, C, true, true>(fixed, records, kSum, dots, scale, offset);
    } else {
      add_unit<R, C, false, true>(fixed, records, kSum, dots, scale, offset);
    }
  } else if (fixed.has_zero) {
    add_unit<R, C, true, false>(fixed, records, kSum, dots, scale, offset);
  } else {
    add_unit<R, C, false, false>(fixed, records, kSum, dots, scale, offset);
  }
}

inline Fixed fix(const Tile& tile) {
  const PackedView& w = *tile.w;
  return {tile.y, _mm256_set1_ps(static_cast<float>(w.zero)), w.zero != 0, w.has_offsets, w.half_floats};
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

template <int R, int C, int kBits, bool kHalf>
void run_panel_tile(const Tile& tile) {
  constexpr int64_t kCodes = planes(kBits) * 256;
  const Fixed fixed = fix(tile);
  const uint8_t* at = tile.blocks[0];
  const uint8_t *record = tile.x, *records[R];
  for (int64_t left = tile.chunks; left > 0; --left) {
    asm("" : "+r"(at));
    find_records<R>(record, tile.x_stride, records);
    const uint8_t *codes[C], *sets[C], *second[C];
    for (int c = 0; c < C; ++c) {
      codes[c] = at + c * kCodes;
      sets[c] = at + C * kCodes + c * 64;
      second[c] = sets[c] + C * 64;
    }
    run_unit<R, C, kBits, kHalf, false, 0>(fixed, codes, records, sets);
    if (kHalf) run_unit<R, C, kBits, kHalf, false, 1>(fixed, codes, records, second);
    at += panel_step(C, kBits, kHalf);
    record += kRecordBytes;
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

template <int R, int C, int kBits, bool kHalf>
void run_direct_tile(const Tile& tile) {
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
    run_unit<R, C, kBits, kHalf, true, 0>(fixed, codes, records, sets);
    if (kHalf) {
      for (int c = 0; c < C; ++c) sets[c] += set_bytes;
      run_unit<R, C, kBits, kHalf, true, 1>(fixed, codes, records, sets);
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

#define TEXTMILL_TILES(run, R) {run<R, 1, kBits, kHalf>, run<R, 2, kBits, kHalf>}
#define TEXTMILL_ALL_TILES(run)                                                                \
  {                                                                                            \
    {                                                                                          \
      TEXTMILL_TILES(run, 1), TEXTMILL_TILES(run, 2), TEXTMILL_TILES(run, 3),                  \
          TEXTMILL_TILES(run, 4), TEXTMILL_TILES(run, 5), TEXTMILL_TILES(run, 6),              \
    }                                                                                          \
  }
template <int kBits, bool kHalf>
constexpr TileTable kPanelTiles = TEXTMILL_ALL_TILES(run_panel_tile);
template <int kBits, bool kHalf>
constexpr TileTable kDirectTiles = TEXTMILL_ALL_TILES(run_direct_tile);

const TileTable& panel_tiles(const PackedView& w) {
  if (w.bits == 4) return w.half_groups ? kPanelTiles<4, true> : kPanelTiles<4, false>;
  return w.half_groups ? kPanelTiles<8, true> : kPanelTiles<8, false>;
}

const TileTable& direct_tiles(const PackedView& w) {
  if (w.bits == 4) return w.half_groups ? kDirectTiles<4, true> : kDirectTiles<4, false>;
  return w.half_groups ? kDirectTiles<8, true> : kDirectTiles<8, false>;
}

// Expands chunks [first, first + count) of one block into its places of a panel of `blocks` blocks; `to` is the place of its
// first codes, `sets` of its first scales.
template <int kBits>
void expand_block(const PackedView& w, const uint8_t* block, int64_t first, int64_t count, int64_t blocks, uint8_t* to,
                  uint8_t* sets) {
  constexpr int P = planes(kBits);
  const int64_t step = panel_step(static_cast<int>(blocks), kBits, w.half_groups);
  const int64_t parts = units(w.half_groups), fetched_a_chunk = w.block_bytes / w.chunks;
  const char* next = reinterpret_cast<const char*>(block) + blocks * w.block_bytes + first * fetched_a_chunk;
  Ahead ahead = {next, next};
  for (int64_t i = 0; i < count; ++i) {
    ahead.fetch(fetched_a_chunk);
    const uint8_t* from = block + (first + i) * w.code_bytes;
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
#pragma GCC unroll 2
      for (int p = 0; p < P; ++p) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(to + p * 256 + q * kQuadBytes), load_quad<kBits, true>(from, q, p));
      }
    }
    for (int64_t part = 0; part < parts; ++part) {
      const uint8_t* set = block + w.scales_at + ((first + i) * parts + part) / w.chunks_per_group * w.set_bytes;
      float* scales = reinterpret_cast<float*>(sets + part * blocks * 64);
      _mm256_store_ps(scales, load_scales(!w.half_floats, set, 0));
      _mm256_store_ps(scales + 8, w.has_offsets ? load_scales(!w.half_floats, set, 1) : _mm256_setzero_ps());
    }
    to += step;
    sets += step;
  }
}

// Products of `count` column blocks with some rows of quantized activations.
struct PackedProducts {
  const PackedView& w;
  const uint8_t* x;

  void operator()(int64_t block, int64_t count, int64_t row, int64_t rows, float* y) const {
    // Registers suffice for 6 rows and two blocks of one plane each, or one of two.
    const int64_t most = planes(w.bits) == 2 ? 1 : 2;
    const bool few = rows <= kDirectRows;
    for (int64_t b = 0; b < count;) {
      int64_t limit = few && rows <= 2 ? 2 : most;
      if (rows == 1 && w.block_bytes > kLargeBlock) limit = 1;  // one stream of memory, not two
      const int64_t width = count - b < limit ? count - b : limit;
      if (few) {
        direct(block + b, width, row, rows, y + b * 8);
      } else {
        panels(block + b, width, row, rows, y + b * 8);
      }
      b += width;
    }
  }

  Tile tile_at(int64_t row, int64_t chunk, float* y) const {
    Tile tile;
    tile.w = &w;
    tile.x_stride = w.chunks * kRecordBytes;
    tile.x = x + row * tile.x_stride + chunk * kRecordBytes;
    tile.y = y;
    tile.ahead = 0;
    return tile;
  }

  // All rows, in tiles of about the same size.
  void run(const TileTable& table, Tile tile, int64_t width, int64_t rows) const {
    for (int64_t tiles = (rows + kTileRows - 1) / kTileRows; tiles > 0; --tiles) {
      const int64_t some = (rows + tiles - 1) / tiles;
      table.of[some - 1][width - 1](tile);
      tile.x += some * tile.x_stride;
      tile.y += some * kLd;
      tile.ahead = 0;
      rows -= some;
    }
  }

  void direct(int64_t block, int64_t width, int64_t row, int64_t rows, float* y) const {
    Tile tile = tile_at(row, 0, y);
    tile.blocks[0] = w.data + block * w.block_bytes;
    tile.blocks[1] = tile.blocks[0] + w.block_bytes;
    tile.chunks = w.chunks;
    tile.ahead = width * w.block_bytes < kLeastAhead ? kLeastAhead : width * w.block_bytes;
    run(direct_tiles(w), tile, width, rows);
  }

  void panels(int64_t block, int64_t width, int64_t row, int64_t rows, float* y) const {
    alignas(64) uint8_t panel[kPanelBytes];
    const int64_t limit = kPanelBytes / panel_step(static_cast<int>(width), w.bits, w.half_groups);
    const int64_t parts = (w.chunks + limit - 1) / limit;
    const int64_t chunks = (w.chunks + parts - 1) / parts;
    const int64_t code_bytes = planes(w.bits) * 256;
    for (int64_t first = 0; first < w.chunks; first += chunks) {
      Tile tile = tile_at(row, first, y);
      tile.blocks[0] = panel;
      tile.chunks = w.chunks - first < chunks ? w.chunks - first : chunks;
      for (int64_t c = 0; c < width; ++c) {
        const uint8_t* from = w.data + (block + c) * w.block_bytes;
        (w.bits == 4 ? expand_block<4> : expand_block<8>)(w, from, first, tile.chunks, width, panel + c * code_bytes,
                                                         panel + width * code_bytes + c * 64);
      }
      run(panel_tiles(w), tile, width, rows);
    }
  }
};

// ---- dense weights ---------------------------------------------------------------------------------------------------

// y += x w for R rows and C blocks over inputs [0, count), one accumulator each, in order.
template <int R, int C>
void dense_tile(const float* const* blocks, const float* x, int64_t x_stride, int64_t count, float* y) {
  __m256 sums[R][C];
  const float* at[C];
#pragma GCC unroll 4
  for (int c = 0; c < C; ++c) at[c] = blocks[c];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sums[r][c] = _mm256_loadu_ps(y + r * kLd + c * 8);
  }
  for (int64_t i = 0; i < count; ++i) {
    __m256 values[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) values[c] = _mm256_load_ps(at[c] + i * 8);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m256 a = _mm256_broadcast_ss(x + r * x_stride + i);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sums[r][c] = _mm256_fmadd_ps(a, values[c], sums[r][c]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(y + r * kLd + c * 8, sums[r][c]);
  }
}

using DenseFunction = void (*)(const float* const*, const float*, int64_t, int64_t, float*);
constexpr DenseFunction kDenseTiles[6][2] = {{dense_tile<1, 1>, dense_tile<1, 2>}, {dense_tile<2, 1>, dense_tile<2, 2>},
                                             {dense_tile<3, 1>, dense_tile<3, 2>}, {dense_tile<4, 1>, dense_tile<4, 2>},
                                             {dense_tile<5, 1>, dense_tile<5, 2>}, {dense_tile<6, 1>, dense_tile<6, 2>}};

struct DenseProducts {
  const DenseView& w;
  const float* x;
  int64_t x_stride;

  void operator()(int64_t block, int64_t count, int64_t row, int64_t rows, float* y) const {
    const int64_t panel = rows <= 6 ? w.k : kDensePanel;
    for (int64_t first = 0; first < w.k; first += panel) {
      const int64_t inputs = w.k - first < panel ? w.k - first : panel;
      run(block, count, x + row * x_stride + first, rows, first, inputs, y);
    }
  }

  void run(int64_t block, int64_t count, const float* rows_at, int64_t rows, int64_t first, int64_t inputs,
           float* y) const {
    const float* blocks[4];
    for (int64_t c = 0; c < 4; ++c) blocks[c] = w.data + ((block + (c < count ? c : 0)) * w.k + first) * 8;
    if (rows <= 2 && count == 4) {
      (rows == 1 ? dense_tile<1, 4> : dense_tile<2, 4>)(blocks, rows_at, x_stride, inputs, y);
      return;
    }
    for (int64_t b = 0; b < count; b += 2) {
      const bool pair = count - b >= 2;
      const float* at[2] = {w.data + ((block + b) * w.k + first) * 8,
                            pair ? w.data + ((block + b + 1) * w.k + first) * 8 : nullptr};
      for (int64_t r = 0; r < rows; r += 6) {
        const int64_t some = rows - r < 6 ? rows - r : 6;
        kDenseTiles[some - 1][pair](at, rows_at + r * x_stride, x_stride, inputs, y + r * kLd + b * 8);
      }
    }
  }
};

// ---- both --------------------------------------------------------------------------------------------------------------

template <class Products>
void compute(const Products& products, int64_t block, int64_t count, int64_t row, int64_t rows, float* y) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < count; ++c) _mm256_store_ps(y + r * kLd + c * 8, _mm256_setzero_ps());
  }
  products(block, count, row, rows, y);
}

// Computes columns [begin, end) for all rows, strip by strip: products, then the epilogue straight into `out`.
template <class Products>
void drive(const Products& products, int64_t n, int64_t rows, int64_t row_block, int64_t begin, int64_t end,
           const Output& out) {
  alignas(64) float y[kMaxRows * kLd];
  alignas(64) float up[kMaxRows * kLd];
  const bool gated = out.epilogue->gated;
  const int64_t half = n / 2, shift = half % 8, blocks = (n + 7) / 8;
  for (int64_t row = 0; row < rows; row += row_block) {
    const int64_t some = rows - row < row_block ? rows - row : row_block;
    for (int64_t column = begin; column < end; column += 8 * kStrip) {
      const int64_t width = end - column < 8 * kStrip ? end - column : 8 * kStrip;
      for (int64_t r = row; r < row + some; ++r) {
        _mm_prefetch(reinterpret_cast<const char*>(out.data + r * out.stride + column), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(out.data + r * out.stride + column + 16), _MM_HINT_T0);
      }
      compute(products, column / 8, (width + 7) / 8, row, some, y);
      if (gated) {
        const int64_t first = (half + column) / 8;
        const int64_t wanted = (shift + width + 7) / 8;
        compute(products, first, first + wanted > blocks ? blocks - first : wanted, row, some, up);
      }
      finish_strip(*out.epilogue, {y, gated ? up + shift : nullptr, kLd, half, row, some, column, width}, out.data,
                   out.stride);
    }
  }
}

// Rows of `row_bytes` that stay in the second-level cache while all columns pass; a multiple of 12, evenly cut.
inline int64_t rows_at_once(int64_t rows, int64_t row_bytes) {
  int64_t most = (int64_t{256} << 10) / row_bytes / 12 * 12;
  most = most < 12 ? 12 : most > kMaxRows ? kMaxRows : most;
  const int64_t parts = (rows + most - 1) / most;
  return ((rows + parts - 1) / parts + 11) / 12 * 12;
}

void packed(const PackedView& w, const uint8_t* x, int64_t rows, int64_t column_begin, int64_t column_end,
            const Output& out) {
  drive(PackedProducts{w, x}, w.n, rows, rows_at_once(rows, w.chunks * kRecordBytes), column_begin, column_end, out);
}

void dense(const DenseView& w, const float* x, int64_t x_stride, int64_t rows, int64_t column_begin, int64_t column_end,
           const Output& out) {
  drive(DenseProducts{w, x, x_stride}, w.n, rows, rows_at_once(rows, w.k * 4), column_begin, column_end, out);
}

// ---- activations -------------------------------------------------------------------------------------------------------

TEXTMILL_INLINE __m256 load_some(const float* x, int64_t count) {  // up to 8 floats, zeros behind
  if (count >= 8) return _mm256_loadu_ps(x);
  return count <= 0 ? _mm256_setzero_ps() : _mm256_maskload_ps(x, lanes_below(count));
}

inline int32_t sum_bytes(__m128i bytes) {  // of 16 signed bytes
  const __m128i sums = _mm_madd_epi16(_mm_maddubs_epi16(_mm_set1_epi8(1), bytes), _mm_set1_epi16(1));
  const __m128i pairs = _mm_add_epi32(sums, _mm_shuffle_epi32(sums, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(pairs, _mm_shuffle_epi32(pairs, 0xb1)));
}

// Largest |x| of 32 as bits: for magnitudes, integers order as floats do, and NaN above Inf above all.
inline uint32_t largest_bits(const __m256* x) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i most = _mm256_and_si256(_mm256_castps_si256(x[0]), magnitude);
  for (int j = 1; j < 4; ++j) most = _mm256_max_epi32(most, _mm256_and_si256(_mm256_castps_si256(x[j]), magnitude));
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(most), _mm256_extracti128_si256(most, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(four));
}

// round(x / scale) of 32 floats as signed bytes in order.
TEXTMILL_INLINE __m256i chunk_codes(const __m256* x, float scale) {
  const __m256 divisor = _mm256_set1_ps(scale), most = _mm256_set1_ps(127.0f), least = _mm256_set1_ps(-127.0f);
  __m256i parts[4];
  for (int j = 0; j < 4; ++j) {
    const __m256 ratio = _mm256_div_ps(x[j], divisor);
    parts[j] = _mm256_cvtps_epi32(_mm256_min_ps(_mm256_max_ps(ratio, least), most));
  }
  const __m256i low = _mm256_packs_epi32(parts[0], parts[1]), high = _mm256_packs_epi32(parts[2], parts[3]);
  return _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7));
}

void quantize_chunk(const float* x, int64_t count, uint8_t* record) {
  __m256 values[4];
  for (int j = 0; j < 4; ++j) values[j] = load_some(x + 8 * j, count - 8 * j);
  const uint32_t bits = largest_bits(values);
  const bool finite = bits < 0x7f800000u;
  float largest;
  __builtin_memcpy(&largest, &bits, 4);
  const float scale = finite ? largest / 127.0f : __builtin_nanf("");
  const __m256i codes = scale > 0.0f ? chunk_codes(values, scale) : _mm256_setzero_si256();
  const int32_t low = sum_bytes(_mm256_castsi256_si128(codes)), high = sum_bytes(_mm256_extracti128_si256(codes, 1));
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(record), codes);
  _mm_storeu_ps(reinterpret_cast<float*>(record + kRecordScale),
                _mm_setr_ps(scale, static_cast<float>(low + high), static_cast<float>(low), static_cast<float>(high)));
}

void quantize(const float* x, int64_t x_stride, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* out) {
  const int64_t chunks = chunk_count(k);
  for (int64_t r = row_begin; r < row_end; ++r) {
    for (int64_t c = 0; c < chunks; ++c) {
      quantize_chunk(x + r * x_stride + c * kChunk, k - c * kChunk, out + (r * chunks + c) * kRecordBytes);
    }
  }
}

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
