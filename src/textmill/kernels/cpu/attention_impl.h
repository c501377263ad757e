// Attention over the paged cache: every query vector does the same arithmetic whatever tile, chunk or batch it is in.
#pragma once

#include "attention_fixed.h"
#include "attention_float.h"
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

inline void store_floats(const AttentionSpec& spec, const float* keys, const float* values, const StoreRow& row) {
  const int64_t dim = spec.dim(), size = spec.block_size, offset = row.position % size, lane = offset % kKeyLanes;
  for (int64_t h = 0; h < spec.kv_heads; ++h) {
    float* const cache = static_cast<float*>(row.cache) + h * 2 * size * dim;
    float* k = cache + (offset - lane) * dim + lane;
    float* v = cache + (size + offset) * dim;
    for (int64_t d = 0; d < dim; ++d) k[d * kKeyLanes] = keys[h * dim + d];
    for (int64_t d = 0; d < spec.head_dim; ++d) v[d] = values[h * spec.head_dim + d];
    for (int64_t d = spec.head_dim; d < dim; ++d) v[d] = 0.0f;
  }
}

// `q` doubles as the place where the keys are turned before they are stored.
inline void store_row(const AttentionSpec& spec, const StoreRow& row) {
  const float* keys = row.qkv + spec.heads * spec.head_dim;
  const float* values = keys + spec.kv_heads * spec.head_dim;
  turn_heads(spec, keys, spec.kv_heads, spec.k_norm, row.position, row.q);
  if (spec.half_cache) {
    store_fixed(spec, row.q, values, row);
  } else {
    store_floats(spec, row.q, values, row);
  }
  turn_heads(spec, row.qkv, spec.heads, spec.q_norm, row.position, row.q);
  for (int64_t i = 0; i < spec.heads * spec.dim(); ++i) row.q[i] *= spec.scale * kLog2E;
}

inline void merge(const Partial& into, const Partial& next, int64_t vectors, int64_t dim) {
  for (int64_t i = 0; i < vectors; ++i) {
    const float a = into.maximum[i], b = next.maximum[i];
    if (b == -INFINITY) continue;  // nothing was visible there
    const float now = a > b ? a : b;
    f32x8 parts[1] = {f32x8{a - now, b - now}};
    exp2_negative<5>(parts);
    const float keep = parts[0][0], take = parts[0][1];
    into.maximum[i] = now;
    into.sum[i] = into.sum[i] * keep + next.sum[i] * take;
    float* to = into.values + i * dim;
    const float* from = next.values + i * dim;
    for (int64_t d = 0; d < dim; d += 8) {
      store(to + d, fma(load(from + d), splat(take), load(to + d) * splat(keep)));
    }
  }
}

// Gives out memory in whole cache lines.
class Carver {
 public:
  explicit Carver(float* memory) : at_(aligned(memory)) {}
  template <typename T>
  T* take(int64_t count) {
    T* taken = reinterpret_cast<T*>(at_);
    at_ += (count + 15) / 16 * 16;
    return taken;
  }

 private:
  float* at_;
};

inline FloatScratch float_scratch(const AttentionSpec& spec, const AttendTask& task, Carver& memory) {
  const int64_t group = spec.group(), dim = spec.dim(), vectors = task.rows * group, padded = padded_vectors(vectors);
  FloatScratch s;
  s.q = memory.take<float>(vectors * dim);
  s.scores = memory.take<float>(vectors * kKeyTile);
  for (float** column : {&s.fade, &s.now, &s.sum}) {
    *column = memory.take<float>(padded);
    std::memset(*column, 0, static_cast<size_t>(padded) * 4);
  }
  for (int64_t r = 0; r < task.rows; ++r) {
    std::memcpy(s.q + r * group * dim, task.q + r * task.q_stride, static_cast<size_t>(group * dim) * 4);
  }
  return s;
}

inline FixedScratch fixed_scratch(const AttentionSpec& spec, const AttendTask& task, Carver& memory) {
  const int64_t group = spec.group(), dim = spec.dim(), vectors = task.rows * group;
  FixedScratch s;
  s.q = memory.take<int32_t>(vectors * dim / 2);
  s.q_unit = memory.take<float>(vectors);
  s.scores = memory.take<float>(kBatch * kKeyTile);
  s.tops = memory.take<float>(kBatch * 8);
  s.sums = memory.take<float>(kBatch * 8);
  std::memset(s.tops, 0, static_cast<size_t>(kBatch) * 8 * 4 * 2);
  for (float** column : {&s.most, &s.fade, &s.take}) *column = memory.take<float>(kBatch);
  for (float** column : {&s.unit, &s.log, &s.over}) *column = memory.take<float>(kKeyTile);
  for (int64_t i = 0; i < vectors; ++i) {
    fix_query(task.q + i / group * task.q_stride + i % group * dim, dim, s.q + i * dim / 2, s.q_unit + i);
  }
  return s;
}

// attend_range(begin, end, partial) for every range of the task, merged in order.
template <typename F>
inline void by_ranges(const AttendTask& task, int64_t vectors, int64_t dim, const Partial& out, float* memory,
                      F attend_range) {
  const Partial next = partial_at(aligned(memory), vectors);
  bool first = true;
  for (int64_t range = task.begin / kKeyRange * kKeyRange; range < task.end; range += kKeyRange) {
    const Partial& to = first ? out : next;
    for (int64_t i = 0; i < padded_vectors(vectors); ++i) {
      to.maximum[i] = -INFINITY;
      to.sum[i] = 0.0f;
    }
    std::memset(to.values, 0, static_cast<size_t>(vectors * dim) * 4);
    attend_range(std::max(task.begin, range), std::min(task.end, range + kKeyRange), to);
    if (!first) merge(out, next, vectors, dim);
    first = false;
  }
}

inline void attend(const AttentionSpec& spec, const AttendTask& task, const Partial& out, float* memory) {
  const int64_t vectors = task.rows * spec.group(), dim = spec.dim();
  Carver carver(memory + partial_floats(vectors, dim) + 16);
  if (spec.half_cache) {
    const FixedScratch scratch = fixed_scratch(spec, task, carver);
    by_ranges(task, vectors, dim, out, memory, [&](int64_t begin, int64_t end, const Partial& to) {
      attend_halves(spec, task, begin, end, to, scratch);
    });
  } else {
    const FloatScratch scratch = float_scratch(spec, task, carver);
    by_ranges(task, vectors, dim, out, memory, [&](int64_t begin, int64_t end, const Partial& to) {
      attend_floats(spec, task, begin, end, to, scratch);
    });
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
