// The thread pool: a job is a row of phases, a phase a number of chunks; threads take chunks until the job ends.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

namespace textmill {

class Job {
 public:
  virtual ~Job() = default;
  // Called first, with the number of threads that may come.
  virtual void prepare(int threads) { (void)threads; }
  // Called when the phase before is complete, by one thread while no other works: does what is serial, and returns the
  // number of chunks of the next phase (below 2^20), or 0 when the job is done.
  virtual uint32_t next_phase() = 0;
  // Called by any thread, numbered from 0. May not throw.
  virtual void run_chunk(uint32_t chunk, int thread) = 0;
};

// One fork per job. A phase is over when all its chunks are done, not when all threads have come by: a thread that is
// not running holds up nobody, unless it is in the middle of a chunk. Chunks are taken from one counter, so threads of
// unequal speed share evenly. A phase of one chunk runs at once on the thread that ended the phase before.
class ThreadPool {
 public:
  explicit ThreadPool(int threads);
  ~ThreadPool();
  int threads() const { return static_cast<int>(workers_.size()) + 1; }
  // Runs the job to its end on the calling thread and the workers. One job at a time.
  void run(Job& job);
  // After a fork, in the child: the workers do not exist there. Never frees them.
  void forget_workers();

 private:
  void work(int thread);
  void advance(int thread);
  void wait_beyond(uint64_t ticket);

  // phase number (24 bits) | chunks of the phase (20) | next chunk (20). Chunks 0: no job.
  alignas(64) std::atomic<uint64_t> ticket_{0};
  alignas(64) std::atomic<uint32_t> done_{0};
  alignas(64) std::atomic<int> sleepers_{0};
  std::atomic<bool> stop_{false};
  Job* job_ = nullptr;
  std::vector<std::thread> workers_;
};

// Cores we may use: affinity and the cgroup's CPU quota.
int usable_cores();

// Sets how many threads the pool of this process has (0: usable_cores). Returns the number.
int set_threads(int count);

// Runs a job on the pool of this process, which is made at first use; waits while another thread's job runs.
void run_job(Job& job);

// body(begin, end) over [0, count) in pieces of `grain`, on the pool.
void parallel_for(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

}  // namespace textmill
