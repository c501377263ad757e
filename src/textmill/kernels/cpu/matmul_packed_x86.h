// Packed products on x86: cuts rows and blocks into tiles, and expands codes for many rows. Included by matmul_x86.h only.
#pragma once

#include <cstdlib>

#include "matmul_tiles_x86.h"

namespace textmill {
namespace matmul_detail {
namespace {

constexpr int64_t kDirectRows = 24;        // up to so many rows use the packed codes directly, without a panel
constexpr int64_t kDirectRowsWords = 16;   // where panels hold words: direct tiles of two planes are much slower
constexpr int64_t kLeastAhead = 8 << 10;   // bytes fetched ahead of direct tiles
constexpr int64_t kLargeBlock = 16 << 10;  // bytes of a block; one row then reads one block at a time

// Expands the codes of one chunk of a block.
template <int kBits>
TEXTMILL_INLINE void expand_codes(const uint8_t* from, __m256i zero, uint8_t* to) {
  if (panel_codes(kBits) == Codes::kWords) {  // pairs: a quad's inputs 0 and 1 of all columns, then 2 and 3
    const __m256i pairs = _mm256_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15,
                                           0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15);
#pragma GCC unroll 8
    for (int q = 0; q < 8; ++q) {
      const __m256i quad = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + q * kQuadBytes));
      const __m256i sorted = _mm256_permute4x64_epi64(_mm256_shuffle_epi8(quad, pairs), 0xd8);
      const __m256i low = _mm256_cvtepu8_epi16(_mm256_castsi256_si128(sorted));
      const __m256i high = _mm256_cvtepu8_epi16(_mm256_extracti128_si256(sorted, 1));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * 64), _mm256_sub_epi16(low, zero));
      _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * 64 + 32), _mm256_sub_epi16(high, zero));
    }
    return;
  }
#pragma GCC unroll 8
  for (int q = 0; q < 8; ++q) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(to + q * kQuadBytes), load_codes<packed_codes(kBits)>(from, q, 0));
  }
}

// Expands chunks [first, first + count) of one block into its places of a panel of `blocks` blocks; `to` is the place of its
// first codes, `sets` of its first scales.
template <int kBits>
void expand_block(const PackedView& w, const uint8_t* block, int64_t first, int64_t count, int64_t blocks, uint8_t* to,
                  uint8_t* sets) {
  const __m256i zero = _mm256_set1_epi16(static_cast<int16_t>(w.zero));
  const __m256 whole_zero = _mm256_set1_ps(static_cast<float>(w.zero));
  const int64_t step = panel_step(static_cast<int>(blocks), kBits, w.half_groups);
  const int64_t parts = units(w.half_groups);
  const int64_t units_a_set = w.chunks_per_group;  // 1 where a chunk has two units
  const uint8_t* set = block + w.scales_at + first * parts / units_a_set * w.set_bytes;
  int64_t left_in_set = units_a_set - first * parts % units_a_set;
  for (int64_t i = 0; i < count; ++i) {
    expand_codes<kBits>(block + (first + i) * w.code_bytes, zero, to);
    for (int64_t part = 0; part < parts; ++part) {
      float* scales = reinterpret_cast<float*>(sets + part * blocks * 64);
      if (w.whole) {
        _mm256_store_si256(reinterpret_cast<__m256i*>(scales), Isa::load_whole(set));
        _mm256_store_ps(scales + 8, whole_offsets(w.has_offsets, whole_zero, set));
      } else {
        _mm256_store_ps(scales, load_scales(!w.half_floats, set, 0));
        _mm256_store_ps(scales + 8, w.has_offsets ? load_scales(!w.half_floats, set, 1) : _mm256_setzero_ps());
      }
      if (--left_in_set == 0) {
        left_in_set = units_a_set;
        set += w.set_bytes;
      }
    }
    to += step;
    sets += step;
  }
}

// Rows of quantized activations with 16-bit words for codes; a buffer of the thread's own that grows as calls need it.
class WideRows {
 public:
  ~WideRows() { std::free(data_); }
  const uint8_t* widen(const uint8_t* records, int64_t count) {
    if (count > capacity_) {
      std::free(data_);
      data_ = static_cast<uint8_t*>(std::malloc(static_cast<size_t>(count * kWideRecord)));
      capacity_ = data_ ? count : 0;
    }
    uint8_t* to = data_;
    if (!to) return nullptr;
    for (int64_t i = 0; i < count; ++i, records += kRecordBytes, to += kWideRecord) {
      for (int half = 0; half < 2; ++half) {
        const __m128i codes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(records) + half);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to) + half, _mm256_cvtepi8_epi16(codes));
      }
      __builtin_memcpy(to + 64, records + kRecordScale, 16);
    }
    return data_;
  }

 private:
  uint8_t* data_ = nullptr;
  int64_t capacity_ = 0;
};

// Products of `count` column blocks with some rows of quantized activations.
struct PackedProducts {
  const PackedView& w;
  const uint8_t* x;
  const bool words = panel_codes(w.bits) == Codes::kWords;
  mutable const uint8_t* wide = nullptr;  // the widened form of `wide_rows` rows from `wide_row` on
  mutable int64_t wide_row = -1, wide_rows = 0;

