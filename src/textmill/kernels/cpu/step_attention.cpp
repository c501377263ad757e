// Attention within a step: storing keys and values, then the plan's tasks, kv head by kv head.
#include <algorithm>

#include "step.h"

namespace textmill {

uint32_t Step::begin_attention() {
  const Op& op = program_.ops_[op_];
  if (phase_ == 0) return chunks_of_rows(program_.value(op.x).cols);
  if (phase_ > 1) return 0;
  const AttentionPlan& plan = plans_[static_cast<size_t>(op.plan)];
  for (auto& counter : counters_) counter.store(0, std::memory_order_relaxed);
  return static_cast<uint32_t>(plan.chunks.size() - 1);
}

// The first row from `row` on that shares no group of keys with the row before: in a word of the cache are two rows'
// values, which one thread alone may change.
int64_t Step::first_of_group(int64_t row) const {
  const auto shares = [&](size_t i) { return positions_[i] % kKeyLanes != 0 && slots_[i] == slots_[i - 1]; };
  while (row > 0 && row < row_count_ && shares(static_cast<size_t>(row))) ++row;
  return row;
}

StoreRow Step::row_to_store(const Op& op, int64_t row) const {
  const AttentionSpec& spec = op.attention;
  const int64_t position = positions_[static_cast<size_t>(row)], slot = slots_[static_cast<size_t>(row)];
  const int64_t block = program_.table_.block_table[slot * program_.table_.blocks_per_slot + position / spec.block_size];
  std::byte* at = program_.cache_.data() + static_cast<size_t>(block) * program_.kv_bytes_per_block_;
  float* q = reinterpret_cast<float*>(program_.arena_.data() + op.scratch_offset);
  return {value_row(op.x, row), q + row * spec.heads * spec.dim(), at + op.keys_offset,
          reinterpret_cast<uint16_t*>(at + op.scales_offset), position};
}

void Step::run_store(const Op& op, int64_t begin, int64_t end) const {
  begin = first_of_group(begin);
  end = first_of_group(end);
  if (begin == end) return;
  StoreRow current = row_to_store(op, begin);
  for (int64_t row = begin; row < end; ++row) {
    StoreRow following;
    if (row + 1 < end) {
      following = row_to_store(op, row + 1);
      const size_t i = static_cast<size_t>(row);
      // Rows of one sequence share their lines.
      if (slots_[i] != slots_[i + 1]) current.next = &following;
    }
    vector_.store_row(op.attention, current);
    current = following;
  }
}

// Unit `unit` of an attention: one task for one kv head.
AttendTask Step::attend_task(const Op& op, int64_t unit) const {
  const AttentionSpec& spec = op.attention;
  const AttentionPlan& plan = plans_[static_cast<size_t>(op.plan)];
  const AttentionTask& task = plan.tasks[static_cast<size_t>(unit / spec.kv_heads)];
  const AttentionTile& tile = plan.tiles[static_cast<size_t>(task.tile)];
  const int64_t head = unit % spec.kv_heads, dim = spec.dim(), group = spec.group();
  const size_t element = spec.half_cache ? 2 : 4;
  const size_t own = static_cast<size_t>(spec.block_size * dim) * element;  // of a head's keys in a block
  const std::byte* cache = program_.cache_.data() + op.keys_offset + static_cast<size_t>(head) * 2 * own;
  const float* q = reinterpret_cast<const float*>(program_.arena_.data() + op.scratch_offset);
  AttendTask call;
  call.q = q + (tile.row * spec.heads + head * group) * dim;
  call.q_stride = spec.heads * dim;
  call.rows = tile.rows;
  call.position = tile.position;
  call.blocks = program_.table_.block_table + tile.slot * program_.table_.blocks_per_slot;
  call.keys = cache;
  call.values = cache + own;
  const std::byte* scales = program_.cache_.data() + op.scales_offset;
  const int64_t first = head * (spec.block_size / kKeyLanes) * kGroupScales;
  call.scales = spec.half_cache ? reinterpret_cast<const uint16_t*>(scales) + first : nullptr;
  call.block_stride = static_cast<int64_t>(program_.kv_bytes_per_block_ / 4);
  call.begin = task.begin;
  call.end = task.end;
  call.slopes = spec.alibi ? spec.alibi + head * group : nullptr;
  return call;
}

void Step::run_attention(const Op& op, uint32_t chunk, int thread) {
  const AttentionPlan& plan = plans_[static_cast<size_t>(op.plan)];
  const int64_t begin = plan.chunks[chunk], end = plan.chunks[chunk + 1];
  // The other threads probably take the chunks in between.
  const size_t later = chunk + static_cast<size_t>(threads_);
  const int64_t after = later + 1 < plan.chunks.size() ? plan.chunks[later] : -1;
  AttendTask call = attend_task(op, begin);
  for (int64_t unit = begin; unit < end; ++unit) {
    const int64_t next = unit + 1 < end ? unit + 1 : after;
    AttendTask following;
    if (next >= 0) following = attend_task(op, next);
    call.next = next >= 0 ? &following : nullptr;
    run_unit(op, unit, call, thread);
    call = following;
  }
}

void Step::run_unit(const Op& op, int64_t unit, const AttendTask& call, int thread) {
  const AttentionSpec& spec = op.attention;
  const AttentionPlan& plan = plans_[static_cast<size_t>(op.plan)];
  const AttentionTask& task = plan.tasks[static_cast<size_t>(unit / spec.kv_heads)];
  const AttentionTile& tile = plan.tiles[static_cast<size_t>(task.tile)];
  const int64_t head = unit % spec.kv_heads;
  float* scratch = program_.scratch_[static_cast<size_t>(thread)].data();
  const int64_t vectors = query_vectors(spec), own = partial_floats(vectors, spec.dim());
  if (task.parts == 1) {
    const Partial result = partial_at(scratch, vectors);
    vector_.attend(spec, call, result, scratch + own);
    vector_.normalize(spec, result, tile.rows, value_row(op.out, tile.row) + head * spec.group() * spec.head_dim,
                      program_.value(op.out).stride);
    return;
  }
  vector_.attend(spec, call, partial_of(plan, spec, task.partial + head), scratch);
  std::atomic<int32_t>& done = counters_[static_cast<size_t>(task.counter * spec.kv_heads + head)];
  if (done.fetch_add(1, std::memory_order_acq_rel) + 1 == task.parts) finish_parts(op, task, tile, head);
}

Partial Step::partial_of(const AttentionPlan& plan, const AttentionSpec& spec, int64_t index) {
  const int64_t own = partial_floats(plan.partial_vectors, spec.dim());
  return partial_at(partials_.data() + index * own, plan.partial_vectors);
}

void Step::finish_parts(const Op& op, const AttentionTask& task, const AttentionTile& tile, int64_t head) {
  const AttentionSpec& spec = op.attention;
  const AttentionPlan& plan = plans_[static_cast<size_t>(op.plan)];
  const int64_t first = task.partial - task.part * spec.kv_heads + head;
  const auto part = [&](int64_t i) { return partial_of(plan, spec, first + i * spec.kv_heads); };
  for (int32_t i = 1; i < task.parts; ++i) vector_.merge(part(0), part(i), tile.rows * spec.group(), spec.dim());
  vector_.normalize(spec, part(0), tile.rows, value_row(op.out, tile.row) + head * spec.group() * spec.head_dim,
                    program_.value(op.out).stride);
}

}  // namespace textmill
