// One step: a job of the thread pool that walks a program's operations over the rows of its work.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <vector>

#include "attention_plan.h"
#include "program.h"
#include "threads.h"

namespace textmill {

class Step final : public Job {
 public:
  Step(Program& program, const WorkItem* work, int64_t count, const StepOutput& output);

  void prepare(int threads) override;
  uint32_t next_phase() override;
  void run_chunk(uint32_t chunk, int thread) override;

  // After the job: appends to every slot what was chosen, as far as the guesses were right.
  void accept();

 private:
  // A row whose logits are wanted.
  struct OutputRow {
    int32_t row;     // of the step
    int32_t item;    // of the work
    int32_t place;   // of the results, where the chosen token goes; -1: choose none
    bool is_prompt;  // log-probability of the next known token
  };

  // Some columns of one expert's product, for places [first, first + rows).
  struct ExpertChunk {
    int32_t expert;
    int64_t first, rows, column, columns;
  };

  void place_rows();
  void place_item(const WorkItem& item, int32_t index);
  void clear_results();

  uint32_t begin_op();
  uint32_t begin_matmul();
  uint32_t begin_attention();
  uint32_t begin_experts();
  uint32_t begin_recurrence();
  uint32_t begin_slice();
  uint32_t chunks_of_rows(int64_t cols) { return chunks_of(rows(), cols); }
  uint32_t chunks_of(int64_t count, int64_t cols);
  static int64_t rows_of_tile(int64_t rows, int64_t cols, bool quantized);
  int64_t columns_of_chunk(const Weight& matrix, int64_t n, int64_t tall, int64_t tiles) const;
  void end_op();

  int64_t rows() const { return op_ < program_.body_ops_ ? row_count_ : slice_rows_; }
  float* value_row(int index, int64_t row) const;
  void quantize(int index, int64_t begin, int64_t end) const;
  void run_rows(const Op& op, int64_t begin, int64_t end) const;
  void run_row(const Op& op, int64_t row, float* out) const;
  void run_product(const Op& op, uint32_t chunk) const;
  int64_t first_of_group(int64_t row) const;
  StoreRow row_to_store(const Op& op, int64_t row) const;
  void run_store(const Op& op, int64_t begin, int64_t end) const;
  AttendTask attend_task(const Op& op, int64_t unit) const;
  void run_attention(const Op& op, uint32_t chunk, int thread);
  void run_unit(const Op& op, int64_t unit, const AttendTask& call, int thread);
  Partial partial_of(const AttentionPlan& plan, const AttentionSpec& spec, int64_t index);
  void finish_parts(const Op& op, const AttentionTask& task, const AttentionTile& tile, int64_t head);
  void sort_by_expert(const Experts& experts);
  uint32_t cut_experts(const Experts& experts, bool down);
  void run_experts(const Op& op, uint32_t chunk);
  void choose_experts(const Op& op, int64_t row);
  void fill_place(const Op& op, int64_t place) const;
  void run_expert(const Op& op, bool down, uint32_t chunk) const;
  void mix_experts(const Op& op, int64_t row) const;
  void profile_experts(const Experts& experts, OpProfile* entry) const;
  void run_recurrence(const Op& op, uint32_t chunk) const;
  void run_convolve(const Op& op, const PlacedItem& item, int64_t channel, int64_t channels, float* state) const;
  void run_scan(const Op& op, const PlacedItem& item, int64_t channel, int64_t channels, float* state) const;
  void run_output(int64_t index, int thread);
  void choose(const OutputRow& wanted, float* logits, int thread);

  Program& program_;
  const WorkItem* work_;
  int64_t item_count_;
  int64_t place_count_ = 0;
  const StepOutput& out_;
  const VectorKernels& vector_;
  int threads_ = 1;

  int64_t row_count_ = 0;
  std::vector<int32_t> tokens_, positions_, slots_;  // by row
  std::vector<PlacedItem> items_;
  std::vector<OutputRow> outputs_;
  std::vector<AttentionPlan> plans_;
  std::vector<float> partials_;
  std::vector<std::atomic<int32_t>> counters_;

  // Of the experts that run; [rows, top_k] by row, then by place.
  std::vector<int32_t> chosen_, place_of_;
  std::vector<float> shares_;
  std::vector<int32_t> row_of_place_;
  std::vector<int64_t> first_place_;  // by expert, and the end
  std::vector<ExpertChunk> expert_chunks_;

  // Where the step is; written between phases only.
  size_t op_ = 0;
  int phase_ = 0;
  bool sampling_ = false;
  int64_t grain_ = 1;            // rows of a chunk
  int64_t columns_ = 0;          // of a chunk of a product
  int64_t row_tiles_ = 1;        // of a product
  int64_t tile_rows_ = 0;
  int64_t slice_ = 0, slice_rows_ = 0;  // output rows [slice_, slice_ + slice_rows_)
  std::chrono::steady_clock::time_point started_;
};

}  // namespace textmill
