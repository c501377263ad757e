// Convolutions and scans along a sequence, channel by channel. Included after attention_impl.h.
#pragma once

#include <cmath>

#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

inline f32x8 load_up_to(const float* x, int64_t count) { return count >= 8 ? load(x) : load_part(x, count, 0.0f); }
inline void store_up_to(float* x, int64_t count, f32x8 v) {
  if (count >= 8) return store(x, v);
  store_part(x, count, v);
}

inline void convolve(const ConvolveTask& t) {
  const int64_t before = t.taps - 1;
  for (int64_t r = 0; r < t.rows; ++r) {
    for (int64_t c = 0; c < t.channels; c += 8) {
      const int64_t left = t.channels - c;
      f32x8 y = splat(0.0f);
      for (int64_t i = 0; i < t.taps; ++i) {
        const int64_t from = r + i - before;  // below zero: an input of an earlier step
        const float* x = from < 0 ? t.state + (before + from) * t.state_stride : t.x + from * t.x_stride;
        y = fma(load_up_to(x + c, left), load_up_to(t.weight + i * t.weight_stride + c, left), y);
      }
      if (t.bias) y += load_up_to(t.bias + c, left);
      store_up_to(t.out + r * t.out_stride + c, left, y * sigmoid(y));
    }
  }
  for (int64_t j = 0; j < before; ++j) {
    const int64_t from = t.rows + j - before;
    const float* x = from < 0 ? t.state + (before + from) * t.state_stride : t.x + from * t.x_stride;
    for (int64_t c = 0; c < t.channels; ++c) t.state[j * t.state_stride + c] = x[c];
  }
}

// log(1 + e^x); x where that is the same.
inline f32x8 softplus(f32x8 x) {
  f32x8 y;
  for (int i = 0; i < 8; ++i) y[i] = x[i] > 20.0f ? x[i] : log1pf(expf(x[i]));
  return y;
}

inline void scan_states(const ScanTask& t) {
  for (int64_t r = 0; r < t.rows; ++r) {
    const float* b = t.bc + r * t.bc_stride;
    for (int64_t i = 0; i < t.channels; i += 8) {
      const int64_t left = t.channels - i;
      const f32x8 x = load_up_to(t.x + r * t.x_stride + i, left);
      const f32x8 step = softplus(load_up_to(t.step + r * t.step_stride + i, left));
      const f32x8 gate = load_up_to(t.gate + r * t.gate_stride + i, left), pushed = step * x;
      f32x8 y = splat(0.0f);
      for (int64_t n = 0; n < t.columns; ++n) {
        float* at = t.state + n * t.state_stride + i;
        const f32x8 fade = exp_negative(step * load_up_to(t.a + n * t.a_stride + i, left));
        const f32x8 h = fma(fade, load_up_to(at, left), pushed * splat(b[n]));
        store_up_to(at, left, h);
        y = fma(h, splat(b[t.columns + n]), y);
      }
      const f32x8 whole = fma(load_up_to(t.skip + i, left), x, y);
      store_up_to(t.out + r * t.out_stride + i, left, whole * gate * sigmoid(gate));
    }
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
