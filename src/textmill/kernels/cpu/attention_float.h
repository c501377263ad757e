// Attention over caches of floats: any number of query vectors, each with the same arithmetic in the same order.
#pragma once

#include "attention_tiles.h"
#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

struct FloatScratch {
  float* q;       // [vectors, dim]
  float* scores;  // [vectors, 64]
  float* fade;    // [vectors] by how much what was summed before fades; as the others below, up to a multiple of 8
  float* now;     // the running maximum after the tile
  float* sum;     // of the tile's weights
};

// acc[i][v] += factors[i * stride] * operands[8 * v]; whichever of the two are fewer stay in registers meanwhile.
template <int N, int V>
inline void multiply_add(const float* factors, int64_t stride, const float* operands, f32x8 (&acc)[N][V]) {
  if constexpr (N < V) {
    f32x8 x[N];
    for (int i = 0; i < N; ++i) x[i] = splat(factors[i * stride]);
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) {
      const f32x8 k = load(operands + 8 * v);
      for (int i = 0; i < N; ++i) acc[i][v] = fma(k, x[i], acc[i][v]);
    }
  } else {
    f32x8 k[V];
    for (int v = 0; v < V; ++v) k[v] = load(operands + 8 * v);
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) {
      const f32x8 x = splat(factors[i * stride]);
      for (int v = 0; v < V; ++v) acc[i][v] = fma(k[v], x, acc[i][v]);
    }
  }
}

// Scores of N query vectors (dim apart) against V / 2 groups of keys; sums over dim in order.
template <int N, int V>
inline void score_keys(const float* q, const Groups<float>& keys, int64_t group, int64_t dim, float* scores) {
  static_assert(V == 2 || V == 4);
  f32x8 acc[N][V] = {};
  const float* first = keys.at[group];
  const int64_t apart = V == 4 ? keys.at[group + 1] - first : 0;
  const char* ahead[2] = {keys.ahead[group], V == 4 ? keys.ahead[group + 1] : keys.ahead[group]};
  for (int64_t d = 0; d < dim; ++d) {
    prefetch(ahead[0] + d * 64);
    if constexpr (V == 2) {
      multiply_add(q + d, dim, first + d * kKeyLanes, acc);
    } else {
      prefetch(ahead[1] + d * 64);
      f32x8 x[N];
      for (int i = 0; i < N; ++i) x[i] = splat(q[i * dim + d]);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        const f32x8 k = load(first + d * kKeyLanes + v / 2 * apart + v % 2 * 8);
        for (int i = 0; i < N; ++i) acc[i][v] = fma(k, x[i], acc[i][v]);
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(scores + i * kKeyTile + group * kKeyLanes + v * 8, acc[i][v]);
  }
}

// All groups of a tile.
template <int N>
inline void score(const float* q, const Groups<float>& keys, int64_t group_count, int64_t dim, float* scores) {
  int64_t group = 0;
  if constexpr (kAtOnce<N> == 4) {
    for (; group + 2 <= group_count; group += 2) score_keys<N, 4>(q, keys, group, dim, scores);
  }
  for (; group < group_count; ++group) score_keys<N, 2>(q, keys, group, dim, scores);
}

// out[i] = out[i] * fade[i] + sum over keys, in order, of weights[i][key] * values[key], for 8 * V columns.
template <int N, int V>
inline void weigh_columns(const float* weights, const Groups<float>& values, int64_t count, int64_t dim, int64_t column,
                          const float* fade, float* out) {
  f32x8 acc[N][V];
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) acc[i][v] = load(out + i * dim + column + 8 * v) * splat(fade[i]);
  }
  for (int64_t begin = 0; begin < count; begin += kKeyLanes) {
    const float* row = values.at[begin / kKeyLanes] + column;
    const char* ahead = values.ahead[begin / kKeyLanes] + column * 4;
    const int64_t end = begin + kKeyLanes < count ? begin + kKeyLanes : count;
    for (int64_t j = begin; j < end; ++j, row += dim, ahead += dim * 4) {
      if constexpr (V > 1) prefetch(ahead);
      if constexpr (V > 2) prefetch(ahead + 64);
      multiply_add(weights + j, kKeyTile, row, acc);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(out + i * dim + column + 8 * v, acc[i][v]);
  }
}

