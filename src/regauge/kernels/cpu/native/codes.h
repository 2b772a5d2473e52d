// Where codes lie, and how a block of them becomes steps of 64 bytes.
#pragma once
#include "regauge.h"
#include "vector.h"

namespace {

// Planes of a code, lowest first: 3 = 2 + 1, 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1. A plane of p bits packs 8 / p steps
// into 64 bytes; a block holds as many steps as its narrowest plane.
constexpr int block_steps(int bits) { return bits & 1 ? 8 : bits & 2 ? 4 : bits & 4 ? 2 : 1; }
constexpr int unit_of(int bits) { return 4 * block_steps(bits); }  // inputs a block
constexpr int block_bytes(int bits) { return block_steps(bits) * STEP * bits / 8; }

// f(i, codes of step i) for every step of a block; i is a constant once inlined.
template <int B, int I, class F>
RG_INLINE void step_of(const uint8_t *block, F &&f) {
  if constexpr (I < block_steps(B)) {
    constexpr int STEPS = block_steps(B);
    Bytes code;
    if constexpr (B == 8) {
      code = load_bytes(block);
    } else {
      const uint8_t *at = block;
      bool first = true;
      if constexpr (B & 4) {
        const Bytes plane = load_bytes(at + (I / 2) * STEP);
        code = shifted<(I % 2) * 4>(plane) & set_bytes(15);
        at += STEPS / 2 * STEP;
        first = false;
      }
      if constexpr (B & 2) {
        constexpr int UP = B & 4;  // this plane's bits stand above the lower plane's
        const Bytes plane = load_bytes(at + (I / 4) * STEP);
        const Bytes own = shifted<(I % 4) * 2 - UP>(plane) & set_bytes(3 << UP);
        code = first ? own : code | own;
        at += STEPS / 4 * STEP;
        first = false;
      }
      if constexpr (B & 1) {
        constexpr int UP = B & 6;
        const Bytes own = shifted<I - UP>(load_bytes(at)) & set_bytes(1 << UP);
        code = first ? own : code | own;
      }
    }
    f(I, code);
    step_of<B, I + 1>(block, f);
  }
}

template <int B, class F>
RG_INLINE void each_step(const uint8_t *block, F &&f) {
  step_of<B, 0>(block, f);
}

// One code into a block that is zero there: the inverse of the above. `place` = byte in the step.
inline void put_code(uint8_t *block, int bits, int step, int place, unsigned code) {
  const int steps = block_steps(bits);
  if (bits == 8) {
    block[place] = static_cast<uint8_t>(code);
    return;
  }
  if (bits & 4) {
    block[step / 2 * STEP + place] |= static_cast<uint8_t>((code & 15u) << (step % 2 * 4));
    block += steps / 2 * STEP;
    code >>= 4;
  }
  if (bits & 2) {
    block[step / 4 * STEP + place] |= static_cast<uint8_t>((code & 3u) << (step % 4 * 2));
    block += steps / 4 * STEP;
    code >>= 2;
  }
  if (bits & 1) block[place] |= static_cast<uint8_t>((code & 1u) << step);
}

constexpr int step_bytes(int kind) {
  return kind == RG_STEP_NONE ? 0 : kind == RG_STEP_F32 ? 4 : kind == RG_STEP_F16 || kind == RG_STEP_BF16 ? 2 : 1;
}

// Sizes of a matrix's panels.
struct Layout {
  int groups, padded, steps_bytes, zeros_bytes, codes_bytes, record;
  size_t panel;
  int64_t panels;
  explicit Layout(const rg_matrix &m)
      : groups((m.columns + m.group - 1) / m.group),
        padded(groups * m.group),
        steps_bytes(PANEL * step_bytes(m.step)),
        zeros_bytes(m.zero ? PANEL * m.bits / 8 : 0),
        codes_bytes(PANEL * m.group * m.bits / 8),
        record(steps_bytes + zeros_bytes + codes_bytes),
        panel(static_cast<size_t>(record) * groups),
        panels((m.rows + PANEL - 1) / PANEL) {}
};

// The 16 steps of a group.
RG_INLINE Floats load_steps(const uint8_t *p, int kind) {
  switch (kind) {
    case RG_STEP_F16: return load_half(p);
    case RG_STEP_BF16: return load_bf16(p);
    case RG_STEP_F32: return load_floats(reinterpret_cast<const float *>(p));
    case RG_STEP_E8M0: return load_e8m0(p);
    case RG_STEP_E4M3: {  // exponent and mantissa as those of a float, 2^-120 of the value (never negative)
      const Ints bits = shifted_left(load_byte_ints(p), 20);
      return as_floats(bits) * set_floats(1.329227995784916e36f);
    }
    default: return set_floats(1.0f);
  }
}

// The 16 zero points of a group: `bits` bits each, dense.
RG_INLINE Floats load_zeros(const uint8_t *p, int bits) {
  if (bits == 8) return to_floats(load_byte_ints(p));
  uint8_t spread[PANEL];
  uint64_t low = 0, high = 0;  // 8 codes are `bits` bytes
  std::memcpy(&low, p, static_cast<size_t>(bits));
  std::memcpy(&high, p + bits, static_cast<size_t>(bits));
  const uint64_t mask = (1u << bits) - 1u;
  for (int i = 0; i < 8; ++i) {
    spread[i] = static_cast<uint8_t>((low >> (i * bits)) & mask);
    spread[8 + i] = static_cast<uint8_t>((high >> (i * bits)) & mask);
  }
  return to_floats(load_byte_ints(spread));
}

}  // namespace
