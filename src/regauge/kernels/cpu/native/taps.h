// How an activation is read: a transform, then codes. Every site that reads a tap reads the same numbers.
//
// Cost a token: a Hadamard of n channels n log2 n additions; a rounding three passes over the channels. A plain tap costs
// nothing: its sites read the activation where it lies.
#pragma once
#include "product.h"

namespace {

inline bool plain(const rg_tap &t) { return !t.format && !t.transform && !t.diagonal; }

// A tap that can be read, of so many channels.
inline bool sound(const rg_tap &t, int columns) {
  if (t.format < RG_PLAIN || t.format > RG_STATIC || (t.value != RG_INT && t.value != RG_FLOAT)) return false;
  if (t.format && (t.bits < 2 || t.bits > 8 || t.group < 0)) return false;
  if (t.value == RG_FLOAT && (t.asymmetric || t.mantissa < 0 || t.mantissa > 6 || !(t.top > 0) || !(t.tiny > 0))) return false;
  if (t.format == RG_STATIC && t.steps && (t.group < 1 || columns % t.group || (t.asymmetric && !t.zeros))) return false;
  if (t.format == RG_STATIC && !t.steps && !(t.step > 0)) return false;
  if (t.format == RG_STATIC && !(std::fabs(t.zero) <= (t.asymmetric ? 32000.0f : 0.0f))) return false;  // codes less it: two bytes, or one
  if (t.transform == RG_HADAMARD) return t.size > 0 && !(t.size & (t.size - 1)) && columns % t.size == 0;
  if (t.transform == RG_KRONECKER) return t.size > 0 && columns % t.size == 0 && t.left && t.right;
  return t.transform == RG_IDENTITY;
}

// Normalised Hadamard of Sylvester's order, in place.
inline void hadamard(float *x, int size) {
  for (int half = 1; half < size; half *= 2)
    for (int at = 0; at < size; at += 2 * half) {
      int i = at;
      for (; i + PANEL <= at + half; i += PANEL) {
        const Floats a = load_floats(x + i), b = load_floats(x + i + half);
        store_floats(x + i, a + b);
        store_floats(x + i + half, a - b);
      }
      for (; i < at + half; ++i) {
        const float a = x[i], b = x[i + half];
        x[i] = a + b;
        x[i + half] = a - b;
      }
    }
  const float by = 1.0f / std::sqrt(static_cast<float>(size));
  for (int i = 0; i < size; ++i) x[i] *= by;
}

// x (left (x) right) in place, x read as a matrix (size, columns / size). `spare`: as many floats as x.
inline void kronecker(const rg_tap &t, int columns, float *x, float *spare) {
  const int rows = t.size, width = columns / t.size;
  std::memset(spare, 0, static_cast<size_t>(columns) * 4);
  for (int k = 0; k < rows; ++k)
    for (int l = 0; l < width; ++l)
      for (int j = 0; j < width; ++j) spare[k * width + j] += x[k * width + l] * t.right[l * width + j];
  std::memset(x, 0, static_cast<size_t>(columns) * 4);
  for (int k = 0; k < rows; ++k)
    for (int i = 0; i < rows; ++i)
      for (int j = 0; j < width; ++j) x[i * width + j] += spare[k * width + j] * t.left[k * rows + i];
}

// The activation after diagonal and transform; `out` has room for twice the columns.
inline void transformed(const rg_tap &t, const float *x, int columns, float *out) {
  for (int i = 0; i < columns; ++i) out[i] = t.diagonal ? x[i] * t.diagonal[i] : x[i];
  if (t.transform == RG_HADAMARD)
    for (int i = 0; i < columns; i += t.size) hadamard(out + i, t.size);
  if (t.transform == RG_KRONECKER) kronecker(t, columns, out, out + columns);
}

// One step of some channels: value = step * (code - zero), codes low ... high; or step * a small float up to high.
struct Coding {
  float step, zero, low, high, nothing;  // nothing: 0, or NaN where an input is none or infinite
  float tiny, whole;                     // of small floats: the least normal one (0: codes are integers), 2^mantissa

  // (code - zero) of x.
  float of(float x) const {
    if (tiny > 0) return small(x / step);
    const float z = std::nearbyint(x / step + zero);
    return (z > high ? high : z >= low ? z : low) - zero;
  }