template <int N>
inline void weigh(const float* weights, const Groups<float>& values, int64_t count, int64_t dim, const float* fade,
                  float* out) {
  int64_t column = 0;
  if constexpr (kAtOnce<N> == 4) {
    for (; column + 32 <= dim; column += 32) weigh_columns<N, 4>(weights, values, count, dim, column, fade, out);
  }
  for (; column + 16 <= dim; column += 16) weigh_columns<N, 2>(weights, values, count, dim, column, fade, out);
  if (column < dim) weigh_columns<N, 1>(weights, values, count, dim, column, fade, out);
}

// N times eight scores, as weights relative to `most`; those of even and odd eights are summed apart.
template <int N>
inline void soften_some(float* scores, f32x8 most, f32x8* even, f32x8* odd) {
  f32x8 w[N];
  for (int v = 0; v < N; ++v) w[v] = load(scores + 8 * v) - most;
  exp2_negative<5>(w);
  for (int v = 0; v < N; v += 2) {
    store(scores + 8 * v, w[v]);
    store(scores + 8 * v + 8, w[v + 1]);
    *even += w[v];
    *odd += w[v + 1];
  }
}

// Turns `count` scores into weights relative to `now`; returns their sum.
inline float soften(float* scores, int64_t count, float now) {
  f32x8 even = splat(0.0f), odd = even;
  if (now == -INFINITY) {  // nothing is visible so far
    for (int64_t i = 0; i < count; i += 8) store(scores + i, even);
    return 0.0f;
  }
  const f32x8 most = splat(now);
  int64_t i = 0;
  for (; i + 32 <= count; i += 32) soften_some<4>(scores + i, most, &even, &odd);
  for (; i < count; i += 16) soften_some<2>(scores + i, most, &even, &odd);
  return sum(even + odd);
}

// The running maxima and sums after a tile, and how much of what was summed before remains.
inline void advance(const FloatScratch& scratch, int64_t vectors, const Partial& out) {
  for (int64_t i = 0; i < vectors; i += 8) {
    const f32x8 now = load(scratch.now + i);
    f32x8 faded[1] = {load(out.maximum + i) - now};
    exp2_negative<5>(faded);
    const f32x8 fade = select(now == splat(-INFINITY), splat(1.0f), faded[0]);
    store(scratch.fade + i, fade);
    store(out.maximum + i, now);
    store(out.sum + i, load(out.sum + i) * fade + load(scratch.sum + i));
  }
}

// N query vectors from `first` on, of a tile whose first key is `tile`: their scores, then their weights.
template <int N>
inline void weights_of(const AttentionSpec& spec, const AttendTask& task, const Groups<float>& keys,
                       int64_t group_count, int64_t tile, int64_t end, int64_t first, const Partial& out, const FloatScratch& scratch) {
  const int64_t dim = spec.dim(), group = spec.group(), count = group_count * kKeyLanes;
  score<N>(scratch.q + first * dim, keys, group_count, dim, scratch.scores + first * kKeyTile);
  // All maxima first: a sum does not wait for its own row's.
  for (int64_t i = first; i < first + N; ++i) {
    const float before = out.maximum[i];
    const float most = largest(mask(spec, scratch.scores + i * kKeyTile, count, tile, task.position + i / group, end,
                                    task.slopes ? task.slopes[i % group] : 0.0f, nullptr));
    scratch.now[i] = most > before ? most : before;
  }
  for (int64_t i = first; i < first + N; ++i) {
    scratch.sum[i] = soften(scratch.scores + i * kKeyTile, count, scratch.now[i]);
  }
}

// Keys [begin, end) of one range.
inline void attend_floats(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end,
                          const Partial& out, const FloatScratch& scratch) {
  const int64_t dim = spec.dim(), vectors = task.rows * spec.group();
  GroupList<float> list(spec, task, begin, end);
  for (int64_t tile = begin / kKeyTile * kKeyTile; tile < end; tile += kKeyTile) {
    const int64_t count = end - tile < kKeyTile ? end - tile : kKeyTile;
    const int64_t group_count = (count + kKeyLanes - 1) / kKeyLanes;
    Groups<float> keys, values;
    list.next_tile(group_count, &keys, &values);
    by_sixes(vectors, [&](int64_t first, auto n) {
      weights_of<n>(spec, task, keys, group_count, tile, end, first, out, scratch);
    });
    advance(scratch, vectors, out);
    by_sixes(vectors, [&](int64_t first, auto n) {
      weigh<n>(scratch.scores + first * kKeyTile, values, count, dim, scratch.fade + first, out.values + first * dim);
    });
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
