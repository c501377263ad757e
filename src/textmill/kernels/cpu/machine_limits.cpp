// The three measurements: a sum over a large buffer, and loops of products that depend on nothing.
#include "machine_limits.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <new>

#include "matmul.h"
#include "threads.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace textmill {
namespace {

using Clock = std::chrono::steady_clock;

constexpr int kFewestPasses = 4;
constexpr int64_t kLoops = 100'000;

double seconds_since(Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); }

volatile int64_t sink;

// Passes of one chunk per thread, until the time is over; keeps the best.
class Passes final : public Job {
 public:
  Passes(double budget, std::function<void(int part, int parts)> work) : budget_(budget), work_(std::move(work)) {}
  void prepare(int threads) override { threads_ = threads, begin_ = Clock::now(); }
  uint32_t next_phase() override {
    if (passes_ > 0) best_ = std::min(best_, seconds_since(start_));
    if (passes_ >= kFewestPasses && seconds_since(begin_) > budget_) return 0;
    ++passes_;
    start_ = Clock::now();
    return static_cast<uint32_t>(threads_);
  }
  void run_chunk(uint32_t chunk, int) override { work_(static_cast<int>(chunk), threads_); }
  int threads() const { return threads_; }
  double best() const { return best_; }

 private:
  const double budget_;
  const std::function<void(int, int)> work_;
  int threads_ = 1, passes_ = 0;
  double best_ = 1e30;
  Clock::time_point begin_, start_;
};

void read_portable(const std::byte* data, size_t bytes) {
  uint64_t sums[8] = {};
  for (size_t i = 0; i + sizeof(sums) <= bytes; i += sizeof(sums)) {
    uint64_t words[8];
    std::memcpy(words, data + i, sizeof(words));
    for (int j = 0; j < 8; ++j) sums[j] += words[j];
  }
  for (const uint64_t sum : sums) sink = static_cast<int64_t>(sum);
}

#if defined(__x86_64__)
// Two streams side by side, and no prefetches of our own: on the machines we know nothing reads faster.
__attribute__((target("avx2"))) void read_avx2(const std::byte* data, size_t bytes) {
  __m256i sums[4] = {};
  const size_t half = bytes / 256 * 128;
  for (size_t i = 0; i + 128 <= half; i += 128) {
    for (const std::byte* stream : {data + i, data + half + i}) {
      for (size_t j = 0; j < 4; ++j) {
        sums[j] = _mm256_add_epi64(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(stream + 32 * j)));
      }
    }
  }
  sums[0] = _mm256_add_epi64(_mm256_add_epi64(sums[0], sums[1]), _mm256_add_epi64(sums[2], sums[3]));
  sink = _mm256_extract_epi64(sums[0], 0);
}

// Inline assembly, or the compiler would compute the equal products once.
__attribute__((target("avx2"))) void bytes_avx2() {
  __m256i codes = _mm256_set1_epi8(1), a = _mm256_set1_epi8(2), total = _mm256_setzero_si256();
  __m256i sums[6] = {total, total, total, total, total, total};
  for (int64_t i = 0; i < kLoops; ++i) {
#pragma GCC unroll 12
    for (int j = 0; j < 12; ++j) {
      __m256i product;
      asm volatile("vpmaddubsw %2, %1, %0" : "=x"(product) : "x"(codes), "x"(a));
      sums[j % 6] = _mm256_add_epi16(sums[j % 6], product);
    }
  }
  for (const __m256i& sum : sums) total = _mm256_add_epi16(total, sum);
  sink = _mm256_extract_epi64(total, 0);
}

__attribute__((target("avx2,avx512f,avx512vl,avx512vnni"))) void bytes_vnni() {
  __m256i codes = _mm256_set1_epi8(1), a = _mm256_set1_epi8(2), z = _mm256_setzero_si256();
  __m256i s0 = z, s1 = z, s2 = z, s3 = z, s4 = z, s5 = z, s6 = z, s7 = z, s8 = z, s9 = z, s10 = z, s11 = z;
  const auto step = [&](__m256i& sum) __attribute__((target("avx2,avx512f,avx512vl,avx512vnni"), always_inline)) {
    asm volatile("vpdpbusd %2, %1, %0" : "+x"(sum) : "x"(codes), "x"(a));
  };
  for (int64_t i = 0; i < kLoops; ++i) {
    step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
    step(s6), step(s7), step(s8), step(s9), step(s10), step(s11);
  }
  for (const __m256i& sum : {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11}) z = _mm256_add_epi32(z, sum);
  sink = _mm256_extract_epi64(z, 0);
}

__attribute__((target("avx2,fma"))) void floats_avx2() {
  __m256 weight = _mm256_set1_ps(1e-9f), a = _mm256_set1_ps(0.5f), z = _mm256_setzero_ps();
  __m256 s0 = z, s1 = z, s2 = z, s3 = z, s4 = z, s5 = z, s6 = z, s7 = z, s8 = z, s9 = z, s10 = z, s11 = z;
  const auto step = [&](__m256& sum) __attribute__((target("avx2,fma"), always_inline)) {
    asm volatile("vfmadd231ps %2, %1, %0" : "+x"(sum) : "x"(weight), "x"(a));
  };
  for (int64_t i = 0; i < kLoops; ++i) {
    step(s0), step(s1), step(s2), step(s3), step(s4), step(s5);
    step(s6), step(s7), step(s8), step(s9), step(s10), step(s11);
  }
  for (const __m256& sum : {s0, s1, s2, s3, s4, s5, s6, s7, s8, s9, s10, s11}) z = _mm256_add_ps(z, sum);
  sink = static_cast<int64_t>(_mm256_cvtss_f32(z));
}

// 10^9 multiply-adds a second of `loop`, whose turns make 12 products of so many lanes.
double products(double seconds, int lanes, void (*loop)()) {
  Passes passes(seconds, [loop](int, int) { loop(); });
  run_job(passes);
  return 12.0 * lanes * kLoops * passes.threads() / passes.best() / 1e9;
}
#endif

}  // namespace

MachineLimits measure_limits(size_t buffer_bytes, double seconds) {
  void* memory = mmap(nullptr, buffer_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  madvise(memory, buffer_bytes, MADV_HUGEPAGE);
  auto* data = static_cast<std::byte*>(memory);
  parallel_for(static_cast<int64_t>(buffer_bytes), 1 << 21, [data](int64_t begin, int64_t end) {
    std::memset(data + begin, 1, static_cast<size_t>(end - begin));
  });
  auto* read = &read_portable;
  MachineLimits found;
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    read = &read_avx2;
    const bool vnni = std::strcmp(matmul_instruction_set(), "avx512vnni") == 0;
    found.byte_gmac_s = products(seconds, 32, vnni ? &bytes_vnni : &bytes_avx2);
    found.float_gmac_s = products(seconds, 8, &floats_avx2);
  }
#endif
  const auto part_of = [buffer_bytes](int parts) { return buffer_bytes / static_cast<size_t>(parts) / 256 * 256; };
  Passes passes(seconds, [&](int index, int parts) {
    read(data + part_of(parts) * static_cast<size_t>(index), part_of(parts));
  });
  run_job(passes);
  found.threads = passes.threads();
  found.read_gb_s = static_cast<double>(part_of(found.threads)) * found.threads / passes.best() / 1e9;
  munmap(memory, buffer_bytes);
  return found;
}

}  // namespace textmill
