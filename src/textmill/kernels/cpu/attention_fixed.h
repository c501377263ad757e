// Attention over 16-bit caches in whole numbers: a key or a value is a row of 13-bit integers and a power of two, and
// products are summed exactly, 64 keys at a time. A weight carries its value's power: so a tile's values can be summed.
#pragma once

#include <algorithm>

#include "attention_store.h"
#include "attention_tiles.h"
#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// Query vectors that go through a tile together: what they need stays in the nearest cache.
constexpr int64_t kBatch = 24;
// So many products of a query and a key are summed in whole numbers: more would leave a query's numbers few bits.
constexpr int64_t kSpan = 128;
// So few vectors wait for memory: what comes next is fetched beside the work on it.
constexpr int kFew = 4;

struct FixedScratch {
  int32_t* q;     // [vectors][dim / 2] words, as of keys
  float* q_unit;  // [vectors]
  float* scores;  // [kBatch][64]; then weights in words, as of values
  float* tops;    // [kBatch][8] the largest scores of a tile, spread over eight
  float* sums;    // [kBatch][8] of weights, likewise
  float* most;    // [kBatch] the largest score of the tile
  float* fade;    // [kBatch] by how much what was summed before fades
  float* take;    // [kBatch] by how much the tile counts
  float* unit;    // [64] of the tile's keys
  float* log;     // [64] the logarithm of the value's power; NaN if it is not finite
  float* over;    // [64] 1 / that power
};

// A query vector as words; `unit` becomes what its numbers are multiples of, NaN if it is not finite.
inline void fix_query(const float* from, int64_t dim, int32_t* to, float* unit) {
  f32x8 top = splat(0.0f), poison = top;
  for (int64_t d = 0; d < dim; d += 8) {
    top = maximum(magnitude(load(from + d)), top);
    poison = fma(load(from + d), splat(0.0f), poison);
  }
  const float most = largest(top);
  const int64_t bound = ((int64_t{1} << 31) - 1) / (kMostNumber * std::min(dim, kSpan));
  const float limit = static_cast<float>(bound < 32767 ? bound : 32767);
  const bool some = most > 1e-30f;
  const f32x8 factor = splat(some ? limit / most : 0.0f), magic = splat(kRoundingTerm);
  *unit = (some ? most / limit : 0.0f) + sum(poison);
  const int64_t half = dim / 2;
  const auto words = [&](f32x8 low, f32x8 high) {
    return pair_up(bits(fma(low, factor, magic)), bits(fma(high, factor, magic)));
  };
  int64_t d = 0;
  for (; d + 8 <= half; d += 8) store(to + d, words(load(from + d), load(from + half + d)));
  if (d == half) return;
  const i32x8 last = words(load_part(from + d, 4, 0.0f), load_part(from + half + d, 4, 0.0f));
  std::memcpy(to + d, &last, 16);
}

template <int N, int V>
inline void clear(i32x8 (&acc)[N][V]) {
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      acc[i][v] = splat(int32_t{0});
#if defined(__AVX2__)
      // Twelve zeros of one origin would cost the loop a register.
      __asm__("" : "+x"(*reinterpret_cast<__m256i*>(&acc[i][v])));
#endif
    }
  }
}

// acc[i][v] += the products of the words factors[i * stride] and operands[8 * v].
template <int N, int V>
inline void multiply_add_pairs(const int32_t* factors, int64_t stride, const int32_t* operands, i32x8 (&acc)[N][V]) {
  const i32x8 k0 = load_here(operands), k1 = V == 2 ? load_here(operands + 8) : k0;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    if constexpr (V == 2) {
      add_products(factors + i * stride, k0, k1, &acc[i][0], &acc[i][1]);
    } else {
      acc[i][0] += multiply_pairs(k0, splat(factors[i * stride]));
    }
  }
}

