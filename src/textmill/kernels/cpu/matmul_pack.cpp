// Puts weights into the layouts of matmul_impl.h, takes single rows out again, and unpacks GGUF blocks.
// Compile flags: -O3 -ffp-contract=off (products and sums must round as numpy's do)
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>

#include "matmul_impl.h"

namespace textmill {
namespace matmul_detail {
namespace {

// Bits of a column's largest scale as a whole number, beside its sign: |dot| <= 15 * 127 * 32 of such fit 32 bits.
constexpr int kWholeBits = 15;
constexpr int kMostPower = 60;  // so that neither a unit nor what is counted in it comes near the ends of 32-bit floats

float unit(int power) { return std::ldexp(1.0f, power); }

}  // namespace

float half_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t exponent = (half >> 10) & 31u;
  const uint32_t mantissa = half & 1023u;
  if (exponent == 0) {  // zero or subnormal: mantissa * 2^-24 is exact
    const float value = static_cast<float>(mantissa) * 5.9604644775390625e-8f;
    return sign ? -value : value;
  }
  const uint32_t bits = sign | (exponent == 31 ? 0x7f800000u : (exponent + 112) << 23) | (mantissa << 13);
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

bool float_to_half_exact(float value, uint16_t* half) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const int32_t exponent = static_cast<int32_t>((bits >> 23) & 255u) - 112;
  const uint32_t mantissa = bits & 0x7fffffu;
  if ((bits & 0x7fffffffu) == 0) {
    *half = static_cast<uint16_t>(sign);
  } else if (exponent >= 31) {
    return false;  // too large, Inf or NaN: such a weight stays in 32 bits as it came
  } else if (exponent >= 1) {
    *half = static_cast<uint16_t>(sign | (exponent << 10) | (mantissa >> 13));
  } else if (exponent >= -10) {  // subnormal half
    *half = static_cast<uint16_t>(sign | ((mantissa | 0x800000u) >> (14 - exponent)));
  } else {
    return false;
  }
  const float back = half_to_float(*half);
  return std::memcmp(&back, &value, 4) == 0;
}

bool whole_power(const float* scales, const float* offsets, int64_t groups, int8_t* power) {
  float most = 0.0f;
  for (int64_t g = 0; g < groups; ++g) {
    if (!std::isfinite(scales[g])) return false;
    most = std::max(most, std::fabs(scales[g]));
  }
  const int exponent = most > 0.0f ? std::ilogb(most) - kWholeBits + 1 : 0;
  if (std::abs(exponent) > kMostPower) return false;
  *power = static_cast<int8_t>(exponent);
  const float units = unit(-exponent);  // of 1.0
  uint16_t half;
  for (int64_t g = 0; g < groups; ++g) {
    const float scale = scales[g] * units;
    if (scale != std::nearbyint(scale) || std::fabs(scale) > 32767.0f) return false;
    if (offsets && !float_to_half_exact(offsets[g] * units / kOffsetUnits, &half)) return false;
  }
  return true;
}

int64_t lay_out(PackedView* view, int64_t group) {
  view->chunks = chunk_count(view->k);
  view->half_groups = group == 16 && view->k != 16;
  view->chunks_per_group = view->half_groups ? 1 : group == view->k ? view->chunks : group / kChunk;
  view->code_bytes = kChunk * kColumnBlock * view->bits / 8;
  view->set_bytes = kColumnBlock * (view->half_floats ? 2 : 4) * (view->has_offsets ? 2 : 1);
  view->scales_at = view->chunks * view->code_bytes;
  const int64_t sets =
      view->half_groups ? view->chunks * 2 : (view->chunks + view->chunks_per_group - 1) / view->chunks_per_group;
  view->block_bytes = (view->scales_at + sets * view->set_bytes + 63) / 64 * 64;
  return view->block_bytes * ((view->n + kColumnBlock - 1) / kColumnBlock);
}

namespace {

// Value `index` of a set: of 8 scales, then 8 offsets.
void put_scale(const PackedView& view, int8_t power, uint8_t* set, int64_t index, float value) {
  if (view.whole) {
    value *= unit(-power);
    if (index < kColumnBlock) {
      const int16_t scale = static_cast<int16_t>(value);
      std::memcpy(set + index * 2, &scale, 2);
      return;
    }
    value /= kOffsetUnits;
  }
  if (view.half_floats) {
    uint16_t half = 0;
    float_to_half_exact(value, &half);
    std::memcpy(set + index * 2, &half, 2);
  } else {
    std::memcpy(set + index * 4, &value, 4);
  }
}

float get_scale(const PackedView& view, int8_t power, const uint8_t* set, int64_t index) {
  if (view.half_floats) {
    uint16_t half;
    std::memcpy(&half, set + index * 2, 2);
    if (!view.whole) return half_to_float(half);
    if (index < kColumnBlock) return static_cast<float>(static_cast<int16_t>(half)) * unit(power);
    return half_to_float(half) * kOffsetUnits * unit(power);
  }
  float value;
  std::memcpy(&value, set + index * 4, 4);
  return value;
}

// Byte of input i of column `lane` in a block's codes; for 4 bits *shift is 0 or 4.
int64_t code_position(const PackedView& view, int64_t i, int64_t lane, int* shift) {
  const int64_t quad = i % kChunk / 4;
  const int64_t vector = view.bits == 4 ? quad % 4 : quad;
  *shift = view.bits == 4 && quad >= 4 ? 4 : 0;
  return i / kChunk * view.code_bytes + vector * kQuadBytes + lane * 4 + i % 4;
}

// The codes of a column go in by quads: a quad's four bytes are neighbours on both sides.
void pack_codes(const PackedView& view, const uint8_t* codes, int64_t lane, uint8_t* block) {
  const auto quad = [&](int64_t i) {
    uint32_t four = 0;
    if (i < view.k) std::memcpy(&four, codes + i, 4);  // k is a multiple of 16: the last chunk may be half empty
    return four;
  };
  for (int64_t chunk = 0; chunk < view.chunks; ++chunk) {
    uint8_t* to = block + chunk * view.code_bytes + lane * 4;
    const int64_t first = chunk * kChunk;
    for (int64_t q = 0; q < (view.bits == 4 ? 4 : 8); ++q) {
      uint32_t four = quad(first + q * 4);
      if (view.bits == 4) four = (four & 0x0f0f0f0fu) | (quad(first + 16 + q * 4) & 0x0f0f0f0fu) << 4;
      std::memcpy(to + q * kQuadBytes, &four, 4);
    }
  }
}

void pack_column(const PackedView& view, const uint8_t* codes, const float* scales, const float* offsets, int64_t group,
                 int64_t lane, int8_t power, uint8_t* block) {
  pack_codes(view, codes, lane, block);
  for (int64_t g = 0; g < view.k / group; ++g) {
    uint8_t* set = block + view.scales_at + g * view.set_bytes;
    put_scale(view, power, set, lane, scales[g]);
    if (view.has_offsets) put_scale(view, power, set, kColumnBlock + lane, offsets[g]);
  }
}

}  // namespace

void pack_blocks(const PackedView& view, const uint8_t* codes, const float* scales, const float* offsets, int64_t group,
                 uint8_t* data) {
  const int64_t groups = view.k / group;
  for (int64_t column = 0; column < view.n; ++column) {
    pack_column(view, codes + column * view.k, scales + column * groups, offsets ? offsets + column * groups : nullptr,
                group, column % kColumnBlock, view.whole ? view.powers[column] : int8_t{0},
                data + column / kColumnBlock * view.block_bytes);
  }
}

void pack_dense(const float* values, int64_t n, int64_t k, float* data) {
  for (int64_t column = 0; column < n; ++column) {
    float* block = data + column / kColumnBlock * kColumnBlock * k + column % kColumnBlock;
    for (int64_t i = 0; i < k; ++i) block[i * kColumnBlock] = values[column * k + i];
  }
}

void unpack_row(const PackedView& view, int64_t row, float* out) {
  const uint8_t* block = view.data + row / kColumnBlock * view.block_bytes;
  const int64_t lane = row % kColumnBlock;
  const int8_t power = view.whole ? view.powers[row] : int8_t{0};
  for (int64_t i = 0; i < view.k; ++i) {
    int shift;
    const uint8_t byte = block[code_position(view, i, lane, &shift)];
    const int code = (view.bits == 4 ? (byte >> shift) & 15 : byte) - view.zero;
    const int64_t index = view.half_groups ? i / 16 : i / kChunk / view.chunks_per_group;
    const uint8_t* set = block + view.scales_at + index * view.set_bytes;
    const float value = get_scale(view, power, set, lane) * static_cast<float>(code);
    out[i] = view.has_offsets ? value + get_scale(view, power, set, kColumnBlock + lane) : value;
  }
}

}  // namespace matmul_detail

