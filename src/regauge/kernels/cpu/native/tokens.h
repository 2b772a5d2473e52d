// A few tokens ready for products: read from rows, rounded, and laid out so that several are multiplied at once.
#pragma once
#include "floats.h"
#include "pool.h"
#include "taps.h"

namespace {

// Memory of the calling thread that grows and stays; WHICH: of several in use at once. Under a sanitiser it is as long as
// what was asked for, each time anew, so that one byte too many is seen.
template <int WHICH = 0>
inline uint8_t *scratch(size_t bytes) {
  struct Buffer {
    uint8_t *data = nullptr;
    size_t size = 0;
    ~Buffer() { __builtin_free(data); }
  };
  static thread_local Buffer buffer;
#if defined(RG_EXACT)
  constexpr bool exact = true;
#else
  constexpr bool exact = false;
#endif
  if (exact || buffer.size < bytes) {
    __builtin_free(buffer.data);
    if (!exact) bytes += bytes / 2;
    buffer.data = static_cast<uint8_t *>(__builtin_malloc(bytes));
    buffer.size = buffer.data ? bytes : 0;
  }
  return buffer.data;
}

RG_INLINE void load_row(const void *x, int64_t at, int count, int dtype, float *out) {
  int i = 0;
  if (dtype == RG_F32) {
    std::memcpy(out, static_cast<const float *>(x) + at, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t *half = static_cast<const uint16_t *>(x) + at;
  for (; i + PANEL <= count; i += PANEL) store_floats(out + i, dtype == RG_BF16 ? load_bf16(half + i) : load_half(half + i));
  for (; i < count; ++i) out[i] = dtype == RG_BF16 ? bf16_to_float(half[i]) : half_to_float(half[i]);
}

RG_INLINE void store_row(void *y, int64_t at, int count, int dtype, const float *values) {
  int i = 0;
  if (dtype == RG_F32) {
    std::memcpy(static_cast<float *>(y) + at, values, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t *half = static_cast<uint16_t *>(y) + at;
  for (; i + PANEL <= count; i += PANEL) {
    if (dtype == RG_BF16) store_bf16(half + i, load_floats(values + i));
    else store_half(half + i, load_floats(values + i));
  }
  for (; i < count; ++i) half[i] = dtype == RG_BF16 ? float_to_bf16(values[i]) : float_to_half(values[i]);
}

// A few tokens ready to be multiplied by one matrix, or by several of the same columns and group.
struct Inputs {
  Rounded rounded[FEW];
  const float *floats[FEW];  // unrounded, `padded` long
  const float *sums[FEW];    // of each group, of the unrounded
};

inline size_t inputs_bytes(const Layout &l) {
  return (rounded_bytes(l) + static_cast<size_t>(l.padded) * 4 + static_cast<size_t>(l.groups) * 4 + 256 + 63) / 64 * 64;
}

// Tokens that a product computes for so many: for one odd one too many the first stands in, whose memory lies behind them.
inline int evened(int count) { return count > 1 ? count + count % 2 : count; }

// Lets the first of some tokens, which lie behind each other in `memory`, stand in for the one that makes them even.
inline void even_out(Inputs &in, int count, uint8_t *memory, size_t each) {
  if (evened(count) == count) return;
  std::memcpy(memory + static_cast<size_t>(count) * each, memory, each);
  in.rounded[count] = in.rounded[count - 1];
  in.rounded[count].high += each / 4;
  in.floats[count] = in.floats[0];
  in.sums[count] = in.sums[0];
}

// Rounds one token into `memory` (inputs_bytes). `x` has `columns` floats.
inline void prepare(const float *x, const rg_matrix &m, const Layout &l, int activations, uint8_t *memory, Inputs &in, int slot) {
  if (activations >= RG_TOKEN) {
    rg_tap token{};
    token.format = RG_DYNAMIC, token.bits = activations - RG_TOKEN;
    in.rounded[slot] = round_by<false>(token, x, m.columns, m.group, l, memory);
  } else if (activations == RG_INT8) in.rounded[slot] = round_token<false>(x, m.columns, m.group, l, memory);
  else if (activations == RG_INT16) in.rounded[slot] = round_token<true>(x, m.columns, m.group, l, memory);
  else {
    float *copy = reinterpret_cast<float *>(aligned(memory)), *sums = copy + l.padded;
    std::memcpy(copy, x, static_cast<size_t>(m.columns) * 4);
    std::memset(copy + m.columns, 0, static_cast<size_t>(l.padded - m.columns) * 4);
    for (int g = 0; g < l.groups; ++g) {
      Floats sum = zero_floats();
      float rest = 0;
      int i = 0;
      for (; i + PANEL <= m.group; i += PANEL) sum = sum + load_floats(copy + g * m.group + i);
      for (; i < m.group; ++i) rest += copy[g * m.group + i];
      sums[g] = total(sum) + rest;
    }
    in.floats[slot] = copy;
    in.sums[slot] = sums;
  }
}

}  // namespace
