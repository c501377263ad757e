// The sampler: nothing here sorts the vocabulary unless a distribution is so flat that top-p needs nearly all of it.
#include "sampler.h"

#include <algorithm>
#include <cmath>
#include <limits>

#include "vector.h"

namespace textmill {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();

// How far below the best a first look goes; what lies within is nearly always enough.
float next_margin(float margin) { return margin < 30.0f ? margin * 2.0f : kInfinity; }

bool sensible(const SamplingParameters& p) {
  return p.temperature > 0 && p.temperature < kInfinity && p.repetition_penalty > 0 &&
         p.repetition_penalty < kInfinity && std::isfinite(p.frequency_penalty) && !std::isnan(p.top_p) &&
         !std::isnan(p.typical_p);
}

// Sorts `ranked` in growing pieces and hands the entries out in order until `visit` returns false.
template <typename Less, typename Visit>
bool visit_in_order(std::vector<std::pair<float, int32_t>>& ranked, Less less, Visit visit) {
  size_t piece = 64;
  for (size_t begin = 0; begin < ranked.size(); piece *= 4) {
    const size_t end = std::min(begin + piece, ranked.size());
    if (end < ranked.size()) std::nth_element(ranked.begin() + begin, ranked.begin() + end, ranked.end(), less);
    std::sort(ranked.begin() + begin, ranked.begin() + end, less);
    for (; begin < end; ++begin) {
      if (!visit(ranked[begin])) return true;
    }
  }
  return false;
}

}  // namespace

double philox_uniform(uint64_t seed, uint32_t position) {
  uint32_t c0 = position, c1 = 0, c2 = 0, c3 = 0;
  uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53u} * c0, b = uint64_t{0xCD9E8D57u} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return static_cast<double>(static_cast<uint64_t>(c0 >> 5) << 26 | c1 >> 6) * 0x1p-53;
}

void Sampler::penalize(float* x, const SamplingParameters& p, const int32_t* tokens, int64_t length) {
  if (p.repetition_penalty == 1.0f && p.frequency_penalty == 0.0f) return;
  const auto known = [&](int32_t token) { return token >= 0 && token < vocabulary_; };
  for (int64_t i = 0; i < length; ++i) {
    if (known(tokens[i])) ++counts_[static_cast<size_t>(tokens[i])];
  }
  const float total = static_cast<float>(std::max<int64_t>(1, length));
  for (int64_t i = 0; i < length; ++i) {
    if (!known(tokens[i]) || counts_[static_cast<size_t>(tokens[i])] == 0) continue;
    uint32_t& count = counts_[static_cast<size_t>(tokens[i])];
    float& score = x[tokens[i]];
    if (p.repetition_penalty != 1.0f) score = score < 0 ? score * p.repetition_penalty : score / p.repetition_penalty;
    score -= p.frequency_penalty * (static_cast<float>(count) / total);
    count = 0;
  }
}

// The kept tokens not below `threshold`, with their scores, in ranked_.
void Sampler::candidates(const float* x, float threshold) {
  ranked_.clear();
  if (!all_) {
    for (const int32_t id : kept_) {
      if (x[id] >= threshold) ranked_.emplace_back(x[id], id);
    }
    return;
  }
  found_.resize(static_cast<size_t>(vocabulary_));
  const int64_t count = vector_kernels().above(x, vocabulary_, threshold, found_.data());
  for (int64_t i = 0; i < count; ++i) ranked_.emplace_back(x[found_[i]], found_[i]);
}

double Sampler::kept_sum(const float* x, float most) const {
  if (all_) return vector_kernels().exp_sum(x, vocabulary_, most, nullptr);
  double total = 0;
  for (const int32_t id : kept_) total += static_cast<double>(vector_kernels().exp(x[id] - most));
  return total;
}

// Tokens that tie with the k-th stay.
void Sampler::keep_top_k(const float* x, float most, int64_t k) {
  if (k >= vocabulary_) return;
  float margin = 8.0f;
  candidates(x, most - margin);
  while (static_cast<int64_t>(ranked_.size()) < k) {
    margin = next_margin(margin);
    candidates(x, most - margin);
  }
  std::nth_element(ranked_.begin(), ranked_.begin() + (k - 1), ranked_.end(),
                   [](const Ranked& a, const Ranked& b) { return a.first > b.first; });
  const float threshold = ranked_[static_cast<size_t>(k - 1)].first;
  kept_.clear();
  for (const Ranked& entry : ranked_) {
    if (entry.first >= threshold) kept_.push_back(entry.second);
  }
  std::sort(kept_.begin(), kept_.end());
  all_ = false;
}

// From the best down, until those already kept carry p; of equals the higher id comes first (as warpers.top_p does).
void Sampler::keep_top_p(const float* x, float most, double p) {
  const double wanted = p * kept_sum(x, most);
  const auto order = [](const Ranked& a, const Ranked& b) {
    return a.first != b.first ? a.first > b.first : a.second > b.second;
  };
  std::vector<int32_t> nucleus;
  for (float margin = 6.0f;; margin = next_margin(margin)) {
    candidates(x, most - margin);
    nucleus.clear();
    double above = 0;
    const bool enough = visit_in_order(ranked_, order, [&](const Ranked& entry) {
      if (!nucleus.empty() && above >= wanted) return false;
      nucleus.push_back(entry.second);
      above += static_cast<double>(vector_kernels().exp(entry.first - most));
      return true;
    });
    if (enough || above >= wanted || margin == kInfinity) break;
  }
  std::sort(nucleus.begin(), nucleus.end());
  kept_.swap(nucleus);
  all_ = false;
}