// Products of N queries and a group of keys, summed over dimensions [begin, end) of half a head and of the other half.
template <int N, int V>
inline void score_span(const int32_t* q, const int32_t* words, const char* ahead, int64_t begin, int64_t end,
                       int64_t half, i32x8 (&acc)[N][V]) {
  clear(acc);
  words += begin * kKeyLanes;
  ahead += begin * 64;
  for (int64_t d = begin; d < end; d += 4) {
#pragma GCC unroll 4
    for (int64_t i = 0; i < 4; ++i, words += kKeyLanes, ahead += 64) {
      if constexpr (N <= kFew) prefetch(ahead);
      multiply_add_pairs<N, V>(q + d + i, half, words, acc);
    }
  }
}

// Scores of N queries, in units of log 2, against a group of keys. `first`: of the vectors, `row`: of the batch.
template <int N, bool Wide>
[[gnu::noinline]] static void score_fixed(const FixedScratch& s, const Groups<int32_t>& keys, int64_t first,
                                          int64_t row, int64_t group, int64_t dim, const float* offset) {
  constexpr int V = 2;
  i32x8 acc[N][V];
  const int64_t half = dim / 2, span = Wide ? kSpan / 2 : half;
  const int32_t* q = s.q + first * half;
  score_span<N, V>(q, keys.at[group], keys.ahead[group], 0, span, half, acc);
  f32x8 sums[N][V];
#pragma GCC unroll 12
  for (int i = 0; i < N * V; ++i) sums[i / V][i % V] = __builtin_convertvector(acc[i / V][i % V], f32x8);
  for (int64_t d = span; Wide && d < half; d += span) {
    score_span<N, V>(q, keys.at[group], keys.ahead[group], d, std::min(half, d + span), half, acc);
#pragma GCC unroll 12
    for (int i = 0; i < N * V; ++i) sums[i / V][i % V] += __builtin_convertvector(acc[i / V][i % V], f32x8);
  }
  const int64_t key = group * kKeyLanes;
  const float* const q_unit = s.q_unit + first;
  float* const scores = s.scores + row * kKeyTile + key;
  float* const tops = s.tops + row * 8;
  const f32x8 unit[V] = {load(s.unit + key), load(s.unit + key + 8)};
  const f32x8 log[V] = {load(offset + key), load(offset + key + 8)};
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    f32x8 top = load(tops + i * 8);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const f32x8 score = fma(sums[i][v] * unit[v], splat(q_unit[i]), log[v]);
      store(scores + i * kKeyTile + 8 * v, score);
      top = maximum(score, top);
    }
    store(tops + i * 8, top);
  }
}

// N times eight scores as weights relative to `top`, N / 2 times eight words; what they stand for is summed.
template <int N>
inline void soften_fixed(float* scores, int32_t* words, f32x8 top, const float* over, f32x8* even, f32x8* odd) {
  f32x8 w[N];
#pragma GCC unroll 4
  for (int v = 0; v < N; ++v) w[v] = load(scores + 8 * v) - top;
  exp2_negative<4>(w);
  const f32x8 unit = splat(kWeightUnit), magic = splat(kRoundingTerm);
#pragma GCC unroll 4
  for (int v = 0; v < N; v += 2) {
    *even = fma(w[v], load(over + 8 * v), *even);
    *odd = fma(w[v + 1], load(over + 8 * v + 8), *odd);
    store(words + 4 * v, pair_up(bits(fma(w[v], unit, magic)), bits(fma(w[v + 1], unit, magic))));
  }
}

// The weights of `rows` rows from `row` on, in place of their scores.
inline void soften_rows(const FixedScratch& s, int64_t row, int64_t rows, int64_t count) {
  for (int64_t r = row; r < row + rows; ++r) {
    float* scores = s.scores + r * kKeyTile;
    int32_t* words = reinterpret_cast<int32_t*>(scores);
    const f32x8 top = splat(s.most[r] == -INFINITY ? 0.0f : s.most[r]);
    f32x8 even = splat(0.0f), odd = even;
    int64_t i = 0;
    for (; i + 32 <= count; i += 32) soften_fixed<4>(scores + i, words + i / 2, top, s.over + i, &even, &odd);
    if (i < count) soften_fixed<2>(scores + i, words + i / 2, top, s.over + i, &even, &odd);
    store(s.sums + r * 8, even + odd);
  }
}

