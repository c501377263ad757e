// The small kernels that exist once per instruction set: rows, attention and the sampler's passes over the vocabulary.
// Each reduces in an order fixed by the length of the row alone.
#pragma once

#include <cstdint>

#include "matmul.h"

// Seen by files compiled for different instruction sets: must leave no shared copy that the linker could mix up.
#define TEXTMILL_INLINE [[gnu::always_inline]] inline

namespace textmill {

// Queries are cut in tiles, keys in tiles and ranges; keys by absolute position, so that bits never depend on the cut.
constexpr int64_t kKeyLanes = 16;   // keys are stored transposed in groups of this many
constexpr int64_t kGroupScales = 32;  // of keys and values of 16 bits, as 16-bit numbers: a cache line
constexpr int64_t kKeyTile = 64;    // keys of one softmax update
constexpr int64_t kKeyRange = 512;  // keys summed on their own, then merged in order
constexpr int64_t kQueryTile = 192;  // query vectors that go through the keys together (at least one row's)

// What the heads of queries or keys are divided and multiplied by before they turn; no weight: nothing.
struct HeadNorm {
  const float* weight = nullptr;
  const float* bias = nullptr;  // as long as the weight, or null
  bool whole = false;           // one norm over all heads together
  bool each = false;            // a head has its own part of the weight
  bool centered = false;        // layer norm: the mean is taken away first
};

// One layer's attention (kernels/spec.py: AttentionSpec).
struct AttentionSpec {
  int64_t heads = 0, kv_heads = 0, head_dim = 0;
  float scale = 1, softcap = 0, norm_eps = 0;
  int64_t window = 0;
  const float* alibi = nullptr;
  const float* rope_cos = nullptr;  // [positions, rotary_half]
  const float* rope_sin = nullptr;
  int64_t rotary_half = 0;
  bool rope_interleaved = false;
  HeadNorm q_norm, k_norm;
  bool half_cache = true;  // 16 bits a number, else floats
  int64_t block_size = 16;

