// Packed products on x86: cuts rows and blocks into tiles, and expands codes for many rows. Included by matmul_x86.h only.
#pragma once

#include "matmul_tiles_x86.h"

namespace textmill {
namespace matmul_detail {
namespace {

constexpr int64_t kDirectRows = 24;        // up to so many rows use the packed codes directly, without a panel
constexpr int64_t kLeastAhead = 8 << 10;   // bytes fetched ahead of direct tiles
constexpr int64_t kLargeBlock = 16 << 10;  // bytes of a block; one row then reads one block at a time

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
  const int64_t units_a_set = w.chunks_per_group;  // 1 where a chunk has two units
  const uint8_t* set = block + w.scales_at + first * parts / units_a_set * w.set_bytes;
  int64_t left_in_set = units_a_set - first * parts % units_a_set;
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
      float* scales = reinterpret_cast<float*>(sets + part * blocks * 64);
      _mm256_store_ps(scales, load_scales(!w.half_floats, set, 0));
      _mm256_store_ps(scales + 8, w.has_offsets ? load_scales(!w.half_floats, set, 1) : _mm256_setzero_ps());
      if (--left_in_set == 0) {
        left_in_set = units_a_set;
        set += w.set_bytes;
      }
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

}  // namespace
}  // namespace matmul_detail
}  // namespace textmill
