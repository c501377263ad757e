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
  ++plan->counters;
}

}  // namespace

void plan_attention(const AttentionSpec& spec, const std::vector<PlacedItem>& items, int threads, AttentionPlan* plan) {
  plan->tiles.clear();
  plan->tasks.clear();
  plan->counters = 0;
  plan->partials = plan->keys = 0;
  for (const PlacedItem& item : items) add_tiles(spec, item, plan);
  // The longest first: the last task to finish is then a short one.
  std::stable_sort(plan->tiles.begin(), plan->tiles.end(), [](const AttentionTile& a, const AttentionTile& b) {
    return a.rows * (a.end - a.begin) > b.rows * (b.end - b.begin);
  });
  const int64_t units = static_cast<int64_t>(plan->tiles.size()) * spec.kv_heads;
  const bool split = threads > 1 && units < 8 * threads;
  for (size_t i = 0; i < plan->tiles.size(); ++i) {
    const AttentionTile& tile = plan->tiles[i];
    if (split && ranges_of(tile) > 1) {
      add_parts(spec, static_cast<int32_t>(i), tile, plan);
    } else {
      plan->tasks.push_back({static_cast<int32_t>(i), 0, 1, -1, tile.begin, tile.end, -1});
    }
  }
}

}  // namespace textmill