// The tokens whose surprise is closest to the entropy, until they carry `mass`; of equals the lower id comes first.
void Sampler::keep_typical(const float* x, float most, double mass) {
  const double total = kept_sum(x, most), log_total = std::log(total);
  candidates(x, -kInfinity);
  double entropy = 0;
  for (const Ranked& entry : ranked_) {
    const double logprob = static_cast<double>(entry.first - most) - log_total;
    if (entry.first > -kInfinity) entropy -= std::exp(logprob) * logprob;
  }
  for (Ranked& entry : ranked_) {
    entry.first = std::fabs(static_cast<float>(-(static_cast<double>(entry.first - most) - log_total) - entropy));
  }
  double carried = 0;
  kept_.clear();
  visit_in_order(ranked_, std::less<Ranked>(), [&](const Ranked& entry) {
    kept_.push_back(entry.second);
    carried += static_cast<double>(vector_kernels().exp(x[entry.second] - most)) / total;
    return carried < mass;
  });
  std::sort(kept_.begin(), kept_.end());
  all_ = false;
}

// The first token, in id order, at which the running sum of exp(x - most) exceeds u times the whole.
int32_t Sampler::draw(const float* x, float most, double u) {
  const size_t count = all_ ? static_cast<size_t>(vocabulary_) : kept_.size();
  terms_.resize(count);
  if (all_) {
    vector_kernels().exp_sum(x, vocabulary_, most, terms_.data());
  } else {
    for (size_t i = 0; i < count; ++i) terms_[i] = vector_kernels().exp(x[kept_[i]] - most);
  }
  double total = 0;
  for (size_t i = 0; i < count; ++i) total += static_cast<double>(terms_[i]);
  const double target = u * total;
  double running = 0;
  size_t last = 0;
  for (size_t i = 0; i < count; ++i) {
    if (terms_[i] <= 0) continue;
    last = i;
    running += static_cast<double>(terms_[i]);
    if (running > target) break;
  }
  return all_ ? static_cast<int32_t>(last) : kept_[last];
}

int32_t Sampler::top(const float* x, int64_t count, float most, float log_sum, int32_t* ids, float* logprobs) {
  count = std::min(count, vocabulary_);
  float margin = all_ ? 8.0f : kInfinity;
  candidates(x, most - margin);
  while (static_cast<int64_t>(ranked_.size()) < count && margin < kInfinity) {
    margin = next_margin(margin);
    candidates(x, most - margin);
  }
  const int64_t present = std::min<int64_t>(count, static_cast<int64_t>(ranked_.size()));
  std::partial_sort(ranked_.begin(), ranked_.begin() + present, ranked_.end(), [](const Ranked& a, const Ranked& b) {
    return a.first != b.first ? a.first > b.first : a.second < b.second;
  });
  for (int64_t i = 0; i < present; ++i) {
    ids[i] = ranked_[static_cast<size_t>(i)].second;
    logprobs[i] = ranked_[static_cast<size_t>(i)].first - most - log_sum;
  }
  int32_t outsider = 0;
  for (int64_t i = present; i < count; ++outsider) {
    if (std::binary_search(kept_.begin(), kept_.end(), outsider)) continue;
    ids[i] = outsider;
    logprobs[i++] = -kInfinity;
  }
  return static_cast<int32_t>(count);
}

Choice Sampler::choose(float* x, const SamplingParameters& p, const int32_t* tokens, int64_t length, int32_t* top_ids,
                       float* top_logprobs) {
  Choice choice;
  float most;
  if (!vector_kernels().scan(x, vocabulary_, &most) || most == -kInfinity) {
    choice.error = ChoiceError::kNotFinite;
    return choice;
  }
  if (!sensible(p)) {
    choice.error = ChoiceError::kBadParameters;
    return choice;
  }
  all_ = true;
  penalize(x, p, tokens, length);
  if (p.temperature != 1.0f) {
    for (int64_t i = 0; i < vocabulary_; ++i) x[i] /= p.temperature;
  }
  const bool changed = p.temperature != 1.0f || p.repetition_penalty != 1.0f || p.frequency_penalty != 0.0f;
  if (changed && !vector_kernels().scan(x, vocabulary_, &most)) {  // a tiny temperature can overflow
    choice.error = ChoiceError::kBadParameters;
    return choice;
  }
  if (p.top_k > 0) keep_top_k(x, most, p.top_k);
  if (p.top_p < 1.0f) keep_top_p(x, most, static_cast<double>(p.top_p));
  if (p.typical_p < 1.0f) keep_typical(x, most, static_cast<double>(p.typical_p));
  if (!all_) {
    most = -kInfinity;
    for (const int32_t id : kept_) most = std::max(most, x[id]);
  }
  const float log_sum = static_cast<float>(std::log(kept_sum(x, most)));
  if (p.draws) {
    choice.token = draw(x, most, philox_uniform(p.seed, static_cast<uint32_t>(length)));
  } else {
    candidates(x, most);
    choice.token = ranked_.front().second;
  }
  choice.logprob = x[choice.token] - most - log_sum;
  if (p.top_n > 0) choice.top_count = top(x, p.top_n, most, log_sum, top_ids, top_logprobs);
  return choice;
}

float Sampler::logprob(const float* x, int32_t token) const {
  float most;
  const bool finite = vector_kernels().scan(x, vocabulary_, &most);
  if (!finite || most == -kInfinity || token < 0 || token >= vocabulary_) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  return x[token] - most - static_cast<float>(std::log(vector_kernels().exp_sum(x, vocabulary_, most, nullptr)));
}

}  // namespace textmill
