// Measures what this machine's cores and memory can give at most; prints one JSON object. Started by run.py.
//   read bandwidth: sums of a buffer, each thread its own part;  codes: unsigned x signed byte products as the 4-bit kernels
//   do them (vpmaddubsw + vpaddw), one with nothing else;  fma: f32 multiply-adds. All best of several short passes.
// Usage: limits THREADS SECONDS
#include <sched.h>
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <thread>
#include <vector>

#if !defined(__x86_64__)
int main() {
  std::puts("{\"error\": \"measures x86-64 with AVX2 only\"}");
  return 1;
}
#else
#include <immintrin.h>

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

// Threads that wait for each other before each pass, so that a pass measures all of them together.
class Gate {
 public:
  explicit Gate(int threads) : threads_(threads) {}
  void wait() {
    const int round = round_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
      arrived_.store(0);
      round_.fetch_add(1);
      return;
    }
    while (round_.load() == round) std::this_thread::yield();
  }

 private:
  const int threads_;
  std::atomic<int> arrived_{0};
  std::atomic<int> round_{0};
};

void pin(int core) {
  cpu_set_t set;
  CPU_ZERO(&set);
  CPU_SET(core, &set);
  sched_setaffinity(0, sizeof(set), &set);  // refused in some containers: then unpinned
}

// The cores this process may use.
std::vector<int> cores() {
  cpu_set_t set;
  std::vector<int> found;
  if (sched_getaffinity(0, sizeof(set), &set) == 0) {
    for (int core = 0; core < CPU_SETSIZE; ++core) {
      if (CPU_ISSET(core, &set)) found.push_back(core);
    }
  }
  return found.empty() ? std::vector<int>{0} : found;
}

// Best seconds of one pass of work(thread) on all threads, repeated for `budget` seconds.
double best_pass(int threads, double budget, const std::function<void(int)>& work) {
  const std::vector<int> allowed = cores();
  Gate gate(threads);
  double best = 1e30;
  std::atomic<bool> stop{false};
  auto body = [&](int thread) {
    pin(allowed[static_cast<size_t>(thread) % allowed.size()]);
    const auto begin = Clock::now();
    for (int pass = 0; !stop.load(); ++pass) {
      gate.wait();
      const auto start = Clock::now();
      work(thread);
      gate.wait();
      if (thread == 0) {
        const double spent = seconds_since(start);
        if (pass > 0 && spent < best) best = spent;
        if (pass > 1 && seconds_since(begin) > budget) stop.store(true);
      }
      gate.wait();
    }
  };
  std::vector<std::thread> pool;
  for (int thread = 0; thread < threads; ++thread) pool.emplace_back(body, thread);
  for (auto& thread : pool) thread.join();
  return best;
}

volatile int64_t sink;

__attribute__((target("avx2"))) void read_all(const uint8_t* data, size_t bytes) {
  __m256i sums[4] = {};
  for (size_t i = 0; i + 128 <= bytes; i += 128) {
    for (size_t j = 0; j < 4; ++j) {
      const auto* at = reinterpret_cast<const __m256i*>(data + i + 32 * j);
      sums[j] = _mm256_add_epi64(sums[j], _mm256_load_si256(at));
    }
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 2048), _MM_HINT_T0);
    _mm_prefetch(reinterpret_cast<const char*>(data + i + 2112), _MM_HINT_T0);
  }
  sums[0] = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  sink = _mm256_extract_epi64(sums[0], 0);
}

double bandwidth(const uint8_t* data, size_t bytes, int threads, double budget) {
  const size_t part = bytes / static_cast<size_t>(threads) / 128 * 128;
  const double spent = best_pass(threads, budget, [&](int thread) {
    read_all(data + part * static_cast<size_t>(thread), part);
  });
  return static_cast<double>(part) * threads / spent / 1e9;
}

constexpr int64_t kLoops = 400000;

// Inline assembly, or the compiler would compute the equal products once.
__attribute__((target("avx2"))) void byte_products() {
  __m256i codes = _mm256_set1_epi8(1), a = _mm256_set1_epi8(2), total = _mm256_setzero_si256();
  __m256i s0 = total, s1 = total, s2 = total, s3 = total, s4 = total, s5 = total;
  auto step = [&](__m256i& sum) __attribute__((target("avx2"), always_inline)) {
    __m256i product;
    asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(codes), "x"(a));
    sum = _mm256_add_epi16(sum, product);
  };
  for (int64_t i = 0; i < kLoops; ++i) {
    step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
    step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
  }
  total = _mm256_add_epi16(_mm256_add_epi16(s0, s1), _mm256_add_epi16(s2, s3));
  total = _mm256_add_epi16(total, _mm256_add_epi16(s4, s5));
  sink = _mm256_extract_epi64(total, 0);
}

__attribute__((target("avx2,fma"))) void float_products() {
  __m256 weight = _mm256_set1_ps(1e-9f), a = _mm256_set1_ps(0.5f), z = _mm256_setzero_ps();
  __m256 s0 = z, s1 = z, s2 = z, s3 = z, s4 = z, s5 = z, s6 = z, s7 = z, s8 = z, s9 = z, s10 = z, s11 = z;
  auto step = [&](__m256& sum) __attribute__((target("avx2,fma"), always_inline)) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(a));
  };
  for (int64_t i = 0; i < kLoops; ++i) {
    step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
    step(s6), step(s7), step(s8), step(s9), step(s10), step(s11);
  }
  z = _mm256_add_ps(_mm256_add_ps(_mm256_add_ps(s0, s1), _mm256_add_ps(s2, s3)), _mm256_add_ps(s4, s5));
  z = _mm256_add_ps(z, _mm256_add_ps(_mm256_add_ps(s6, s7), _mm256_add_ps(_mm256_add_ps(s8, s9), _mm256_add_ps(s10, s11))));
  sink = static_cast<int64_t>(_mm256_cvtss_f32(z));
}

double rate(int threads, double budget, double per_loop, void (*work)()) {
  return per_loop * kLoops * threads / best_pass(threads, budget, [work](int) { work(); }) / 1e9;
}

}  // namespace

int main(int argc, char** argv) {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) {
    std::puts("{\"error\": \"this machine has no AVX2\"}");
    return 1;
  }
  const int threads = argc > 1 ? std::atoi(argv[1]) : 1;
  const double budget = argc > 2 ? std::atof(argv[2]) : 0.5;
  constexpr size_t kBytes = size_t{1} << 30;
  void* memory = std::aligned_alloc(size_t{2} << 20, kBytes);
  if (!memory || threads < 1) return 1;
  madvise(memory, kBytes, MADV_HUGEPAGE);
  std::memset(memory, 1, kBytes);
  const auto* data = static_cast<const uint8_t*>(memory);
  std::printf("{\"threads\": %d, \"read_1gib_gb_s\": %.1f, ", threads, bandwidth(data, kBytes, threads, budget));
  std::printf("\"read_96mib_gb_s\": %.1f, ", bandwidth(data, size_t{96} << 20, threads, budget));
  std::printf("\"byte_products_gmac_s\": %.1f, ", rate(threads, budget, 12.0 * 32, byte_products));
  std::printf("\"fma_gmac_s\": %.1f}\n", rate(threads, budget, 12.0 * 8, float_products));
  return 0;
}
#endif
