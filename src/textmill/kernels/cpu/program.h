// A model as a list of operations over rows, recorded once; a step walks it for any number of rows in one call.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "matmul.h"
#include "sampler.h"
#include "vector.h"

namespace textmill {

struct Limits {
  int64_t max_rows = 0, max_outputs = 0, max_slots = 0, max_total_tokens = 0, block_size = 16, vocab_size = 0;
  bool half_cache = true;
};

// The columns of the slot table, owned by Python; one entry (or row) per slot.
struct SlotTable {
  int32_t* tokens = nullptr;  // [max_slots, max_total_tokens + 1]
  int32_t* length = nullptr;
  const int32_t* block_table = nullptr;  // [max_slots, blocks_per_slot]
  int64_t blocks_per_slot = 0;
  const float* temperature = nullptr;
  const float* top_p = nullptr;
  const float* typical_p = nullptr;
  const float* repetition_penalty = nullptr;
  const float* frequency_penalty = nullptr;
  const int32_t* top_k = nullptr;
  const uint8_t* draws = nullptr;
  const uint64_t* seed = nullptr;
  const int32_t* top_n = nullptr;
  const uint8_t* prompt_logprobs = nullptr;
};

// One slot's share of a step, as a row of Python's work array. After each of its last `samples` rows a token is chosen:
// the first of them is the newest known one, the others hold guesses, which stand in the table behind `length`.
struct WorkItem {
  int32_t slot, start, count, samples;

  // Entries of the item in a step's results: one per row that samples, at least one.
  int32_t places() const { return samples > 1 ? samples : 1; }
};

// Where a step's results go: an item's places stand side by side; prompt_logprobs one per row (null: nobody asked).
struct StepOutput {
  int32_t* token;
  float* logprob;
  uint8_t* error;
  int32_t* top_count;
  int32_t* top_ids;  // [places, top_width]
  float* top_logprobs;
  int64_t top_width;
  float* prompt_logprobs;
  float* logits;  // [output rows, vocab_size] or null
  bool sample;
  bool every_row;
};

enum class OpKind {  // those before kMatmul work row by row
  kEmbed, kEmbedPositions, kPlace, kRmsNorm, kLayerNorm, kAdd, kMultiply, kScale, kClip, kSoftcap, kActivation,
  kGatedActivation, kOutputs, kMatmul, kAttention, kExperts,
  kConvolve, kScan
};

struct Value {
  int64_t cols = 0, stride = 0;  // floats
  bool head = false;             // max_outputs rows instead of max_rows
  int producer = -1;
  int readers = 0, last_reader = -1;
  size_t offset = 0;  // in the arena
  // Its quantized copy, shared by all packed matrices that read it.
  bool quantized = false;
  int first_product = -1, last_product = -1;
  size_t quantized_offset = 0;
};

// A mixture of gated experts (kernels/spec.py: ExpertsSpec). A step sorts its rows by expert into `places`: rows times
// top_k of them.
struct Experts {
  std::vector<std::shared_ptr<const Weight>> gate_up, down;
  int64_t top_k = 0;
  float norm = 0;  // 0: weights stay as they are
  Activation activation = Activation::kNone;
  // In the operation's scratch: first what experts read (floats or quantized), later what they answer; then their inner
  // numbers as floats, then quantized.
  size_t inner_offset = 0, codes_offset = 0, scratch_bytes = 0;

  int64_t count() const { return static_cast<int64_t>(gate_up.size()); }
  int64_t outer() const { return gate_up[0]->k; }
  int64_t inner() const { return down[0]->k; }
  bool up_quantized() const { return gate_up[0]->quantized(); }
  bool down_quantized() const { return down[0]->quantized(); }
};

struct Op {
  OpKind kind = OpKind::kAdd;
  int x = -1, y = -1, out = -1;  // values; y of a matmul is its residual, of experts their scores, of a scan its steps
  int bc = -1, gate = -1;        // of a scan
  bool head = false;
  const float* weight = nullptr;
  const float* bias = nullptr;
  float number = 0;  // eps, factor, cap or limit
  Activation activation = Activation::kNone;
  bool gated = false;
  bool quantizes = false;  // a matmul that must first quantize its input
  std::shared_ptr<const Weight> matrix;
  std::shared_ptr<const Experts> experts;
  AttentionSpec attention;
  int layer = -1, plan = -1;
  size_t scratch_offset = 0;  // attention's rotated queries; what experts need
  int64_t width = 0;          // taps of a convolution, columns of a scan
  int64_t state_offset = 0;   // floats, in a slot's states
  size_t keys_offset = 0, scales_offset = 0;  // in a cache block
};

// Rows of one step that come from elsewhere (pictures): row i is values[row[i]], or its own where row[i] is negative.
struct PlacedRows {
  const int32_t* row = nullptr;  // null: all rows are their own
  int64_t rows = 0;
  const float* values = nullptr;  // [count, cols]
  int64_t count = 0, cols = 0;
};

struct OpProfile {
  std::string name;
  int64_t calls = 0;
  double seconds = 0;
  int64_t bytes = 0, macs = 0;
};

// Memory from mmap: zero, and touched only where it is used.
class Mapping {
 public:
  Mapping() = default;
  ~Mapping();
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  void map(size_t bytes);  // std::bad_alloc
  std::byte* data() const { return data_; }

