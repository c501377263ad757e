// The pool itself: tickets, a short spin, then the kernel's futex.
#include "threads.h"

#include <linux/futex.h>
#include <pthread.h>
#include <sched.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <climits>
#include <cmath>
#include <fstream>
#include <string>

namespace textmill {
namespace {

// The web side shares our cores: spin about as long as a phase lasts, never as long as a step.
constexpr auto kSpin = std::chrono::microseconds(30);

constexpr uint64_t kCountMask = (1u << 20) - 1;
uint32_t next_of(uint64_t ticket) { return static_cast<uint32_t>(ticket & kCountMask); }
uint32_t total_of(uint64_t ticket) { return static_cast<uint32_t>((ticket >> 20) & kCountMask); }
uint64_t phase_of(uint64_t ticket) { return ticket >> 40; }

void relax() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

// The half of the ticket that changes with every phase (little-endian machines only, as all we build for).
uint32_t* futex_word(std::atomic<uint64_t>& ticket) { return reinterpret_cast<uint32_t*>(&ticket) + 1; }

void futex_wait(uint32_t* word, uint32_t expected) {
  syscall(SYS_futex, word, FUTEX_WAIT_PRIVATE, expected, nullptr, nullptr, 0);
}

void futex_wake_all(uint32_t* word) { syscall(SYS_futex, word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

}  // namespace

ThreadPool::ThreadPool(int threads) {
  for (int i = 1; i < threads; ++i) {
    workers_.emplace_back([this, i] {
      pthread_setname_np(pthread_self(), "kernels");
      work(i);
    });
  }
}

ThreadPool::~ThreadPool() {
  stop_.store(true);
  ticket_.store((phase_of(ticket_.load()) + 1) << 40);
  futex_wake_all(futex_word(ticket_));
  for (auto& worker : workers_) worker.join();
}

void ThreadPool::forget_workers() {
  // A std::thread that is joinable may not be destroyed: its memory is left behind, once per fork.
  new std::vector<std::thread>(std::move(workers_));
  workers_.clear();
}

void ThreadPool::run(Job& job) {
  job_ = &job;
  job.prepare(threads());
  advance(0);
  work(0);
  job_ = nullptr;
}

void ThreadPool::advance(int thread) {
  uint32_t total;
  while ((total = job_->next_phase()) == 1) job_->run_chunk(0, thread);
  done_.store(0, std::memory_order_relaxed);
  const uint64_t phase = phase_of(ticket_.load(std::memory_order_relaxed)) + 1;
  ticket_.store(phase << 40 | static_cast<uint64_t>(total) << 20);  // seq_cst: before the look at the sleepers
  if (sleepers_.load() > 0) futex_wake_all(futex_word(ticket_));
}

void ThreadPool::work(int thread) {
  for (;;) {
    const uint64_t ticket = ticket_.fetch_add(1, std::memory_order_acq_rel);
    if (next_of(ticket) < total_of(ticket)) {
      job_->run_chunk(next_of(ticket), thread);
      if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == total_of(ticket)) advance(thread);
      continue;
    }
    if (thread == 0 && total_of(ticket) == 0) return;  // the job is done
    if (stop_.load(std::memory_order_relaxed)) return;
    wait_beyond(ticket);
  }
}

void ThreadPool::wait_beyond(uint64_t ticket) {
  const auto until = std::chrono::steady_clock::now() + kSpin;
  do {
    for (int i = 0; i < 16; ++i) {
      if (phase_of(ticket_.load(std::memory_order_acquire)) != phase_of(ticket)) return;
      relax();
    }
  } while (std::chrono::steady_clock::now() < until);
  sleepers_.fetch_add(1);
  const uint32_t expected = static_cast<uint32_t>(ticket >> 32);
  while (phase_of(ticket_.load()) == phase_of(ticket)) futex_wait(futex_word(ticket_), expected);
  sleepers_.fetch_sub(1);
}

namespace {

double cgroup_quota() {
  std::ifstream unified("/sys/fs/cgroup/cpu.max");
  std::string quota;
  double period = 0;
  if (unified >> quota >> period && quota != "max" && period > 0) return std::stod(quota) / period;
  std::ifstream legacy_quota("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"), legacy_period("/sys/fs/cgroup/cpu/cpu.cfs_period_us");
  double microseconds = 0;
  if (legacy_quota >> microseconds && legacy_period >> period && microseconds > 0 && period > 0) {
    return microseconds / period;
  }
  return 0;
}

// The process's pool; made at first use, so that a fork before that is harmless.
struct SharedPool {
  std::mutex mutex;
  std::unique_ptr<ThreadPool> pool;
  int wanted = 0;
  pid_t owner = 0;

  ThreadPool& get() {  // with the mutex held
    if (pool && owner != getpid()) {
      pool->forget_workers();
      (void)pool.release();  // its memory may be in any state; the child starts anew
    }
    if (!pool) {
      owner = getpid();
      pool = std::make_unique<ThreadPool>(wanted > 0 ? wanted : usable_cores());
    }
    return *pool;
  }
};

SharedPool& shared() {
  static SharedPool* const pool = new SharedPool;  // never destroyed: threads may still run at exit
  return *pool;
}

class RangeJob final : public Job {
 public:
  RangeJob(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body)
      : count_(count), grain_(grain), body_(body) {}
  uint32_t next_phase() override {
    if (started_) return 0;
    started_ = true;
    return static_cast<uint32_t>((count_ + grain_ - 1) / grain_);
  }
  void run_chunk(uint32_t chunk, int) override {
    const int64_t begin = chunk * grain_;
    body_(begin, std::min(begin + grain_, count_));
  }

 private:
  int64_t count_, grain_;
  const std::function<void(int64_t, int64_t)>& body_;
  bool started_ = false;
};

}  // namespace

int usable_cores() {
  cpu_set_t set;
  CPU_ZERO(&set);
  int cores = sched_getaffinity(0, sizeof(set), &set) == 0 ? CPU_COUNT(&set) : 1;
  const double quota = cgroup_quota();
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  return std::max(1, cores);
}

int set_threads(int count) {
  SharedPool& owner = shared();
  std::lock_guard<std::mutex> lock(owner.mutex);
  const int wanted = count > 0 ? std::min(count, 1024) : usable_cores();
  owner.wanted = wanted;
  if (owner.pool && owner.owner == getpid() && owner.pool->threads() != wanted) owner.pool.reset();
  return wanted;
}

void run_job(Job& job) {
  SharedPool& owner = shared();
  std::lock_guard<std::mutex> lock(owner.mutex);
  owner.get().run(job);
}

void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  constexpr int64_t kMostChunks = 1 << 16;
  RangeJob job(count, std::max(grain, (count + kMostChunks - 1) / kMostChunks), body);
  run_job(job);
}

}  // namespace textmill
