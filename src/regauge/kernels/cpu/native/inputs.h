// What several sites read of one tap: rounded once for each way in which their products want it; and their low-rank terms.
#pragma once
#include "functions.h"

namespace {

constexpr int MOST = 64;      // new tokens that a step takes, of all sequences together
constexpr int DISTINCT = 4;   // ways in which one input may have to be rounded
constexpr int BUNCHES = (MOST + FEW - 1) / FEW;

// How the product of a site carries what it reads of a tap.
inline int carried(const rg_site &s, const rg_tap &t) {
  if (t.format == RG_PLAIN || s.unrounded || s.activations == RG_FLOAT32) return s.activations;
  return wide(t) || !nests(t, s.matrix.group) ? RG_INT16 : RG_INT8;
}

// A site with its kernel chosen.
struct Site {
  Ready ready;
  const float *bias;
  const rg_low_rank *low;
  bool unrounded;
  const float *narrowed = nullptr;  // right x of every token, `width` floats each
  Site(const rg_site &s, const rg_tap &t) : ready(s.matrix, carried(s, t)), bias(s.bias), low(s.low_rank), unrounded(s.unrounded || t.format == RG_PLAIN) {}

  size_t width() const { return (static_cast<size_t>(low->right.rows) + PANEL - 1) / PANEL * PANEL; }

  // Adds left (right x) to rows of a panel for tokens first ... first + count - 1.
  void add_low_rank(int64_t panel, int first, int count, float *out) const {
    const rg_matrix &left = low->left;
    const size_t rank = static_cast<size_t>(left.columns), size = left.bits == RG_F32 ? 4 : 2;
    const uint8_t *own = left.panels + static_cast<size_t>(panel) * rank * PANEL * size;
    for (int r = 0; r < count; ++r) {
      const float *x = narrowed + static_cast<size_t>(first + r) * width();
      Floats sum = load_floats(out + r * PANEL);
      for (size_t k = 0; k < rank; ++k) {
        const uint8_t *at = own + k * PANEL * size;
        const Floats some = left.bits == RG_F32    ? load_floats(reinterpret_cast<const float *>(at))
                            : left.bits == RG_BF16 ? load_bf16(reinterpret_cast<const uint16_t *>(at))
                                                   : load_half(reinterpret_cast<const uint16_t *>(at));
        sum = fma(some, set_floats(x[k]), sum);
      }
      store_floats(out + r * PANEL, sum);
    }
  }
};

// One activation of some tokens as its tap gives it, ready for every site that reads it.
struct Prepared {
  int activations[DISTINCT], group[DISTINCT], offset[DISTINCT];
  bool unrounded[DISTINCT];
  Inputs in[DISTINCT][BUNCHES];
  int kinds = 0;
  uint8_t *memory;
  size_t used = 0;

  const rg_tap *tap = nullptr;
  const float *x = nullptr;  // after the transform
  size_t row = 0;
  int columns = 0, tokens = 0;
  bool coded = false;
  float *work = nullptr;     // what is transformed, then what its codes stand for: (tokens, 3 columns padded)

  static size_t work_row(int columns) { return (static_cast<size_t>(columns) + PANEL) / PANEL * PANEL; }

  void restart(const rg_tap &t, const float *given, size_t given_row, int channels, int count) {
    kinds = 0, used = 0, coded = false;
    tap = &t, x = given, row = given_row, columns = channels, tokens = count;
    if (t.transform || t.diagonal) transform();
  }

  // Drops what was rounded, not what it was rounded from.
  void again() { kinds = 0, used = 0; }

  void transform() {
    const size_t wide_row = work_row(columns) * 3;
    for (int n = 0; n < tokens; ++n) transformed(*tap, x + static_cast<size_t>(n) * row, columns, work + static_cast<size_t>(n) * wide_row);
    x = work;
    row = wide_row;
  }