namespace {

using matmul_detail::half_to_float;

enum GgmlType : int { kQ4_0 = 2, kQ4_1 = 3, kQ8_0 = 8, kQ4_K = 12, kQ6_K = 14 };

float read_half(const uint8_t* at) {
  uint16_t half;
  std::memcpy(&half, at, 2);
  return half_to_float(half);
}

void unpack_nibbles_32(const uint8_t* bytes, uint8_t* codes) {
  for (int i = 0; i < 16; ++i) {
    codes[i] = bytes[i] & 15;
    codes[i + 16] = bytes[i] >> 4;
  }
}

void unpack_q4(const uint8_t* block, uint8_t* codes, float* scale, float* offset) {
  *scale = read_half(block);
  if (offset) *offset = read_half(block + 2);
  unpack_nibbles_32(block + (offset ? 4 : 2), codes);
}

void unpack_q8_0(const uint8_t* block, uint8_t* codes, float* scale) {
  *scale = read_half(block);
  for (int i = 0; i < 32; ++i) codes[i] = block[2 + i] ^ 128;  // signed + 128
}

void unpack_q4_k(const uint8_t* block, uint8_t* codes, float* scales, float* offsets) {
  const float d = read_half(block);
  const float dmin = read_half(block + 2);
  const uint8_t* packed = block + 4;
  for (int j = 0; j < 8; ++j) {
    const int scale = j < 4 ? packed[j] & 63 : (packed[j + 4] & 15) | (packed[j - 4] >> 6 << 4);
    const int minimum = j < 4 ? packed[j + 4] & 63 : (packed[j + 4] >> 4) | (packed[j] >> 6 << 4);
    scales[j] = d * static_cast<float>(scale);
    offsets[j] = -(dmin * static_cast<float>(minimum));
  }
  const uint8_t* bytes = block + 16;
  for (int i = 0; i < 256; ++i) {
    codes[i] = static_cast<uint8_t>((bytes[i / 64 * 32 + i % 32] >> (i % 64 < 32 ? 0 : 4)) & 15);
  }
}

void unpack_q6_k(const uint8_t* block, uint8_t* codes, float* scales) {
  const uint8_t* low = block;
  const uint8_t* high = block + 128;
  const float d = read_half(block + 208);
  for (int j = 0; j < 16; ++j) scales[j] = d * static_cast<float>(static_cast<int8_t>(block[192 + j]));
  for (int i = 0; i < 256; ++i) {
    const int half = i / 128, part = i % 128 / 32, l = i % 32;
    const int nibble = (low[half * 64 + (part % 2) * 32 + l] >> (part < 2 ? 0 : 4)) & 15;
    codes[i] = static_cast<uint8_t>(nibble | ((high[half * 32 + l] >> (2 * part)) & 3) << 4);
  }
}

int64_t ggml_block_bytes(int type) {
  switch (type) {
    case kQ4_0: return 18;
    case kQ4_1: return 20;
    case kQ8_0: return 34;
    case kQ4_K: return 144;
    default: return 210;
  }
}

}  // namespace

