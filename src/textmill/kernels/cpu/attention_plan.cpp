// Cutting attention: query tiles always, ranges of keys where the batch is small and the context long.
#include "attention_plan.h"

#include <algorithm>

namespace textmill {
namespace {

void add_tiles(const AttentionSpec& spec, const PlacedItem& item, AttentionPlan* plan) {
  const int64_t height = std::max<int64_t>(1, kQueryTile / spec.group());
  for (int64_t first = 0; first < item.count; first += height) {
    AttentionTile tile;
    tile.row = item.row + first;
    tile.rows = std::min(height, item.count - first);
    tile.position = item.position + first;
    tile.slot = item.slot;
    tile.begin = spec.window > 0 ? std::max<int64_t>(0, tile.position - spec.window + 1) : 0;
    tile.end = tile.position + tile.rows;
    plan->keys += tile.rows * (tile.end - tile.begin);
    plan->tiles.push_back(tile);
  }
}

int64_t ranges_of(const AttentionTile& tile) { return (tile.end - 1) / kKeyRange - tile.begin / kKeyRange + 1; }

void add_parts(const AttentionSpec& spec, int32_t index, const AttentionTile& tile, AttentionPlan* plan) {
  const int32_t parts = static_cast<int32_t>(ranges_of(tile));
  for (int32_t part = 0; part < parts; ++part) {
    const int64_t range = (tile.begin / kKeyRange + part) * kKeyRange;
    plan->tasks.push_back({index, part, parts, plan->counters, std::max(tile.begin, range),
                           std::min(tile.end, range + kKeyRange), plan->partials});
    plan->partials += spec.kv_heads;
  }
  plan->partial_vectors = std::max(plan->partial_vectors, tile.rows * spec.group());
  ++plan->counters;
}

// Work of keys [begin, end) for `rows` queries and one kv head: keys are read once, and a task has costs of its own.
int64_t work_of(int64_t rows, int64_t begin, int64_t end) { return (rows + 1) * (end - begin + kKeyTile); }

// How many chunks a thread gets: the last to finish should not be waited for long.
constexpr int64_t kChunksOfThread = 16;

void cut_chunks(const AttentionSpec& spec, int64_t share, AttentionPlan* plan) {
  int64_t unit = 0, gathered = share;
  for (const AttentionTask& task : plan->tasks) {
    const int64_t work = work_of(plan->tiles[static_cast<size_t>(task.tile)].rows, task.begin, task.end);
    for (int64_t head = 0; head < spec.kv_heads; ++head, ++unit, gathered += work) {
      if (gathered + work / 2 < share) continue;
      plan->chunks.push_back(unit);
      gathered = 0;
    }
  }
  plan->chunks.push_back(unit);
}

}  // namespace

void plan_attention(const AttentionSpec& spec, const std::vector<PlacedItem>& items, int threads, AttentionPlan* plan) {
  plan->tiles.clear();
  plan->tasks.clear();
  plan->chunks.clear();
  plan->counters = 0;
  plan->partials = plan->partial_vectors = plan->keys = 0;
  for (const PlacedItem& item : items) add_tiles(spec, item, plan);
  // The longest first: the last task to finish is then a short one.
  std::stable_sort(plan->tiles.begin(), plan->tiles.end(), [](const AttentionTile& a, const AttentionTile& b) {
    return work_of(a.rows, a.begin, a.end) > work_of(b.rows, b.begin, b.end);
  });
  int64_t work = 0;
  for (const AttentionTile& tile : plan->tiles) work += work_of(tile.rows, tile.begin, tile.end) * spec.kv_heads;
  const int64_t most = threads > 1 ? work / (threads * kChunksOfThread / 2) : work;
  for (size_t i = 0; i < plan->tiles.size(); ++i) {
    const AttentionTile& tile = plan->tiles[i];
    if (ranges_of(tile) > 1 && work_of(tile.rows, tile.begin, tile.end) > most) {
      add_parts(spec, static_cast<int32_t>(i), tile, plan);
    } else {
      plan->tasks.push_back({static_cast<int32_t>(i), 0, 1, -1, tile.begin, tile.end, -1});
    }
  }
  cut_chunks(spec, std::max<int64_t>(1, work / (threads * kChunksOfThread)), plan);
}

}  // namespace textmill
