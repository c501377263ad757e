// Products and softmax of one tile of keys: any number of query vectors, each with the same arithmetic in the same order.
#pragma once

#include <type_traits>

#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// Vectors in hand for N queries: as many sums in flight as sixteen registers hold beside the operands.
template <int N>
constexpr int kAtOnce = N <= 3 ? 4 : 2;

inline void prefetch(const void* at) { __builtin_prefetch(at); }

// acc[i][v] += factors[i * stride] * operands[8 * v]; whichever of the two are fewer stay in registers meanwhile.
template <int N, int V, typename T>
inline void multiply_add(const float* factors, int64_t stride, const T* operands, f32x8 (&acc)[N][V]) {
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

// A tile of keys or of values in groups of 16 keys, and what to fetch into the cache beside the work on each group.
template <typename T>
struct Groups {
  const T* at[kKeyTile / kKeyLanes];
  const char* ahead[kKeyTile / kKeyLanes];
  int64_t stride;  // values only: elements from a key to the next
};

// Scores of N query vectors (dim apart) against V / 2 groups of keys; sums over dim in order.
template <int N, int V, typename T>
inline void score_keys(const float* q, const Groups<T>& keys, int64_t group, int64_t dim, float* scores) {
  static_assert(V == 2 || V == 4);
  f32x8 acc[N][V];
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) acc[i][v] = splat(0.0f);
  }
  const T* first = keys.at[group];
  const int64_t apart = V == 4 ? keys.at[group + 1] - first : 0;
  const char* ahead[2] = {keys.ahead[group], V == 4 ? keys.ahead[group + 1] : keys.ahead[group] + dim * 16};
  for (int half = 0; half < 2; ++half) {
    const char* fetch = ahead[half];
    for (int64_t d = half * (dim / 2); d < (half + 1) * (dim / 2); ++d, fetch += 16 * V) {
      if constexpr (sizeof(T) == 2) prefetch(fetch);
      if constexpr (V == 2) {
        multiply_add(q + d, dim, first + d * kKeyLanes, acc);
      } else {
        f32x8 x[N];
        for (int i = 0; i < N; ++i) x[i] = splat(q[i * dim + d]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) {
          const f32x8 k = load(first + d * kKeyLanes + v / 2 * apart + v % 2 * 8);
          for (int i = 0; i < N; ++i) acc[i][v] = fma(k, x[i], acc[i][v]);
        }
      }
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(scores + i * kKeyTile + group * kKeyLanes + v * 8, acc[i][v]);
  }
}

// All groups of a tile.
template <int N, typename T>
inline void score(const float* q, const Groups<T>& keys, int64_t group_count, int64_t dim, float* scores) {
  int64_t group = 0;
  if constexpr (kAtOnce<N> == 4) {
    for (; group + 2 <= group_count; group += 2) score_keys<N, 4>(q, keys, group, dim, scores);
  }
  for (; group < group_count; ++group) score_keys<N, 2>(q, keys, group, dim, scores);
}

// out[i] = out[i] * fade[i] + sum over keys, in order, of weights[i][key] * values[key], for 8 * V columns.
template <int N, int V, typename T>
inline void weigh_columns(const float* weights, const Groups<T>& values, int64_t count, int64_t dim, int64_t column,
                          const T* const* at, const float* fade, float* out) {
  f32x8 acc[N][V];
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) acc[i][v] = load(out + i * dim + column + 8 * v) * splat(fade[i]);
  }
  const int64_t stride = values.stride;
  for (int64_t begin = 0; begin < count; begin += kKeyLanes) {
    const T* row = at[begin / kKeyLanes];
    const int64_t end = begin + kKeyLanes < count ? begin + kKeyLanes : count;
    const char* fetch = values.ahead[begin / kKeyLanes] + column * 32;
    for (int64_t j = begin; j < end; ++j, row += stride, fetch += 16 * V) {
      if constexpr (sizeof(T) == 2) prefetch(fetch);
      multiply_add(weights + j, kKeyTile, row, acc);
    }
    if constexpr (sizeof(T) == 2) {
      for (int64_t j = end; j < begin + kKeyLanes; ++j, fetch += 16 * V) prefetch(fetch);
    }
  }
  for (int i = 0; i < N; ++i) {
    for (int v = 0; v < V; ++v) store(out + i * dim + column + 8 * v, acc[i][v]);
  }
}

