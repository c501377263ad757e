// Attention over the paged cache: every query vector does the same arithmetic whatever tile, chunk or batch it is in.
#pragma once

#include "attention_tiles.h"
#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// Folds f(vector, running) over a row in four streams, joined in one fixed order; the tail is padded with `rest`.
template <typename F>
inline float reduce_row(const float* x, int64_t cols, float rest, F f) {
  f32x8 s0 = splat(0.0f), s1 = s0, s2 = s0, s3 = s0;
  int64_t i = 0;
  for (; i + 32 <= cols; i += 32) {
    s0 = f(load(x + i), s0);
    s1 = f(load(x + i + 8), s1);
    s2 = f(load(x + i + 16), s2);
    s3 = f(load(x + i + 24), s3);
  }
  for (; i + 8 <= cols; i += 8) s0 = f(load(x + i), s0);
  if (i < cols) s0 = f(load_part(x + i, cols - i, rest), s0);
  return sum((s0 + s2) + (s1 + s3));
}

inline float inverse_rms(const float* x, int64_t cols, float eps) {
  const float squares = reduce_row(x, cols, 0.0f, [](f32x8 a, f32x8 s) { return fma(a, a, s); });
  return 1.0f / std::sqrt(squares / static_cast<float>(cols) + eps);
}

// (x - mean) * factor for `cols` numbers that are normed together.
struct Spread {
  float mean = 0.0f, factor = 1.0f;
};

inline Spread spread_of(const HeadNorm& norm, const float* x, int64_t cols, float eps) {
  if (!norm.centered) return {0.0f, inverse_rms(x, cols, eps)};
  const float mean = reduce_row(x, cols, 0.0f, [](f32x8 a, f32x8 s) { return s + a; }) / static_cast<float>(cols);
  const f32x8 middle = splat(mean);
  const float squares = reduce_row(x, cols, mean, [=](f32x8 a, f32x8 s) { return fma(a - middle, a - middle, s); });
  return {mean, 1.0f / std::sqrt(squares / static_cast<float>(cols) + eps)};
}

// Heads x [count, head_dim] into out [count, dim]: optional norm, then the turn by cos, sin (of the row's position).
inline void turn_heads(const AttentionSpec& spec, const float* x, int64_t count, const HeadNorm& norm, int64_t position,
                       float* out) {
  const int64_t width = spec.head_dim, half = spec.rotary_half;
  const float* cos = spec.rope_cos + position * half;
  const float* sin = spec.rope_sin + position * half;
  const Spread shared = norm.weight && norm.whole ? spread_of(norm, x, count * width, spec.norm_eps) : Spread();
  for (int64_t h = 0; h < count; ++h) {
    const float* from = x + h * width;
    float* to = out + h * spec.dim();
    if (norm.weight) {
      const Spread own = norm.whole ? shared : spread_of(norm, from, width, spec.norm_eps);
      const int64_t first = norm.each ? h * width : 0;
      const float* weight = norm.weight + first;
      for (int64_t d = 0; d < width; ++d) to[d] = (from[d] - own.mean) * own.factor * weight[d];
      for (int64_t d = 0; norm.bias && d < width; ++d) to[d] += norm.bias[first + d];
    } else {
      for (int64_t d = 0; d < width; ++d) to[d] = from[d];
    }
    for (int64_t d = width; d < spec.dim(); ++d) to[d] = 0.0f;
    if (!spec.rope_cos) continue;
    const int64_t step = spec.rope_interleaved ? 2 : 1, apart = spec.rope_interleaved ? 1 : half;
    int64_t i = 0;
    for (; !spec.rope_interleaved && i + 8 <= half; i += 8) {
      const f32x8 a = load(to + i), b = load(to + i + half), c = load(cos + i), s = load(sin + i);
      store(to + i, a * c - b * s);
      store(to + i + half, b * c + a * s);
    }
    for (; i < half; ++i) {
      const float a = to[i * step], b = to[i * step + apart];
      to[i * step] = a * cos[i] - b * sin[i];
      to[i * step + apart] = b * cos[i] + a * sin[i];
    }
  }
}

