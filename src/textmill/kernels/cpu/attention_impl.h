// Attention over the paged cache: every query vector does the same arithmetic whatever tile, chunk or batch it is in.
#pragma once

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

// Heads x [count, head_dim] into out [count, dim]: optional norm, then the turn by cos, sin (of the row's position).
inline void turn_heads(const AttentionSpec& spec, const float* x, int64_t count, const float* norm, bool norm_all,
                       int64_t position, float* out) {
  const int64_t width = spec.head_dim, half = spec.rotary_half;
  const float* cos = spec.rope_cos + position * half;
  const float* sin = spec.rope_sin + position * half;
  const float shared = norm && norm_all ? inverse_rms(x, count * width, spec.norm_eps) : 1.0f;
  for (int64_t h = 0; h < count; ++h) {
    const float* from = x + h * width;
    float* to = out + h * spec.dim();
    if (norm) {
      const float factor = norm_all ? shared : inverse_rms(from, width, spec.norm_eps);
      const float* weight = norm + (norm_all ? h * width : 0);
      for (int64_t d = 0; d < width; ++d) to[d] = from[d] * factor * weight[d];
    } else {
      for (int64_t d = 0; d < width; ++d) to[d] = from[d];
    }
    for (int64_t d = width; d < spec.dim(); ++d) to[d] = 0.0f;
    if (!spec.rope_cos) continue;
    const int64_t step = spec.rope_interleaved ? 2 : 1, apart = spec.rope_interleaved ? 1 : half;
    for (int64_t i = 0; i < half; ++i) {
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
  turn_heads(spec, keys, spec.kv_heads, spec.k_norm, spec.k_norm_all, row.position, row.q);
  if (spec.half_cache) {
    store_cache(spec, row.q, values, offset, static_cast<uint16_t*>(row.keys), static_cast<uint16_t*>(row.values));
  } else {
    store_cache(spec, row.q, values, offset, static_cast<float*>(row.keys), static_cast<float*>(row.values));
  }
  turn_heads(spec, row.qkv, spec.heads, spec.q_norm, spec.q_norm_all, row.position, row.q);
  for (int64_t i = 0; i < spec.heads * spec.dim(); ++i) row.q[i] *= spec.scale;
}

// Vectors in hand for N queries: as many sums in flight as sixteen registers hold beside the operands.
template <int N>
constexpr int kAtOnce = N <= 2 ? 4 : N == 3 ? 3 : 2;

// Scores of N query vectors (dim apart) against V times 8 keys; sums over dim in order. `first` counts eights of keys.
template <int N, int V, typename T>
inline void score_keys(const float* q, const T* const* groups, int64_t first, int64_t dim, float* scores) {
  f32x8 acc[N][V];
  const T* keys[V];
  for (int v = 0; v < V; ++v) {
    keys[v] = groups[(first + v) / 2] + (first + v) % 2 * 8;
    for (int i = 0; i < N; ++i) acc[i][v] = splat(0.0f);
  }
  for (int64_t d = 0; d < dim; ++d) {
    f32x8 k[V];
    for (int v = 0; v < V; ++v) k[v] = load(keys[v] + d * kKeyLanes);
#pragma GCC unroll 6
    for (int i = 0; i < N; ++i) {
      const f32x8 x = splat(q[i * dim + d]);
      for (int v = 0; v < V; ++v) acc[i][v] = fma(k[v], x, acc[i][v]);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(scores + i * kKeyTile + (first + v) * 8, acc[i][v]);
  }
}

// All groups of a tile.
template <int N, typename T>
inline void score(const float* q, const T* const* groups, int64_t group_count, int64_t dim, float* scores) {
  constexpr int V = kAtOnce<N>;
  int64_t at = 0;
  for (; at + V <= group_count * 2; at += V) score_keys<N, V>(q, groups, at, dim, scores);
  for (; at < group_count * 2; ++at) score_keys<N, 1>(q, groups, at, dim, scores);
}

// out[i] = out[i] * fade[i] + sum over keys, in order, of weights[i][key] * values[key], for 8 * V columns.
template <int N, int V, typename T>
inline void weigh_columns(const float* weights, const T* const* groups, int64_t count, int64_t dim, int64_t column,
                          const float* fade, float* out) {
  f32x8 acc[N][V];
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) acc[i][v] = load(out + i * dim + column + 8 * v) * splat(fade[i]);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyLanes) {
    const T* row = groups[begin / kKeyLanes] + column;
    const int64_t end = begin + kKeyLanes < count ? begin + kKeyLanes : count;
    for (int64_t j = begin; j < end; ++j, row += dim) {
      f32x8 x[V];
      for (int v = 0; v < V; ++v) x[v] = load(row + 8 * v);
#pragma GCC unroll 6
      for (int i = 0; i < N; ++i) {
        const f32x8 w = splat(weights[i * kKeyTile + j]);
        for (int v = 0; v < V; ++v) acc[i][v] = fma(w, x[v], acc[i][v]);
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(out + i * dim + column + 8 * v, acc[i][v]);
  }
}

template <int N, typename T>
inline void weigh(const float* weights, const T* const* groups, int64_t count, int64_t dim, const float* fade,
                  float* out) {
  constexpr int V = kAtOnce<N>;
  int64_t column = 0;
  for (; column + 8 * V <= dim; column += 8 * V) weigh_columns<N, V>(weights, groups, count, dim, column, fade, out);
  for (; column + 16 <= dim; column += 16) weigh_columns<N, 2>(weights, groups, count, dim, column, fade, out);
  if (column < dim) weigh_columns<N, 1>(weights, groups, count, dim, column, fade, out);
}

// A tile of up to 64 keys against all query vectors, six at a time: 12 sums, 2 operands and 1 factor fit 16 registers.
template <typename T>
inline void score_tile(const float* q, int64_t vectors, const T* const* groups, int64_t group_count, int64_t dim,
                       float* scores) {
  for (int64_t i = 0; i < vectors; i += 6) {
    const float* from = q + i * dim;
    float* to = scores + i * kKeyTile;
    switch (vectors - i) {
      case 1: score<1>(from, groups, group_count, dim, to); break;
      case 2: score<2>(from, groups, group_count, dim, to); break;
      case 3: score<3>(from, groups, group_count, dim, to); break;
      case 4: score<4>(from, groups, group_count, dim, to); break;
      case 5: score<5>(from, groups, group_count, dim, to); break;
      default: score<6>(from, groups, group_count, dim, to); break;
    }
  }
}

template <typename T>
inline void weigh_tile(const float* weights, int64_t vectors, const T* const* groups, int64_t count, int64_t dim,
                       const float* fade, float* out) {
  for (int64_t i = 0; i < vectors; i += 6) {
    const float* from = weights + i * kKeyTile;
    float* to = out + i * dim;
    switch (vectors - i) {
      case 1: weigh<1>(from, groups, count, dim, fade + i, to); break;
      case 2: weigh<2>(from, groups, count, dim, fade + i, to); break;
      case 3: weigh<3>(from, groups, count, dim, fade + i, to); break;
      case 4: weigh<4>(from, groups, count, dim, fade + i, to); break;
      case 5: weigh<5>(from, groups, count, dim, fade + i, to); break;
      default: weigh<6>(from, groups, count, dim, fade + i, to); break;
    }
  }
}

// Scores as the model means them: capped, leaning with distance, -Inf where the query may not look. Returns the largest.
inline float mask(const AttentionSpec& spec, float* scores, int64_t count, int64_t tile, int64_t position, int64_t end,
                  float slope) {
  const int64_t last = position < end - 1 ? position : end - 1;
  const int64_t first = spec.window > 0 ? position - spec.window + 1 : 0;
  const bool whole = first <= tile && tile + count - 1 <= last;
  const i32x8 upper = splat(static_cast<int32_t>(last - tile)), lower = splat(static_cast<int32_t>(first - tile));
  const f32x8 cap = splat(spec.softcap), lean = splat(slope);
  f32x8 top = splat(-INFINITY);
  if (whole && spec.softcap <= 0 && slope == 0) {
    for (int64_t i = 0; i < count; i += 8) top = maximum(load(scores + i), top);
    return largest(top);
  }
  for (int64_t i = 0; i < count; i += 8) {
    const i32x8 key = iota(static_cast<int32_t>(i));
    f32x8 s = load(scores + i);
    if (spec.softcap > 0) s = tanh(s / cap) * cap;
    if (slope != 0) s += lean * __builtin_convertvector(key + splat(static_cast<int32_t>(tile - position)), f32x8);
    s = select((key <= upper) & (key >= lower), s, splat(-INFINITY));
    store(scores + i, s);
    top = maximum(s, top);
  }
  return largest(top);
}

// Turns one query's scores of a tile (first key at `tile`, `count` of them computed) into weights relative to the
// running maximum, and returns by how much what was summed before fades.
inline float soften(const AttentionSpec& spec, float* scores, int64_t count, int64_t tile, int64_t position, int64_t end,
                    float slope, float* running, float* total) {
  const float before = *running, most = mask(spec, scores, count, tile, position, end, slope);
  const float now = most > before ? most : before;
  f32x8 weight_sum = splat(0.0f);
  if (now == -INFINITY) {  // nothing of this tile is visible, nor was anything before
    for (int64_t i = 0; i < count; i += 8) store(scores + i, weight_sum);
    return 1.0f;
  }
  for (int64_t i = 0; i < count; i += 8) {
    const f32x8 w = exp_negative(load(scores + i) - splat(now));
    store(scores + i, w);
    weight_sum += w;
  }
  const float fade = before == now ? 1.0f : exp_negative(splat(before - now))[0];
  *running = now;
  *total = *total * fade + sum(weight_sum);
  return fade;
}

struct Scratch {
  float* q;       // [vectors, dim]
  float* scores;  // [vectors, 64]
  float* tile;    // [64 * dim]: a tile of keys, then of values, as floats
  float* fade;    // [vectors]
};

inline void widen(const uint16_t* from, int64_t count, float* to) {
  for (int64_t i = 0; i < count; i += 8) store(to + i, load(from + i));
}
inline void widen(const float* from, int64_t count, float* to) { std::memcpy(to, from, static_cast<size_t>(count) * 4); }

// Pointers to the groups of 16 keys (or values) of a tile. Many queries: as floats, converted once.
template <typename T>
struct Groups {
  const T* stored[kKeyTile / kKeyLanes];
  const float* wide[kKeyTile / kKeyLanes];
};

template <typename T>
inline void find_groups(const AttentionSpec& spec, const AttendTask& task, const void* pool, int64_t tile, int64_t count,
                        bool many, float* buffer, Groups<T>* out) {
  const int64_t elements = kKeyLanes * spec.dim();
  for (int64_t g = 0; g < count; ++g) {
    const int64_t key = tile + g * kKeyLanes;
    const T* from = static_cast<const T*>(pool) + task.blocks[key / spec.block_size] * task.block_stride +
                    key % spec.block_size / kKeyLanes * elements;
    out->stored[g] = from;
    out->wide[g] = buffer + g * elements;
    if (many) widen(from, elements, buffer + g * elements);
  }
}

// Keys [begin, end) of one range, from nothing.
template <typename T>
inline void attend_range(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end,
                         const Partial& out, const Scratch& scratch) {
  const int64_t group = spec.group(), dim = spec.dim(), vectors = task.rows * group;
  const bool many = vectors > 6 && sizeof(T) == 2;
  for (int64_t i = 0; i < vectors; ++i) {
    out.maximum[i] = -INFINITY;
    out.sum[i] = 0.0f;
  }
  std::memset(out.values, 0, static_cast<size_t>(vectors * dim) * 4);
  for (int64_t tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    const int64_t count = end - tile < kKeyTile ? end - tile : kKeyTile;
    const int64_t groups = (count + kKeyLanes - 1) / kKeyLanes;
    Groups<T> at;
    find_groups(spec, task, task.keys, tile, groups, many, scratch.tile, &at);
    if (many) {
      score_tile(scratch.q, vectors, at.wide, groups, dim, scratch.scores);
    } else {
      score_tile(scratch.q, vectors, at.stored, groups, dim, scratch.scores);
    }
    for (int64_t i = 0; i < vectors; ++i) {
      scratch.fade[i] = soften(spec, scratch.scores + i * kKeyTile, groups * kKeyLanes, tile, task.position + i / group, end,
                               task.slopes ? task.slopes[i % group] : 0.0f, out.maximum + i, out.sum + i);
    }
    find_groups(spec, task, task.values, tile, groups, many, scratch.tile, &at);
    if (many) {
      weigh_tile(scratch.scores, vectors, at.wide, count, dim, scratch.fade, out.values);
    } else {
      weigh_tile(scratch.scores, vectors, at.stored, count, dim, scratch.fade, out.values);
    }
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
  const int64_t group = spec.group(), dim = spec.dim(), vectors = task.rows * group;
  Scratch scratch;
  scratch.q = memory;
  scratch.scores = scratch.q + vectors * dim;
  scratch.tile = scratch.scores + vectors * kKeyTile;
  scratch.fade = scratch.tile + kKeyTile * dim;
  const Partial next = partial_at(scratch.fade + vectors, vectors);
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