// out[i] = out[i] * fade[i] + take[i] * sum over keys of weight * value, for 8 * V columns.
template <int N, int V>
[[gnu::noinline]] static void weigh_fixed(const FixedScratch& s, const Groups<int32_t>& values, int64_t row,
                                          int64_t group_count, int64_t column, int64_t dim, float* out) {
  i32x8 acc[N][V];
  clear(acc);
  const int32_t* weights = reinterpret_cast<const int32_t*>(s.scores + row * kKeyTile);
  for (int64_t g = 0; g < group_count; ++g, weights += 8) {
    const int32_t* words = values.at[g] + column;
    // What follows is fetched in the order of its addresses, eight lines at a time.
    const uint32_t turn = static_cast<uint32_t>(column / 16 * group_count + g);
    const uint32_t eights = static_cast<uint32_t>(dim + 8) / 16;
    const char* ahead = values.ahead[turn / eights] + turn % eights * 512;
#pragma GCC unroll 8
    for (int64_t j = 0; j < 8; ++j, words += dim, ahead += 64) {
      if constexpr (N <= kFew) prefetch(ahead);
      multiply_add_pairs<N, V>(weights + j, kKeyTile, words, acc);
    }
  }
  const float* const fade = s.fade + row;
  const float* const take = s.take + row;
#pragma GCC unroll 8
  for (int i = 0; i < N; ++i) {
    const f32x8 keep = splat(fade[i]), add = splat(take[i]);
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      float* to = out + i * dim + column + 8 * v;
      store(to, fma(__builtin_convertvector(acc[i][v], f32x8), add, load(to) * keep));
    }
  }
}

// The running maxima and sums after a tile, and what of the sums before and of the tile remains.
inline void advance_fixed(const FixedScratch& s, int64_t vectors, float* maxima, float* sums) {
  const f32x8 never = splat(-INFINITY);
  for (int64_t i = 0; i < vectors; i += 8) {
    const f32x8 before = load(maxima + i), most = load(s.most + i), now = maximum(most, before);
    const f32x8 tile_sum = fold_rows(s.sums + i * 8, [](f32x8 a, f32x8 b) { return a + b; });
    f32x8 x[2] = {before - now, most - now};
    exp2_negative<5>(x);
    const f32x8 fade = select(now == never, splat(1.0f), x[0]), take = select(most == never, splat(0.0f), x[1]);
    store(maxima + i, now);
    store(sums + i, fma(tile_sum, take, load(sums + i) * fade));
    store(s.fade + i, fade);
    store(s.take + i, take * splat(1.0f / (kWeightUnit * (1 << (kNumberBits - 1)))));
  }
}

// What the scales of a group say, as floats.
inline void read_scales(const uint16_t* scales, int64_t key, const FixedScratch& s) {
  for (int64_t i = 0; i < kKeyLanes; i += 8) {
    store(s.unit + key + i, (f32x8)load_upper(scales + i));
    const i32x8 power = load_upper(scales + 16 + i);
    const f32x8 log = __builtin_convertvector((power >> 23) - 127, f32x8);
    store(s.log + key + i, select(power == splat(int32_t{0x7fc00000}), splat(NAN), log));
    store(s.over + key + i, (f32x8)((254 << 23) - power));
  }
}

// One tile of keys [first, end) before the queries of a task.
struct FixedTile {
  const AttentionSpec& spec;
  const AttendTask& task;
  const FixedScratch& s;
  int64_t first, end, dim, group;
  Groups<int32_t> keys, values;

  // What n query vectors look at.
  struct View {
    int64_t groups;  // 0: nothing
    bool whole;      // every key of them
  };

