// Convolutions and scans within a step: a chunk is some channels of one sequence, all of its rows in order.
#include <algorithm>

#include "step.h"

namespace textmill {
namespace {

constexpr int64_t kChannels = 64;  // of a chunk

}  // namespace

uint32_t Step::begin_recurrence() {
  if (phase_ > 0) return 0;
  const int64_t channels = program_.value(program_.ops_[op_].out).cols;
  return static_cast<uint32_t>((channels + kChannels - 1) / kChannels * static_cast<int64_t>(items_.size()));
}

void Step::run_recurrence(const Op& op, uint32_t chunk) const {
  const Value& out = program_.value(op.out);
  const int64_t blocks = (out.cols + kChannels - 1) / kChannels, channel = chunk % blocks * kChannels;
  const int64_t channels = std::min(kChannels, out.cols - channel);
  const PlacedItem& item = items_[static_cast<size_t>(chunk / blocks)];
  const int64_t held = op.kind == OpKind::kScan ? op.width : op.width - 1;
  float* states = reinterpret_cast<float*>(program_.states_.data());
  float* state = states + item.slot * program_.state_floats_ + op.state_offset + channel;
  if (item.position == 0) {  // whatever the slot held is of no meaning to a sequence that begins
    for (int64_t i = 0; i < held; ++i) std::fill_n(state + i * out.stride, channels, 0.0f);
  }
  op.kind == OpKind::kScan ? run_scan(op, item, channel, channels, state)
                           : run_convolve(op, item, channel, channels, state);
}

void Step::run_convolve(const Op& op, const PlacedItem& item, int64_t channel, int64_t channels, float* state) const {
  const Value &x = program_.value(op.x), &out = program_.value(op.out);
  ConvolveTask task;
  task.rows = item.count;
  task.channels = channels;
  task.taps = op.width;
  task.x = value_row(op.x, item.row) + channel;
  task.x_stride = x.stride;
  task.weight = op.weight + channel;
  task.weight_stride = out.cols;
  task.bias = op.bias ? op.bias + channel : nullptr;
  task.state = state;
  task.state_stride = out.stride;
  task.out = value_row(op.out, item.row) + channel;
  task.out_stride = out.stride;
  vector_.convolve(task);
}

void Step::run_scan(const Op& op, const PlacedItem& item, int64_t channel, int64_t channels, float* state) const {
  const Value &gate = program_.value(op.gate), &out = program_.value(op.out);
  ScanTask task;
  task.rows = item.count;
  task.channels = channels;
  task.columns = op.width;
  task.x = value_row(op.x, item.row) + channel;
  task.x_stride = program_.value(op.x).stride;
  task.step = value_row(op.y, item.row) + channel;
  task.step_stride = program_.value(op.y).stride;
  task.gate = value_row(op.gate, item.row) + gate.cols - out.cols + channel;
  task.gate_stride = gate.stride;
  task.bc = value_row(op.bc, item.row);
  task.bc_stride = program_.value(op.bc).stride;
  task.a = op.weight + channel;
  task.a_stride = out.cols;
  task.skip = op.bias + channel;
  task.state = state;
  task.state_stride = out.stride;
  task.out = value_row(op.out, item.row) + channel;
  task.out_stride = out.stride;
  vector_.scan_states(task);
}

}  // namespace textmill
