// How a row's keys and values become 16-bit numbers of the cache: a row is 13-bit integers and a power of two.
#pragma once

#include <algorithm>

#include "attention_tiles.h"
#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// A number of a key or a value is at most 4095, a weight at most 8192: a tile's 64 products stay below 2^31.
constexpr int32_t kMostNumber = 4095;
constexpr int kNumberBits = 12;
constexpr float kWeightUnit = 8192.0f;
constexpr float kRoundingTerm = 12582912.0f;  // 1.5 * 2^23: adding it leaves the rounded number in the low bits
// Keys in groups of 16: [dim / 2][16] words, each of the numbers of dimensions d and d + dim / 2.
// Values in groups of 16: [8][dim] words, each of the numbers of keys j and j + 8.
// Scales of a group: [16] a key's unit, [16] the largest power of two in a value; the upper halves of floats.

// What a row of numbers is a multiple of; not finite: NaN.
struct Power {
  int32_t exponent;  // of the largest
  bool finite;
};

inline Power power_of(const float* x, int64_t count) {
  f32x8 top = splat(0.0f), poison = top;
  for (int64_t d = 0; d < count; d += 8) {
    const f32x8 v = d + 8 <= count ? load(x + d) : load_part(x + d, count - d, 0.0f);
    top = maximum(magnitude(v), top);
    poison = fma(v, splat(0.0f), poison);
  }
  const float most = largest(top);
  int32_t word;
  std::memcpy(&word, &most, 4);
  return {std::clamp((word >> 23) - 127, -40, 15), sum(poison) == 0.0f};
}
inline uint16_t scale_word(Power power, int32_t bits_below) {
  return power.finite ? static_cast<uint16_t>((power.exponent - bits_below + 127) << 7) : uint16_t{0x7fc0};
}

// Eight numbers of a row. Beyond the largest only where the row is beyond 2^16, or rounds up.
inline i32x8 numbers_of(f32x8 x, Power power) {
  const f32x8 factor = (f32x8)((splat(kNumberBits - 1 - power.exponent) + 127) << 23), magic = splat(kRoundingTerm);
  const f32x8 most = splat(static_cast<float>(kMostNumber));
  const f32x8 scaled = -maximum(-most, -maximum(-most, x * factor));
  return bits(scaled + magic) - bits(magic);
}

// The numbers of a key, a word to a line.
inline void put_key(const float* x, int64_t dim, Power power, int32_t* to) {
  const int64_t half = dim / 2;
  for (int64_t d = 0; d < half; d += 8) {
    const int64_t count = std::min<int64_t>(8, half - d);
    const f32x8 low = count == 8 ? load(x + d) : load_part(x + d, count, 0.0f);
    const f32x8 high = count == 8 ? load(x + half + d) : load_part(x + half + d, count, 0.0f);
    int32_t words[8];
    store(words, pair_up(numbers_of(low, power), numbers_of(high, power)));
    for (int64_t i = 0; i < count; ++i) to[(d + i) * kKeyLanes] = words[i];
  }
}

// Those of a value, beside another key's numbers: the lower or the upper halves of words in a row.
inline void put_value(const float* x, int64_t count, Power power, bool upper, int32_t* to) {
  for (int64_t d = 0; d < count; d += 8) {
    const f32x8 v = d + 8 <= count ? load(x + d) : load_part(x + d, count - d, 0.0f);
    const i32x8 number = numbers_of(v, power), there = load(to + d);
    store(to + d, upper ? pair_up(there, number) : pair_up(number, there >> 16));
  }
}

// Where a row's key and value of one kv head go.
struct FixedPlace {
  int32_t* key;    // [dim / 2] words, a line apart
  int32_t* value;  // [dim]
  uint16_t* scales;

  FixedPlace(const AttentionSpec& spec, const StoreRow& row, int64_t head) {
    const int64_t dim = spec.dim(), size = spec.block_size, offset = row.position % size;
    const int64_t group = offset / kKeyLanes, lane = offset % kKeyLanes;
    int32_t* const keys = static_cast<int32_t*>(row.cache) + head * size * dim + group * kKeyLanes * dim / 2;
    key = keys + lane;
    value = keys + size * dim / 2 + lane % 8 * dim;
    scales = row.scales + (head * (size / kKeyLanes) + group) * kGroupScales + lane;
  }
  void fetch(int64_t dim) const {
    for (int64_t d = 0; d < dim / 2; ++d) prefetch(key + d * kKeyLanes);
    for (int64_t d = 0; d < dim; d += 16) prefetch(value + d);
    prefetch(scales);
  }
};

// One row's keys (turned, [kv_heads, dim]) and values ([kv_heads, head_dim]).
inline void store_fixed(const AttentionSpec& spec, const float* keys, const float* values, const StoreRow& row) {
  const int64_t dim = spec.dim(), width = spec.head_dim;
  for (int64_t h = 0; h < spec.kv_heads; ++h) {
    if (row.next) FixedPlace(spec, *row.next, h).fetch(dim);
    const FixedPlace to(spec, row, h);
    const Power key = power_of(keys + h * dim, dim), value = power_of(values + h * width, width);
    to.scales[0] = scale_word(key, kNumberBits - 1);
    to.scales[16] = scale_word(value, 0);
    put_key(keys + h * dim, dim, key, to.key);
    put_value(values + h * width, width, value, row.position % kKeyLanes >= 8, to.value);
  }
}

}  // namespace TEXTMILL_ISA
}  // namespace textmill