 private:
  std::byte* data_ = nullptr;
  size_t bytes_ = 0;
};

// Recording throws std::invalid_argument on shapes that do not fit.
class Program {
 public:
  Program(const Limits& limits, const SlotTable& table);

  int embed(std::shared_ptr<const Weight> matrix, float scale);
  // table: [positions, cols]; row `position + offset` of it.
  int embed_positions(const float* table, int64_t positions, int64_t cols, int64_t offset);
  // x, but with the rows that a step places.
  int place_rows(int x);
  int rms_norm(int x, const float* weight, int64_t size, float eps);
  int layer_norm(int x, const float* weight, int64_t size, const float* bias, float eps);
  int binary(OpKind kind, int x, int y);
  int unary(OpKind kind, int x, float number);
  int activation(int x, Activation kind, bool gated);
  int matmul(int x, std::shared_ptr<const Weight> matrix, const float* bias, Activation kind, bool gated);
  int attend(int x, int layer, const AttentionSpec& spec);
  int experts(int x, int scores, Experts experts);
  // weight: [taps, channels], of the first channels of x; bias may be null.
  int convolve(int x, const float* weight, int64_t taps, int64_t channels, const float* bias);
  // a: [columns, channels]; bc: rows of b | c; the last channels of `gate`.
  int scan(int x, int step, int bc, int gate, const float* a, int64_t columns, int64_t channels, const float* skip);
  int outputs(int x);
  void finish(int logits);

  int64_t columns(int index) const { return value(index).cols; }
  // True if the slot asks for the log-probabilities of its prompt.
  bool wants_prompt(int32_t slot) const { return table_.prompt_logprobs[slot] != 0; }
  // How many of the likeliest tokens a slot asks for beside the chosen one.
  int32_t wanted_tops(int32_t slot) const { return table_.top_n[slot]; }
  bool has_slot(int32_t slot) const { return slot >= 0 && slot < limits_.max_slots; }
  size_t kv_bytes_per_block() const { return kv_bytes_per_block_; }
  size_t arena_bytes() const { return arena_bytes_; }
  // What every slot holds beside its blocks.
  size_t state_bytes_per_slot() const { return static_cast<size_t>(state_floats_) * 4; }
  void allocate(int64_t num_blocks);

  // std::invalid_argument, before anything is touched, on work that does not fit.
  void run(const WorkItem* work, int64_t count, const StepOutput& output, const PlacedRows& placed);

  bool profiling = false;
  std::vector<OpProfile> profile() const;
  void reset_profile();

 private:
  friend class Step;

  const Value& value(int index) const;
  int record(Op op, int64_t cols);
  void check_input(int x) const;
  void fuse_residuals();
  void fuse_into(size_t add);
  void drop_fused();
  void find_lifetimes();
  void plan_quantization();
  void plan_memory();
  void check_work(const WorkItem* work, int64_t count) const;
  void check_item(const WorkItem& item) const;
  void check_placed(int64_t rows) const;

  Limits limits_;
  SlotTable table_;
  std::vector<Value> values_;
  std::vector<Op> ops_;
  bool in_head_ = false, finished_ = false;
  int logits_ = -1;
  size_t body_ops_ = 0;  // ops before the head
  std::vector<AttentionSpec> plans_;  // one per distinct shape of attention work
  size_t arena_bytes_ = 0, kv_bytes_per_block_ = 0;
  int64_t num_blocks_ = 0;
  int64_t state_floats_ = 0;  // of a slot
  Mapping arena_, cache_, states_;
  std::vector<OpProfile> profiles_;  // by op
  std::vector<std::unique_ptr<Sampler>> samplers_;  // by thread
  std::vector<std::vector<float>> scratch_;         // by thread
  PlacedRows placed_;  // of the step that runs
  std::mutex running_;
};

}  // namespace textmill
