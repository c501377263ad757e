// How a step's attention is cut into tasks for the threads; no cut changes a bit of the result.
#pragma once

#include <cstdint>
#include <vector>

#include "vector.h"

namespace textmill {

// A work item of a step with its place among the step's rows.
struct PlacedItem {
  int64_t row;       // its first row
  int64_t position;  // of that row
  int64_t count;
  int64_t slot;
};

// A tile of query rows of one item, against keys [begin, end), for any one kv head.
struct AttentionTile {
  int64_t row, rows, position, slot;
  int64_t begin, end;
};

// One unit of work: keys [begin, end) of a tile. parts == 1: the whole tile, written out at once. Else part `part` of
// `parts`: its unnormalized result goes to `partial`, and whoever finishes a tile's last part merges them in order.
struct AttentionTask {
  int32_t tile;
  int32_t part, parts;
  int32_t counter;  // of the tile, times kv_heads
  int64_t begin, end;
  int64_t partial;  // index of the task's first partial; one per kv head
};

struct AttentionPlan {
  std::vector<AttentionTile> tiles;
  std::vector<AttentionTask> tasks;  // parts of one tile stand side by side, in order
  std::vector<int64_t> chunks;       // first units of the threads' chunks, then the number of units
  int32_t counters = 0;              // tiles that have parts
  int64_t partials = 0;
  int64_t partial_vectors = 0;  // at most, of a tile that has parts
  int64_t keys = 0;  // sum over query rows of keys looked at, for the profile
};

// Fills `plan` anew. A unit is a task for one kv head, task by task. Tiles that would keep one of `threads` busy for long
// are split; chunks are units of about equal work.
void plan_attention(const AttentionSpec& spec, const std::vector<PlacedItem>& items, int threads, AttentionPlan* plan);

}  // namespace textmill