// `panel`: elements from 16 columns to the next 16.
template <int N, typename T>
inline void weigh(const float* weights, const Groups<T>& values, int64_t count, int64_t dim, int64_t panel,
                  const float* fade, float* out) {
  constexpr int64_t kGroups = kKeyTile / kKeyLanes;
  const T* at[kGroups];
  const auto move = [&](int64_t column) {
    for (int64_t g = 0; g < (count + kKeyLanes - 1) / kKeyLanes; ++g) at[g] = values.at[g] + column / 16 * panel;
  };
  int64_t column = 0;
  if constexpr (kAtOnce<N> == 4) {
    for (; panel == 16 && column + 32 <= dim; column += 32) {
      move(column);
      weigh_columns<N, 4>(weights, values, count, dim, column, at, fade, out);
    }
  }
  for (; column + 16 <= dim; column += 16) {
    move(column);
    weigh_columns<N, 2>(weights, values, count, dim, column, at, fade, out);
  }
  if (column < dim) {
    move(column);
    weigh_columns<N, 1>(weights, values, count, dim, column, at, fade, out);
  }
}

// Scores as the model means them: capped, leaning with distance, -Inf where the query may not look. Returns the largest.
inline float mask(const AttentionSpec& spec, float* scores, int64_t count, int64_t tile, int64_t position, int64_t end,
                  float slope) {
  const int64_t last = position < end - 1 ? position : end - 1;
  const int64_t first = spec.window > 0 ? position - spec.window + 1 : 0;
  const bool whole = first <= tile && tile + count - 1 <= last;
  f32x8 top = splat(-INFINITY);
  if (whole && spec.softcap <= 0 && slope == 0) {
    for (int64_t i = 0; i < count; i += 8) top = maximum(load(scores + i), top);
    return largest(top);
  }
  const i32x8 upper = splat(static_cast<int32_t>(last - tile)), lower = splat(static_cast<int32_t>(first - tile));
  const f32x8 cap = splat(spec.softcap), lean = splat(slope);
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

// N times eight scores, as weights relative to `most`; those of even and odd eights are summed apart.
template <int N>
inline void soften_some(float* scores, f32x8 most, f32x8* even, f32x8* odd) {
  f32x8 w[N];
  for (int v = 0; v < N; ++v) w[v] = load(scores + 8 * v) - most;
  exp_negative(w);
  for (int v = 0; v < N; v += 2) {
    store(scores + 8 * v, w[v]);
    store(scores + 8 * v + 8, w[v + 1]);
    *even += w[v];
    *odd += w[v + 1];
  }
}

// Turns `count` scores into weights relative to `now`; returns their sum. N: eights side by side, of no effect on bits.
template <int N>
inline float soften(float* scores, int64_t count, float now) {
  f32x8 even = splat(0.0f), odd = even;
  if (now == -INFINITY) {  // nothing is visible so far
    for (int64_t i = 0; i < count; i += 8) store(scores + i, even);
    return 0.0f;
  }
  const f32x8 most = splat(now);
  int64_t i = 0;
  for (; i + 8 * N <= count; i += 8 * N) soften_some<N>(scores + i, most, &even, &odd);
  for (; i < count; i += 16) soften_some<2>(scores + i, most, &even, &odd);
  return sum(even + odd);
}

// f(first, N as a constant) for all vectors, six at a time: 12 sums, 2 operands and 1 factor fit 16 registers.
template <typename F>
inline void by_sixes(int64_t vectors, F f) {
  int64_t i = 0;
  for (; i + 6 <= vectors; i += 6) f(i, std::integral_constant<int, 6>());
  switch (vectors - i) {
    case 1: return f(i, std::integral_constant<int, 1>());
    case 2: return f(i, std::integral_constant<int, 2>());
    case 3: return f(i, std::integral_constant<int, 3>());
    case 4: return f(i, std::integral_constant<int, 4>());
    case 5: return f(i, std::integral_constant<int, 5>());
    default: return;
  }
}

inline void widen_keys(const uint16_t* from, int64_t dim, float* to) {
  for (int64_t i = 0; i < kKeyLanes * dim; i += 8) store(to + i, load(from + i));
}

// Sixteen values into panels of 16 columns, each of 64 keys.
inline void widen_values(const uint16_t* from, int64_t dim, float* to) {
  for (int64_t j = 0; j < kKeyLanes; ++j, from += dim, to += 16) {
    for (int64_t d = 0; d < dim; d += 8) store(to + d / 16 * (16 * kKeyTile) + d % 16, load(from + d));
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
