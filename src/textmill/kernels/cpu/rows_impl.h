// Kernels over single rows, and the table of all vector kernels of one instruction set. Included after attention_impl.h.
#pragma once

#include "recurrence_impl.h"
#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// f(vector of x) for a whole row; the tail goes through the same vector arithmetic.
template <typename F>
inline void map_row(const float* x, int64_t cols, float* out, F f) {
  int64_t i = 0;
  for (; i + 8 <= cols; i += 8) store(out + i, f(load(x + i)));
  if (i < cols) store_part(out + i, cols - i, f(load_part(x + i, cols - i, 0.0f)));
}

template <typename F>
inline void map_rows(const float* x, const float* y, int64_t cols, float* out, F f) {
  int64_t i = 0;
  for (; i + 8 <= cols; i += 8) store(out + i, f(load(x + i), load(y + i)));
  if (i < cols) {
    store_part(out + i, cols - i, f(load_part(x + i, cols - i, 0.0f), load_part(y + i, cols - i, 0.0f)));
  }
}

inline void rms_norm(const float* x, const float* weight, float eps, int64_t cols, float* out) {
  const f32x8 factor = splat(inverse_rms(x, cols, eps));
  map_rows(x, weight, cols, out, [=](f32x8 a, f32x8 w) { return a * factor * w; });
}

inline void layer_norm(const float* x, const float* weight, const float* bias, float eps, int64_t cols, float* out) {
  const float mean = reduce_row(x, cols, 0.0f, [](f32x8 a, f32x8 s) { return s + a; }) / static_cast<float>(cols);
  const f32x8 middle = splat(mean);
  // Padding the tail with the mean adds nothing to the squares.
  const float squares = reduce_row(x, cols, mean, [=](f32x8 a, f32x8 s) { return fma(a - middle, a - middle, s); });
  const f32x8 factor = splat(1.0f / std::sqrt(squares / static_cast<float>(cols) + eps));
  map_rows(x, weight, cols, out, [=](f32x8 a, f32x8 w) { return (a - middle) * factor * w; });
  if (bias) map_rows(out, bias, cols, out, [](f32x8 a, f32x8 b) { return a + b; });
}

inline void add(const float* x, const float* y, int64_t cols, float* out) {
  map_rows(x, y, cols, out, [](f32x8 a, f32x8 b) { return a + b; });
}

inline void multiply(const float* x, const float* y, int64_t cols, float* out) {
  map_rows(x, y, cols, out, [](f32x8 a, f32x8 b) { return a * b; });
}

inline void add_scaled(const float* x, float factor, int64_t cols, float* out) {
  const f32x8 f = splat(factor);
  map_rows(x, out, cols, out, [=](f32x8 a, f32x8 b) { return fma(a, f, b); });
}

inline void clip(const float* x, float limit, int64_t cols, float* out) {
  const f32x8 most = splat(limit), least = splat(-limit);
  map_row(x, cols, out, [=](f32x8 a) { return a > most ? most : (a < least ? least : a); });
}

inline void scale(const float* x, float factor, int64_t cols, float* out) {
  const f32x8 f = splat(factor);
  map_row(x, cols, out, [=](f32x8 a) { return a * f; });
}

inline void softcap(const float* x, float cap, int64_t cols, float* out) {
  const f32x8 c = splat(cap);
  map_row(x, cols, out, [=](f32x8 a) { return tanh(a / c) * c; });
}

inline f32x8 gelu_erf(f32x8 x) {
  f32x8 y;
  for (int i = 0; i < 8; ++i) y[i] = 0.5f * x[i] * (1.0f + erff(x[i] * 0.70710678118654752f));
  return y;
}

inline f32x8 gelu_tanh(f32x8 x) {
  // (1 + tanh(u)) / 2 is the sigmoid of 2u, which loses nothing where tanh nears -1.
  const f32x8 twice = splat(1.5957691216057308f) * fma(splat(0.044715f) * x * x, x, x);
  return x * sigmoid(twice);
}

inline f32x8 apply(Activation kind, f32x8 x) {
  switch (kind) {
    case Activation::kSilu: return x * sigmoid(x);
    case Activation::kGeluTanh: return gelu_tanh(x);
    case Activation::kGeluErf: return gelu_erf(x);
    case Activation::kRelu: return x < splat(0.0f) ? splat(0.0f) : x;
    case Activation::kSigmoid: return sigmoid(x);
    case Activation::kTanh: return tanh(x);
    case Activation::kQuickGelu: return x * sigmoid(splat(1.702f) * x);
    default: return x;
  }
}

inline void activation(const float* x, Activation kind, int64_t cols, float* out) {
  map_row(x, cols, out, [=](f32x8 a) { return apply(kind, a); });
}

inline void gated(const float* x, Activation kind, int64_t cols, float* out) {
  map_rows(x, x + cols, cols, out, [=](f32x8 gate, f32x8 up) { return apply(kind, gate) * up; });
}

inline bool scan(const float* x, int64_t count, float* most) {
  f32x8 top = splat(-INFINITY);
  i32x8 bad = splat(int32_t{0});
  const auto look = [&](f32x8 a) {
    bad |= ~(a < splat(INFINITY));  // NaN compares false
    top = maximum(a, top);
  };
  int64_t i = 0;
  for (; i + 8 <= count; i += 8) look(load(x + i));
  if (i < count) look(load_part(x + i, count - i, -INFINITY));
  *most = largest(top);
  return !any(bad);
}

inline double exp_sum(const float* x, int64_t count, float most, float* out) {
  constexpr int64_t kBlock = 1024;  // summed in eight floats, then in a double
  const f32x8 m = splat(most);
  double total = 0;
  for (int64_t begin = 0; begin < count; begin += kBlock) {
    const int64_t end = begin + kBlock < count ? begin + kBlock : count;
    f32x8 s = splat(0.0f);
    int64_t i = begin;
    for (; i + 8 <= end; i += 8) {
      const f32x8 e = exp_negative(load(x + i) - m);
      s += e;
      if (out) store(out + i, e);
    }
    if (i < end) {
      const f32x8 e = exp_negative(load_part(x + i, end - i, -INFINITY) - m);
      s += e;
      if (out) store_part(out + i, end - i, e);
    }
    total += static_cast<double>(sum(s));
  }
  return total;
}

inline int64_t above(const float* x, int64_t count, float threshold, int32_t* indices) {
  const f32x8 t = splat(threshold);
  int64_t found = 0, i = 0;
  for (; i + 8 <= count; i += 8) {
    for (uint32_t mask = lanes(load(x + i) >= t); mask; mask &= mask - 1) {
      indices[found++] = static_cast<int32_t>(i) + __builtin_ctz(mask);
    }
  }
  for (; i < count; ++i) {
    if (x[i] >= threshold) indices[found++] = static_cast<int32_t>(i);
  }
  return found;
}

inline float exp_one(float x) { return exp(x); }

constexpr VectorKernels table(const char* name) {
  return {name,       rms_norm, layer_norm, add,         multiply,  add_scaled, clip,  scale,     softcap, activation,
          gated,      convolve, scan_states, store_row,  attend,    merge,      normalize, scan,  exp_sum, above,
          exp_one};
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
