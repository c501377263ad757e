// What attention over floats and over 16-bit numbers share: where a range's keys lie, and which a query may look at.
#pragma once

#include <type_traits>

#include "simd.h"
#include "vector.h"

namespace textmill {
namespace TEXTMILL_ISA {

// Vectors in hand for N queries: as many sums in flight as sixteen registers hold beside the operands.
template <int N>
constexpr int kAtOnce = N <= 3 ? 4 : 2;

constexpr float kLog2E = 1.44269504088896f;

inline void prefetch(const void* at) { __builtin_prefetch(at); }

// A tile of keys or of values in groups of 16 keys, and what to fetch into the cache beside the work on each group.
template <typename T>
struct Groups {
  const T* at[kKeyTile / kKeyLanes];
  const char* ahead[kKeyTile / kKeyLanes];
  const uint16_t* scales[kKeyTile / kKeyLanes];  // with keys of 16 bits only
};

// How many groups ahead of the work memory is fetched: far enough for its latency, near enough to stay in the cache.
constexpr int64_t kAhead = 8;

// The groups of a range in the order in which they are worked on: a tile's keys, then its values; then what follows.
template <typename T>
class GroupList {
 public:
  GroupList(const AttentionSpec& spec, const AttendTask& task, int64_t begin, int64_t end) : spec_(spec) {
    add(task, begin, end, kKeyRange / kKeyLanes * 2);
    // A short context is followed by another soon.
    distance_ = count_ < kAhead ? count_ : kAhead;
    const int64_t needed = count_ + kAhead;
    if (end < task.end) {
      add(task, end, task.end, kAhead);
    } else if (task.next) {
      add(*task.next, task.next->begin, task.next->end, kAhead);
    }
    for (; count_ < needed; ++count_) {
      groups_[count_] = groups_[count_ - 1];
      scales_[count_] = scales_[count_ - 1];
    }
  }

  void next_tile(int64_t group_count, Groups<T>* keys, Groups<T>* values) {
    const T* const* at = groups_ + taken_;
    for (int64_t g = 0; g < group_count; ++g) {
      keys->at[g] = at[g];
      values->at[g] = at[group_count + g];
      keys->scales[g] = scales_[taken_ + g];
      if (keys->scales[g]) prefetch(scales_[taken_ + distance_ + g]);
      keys->ahead[g] = reinterpret_cast<const char*>(at[distance_ + g]);
      values->ahead[g] = reinterpret_cast<const char*>(at[distance_ + group_count + g]);
    }
    taken_ += 2 * group_count;
  }

 private:
  // Whole tiles of [begin, end), at most `most` groups.
  void add(const AttendTask& task, int64_t begin, int64_t end, int64_t most) {
    // Of a group: numbers of 16 bits are two to a word.
    const int64_t words = kKeyLanes * spec_.dim() * (spec_.half_cache ? 2 : 4) / 4, limit = count_ + most;
    const T* const keys = static_cast<const T*>(task.keys);
    const int64_t apart = static_cast<const T*>(task.values) - keys;
    int64_t tile = begin / kKeyTile * kKeyTile;
    int64_t block = tile / spec_.block_size, within = tile - block * spec_.block_size;
    for (; tile < end; tile += kKeyTile) {
      const int64_t tile_groups = ((end - tile < kKeyTile ? end - tile : kKeyTile) + kKeyLanes - 1) / kKeyLanes;
      if (count_ + 2 * tile_groups > limit) return;
      for (int64_t g = 0; g < tile_groups; ++g) {
        const int64_t offset = task.blocks[block] * task.block_stride, group = within / kKeyLanes;
        groups_[count_ + g] = keys + offset + group * words;
        groups_[count_ + tile_groups + g] = groups_[count_ + g] + apart;
        scales_[count_ + g] = scales_[count_ + tile_groups + g] =
            task.scales ? task.scales + 2 * offset + group * kGroupScales : nullptr;
        within += kKeyLanes;
        if (within == spec_.block_size) within = 0, ++block;
      }
      count_ += 2 * tile_groups;
    }
  }

  const AttentionSpec& spec_;
  int64_t count_ = 0, taken_ = 0, distance_ = 0;
  const T* groups_[kKeyRange / kKeyLanes * 2 + kAhead];
  const uint16_t* scales_[kKeyRange / kKeyLanes * 2 + kAhead];
};

// Scores as the model means them, in units of log 2: capped, leaning with distance, moved by `offset` (or null), -Inf
// where the query may not look. Returns the largest, spread over eight.
inline f32x8 mask(const AttentionSpec& spec, float* scores, int64_t count, int64_t tile, int64_t position, int64_t end,
                  float slope, const float* offset) {
  const int64_t last = position < end - 1 ? position : end - 1;
  const int64_t first = spec.window > 0 ? position - spec.window + 1 : 0;
  const bool whole = first <= tile && tile + count - 1 <= last;
  f32x8 top = splat(-INFINITY);
  if (whole && spec.softcap <= 0 && slope == 0) {
    for (int64_t i = 0; i < count; i += 8) top = maximum(load(scores + i), top);
    return top;
  }
  const i32x8 upper = splat(static_cast<int32_t>(last - tile)), lower = splat(static_cast<int32_t>(first - tile));
  const f32x8 cap = splat(spec.softcap * kLog2E), lean = splat(slope * kLog2E);
  for (int64_t i = 0; i < count; i += 8) {
    const i32x8 key = iota(static_cast<int32_t>(i));
    f32x8 s = load(scores + i);
    if (spec.softcap > 0) s = tanh(s / cap) * cap;
    if (slope != 0) s += lean * __builtin_convertvector(key + splat(static_cast<int32_t>(tile - position)), f32x8);
    if (offset) s += load(offset + i);
    s = select((key <= upper) & (key >= lower), s, splat(-INFINITY));
    store(scores + i, s);
    top = maximum(s, top);
  }
  return top;
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

}  // namespace TEXTMILL_ISA
}  // namespace textmill