  // The nearest small float; a tie goes to the even mantissa.
  float small(float z) const {
    const float size = std::fabs(z) < high ? std::fabs(z) : high;
    uint32_t exponent;
    std::memcpy(&exponent, &size, 4);
    exponent &= 0x7f800000u;  // the power of two below
    float below;
    std::memcpy(&below, &exponent, 4);
    const float spacing = (below > tiny ? below : tiny) / whole;
    return std::copysign(std::nearbyint(size / spacing) * spacing, z);
  }
};

// How many channels share a step.
inline int span_of(const rg_tap &t, int columns) {
  const bool grouped = t.group && t.group < columns && (t.format == RG_DYNAMIC || t.steps);
  return grouped ? t.group : columns;
}

// As formats/ rounds inputs: a symmetric step is reach / (half the width of the grid), ties go to even, codes saturate;
// asymmetric ranges are widened to hold 0. `first` of `count` channels.
inline Coding coding(const rg_tap &t, const float *x, int first, int count) {
  Coding c{};
  const bool floats = t.value == RG_FLOAT;
  c.low = floats ? -t.top : t.asymmetric ? 0.0f : -std::ldexp(1.0f, t.bits - 1);
  c.high = floats ? t.top : c.low + std::ldexp(1.0f, t.bits) - 1.0f;
  c.tiny = floats ? t.tiny : 0.0f;
  c.whole = std::ldexp(1.0f, t.mantissa);
  float least = 0, most = 0;
  for (int i = 0; i < count; ++i) {
    least = x[i] < least ? x[i] : least;
    most = x[i] > most ? x[i] : most;
    c.nothing += x[i] * 0.0f;
  }
  if (t.format == RG_STATIC) {
    c.step = t.steps ? t.steps[first / t.group] : t.step;
    c.zero = t.steps ? (t.zeros ? t.zeros[first / t.group] : 0.0f) : t.zero;
    return c;
  }
  if (t.step > 0 && t.step < 1) least *= t.step, most *= t.step;  // a clip: the range is shortened, codes saturate
  constexpr float LEAST = 1.2930e-26f;
  const float own = t.asymmetric ? (most - least) / (c.high - c.low) : (most > -least ? most : -least) / ((c.high - c.low) / 2);
  c.step = own > LEAST ? own : LEAST;
  const float zero = t.asymmetric ? std::nearbyint(c.low - least / c.step) : 0.0f;
  c.zero = zero > c.high ? c.high : zero >= c.low ? zero : c.low;
  return c;
}

// Whether the codes of a tap, less their zero point, need two bytes.
inline bool wide(const rg_tap &t) { return t.asymmetric; }

// Whether each group of the matrix has one step of the tap, and codes are integers.
inline bool nests(const rg_tap &t, int group) {
  return t.value == RG_INT && ((t.format == RG_STATIC && !t.steps) || !t.group || t.group % group == 0);
}

// A group's codes as panels read them, its sums and its step: code(i) for each of its channels. TWO: codes in two bytes.
template <bool TWO, class F>
inline void put_group(const TokenRoom &room, int g, int group, float step, F &&code) {
  int32_t highs = 0, lows = 0;
  for (int i = g * group; i < (g + 1) * group; ++i) {
    const int32_t q = code(i), h = TWO ? (q + 128) >> 8 : q;
    room.high[i] = static_cast<int8_t>(h);
    highs += h;
    if (TWO) {
      room.low[i] = static_cast<int8_t>(q - h * 256);
      lows += q - h * 256;
    }
  }
  room.sum_high[g] = highs;
  room.sum_low[g] = lows;
  room.step[g] = step;
  room.sum[g] = (TWO ? 256.0f : 1.0f) * static_cast<float>(highs) + static_cast<float>(lows);
}

// One token in the codes of its tap, as panels read it. TWO: codes in two bytes.
template <bool TWO>
inline Rounded round_by(const rg_tap &t, const float *x, int columns, int group, const Layout &l, uint8_t *scratch) {
  const TokenRoom room(l, scratch, TWO);
  const int span = span_of(t, columns);
  Coding c{};
  for (int g = 0; g < l.groups; ++g) {
    const int begin = g * group, stop = columns - begin < group ? columns : begin + group;
    if (begin % span == 0) c = coding(t, x + begin, begin, columns - begin < span ? columns - begin : span);
    put_group<TWO>(room, g, group, c.step + c.nothing, [&](int i) { return i < stop ? static_cast<int32_t>(c.of(x[i])) : 0; });
  }
  return room.rounded();
}

// The entry of the step that some token's channels from `begin` on share.
inline size_t entry_of(const rg_codes &c, int64_t token, int columns, int begin) {
  return c.group ? static_cast<size_t>(token) * static_cast<size_t>(columns / c.group) + static_cast<size_t>(begin / c.group) : static_cast<size_t>(token);
}

// The zero point of some token's channels from `begin` on.
inline int32_t zero_of(const rg_codes &c, int64_t token, int columns, int begin) {
  return c.zeros ? c.zeros[entry_of(c, c.shared ? 0 : token, columns, begin)] : 0;
}

// A token of ready codes as panels read it. TWO: codes less a zero point, in two bytes.
template <bool TWO>
inline Rounded ready_token(const rg_codes &c, int64_t token, int columns, int group, const Layout &l, uint8_t *scratch) {
  const TokenRoom room(l, scratch, TWO);
  const int8_t *from = c.codes + token * columns;
  for (int g = 0; g < l.groups; ++g) {
    const int begin = g * group;
    const int32_t zero = TWO ? zero_of(c, token, columns, begin) : 0;
    const float step = c.steps ? c.steps[entry_of(c, token, columns, begin)] : 1.0f;
    put_group<TWO>(room, g, group, step, [&](int i) { return i < columns ? from[i] - zero : 0; });
  }
  return room.rounded();
}

// What the codes of a token stand for.
inline void simulated(const rg_tap &t, const float *x, int columns, float *out) {
  const int span = span_of(t, columns);
  for (int begin = 0; begin < columns; begin += span) {
    const int stop = columns - begin < span ? columns : begin + span;
    const Coding c = coding(t, x + begin, begin, stop - begin);
    for (int i = begin; i < stop; ++i) out[i] = c.of(x[i]) * (c.step + c.nothing);
  }
}

}  // namespace
