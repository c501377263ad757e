// From one row of logits to a token, in TGI's order; the meaning is sampling/ (warpers.py, sampler.py, random_stream.py).
#pragma once

#include <cstdint>
#include <cstddef>
#include <utility>
#include <vector>

namespace textmill {

struct SamplingParameters {
  float temperature = 1, top_p = 1, typical_p = 1, repetition_penalty = 1, frequency_penalty = 0;
  int32_t top_k = 0;
  bool draws = false;
  uint64_t seed = 0;
  int32_t top_n = 0;
};

enum class ChoiceError : uint8_t { kNone = 0, kNotFinite = 1, kBadParameters = 2 };

struct Choice {
  int32_t token = -1;
  float logprob = 0;
  ChoiceError error = ChoiceError::kNone;
  int32_t top_count = 0;
};

// Uniform in [0, 1): Philox4x32-10, key = seed, counter = (position, 0, 0, 0); 53 bits from the first two words.
double philox_uniform(uint64_t seed, uint32_t position);

// One thread's tools; the memory is kept from row to row.
class Sampler {
 public:
  explicit Sampler(int64_t vocabulary) : vocabulary_(vocabulary), counts_(static_cast<size_t>(vocabulary)) {}

  // Chooses the token that will stand at position `length` after `tokens` [length]. Overwrites the logits.
  // top_ids, top_logprobs: room for parameters.top_n.
  Choice choose(float* logits, const SamplingParameters& parameters, const int32_t* tokens, int64_t length,
                int32_t* top_ids, float* top_logprobs);

  // Log-probability of `token` under raw logits; NaN if they are not finite numbers.
  float logprob(const float* logits, int32_t token) const;

 private:
  using Ranked = std::pair<float, int32_t>;

  void penalize(float* x, const SamplingParameters& p, const int32_t* tokens, int64_t length);
  void keep_top_k(const float* x, float most, int64_t k);
  void keep_top_p(const float* x, float most, double p);
  void keep_typical(const float* x, float most, double mass);
  int32_t draw(const float* x, float most, double target);
  int32_t top(const float* x, int64_t count, float most, float log_sum, int32_t* ids, float* logprobs);
  void candidates(const float* x, float threshold);
  double kept_sum(const float* x, float most) const;

  int64_t vocabulary_;
  std::vector<uint32_t> counts_;  // all zero between calls
  std::vector<float> terms_;
  std::vector<int32_t> found_;
  std::vector<Ranked> ranked_;
  // The tokens still in, ascending; meaningless while all_ is set.
  bool all_ = true;
  std::vector<int32_t> kept_;
};

}  // namespace textmill