  View view_of(int64_t at, int64_t n) const {
    const int64_t lowest = task.position + row_of(at);
    if (spec.window > 0 && lowest - spec.window + 1 >= first + kKeyTile) return {0, false};
    const int64_t last = std::min(task.position + row_of(at + n - 1) + 1, end);
    const int64_t groups = last <= first ? 0 : (std::min(last - first, kKeyTile) + kKeyLanes - 1) / kKeyLanes;
    return {groups, spec.window <= 0 && first + groups * kKeyLanes <= std::min(lowest + 1, end)};
  }
  // 32 bits are divided twice as fast as 64.
  int64_t row_of(int64_t at) const { return static_cast<uint32_t>(at) / static_cast<uint32_t>(group); }

  template <int N>
  void score(int64_t at, int64_t row, View view) const {
    static const float kNone[kKeyTile] = {};
    for (int64_t i = row; i < row + N; ++i) store(s.tops + i * 8, splat(-INFINITY));
    const float* offset = spec.softcap > 0 ? kNone : s.log;
    if (dim <= kSpan) {
      for (int64_t g = 0; g < view.groups; ++g) score_fixed<N, false>(s, keys, at, row, g, dim, offset);
    } else {
      for (int64_t g = 0; g < view.groups; ++g) score_fixed<N, true>(s, keys, at, row, g, dim, offset);
    }
    if (view.groups == 0 || (view.whole && spec.softcap <= 0 && !task.slopes)) return;
    for (int64_t i = 0; i < N; ++i) {
      const int64_t of_row = row_of(at + i), head = at + i - of_row * group;
      const f32x8 top = mask(spec, s.scores + (row + i) * kKeyTile, view.groups * kKeyLanes, first,
                             task.position + of_row, end, task.slopes ? task.slopes[head] : 0.0f,
                             spec.softcap > 0 ? s.log : nullptr);
      store(s.tops + (row + i) * 8, top);
    }
  }

  template <int N>
  void weigh(int64_t row, int64_t groups, float* out) const {
    if (groups == 0) return;
    int64_t column = 0;
    for (; column + 16 <= dim; column += 16) weigh_fixed<N, 2>(s, values, row, groups, column, dim, out);
    if (column < dim) weigh_fixed<N, 1>(s, values, row, groups, column, dim, out);
  }

  // `count` query vectors from `at` on.
  void attend(int64_t at, int64_t count, const Partial& out) const {
    View views[kBatch / 6];
    by_sixes(count, [&](int64_t row, auto n) {
      views[row / 6] = view_of(at + row, n);
      score<n>(at + row, row, views[row / 6]);
    });
    for (int64_t i = 0; i < count; i += 8) {
      store(s.most + i, fold_rows(s.tops + i * 8, [](f32x8 a, f32x8 b) { return maximum(a, b); }));
    }
    by_sixes(count, [&](int64_t row, auto n) { soften_rows(s, row, n, views[row / 6].groups * kKeyLanes); });
    advance_fixed(s, count, out.maximum + at, out.sum + at);
    by_sixes(count, [&](int64_t row, auto n) { weigh<n>(row, views[row / 6].groups, out.values + (at + row) * dim); });
  }
};

// Keys [begin, end) of one range.
inline void attend_halves(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end,
                          const Partial& out, const FixedScratch& s) {
  const int64_t group = spec.group(), vectors = task.rows * group;
  GroupList<int32_t> list(spec, task, begin, end);
  FixedTile tile = {spec, task, s, begin / kKeyTile * kKeyTile, end, spec.dim(), group, {}, {}};
  for (; tile.first < end; tile.first += kKeyTile) {
    const int64_t group_count = (std::min(end - tile.first, kKeyTile) + kKeyLanes - 1) / kKeyLanes;
    list.next_tile(group_count, &tile.keys, &tile.values);
    for (int64_t g = 0; g < group_count; ++g) read_scales(tile.keys.scales[g], g * kKeyLanes, s);
    for (int64_t batch = 0; batch < vectors; batch += kBatch) {
      tile.attend(batch, std::min(kBatch, vectors - batch), out);
    }
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
