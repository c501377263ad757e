// Steps of one program on a thread of their own, back to back: the next one starts when the one before it ends.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "program.h"

namespace textmill {

// Room for what a step brings; see StepOutput.
struct StepResults {
  StepResults() = default;
  // As many tops a place as the widest of the step's slots wants, but `most_tops` at most.
  StepResults(const Program& program, const std::vector<WorkItem>& work, int32_t most_tops);
  StepOutput output();

  std::vector<int32_t> token, top_count, top_ids;
  std::vector<float> logprob, top_logprobs, prompt_logprobs;
  std::vector<uint8_t> error;
  int64_t top_width = 0;
};

class StepQueue {
 public:
  struct Ran {
    double seconds = 0;
    bool held = false;  // not run: an earlier step failed one of its slots
    std::string error;  // why the whole step could not run; empty: it did
    StepResults results;
  };

  // `failed` [slots]: set for slots whose rows failed. Whoever admits a slot anew clears it, while no step waits.
  StepQueue(Program& program, uint8_t* failed, int32_t most_tops)
      : program_(program), failed_(failed), most_tops_(most_tops), thread_([this] { loop(); }) {}
  ~StepQueue();
  StepQueue(const StepQueue&) = delete;
  StepQueue& operator=(const StepQueue&) = delete;

  // std::invalid_argument on work that no results could be made room for; what else is wrong with it, `collect` says.
  void submit(std::vector<WorkItem> work);
  // Waits for the oldest step. One that was held or could not run stops those behind it until `go_on`.
  Ran collect();
  void go_on();

 private:
  struct Ticket {
    std::vector<WorkItem> work;
    Ran ran;
    bool done = false;
  };

  void loop();
  Ticket* next();
  void run(Ticket& ticket);
  bool touches_failed(const Ticket& ticket) const;
  void mark_failed(const Ticket& ticket);

  Program& program_;
  uint8_t* failed_;
  const int32_t most_tops_;
  std::mutex mutex_;  // guards what follows
  std::condition_variable ready_, done_;
  std::deque<Ticket> tickets_;  // those collected leave at the front
  size_t taken_ = 0;            // of them, those that ran or run
  bool halted_ = false, stopping_ = false;
  std::atomic<int> changes_{0};  // counts whatever the thread may be waiting for
  std::thread thread_;           // last: it uses all of the above
};

}  // namespace textmill
