// The queue's thread: waits, first spinning, for a step; runs it; says so.
#include "step_queue.h"

#include <pthread.h>

#include <algorithm>
#include <chrono>
#include <exception>
#include <stdexcept>
#include <utility>

namespace textmill {
namespace {

using Clock = std::chrono::steady_clock;
// About as long as it takes to plan a step when none is there in time.
constexpr auto kSpin = std::chrono::microseconds(50);

}  // namespace

StepResults::StepResults(const Program& program, const std::vector<WorkItem>& work, int32_t most_tops) {
  size_t places = 0, rows = 0;
  bool scored = false;
  for (const WorkItem& item : work) {
    if (!program.has_slot(item.slot)) throw std::invalid_argument("work: no such slot");
    if (item.samples < 0 || item.samples > item.count) throw std::invalid_argument("work: more samples than rows");
    places += static_cast<size_t>(item.places());
    rows += static_cast<size_t>(item.count);
    scored |= program.wants_prompt(item.slot);
    top_width = std::max<int64_t>(top_width, std::min(program.wanted_tops(item.slot), most_tops));
  }
  const size_t tops = places * static_cast<size_t>(top_width);
  token.resize(places), logprob.resize(places), error.resize(places), top_count.resize(places);
  top_ids.resize(tops), top_logprobs.resize(tops);
  prompt_logprobs.resize(scored ? rows : 0);
}

StepOutput StepResults::output() {
  float* const scores = prompt_logprobs.empty() ? nullptr : prompt_logprobs.data();
  return {token.data(),   logprob.data(), error.data(), top_count.data(), top_ids.data(), top_logprobs.data(),
          top_width,      scores,         nullptr,      true,             false};
}

StepQueue::~StepQueue() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    stopping_ = true;
    ++changes_;
  }
  ready_.notify_one();
  thread_.join();
}

void StepQueue::submit(std::vector<WorkItem> work) {
  Ran ran;
  ran.results = StepResults(program_, work, most_tops_);
  {
    std::lock_guard<std::mutex> lock(mutex_);
    tickets_.push_back({std::move(work), std::move(ran), false});
    ++changes_;
  }
  ready_.notify_one();
}

StepQueue::Ran StepQueue::collect() {
  std::unique_lock<std::mutex> lock(mutex_);
  done_.wait(lock, [this] { return stopping_ || (!tickets_.empty() && tickets_.front().done); });
  if (tickets_.empty() || !tickets_.front().done) return {0, false, "the queue was stopped", {}};
  Ran ran = std::move(tickets_.front().ran);
  tickets_.pop_front();
  --taken_;
  return ran;
}

void StepQueue::go_on() {
  {
    std::lock_guard<std::mutex> lock(mutex_);
    halted_ = false;
    ++changes_;
  }
  ready_.notify_one();
}

void StepQueue::loop() {
  pthread_setname_np(pthread_self(), "steps");
  while (Ticket* ticket = next()) {
    ticket->ran.held = touches_failed(*ticket);
    if (!ticket->ran.held) run(*ticket);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      halted_ = ticket->ran.held || !ticket->ran.error.empty();
      ticket->done = true;
    }
    done_.notify_one();
  }
}

// Waits for a step that may run; null when the queue ends. A deque never moves its elements.
StepQueue::Ticket* StepQueue::next() {
  const auto until = Clock::now() + kSpin;
  std::unique_lock<std::mutex> lock(mutex_);
  const auto wanted = [this] { return stopping_ || (!halted_ && taken_ < tickets_.size()); };
  while (!wanted() && Clock::now() < until) {
    const int seen = changes_.load(std::memory_order_relaxed);
    lock.unlock();
    while (changes_.load(std::memory_order_relaxed) == seen && Clock::now() < until) {
    }
    lock.lock();
  }
  ready_.wait(lock, wanted);
  return stopping_ ? nullptr : &tickets_[taken_++];
}

void StepQueue::run(Ticket& ticket) {
  const auto started = Clock::now();
  try {
    program_.run(ticket.work.data(), static_cast<int64_t>(ticket.work.size()), ticket.ran.results.output(), {});
    mark_failed(ticket);
  } catch (const std::exception& error) {
    ticket.ran.error = error.what();
    for (const WorkItem& item : ticket.work) failed_[item.slot] = 1;
  }
  ticket.ran.seconds = std::chrono::duration<double>(Clock::now() - started).count();
}

bool StepQueue::touches_failed(const Ticket& ticket) const {
  for (const WorkItem& item : ticket.work) {
    if (failed_[item.slot]) return true;
  }
  return false;
}

void StepQueue::mark_failed(const Ticket& ticket) {
  int64_t place = 0;
  for (const WorkItem& item : ticket.work) {
    // Of the newest known token; later places are guesses.
    failed_[item.slot] |= ticket.ran.results.error[static_cast<size_t>(place)] != 0;
    place += item.places();
  }
}

}  // namespace textmill