template <typename T>
inline void store_cache(const AttentionSpec& spec, const float* keys, const float* values, int64_t offset, T* key_block,
                        T* value_block) {
  const int64_t dim = spec.dim(), size = spec.block_size;
  for (int64_t h = 0; h < spec.kv_heads; ++h) {
    T* k = key_block + h * size * dim + offset / kKeyLanes * kKeyLanes * dim + offset % kKeyLanes;
    T* v = value_block + (h * size + offset) * dim;
    for (int64_t d = 0; d < dim; ++d) put(k + d * kKeyLanes, keys[h * dim + d]);
    for (int64_t d = 0; d < spec.head_dim; ++d) put(v + d, values[h * spec.head_dim + d]);
    for (int64_t d = spec.head_dim; d < dim; ++d) put(v + d, 0.0f);
  }
}

// `q` doubles as the place where the keys are turned before they are stored.
inline void store_row(const AttentionSpec& spec, const StoreRow& row) {
  const float* keys = row.qkv + spec.heads * spec.head_dim;
  const float* values = keys + spec.kv_heads * spec.head_dim;
  const int64_t offset = row.position % spec.block_size;
  turn_heads(spec, keys, spec.kv_heads, spec.k_norm, row.position, row.q);
  if (spec.half_cache) {
    store_cache(spec, row.q, values, offset, static_cast<uint16_t*>(row.keys), static_cast<uint16_t*>(row.values));
  } else {
    store_cache(spec, row.q, values, offset, static_cast<float*>(row.keys), static_cast<float*>(row.values));
  }
  turn_heads(spec, row.qkv, spec.heads, spec.q_norm, row.position, row.q);
  for (int64_t i = 0; i < spec.heads * spec.dim(); ++i) row.q[i] *= spec.scale;
}

struct Scratch {
  float* q;       // [vectors, dim]
  float* scores;  // [vectors, 64]
  float* tile;    // [64 * dim]: a tile of keys, then of values in panels of 16 columns, as floats
  float* fade;    // [vectors] by how much what was summed before fades; as the others below, up to a multiple of 8
  float* now;     // the running maximum after the tile
  float* sum;     // of the tile's weights
};

// The running maxima and sums after a tile, and how much of what was summed before remains.
inline void advance(const Scratch& scratch, int64_t vectors, const Partial& out) {
  for (int64_t i = 0; i < vectors; i += 8) {
    const f32x8 now = load(scratch.now + i);
    const f32x8 faded = exp_negative(load(out.maximum + i) - now);
    const f32x8 fade = select(now == splat(-INFINITY), splat(1.0f), faded);
    store(scratch.fade + i, fade);
    store(out.maximum + i, now);
    store(out.sum + i, load(out.sum + i) * fade + load(scratch.sum + i));
  }
}

// N query vectors from `first` on, of a tile whose first key is `tile`: their scores, then their weights.
template <int N, typename T>
inline void weights_of(const AttentionSpec& spec, const AttendTask& task, const Groups<T>& keys, int64_t group_count,
                       int64_t tile, int64_t end, int64_t first, const Partial& out, const Scratch& scratch) {
  const int64_t dim = spec.dim(), group = spec.group();
  score<N>(scratch.q + first * dim, keys, group_count, dim, scratch.scores + first * kKeyTile);
  // All maxima first: a sum does not wait for its own row's.
  const int64_t count = group_count * kKeyLanes;
  int64_t row = first / group, head = first % group;
  for (int64_t i = first; i < first + N; ++i) {
    const float before = out.maximum[i];
    const float most = mask(spec, scratch.scores + i * kKeyTile, count, tile, task.position + row, end,
                            task.slopes ? task.slopes[head] : 0.0f);
    scratch.now[i] = most > before ? most : before;
    if (++head == group) head = 0, ++row;
  }
  for (int64_t i = first; i < first + N; ++i) {
    scratch.sum[i] = soften<N == 6 ? 4 : 2>(scratch.scores + i * kKeyTile, count, scratch.now[i]);
  }
}