  void operator()(int64_t block, int64_t count, int64_t row, int64_t rows, float* y) const {
    const bool panel = rows > (words ? kDirectRowsWords : kDirectRows) && (!words || widen(row, rows));
    // Registers suffice for 6 rows and two blocks of one plane each, or one of two.
    int64_t limit = !panel && packed_codes(w.bits) == Codes::kPlanes && rows > 2 ? 1 : 2;
    if (rows == 1 && w.block_bytes > kLargeBlock) limit = 1;  // one stream of memory, not two
    for (int64_t b = 0; b < count;) {
      const int64_t width = count - b < limit ? count - b : limit;
      if (panel) {
        panels(block + b, width, row, rows, y + b * 8);
      } else {
        direct(block + b, width, row, rows, y + b * 8);
      }
      if (w.whole) leave_units(block + b, width, rows, y + b * 8);
      b += width;
    }
  }

  // What was counted in the columns' units.
  void leave_units(int64_t block, int64_t width, int64_t rows, float* y) const {
    for (int64_t c = 0; c < width; ++c) {
      const __m128i eight = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.powers + (block + c) * kColumnBlock));
      const __m256i power = _mm256_add_epi32(_mm256_cvtepi8_epi32(eight), _mm256_set1_epi32(127));
      const __m256 unit = _mm256_castsi256_ps(_mm256_slli_epi32(power, 23));
      for (float* at = y + c * 8; at < y + rows * kLd; at += kLd) {
        _mm256_store_ps(at, _mm256_mul_ps(_mm256_load_ps(at), unit));
      }
    }
  }

  bool widen(int64_t row, int64_t rows) const {
    if (row == wide_row && rows == wide_rows) return true;
    static thread_local WideRows buffer;
    wide = buffer.widen(x + row * w.chunks * kRecordBytes, rows * w.chunks);
    wide_row = row;
    wide_rows = rows;
    return wide != nullptr;
  }

  static int64_t tiles_of(int64_t rows) { return (rows + kTileRows - 1) / kTileRows; }

  // All rows, in tiles of about the same size; `bytes` are fetched ahead with each tile.
  void run(const TileTable& table, Tile tile, int64_t width, int64_t rows, Ahead* ahead, int64_t bytes) const {
    int64_t done = 0;
    for (int64_t tiles = tiles_of(rows); tiles > 0; --tiles) {
      ahead->fetch(bytes);
      const int64_t some = (rows - done + tiles - 1) / tiles;
      table.of[some - 1][width - 1](tile);
      tile.x += some * tile.x_stride;
      tile.y += some * kLd;
      tile.ahead = 0;
      done += some;
    }
  }

  void direct(int64_t block, int64_t width, int64_t row, int64_t rows, float* y) const {
    Tile tile = {};
    tile.w = &w;
    tile.y = y;
    tile.x_stride = w.chunks * kRecordBytes;
    tile.x = x + row * tile.x_stride;
    tile.blocks[0] = w.data + block * w.block_bytes;
    tile.blocks[1] = tile.blocks[0] + w.block_bytes;
    tile.chunks = w.chunks;
    tile.ahead = width * w.block_bytes < kLeastAhead ? kLeastAhead : width * w.block_bytes;
    Ahead nothing = {};
    run(direct_tiles(w), tile, width, rows, &nothing, 0);
  }

  void panels(int64_t block, int64_t width, int64_t row, int64_t rows, float* y) const {
    alignas(64) uint8_t panel[kPanelBytes];
    const int64_t limit = kPanelBytes / panel_step(static_cast<int>(width), w.bits, w.half_groups);
    const int64_t parts = (w.chunks + limit - 1) / limit;
    const int64_t chunks = (w.chunks + parts - 1) / parts;
    const int64_t code_bytes = panel_code_bytes(w.bits), record = words ? kWideRecord : kRecordBytes;
    Tile tile = {};
    tile.w = &w;
    tile.y = y;
    tile.x_stride = w.chunks * record;
    tile.blocks[0] = panel;
    // The next blocks come from memory while this panel is computed with; all at once they would be waited for.
    const char* next = reinterpret_cast<const char*>(w.data + (block + width) * w.block_bytes);
    Ahead ahead = {next, next};
    const int64_t bytes = width * w.block_bytes / (parts * tiles_of(rows)) + 1;
    for (int64_t first = 0; first < w.chunks; first += chunks) {
      tile.x = (words ? wide : x + row * tile.x_stride) + first * record;
      tile.chunks = w.chunks - first < chunks ? w.chunks - first : chunks;
      for (int64_t c = 0; c < width; ++c) {
        const uint8_t* from = w.data + (block + c) * w.block_bytes;
        (w.bits == 4 ? expand_block<4> : expand_block<8>)(w, from, first, tile.chunks, width, panel + c * code_bytes,
                                                         panel + width * code_bytes + c * 64);
      }
      run(panel_tiles(w), tile, width, rows, &ahead, bytes);
    }
  }
};

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