bool ggml_layout(int type, GgmlLayout* layout) {
  switch (type) {
    case kQ4_0: *layout = {4, 32, 8, false}; return true;
    case kQ4_1: *layout = {4, 32, 0, true}; return true;
    case kQ8_0: *layout = {8, 32, 128, false}; return true;
    case kQ4_K: *layout = {4, 32, 0, true}; return true;
    case kQ6_K: *layout = {8, 16, 32, false}; return true;
    default: return false;
  }
}

bool ggml_unpack(int type, const uint8_t* blocks, int64_t row_begin, int64_t row_end, int64_t k, uint8_t* codes,
                 float* scales, float* offsets) {
  GgmlLayout layout;
  const int64_t per_block = type == kQ4_K || type == kQ6_K ? 256 : 32;
  if (!ggml_layout(type, &layout) || k % per_block != 0 || (layout.has_offsets && !offsets)) return false;
  const int64_t groups = per_block / layout.group;
  const int64_t first = row_begin * (k / per_block), last = row_end * (k / per_block);
  for (int64_t b = first; b < last; ++b) {
    const uint8_t* block = blocks + b * ggml_block_bytes(type);
    uint8_t* to = codes + (b - first) * per_block;
    float* scale = scales + (b - first) * groups;
    float* offset = offsets + (layout.has_offsets ? (b - first) * groups : 0);
    switch (type) {
      case kQ4_0: unpack_q4(block, to, scale, nullptr); break;
      case kQ4_1: unpack_q4(block, to, scale, offset); break;
      case kQ8_0: unpack_q8_0(block, to, scale); break;
      case kQ4_K: unpack_q4_k(block, to, scale, offset); break;
      default: unpack_q6_k(block, to, scale); break;
    }
  }
  return true;
}

}  // namespace textmill