// How many groups ahead of the work memory is fetched: far enough for its latency, near enough to be still in the cache.
constexpr int64_t kAhead = 16;

// The groups of keys [begin, end) in the order in which they are worked on: a tile's keys, then its values. At most `most`.
template <typename T>
inline int64_t list_groups(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end, int64_t most,
                           const T** groups) {
  const int64_t elements = kKeyLanes * spec.dim();
  const T* const pools[2] = {static_cast<const T*>(task.keys), static_cast<const T*>(task.values)};
  int64_t count = 0;
  int64_t block = begin / kKeyTile * kKeyTile / spec.block_size;
  int64_t within = begin / kKeyTile * kKeyTile - block * spec.block_size;
  for (int64_t tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    const int64_t tile_groups = ((end - tile < kKeyTile ? end - tile : kKeyTile) + kKeyLanes - 1) / kKeyLanes;
    if (count + 2 * tile_groups > most) return count;
    for (int64_t g = 0; g < tile_groups; ++g) {
      const int64_t offset = task.blocks[block] * task.block_stride + within / kKeyLanes * elements;
      groups[count + g] = pools[0] + offset;
      groups[count + tile_groups + g] = pools[1] + offset;
      within += kKeyLanes;
      if (within == spec.block_size) within = 0, ++block;
    }
    count += 2 * tile_groups;
  }
  return count;
}

// Fetches a share of what lies ahead of a tile: many queries leave time for it between their products.
template <typename T>
inline void fetch_share(const Groups<T>& tile, int64_t share, int64_t dim) {
  if (share >= 8) return;
  const char* at = tile.ahead[share / 2] + share % 2 * dim * 16;
  for (int64_t i = 0; i < dim * 16; i += 64) prefetch(at + i);
}

// Keys [begin, end) of one range, from nothing.
template <typename T>
inline void attend_range(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end,
                         const Partial& out, const Scratch& scratch) {
  const int64_t dim = spec.dim(), vectors = task.rows * spec.group();
  const bool many = vectors > 6 && sizeof(T) == 2;
  for (int64_t i = 0; i < padded_vectors(vectors); ++i) {
    out.maximum[i] = -INFINITY;
    out.sum[i] = 0.0f;
  }
  std::memset(out.values, 0, static_cast<size_t>(vectors * dim) * 4);
  const T* groups[kKeyRange / kKeyLanes * 2 + kAhead];
  int64_t listed = list_groups(spec, task, begin, end, kKeyRange / kKeyLanes * 2, groups);
  const int64_t needed = listed + kAhead;
  if (end < task.end) {
    listed += list_groups(spec, task, end, task.end, kAhead, groups + listed);
  } else if (task.next) {
    listed += list_groups(spec, *task.next, task.next->begin, task.next->end, kAhead, groups + listed);
  }
  for (; listed < needed; ++listed) groups[listed] = groups[listed - 1];
  const T* const* at = groups;
  for (int64_t tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    const int64_t count = end - tile < kKeyTile ? end - tile : kKeyTile;
    const int64_t group_count = (count + kKeyLanes - 1) / kKeyLanes;
    Groups<T> keys, values;
    Groups<float> wide_keys, wide_values;
    for (int64_t g = 0; g < group_count; ++g) {
      keys.at[g] = at[g];
      values.at[g] = at[group_count + g];
      keys.ahead[g] = reinterpret_cast<const char*>(at[kAhead + g]);
      values.ahead[g] = reinterpret_cast<const char*>(at[kAhead + group_count + g]);
      wide_keys.ahead[g] = wide_values.ahead[g] = nullptr;
      wide_keys.at[g] = scratch.tile + g * kKeyLanes * dim;
      wide_values.at[g] = scratch.tile + g * kKeyLanes * 16;
    }
    at += 2 * group_count;
    values.stride = dim;
    wide_values.stride = 16;
    if (many) {
      for (int64_t g = 0; g < group_count; ++g) {
        if constexpr (sizeof(T) == 2) widen_keys(keys.at[g], dim, scratch.tile + g * kKeyLanes * dim);
      }
    }
    by_sixes(vectors, [&](int64_t first, auto n) {
      if (many) {
        if (group_count == 4) fetch_share(keys, first / 6, dim);
        weights_of<n>(spec, task, wide_keys, group_count, tile, end, first, out, scratch);
      } else {
        weights_of<n>(spec, task, keys, group_count, tile, end, first, out, scratch);
      }
    });
    advance(scratch, vectors, out);
    if (many) {
      for (int64_t g = 0; g < group_count; ++g) {
        if constexpr (sizeof(T) == 2) widen_values(values.at[g], dim, scratch.tile + g * kKeyLanes * 16);
      }
    }
    by_sixes(vectors, [&](int64_t first, auto n) {
      const float* weights = scratch.scores + first * kKeyTile;
      float* to = out.values + first * dim;
      if (many) {
        if (group_count == 4) fetch_share(values, first / 6, dim);
        weigh<n>(weights, wide_values, count, dim, 16 * kKeyTile, scratch.fade + first, to);
      } else {
        weigh<n>(weights, values, count, dim, 16, scratch.fade + first, to);
      }
    });
  }
}