  TEXTMILL_INLINE int64_t group() const { return heads / kv_heads; }
  // Width of a head in the cache and in the rotated queries; the padding is zero.
  TEXTMILL_INLINE int64_t dim() const { return (head_dim + 7) / 8 * 8; }
  TEXTMILL_INLINE int64_t block_elements() const { return kv_heads * block_size * dim(); }
};

// Norms, turns and scales the queries of one row into q [heads, dim], and stores its keys and values.
// cache: the layer's part of the row's block, by kv head: keys [block_size / 16][dim][16], then values
// [block_size][dim], floats, or 16-bit numbers in the order, and with the scales, of attention_fixed.h.
struct StoreRow {
  const float* qkv;
  float* q;
  void* cache;
  uint16_t* scales;  // [kv_heads][block_size / 16][32]; 16-bit caches only
  int64_t position;
  const StoreRow* next = nullptr;  // what this thread stores after it: its place is fetched meanwhile
};

// Unnormalized attention of nq = rows * group query vectors: maximum, sum and weighted values of each.
struct Partial {
  float* maximum;  // [nq, up to a multiple of 8]
  float* sum;      // likewise
  float* values;   // [nq, dim]
};

// One kv head's keys [begin, end) against consecutive rows of queries of its group.
struct AttendTask {
  const float* q;  // row 0, first head of the group; heads are dim apart
  int64_t q_stride;
  int64_t rows;
  int64_t position;  // of row 0
  const int32_t* blocks;
  const void* keys;  // of block 0, advanced to the kv head
  const void* values;
  const uint16_t* scales;  // likewise; null for floats
  int64_t block_stride;    // words of 4 bytes from a block to the next
  int64_t begin, end;
  const float* slopes;  // ALiBi of the group, or null
  const AttendTask* next = nullptr;  // what this thread does after it, if known: its first keys are fetched meanwhile
};

// Floats of scratch that attend needs, and of one Partial.
TEXTMILL_INLINE int64_t query_vectors(const AttentionSpec& spec) {
  return kQueryTile > spec.group() ? kQueryTile : spec.group();
}
TEXTMILL_INLINE int64_t padded_vectors(int64_t vectors) { return (vectors + 7) / 8 * 8; }
TEXTMILL_INLINE int64_t partial_floats(int64_t vectors, int64_t dim) {
  return vectors * dim + 2 * padded_vectors(vectors);
}
TEXTMILL_INLINE Partial partial_at(float* memory, int64_t vectors) {
  return {memory, memory + padded_vectors(vectors), memory + 2 * padded_vectors(vectors)};
}
// Memory from the next cache line on.
TEXTMILL_INLINE float* aligned(float* memory) {
  return reinterpret_cast<float*>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
}
TEXTMILL_INLINE int64_t attend_scratch_floats(int64_t vectors, int64_t dim) {
  const int64_t queries = vectors * (dim + kKeyTile) + 3 * padded_vectors(vectors);
  const int64_t tile = 3 * kKeyTile, batch = 24 * (kKeyTile + 8 + 8 + 4), lines = 16 * 16;
  return partial_floats(vectors, dim) + queries + tile + batch + lines;
}

// Operations whose state moves on with every token, for some channels of consecutive rows of one sequence. Pointers stand
// at the first of these channels; what is per channel has its channels side by side.
struct ConvolveTask {
  int64_t rows, channels, taps;
  const float* x;
  int64_t x_stride;
  const float* weight;  // [taps]
  int64_t weight_stride;
  const float* bias;  // or null
  float* state;       // [taps - 1]: the inputs before x
  int64_t state_stride;
  float* out;
  int64_t out_stride;
};

struct ScanTask {
  int64_t rows, channels, columns;
  const float *x, *step, *gate;
  int64_t x_stride, step_stride, gate_stride;
  const float* bc;  // of row 0, whole: b [columns], c [columns]
  int64_t bc_stride;
  const float* a;  // [columns], below zero
  int64_t a_stride;
  const float* skip;
  float* state;  // [columns]
  int64_t state_stride;
  float* out;
  int64_t out_stride;
};

struct VectorKernels {
  const char* name;
  void (*rms_norm)(const float* x, const float* weight, float eps, int64_t cols, float* out);
  void (*layer_norm)(const float* x, const float* weight, const float* bias, float eps, int64_t cols, float* out);
  void (*add)(const float* x, const float* y, int64_t cols, float* out);
  void (*multiply)(const float* x, const float* y, int64_t cols, float* out);
  void (*add_scaled)(const float* x, float factor, int64_t cols, float* out);  // out += x * factor
  void (*clip)(const float* x, float limit, int64_t cols, float* out);  // to -limit .. limit; NaN stays
  void (*scale)(const float* x, float factor, int64_t cols, float* out);
  void (*softcap)(const float* x, float cap, int64_t cols, float* out);
  void (*activation)(const float* x, Activation kind, int64_t cols, float* out);
  void (*gated)(const float* x, Activation kind, int64_t cols, float* out);  // cols: of out

  // silu(bias + sum of the taps), and the inputs that the next rows will need.
  void (*convolve)(const ConvolveTask& task);
  // h = exp(softplus(step) a) h + softplus(step) b x; (c . h + skip x) silu(gate)
  void (*scan_states)(const ScanTask& task);

  void (*store_row)(const AttentionSpec& spec, const StoreRow& row);
  // Keys [begin, end) range by range, merged in order.
  void (*attend)(const AttentionSpec& spec, const AttendTask& task, const Partial& out, float* scratch);
  void (*merge)(const Partial& into, const Partial& next, int64_t vectors, int64_t dim);
  // out + row * out_stride + head * head_dim = values / sum
  void (*normalize)(const AttentionSpec& spec, const Partial& from, int64_t rows, float* out, int64_t out_stride);

  // The largest of x; false if x holds NaN or +Inf.
  bool (*scan)(const float* x, int64_t count, float* largest);
  // Sum of exp(x - largest); with `out`, writes the terms too.
  double (*exp_sum)(const float* x, int64_t count, float largest, float* out);
  // Indices with x >= threshold, ascending; returns how many.
  int64_t (*above)(const float* x, int64_t count, float threshold, int32_t* indices);
  float (*exp)(float x);
};

extern const VectorKernels kPortableVector;
#if defined(__x86_64__)
extern const VectorKernels kAvx2Vector;
#endif

// The best for this machine, chosen at first use; "portable" forces the plain ones (tests), anything else undoes that.
const VectorKernels& vector_kernels();
void set_vector_kernels(const char* name);

}  // namespace textmill