  // The token in floats, as a site sees it.
  const float *seen(int token, bool before) {
    if (before) return x + static_cast<size_t>(token) * row;
    const size_t wide_row = work_row(columns) * 3;
    if (!coded)
      for (int n = 0; n < tokens; ++n) simulated(*tap, x + static_cast<size_t>(n) * row, columns, work + static_cast<size_t>(n) * wide_row + 2 * work_row(columns));
    coded = true;
    return work + static_cast<size_t>(token) * wide_row + 2 * work_row(columns);
  }

  // Index of the way this site wants its input.
  int of(const Site &s) {
    const Ready &a = s.ready;
    for (int i = 0; i < kinds; ++i)
      if (activations[i] == a.activations && group[i] == a.m->group && offset[i] == a.m->offset && unrounded[i] == s.unrounded) return i;
    const int slot = kinds++;
    group[slot] = a.m->group;
    activations[slot] = a.activations;
    offset[slot] = a.m->offset;
    unrounded[slot] = s.unrounded;
    const size_t each = inputs_bytes(a.l);
    const bool codes = !s.unrounded && a.activations != RG_FLOAT32 && nests(*tap, a.m->group);
    for (int t = 0; t < tokens; ++t, used += each) {
      Inputs &to = in[slot][t / FEW];
      if (!codes) prepare(seen(t, s.unrounded), *a.m, a.l, a.activations, memory + used, to, t % FEW);
      else if (wide(*tap)) to.rounded[t % FEW] = round_by<true>(*tap, x + static_cast<size_t>(t) * row, columns, a.m->group, a.l, memory + used);
      else to.rounded[t % FEW] = round_by<false>(*tap, x + static_cast<size_t>(t) * row, columns, a.m->group, a.l, memory + used);
      if (a.activations != RG_FLOAT32) centre(to.rounded[t % FEW], a.l, a.m->offset);
    }
    const int last = tokens % FEW;
    if (evened(last) != last) {
      even_out(in[slot][tokens / FEW], last, memory + used - static_cast<size_t>(last) * each, each);
      used += each;
    }
    return slot;
  }

  // Rows of `right x` that stand in one panel, of some tokens.
  void narrow(const Site &s, int64_t panel, int first, int some, float *out) {
    alignas(64) float rows[FEW * PANEL];
    for (int t = 0; t < some; t += FEW) {
      const int count = some - t < FEW ? some - t : FEW;
      Inputs few;
      for (int r = 0; r < count; ++r) few.floats[r] = seen(first + t + r, s.unrounded);
      full_rows(s.low->right, panel, panel + 1, few, count, count, rows);
      for (int r = 0; r < count; ++r) std::memcpy(out + static_cast<size_t>(t + r) * s.width() + panel * PANEL, rows + r * PANEL, PANEL * 4);
    }
  }
};

inline Inputs alone(const Inputs &in, int slot) {
  Inputs one;
  one.rounded[0] = in.rounded[slot];
  one.floats[0] = in.floats[slot];
  one.sums[0] = in.sums[slot];
  return one;
}

// Panels [start, stop) of a site, at most `panels_together`, for all tokens of a prepared input; rows beyond the matrix are not
// written. with(panel, t, rows, values)
template <class With>
inline void each_panel(const Site &s, const Inputs *in, int tokens, int64_t start, int64_t stop, With &&with) {
  alignas(64) float room[ROOM];
  for (int t = 0; t < tokens; t += FEW) {
    const int count = tokens - t < FEW ? tokens - t : FEW;
    panels_values(s.ready, start, stop, in[t / FEW], count, room);
    for (int64_t panel = start; panel < stop; ++panel) {
      float *out = room + (panel - start) * evened(count) * PANEL;
      if (s.low) s.add_low_rank(panel, t, count, out);
      const int64_t left = s.ready.m->rows - panel * PANEL;
      const int rows = static_cast<int>(left < PANEL ? left : PANEL);
      for (int r = 0; r < count; ++r) {
        float *row = out + r * PANEL;
        if (s.bias) for (int i = 0; i < rows; ++i) row[i] += s.bias[panel * PANEL + i];
        with(panel, t + r, rows, row);
      }
    }
  }
}

}  // namespace