inline void merge(const Partial& into, const Partial& next, int64_t vectors, int64_t dim) {
  for (int64_t i = 0; i < vectors; ++i) {
    const float a = into.maximum[i], b = next.maximum[i];
    if (b == -INFINITY) continue;  // nothing was visible there
    const float now = a > b ? a : b;
    const float keep = exp_negative(splat(a - now))[0], take = exp_negative(splat(b - now))[0];
    into.maximum[i] = now;
    into.sum[i] = into.sum[i] * keep + next.sum[i] * take;
    float* to = into.values + i * dim;
    const float* from = next.values + i * dim;
    for (int64_t d = 0; d < dim; d += 8) {
      store(to + d, fma(load(from + d), splat(take), load(to + d) * splat(keep)));
    }
  }
}

inline void attend(const AttentionSpec& spec, const AttendTask& task, const Partial& out, float* memory) {
  const int64_t group = spec.group(), dim = spec.dim(), vectors = task.rows * group, padded = padded_vectors(vectors);
  Scratch scratch;
  scratch.q = memory;
  scratch.scores = scratch.q + vectors * dim;
  scratch.tile = scratch.scores + vectors * kKeyTile;
  scratch.fade = scratch.tile + kKeyTile * ((dim + 15) / 16 * 16);
  scratch.now = scratch.fade + padded;
  scratch.sum = scratch.now + padded;
  std::memset(scratch.fade, 0, static_cast<size_t>(3 * padded) * 4);
  const Partial next = partial_at(scratch.sum + padded, vectors);
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memcpy(scratch.q + r * group * dim, task.q + r * task.q_stride, static_cast<size_t>(group * dim) * 4);
  }
  bool first = true;
  for (int64_t range = task.begin / kKeyRange * kKeyRange; range < task.end; range += kKeyRange) {
    const int64_t begin = task.begin > range ? task.begin : range;
    const int64_t end = task.end < range + kKeyRange ? task.end : range + kKeyRange;
    const Partial& to = first ? out : next;
    if (spec.half_cache) {
      attend_range<uint16_t>(spec, task, begin, end, to, scratch);
    } else {
      attend_range<float>(spec, task, begin, end, to, scratch);
    }
    if (!first) merge(out, next, vectors, dim);
    first = false;
  }
}

inline void normalize(const AttentionSpec& spec, const Partial& from, int64_t rows, float* out, int64_t out_stride) {
  const int64_t group = spec.group(), dim = spec.dim();
  for (int64_t i = 0; i < rows * group; ++i) {
    const float factor = 1.0f / from.sum[i];
    float* to = out + i / group * out_stride + i % group * spec.head_dim;
    for (int64_t d = 0; d < spec.head_dim; ++d) to[d] = from.values[i * dim + d] * factor;
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
