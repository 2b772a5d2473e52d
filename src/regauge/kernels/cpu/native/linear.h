// Products for a few tokens: who rounds, who multiplies, where results go.
#pragma once
#include "full.h"
#include "trellis_levels.h"

namespace {

// A matrix with what the choice of its kernel needs.
struct Ready {
  const rg_matrix *m;
  Layout l;
  int activations;
  IntegerTable integers{};
  float table[16]{};
  int kind;  // 0 integers, 1 narrow table, 2 wide table; 3 ... 6 floats of INT, TABLE, FLOAT, FULL

  Ready(const rg_matrix &matrix, int wanted) : m(&matrix), l(matrix), activations(wanted) {
    if (m->value == RG_FULL) {
      l.panel = l.read = PANEL * (by_columns(*m) ? full_bytes(*m, m->columns) : full_row_bytes(*m));
      l.hop = by_columns(*m) ? full_bytes(*m, PANEL) : l.panel;
      activations = RG_FLOAT32;
    }
    if (m->value == RG_TABLE) {
      for (int i = 0; i < 1 << m->bits; ++i) table[i] = m->table[i];
      integers = integer_table(table, 1 << m->bits);
    }
    if (m->value == RG_FLOAT) activations = RG_FLOAT32;
    kind = activations == RG_FLOAT32 ? 3 + m->value : m->value == RG_INT ? 0 : integers.wide ? 2 : 1;  // not of a trellis
  }

  // Whether it is of integers with steps kept in a usual way, so that a group's end is short.
  bool usual() const { return kind == 0 && m->group <= LONGEST && (m->step == RG_STEP_F16 || (m->step == RG_STEP_NONE && !m->zero)); }
};

// One token of a matrix of usual steps comes by `alone_values`.
template <int B, int MR, bool TWO>
inline void one_panel_of_integers(const Ready &a, const uint8_t *panel, const Rounded *x, Floats (&out)[MR]) {
  const rg_matrix &m = *a.m;
  if constexpr (MR > 1)
    if (B >= NESTED || MR > 4 || a.usual()) return panel_product<B, MR, TWO, 0, USUAL_STEPS>(m, a.l, nullptr, panel, x, out);
  if constexpr (MR > 4 || B >= NESTED) return;
  else if (a.kind == 0) return panel_product<B, MR, TWO, 0>(m, a.l, nullptr, panel, x, out);
  if constexpr (B <= 4) {
    if (a.kind == 1) return panel_product<B, MR, TWO, 1>(m, a.l, &a.integers, panel, x, out);
    return panel_product<B, MR, TWO, 2>(m, a.l, &a.integers, panel, x, out);
  }
}

template <int B, int MR>
inline void one_panel(const Ready &a, const uint8_t *panel, const Inputs &in, int first, Floats (&out)[MR]) {
  const rg_matrix &m = *a.m;
  if (a.activations == RG_INT16) {
    one_panel_of_integers<B, MR, true>(a, panel, in.rounded + first, out);
  } else if (a.activations != RG_FLOAT32) {
    one_panel_of_integers<B, MR, false>(a, panel, in.rounded + first, out);
  } else if constexpr (B >= NESTED && MR <= 4) {
    return panel_floats<PUT, MR, RG_INT>(m, a.l, a.table, panel, in.floats + first, in.sums + first, out);
  } else if constexpr (MR <= 4) {
    const float *const *floats = in.floats + first, *const *sums = in.sums + first;
    if (a.kind == 3 + RG_INT) return panel_floats<B, MR, RG_INT>(m, a.l, a.table, panel, floats, sums, out);
    if constexpr (B <= 4)
      if (a.kind == 3 + RG_TABLE) return panel_floats<B, MR, RG_TABLE>(m, a.l, a.table, panel, floats, sums, out);
    return panel_floats<B, MR, RG_FLOAT>(m, a.l, a.table, panel, floats, sums, out);
  }
}

// What of a panel is multiplied: all of it, or one of its runs, whose sums go on from those of the runs before.
enum Part { WHOLE = 0, BEGUN = 1, UNENDED = 2 };

// Rows of a panel for MR tokens from `first` on: out[t * 16 ... ], scaled; of a panel that is UNENDED the sums.
template <int B, int MR>
inline void tokens_of(const Ready &a, const uint8_t *panel, const Inputs &in, int first, Floats scale, int part, float *out) {
  constexpr int KIND = B < NESTED || MR == 1 ? B : B == NESTED + 8 ? PUT : PUT_SMALL;
  Floats sum[MR];
  for (int r = 0; r < MR; ++r) sum[r] = part & BEGUN ? load_floats(out + (first + r) * PANEL) : zero_floats();
  one_panel<KIND, MR>(a, panel, in, first, sum);
  const bool table = a.kind == 1 || a.kind == 2;
  for (int r = 0; r < MR; ++r) {
    if (!(part & UNENDED)) sum[r] = (table ? sum[r] * set_floats(a.integers.scale) : sum[r]) * scale;
    store_floats(out + (first + r) * PANEL, sum[r]);
  }
}

// Rows of one panel for `count` <= FEW tokens; `out` has room for as many as kernels are compiled for.
template <int B>
inline void panel_of(const Ready &a, const uint8_t *panel, const Inputs &in, int count, int64_t number, int part, float *out) {
  count = evened(count);
  const Floats scale = a.m->row_scale ? load_floats(a.m->row_scale + number * PANEL) : set_floats(1.0f);
  if constexpr (FEW == 8) {
    if (count == 8 && a.usual()) return tokens_of<B, 8>(a, panel, in, 0, scale, part, out);
    if (count == 6 && a.usual()) return tokens_of<B, 6>(a, panel, in, 0, scale, part, out);
  }
  int t = 0;
  for (; t + 4 <= count; t += 4) tokens_of<B, 4>(a, panel, in, t, scale, part, out);
  if (t + 2 <= count) tokens_of<B, 2>(a, panel, in, t, scale, part, out);
  else if (t < count) tokens_of<B, 1>(a, panel, in, t, scale, part, out);
}

// Sixteen rows of a trellis, whose kernels are compiled apart.
inline void trellis_values(const Ready &a, const uint8_t *panel, const Inputs &in, int count, int64_t number, float *out) {
  for (int t = 0; t < count; t += 4) {
    const int some = count - t < 4 ? count - t : 4;
    if (a.activations == RG_FLOAT32) {
      rg::trellises().floats(*a.m, panel, in.floats + t, some, out + t * PANEL);
    } else {
      rg::TrellisInput x[4];
      for (int r = 0; r < some; ++r) {
        const Rounded &one = in.rounded[t + r];
        x[r] = {one.high, one.low, one.sum_high, one.sum_low, one.step};
      }
      rg::trellises().product(*a.m, panel, x, some, a.activations == RG_INT16, out + t * PANEL);
    }
  }
  if (!a.m->row_scale) return;
  const Floats scale = load_floats(a.m->row_scale + number * PANEL);
  for (int t = 0; t < count; ++t) store_floats(out + t * PANEL, load_floats(out + t * PANEL) * scale);
}

// Panels of one run by one token: what all have in common is found once, and a core sees from one into the next, so that a run
// of few groups costs no more than a part of a long one.
template <int B, bool TWO, int KEPT>
inline void panels_alone(const rg_matrix &m, const Layout &l, const uint8_t *at, size_t hop, int64_t first, int64_t stop, const Rounded &x, int part, float *out) {
  for (int64_t p = first; p < stop; ++p, at += hop, out += PANEL) {
    Floats sum[1] = {part & BEGUN ? load_floats(out) : zero_floats()};
    panel_product<B, 1, TWO, 0, KEPT>(m, l, nullptr, at, &x, sum);
    if (!(part & UNENDED) && m.row_scale) sum[0] = sum[0] * load_floats(m.row_scale + p * PANEL);
    store_floats(out, sum[0]);
  }
}

// Rows of panels [start, stop) of a matrix of usual steps by one token.
template <int B>
inline void alone_values(const Ready &a, int64_t start, int64_t stop, const Inputs &in, float *out) {
  const rg_matrix &m = *a.m;
  Layout l = a.l;
  for (int g = 0, end = 0; g < a.l.groups; g = end) {
    end = a.l.end_of(g);
    l.groups = l.ends[0] = end - g;
    const bool runs = a.l.in_runs();
    const uint8_t *at = runs ? a.l.run_at(start, g) : m.panels + a.l.hop * static_cast<size_t>(start);
    const size_t hop = runs ? static_cast<size_t>(a.l.run_at(1, g) - a.l.run_at(0, g)) : a.l.hop;
    const int part = (g ? BEGUN : 0) | (end < a.l.groups ? UNENDED : 0);
    const Rounded x = in.rounded[0].from(g, m.group);
    const auto go = [&](auto two, auto kept) { panels_alone<B, two.value != 0, kept.value>(m, l, at, hop, start, stop, x, part, out); };
    const auto by = [&](auto two) {
      if constexpr (B < NESTED) {
        if (m.step == RG_STEP_NONE) return go(two, Constant<NO_STEPS>{});
        if (m.zero) return go(two, Constant<HALF_STEPS_AND_ZEROS>{});
      }
      go(two, Constant<HALF_STEPS>{});
    };
    a.activations == RG_INT16 ? by(Constant<1>{}) : by(Constant<0>{});
  }
}

// f(Constant<kind_of(m)>) of codes but a trellis's.
template <class F>
inline void of_kind(const rg_matrix &m, F &&f) {
  switch (kind_of(m)) {
    case NESTED + 2: return f(Constant<NESTED + 2>{});
    case NESTED + 3: return f(Constant<NESTED + 3>{});
    case NESTED + 4: return f(Constant<NESTED + 4>{});
    case NESTED + 5: return f(Constant<NESTED + 5>{});
    case NESTED + 6: return f(Constant<NESTED + 6>{});
    case NESTED + 7: return f(Constant<NESTED + 7>{});
    case NESTED + 8: return f(Constant<NESTED + 8>{});
    case 1: return f(Constant<1>{});
    case 2: return f(Constant<2>{});
    case 3: return f(Constant<3>{});
    case 4: return f(Constant<4>{});
    case 5: return f(Constant<5>{});
    case 6: return f(Constant<6>{});
    case 7: return f(Constant<7>{});
    default: return f(Constant<8>{});
  }
}

// Sixteen rows of codes but a trellis's.
inline void codes_values(const Ready &a, const uint8_t *panel, const Inputs &in, int count, int64_t number, int part, float *out) {
  of_kind(*a.m, [&](auto kind) { panel_of<kind.value>(a, panel, in, count, number, part, out); });
}

inline void panel_values(const Ready &a, int64_t number, const Inputs &in, int count, float *out) {
  if (a.m->value == RG_FULL) return full_rows(*a.m, number, in, count, out);
  const uint8_t *panel = a.m->panels + a.l.hop * static_cast<size_t>(number);
  if (a.m->value == RG_TRELLIS) return trellis_values(a, panel, in, count, number, out);
  codes_values(a, panel, in, count, number, WHOLE, out);
}

// Whether each run is multiplied by itself; else a kernel finds the way from run to run.
inline bool by_runs(const Ready &a) { return a.l.in_runs() && a.m->value != RG_TRELLIS && a.activations != RG_FLOAT32; }

constexpr int ROOM = 4096;  // floats of sums that are kept at once

// How many panels are multiplied together, as many as have room for their sums: run by run, or column by column, so that memory is
// read in order; or by one token. 1: a panel after another, and where a panel is read anew for more tokens.
inline int64_t panels_together(const Ready &a, int tokens) {
  const bool several = by_columns(*a.m) || (by_runs(a) && tokens <= FEW) || (tokens == 1 && a.usual());
  return several ? ROOM / (PANEL * evened(tokens < FEW ? tokens : FEW)) : 1;
}

// Rows of panels [start, stop), at most `panels_together`: out (panels, evened(count), 16). The same sums in the same order.
inline void panels_values(const Ready &a, int64_t start, int64_t stop, const Inputs &in, int count, float *out) {
  if (by_columns(*a.m)) return full_columns(*a.m, start, stop, in, count, evened(count), out);
  if (count == 1 && a.usual()) return of_kind(*a.m, [&](auto kind) { alone_values<kind.value>(a, start, stop, in, out); });
  if (!by_runs(a)) return panel_values(a, start, in, count, out);
  Ready part(a);
  for (int g = 0, end = 0; g < a.l.groups; g = end) {
    end = a.l.end_of(g);
    part.l.groups = part.l.ends[0] = end - g;
    Inputs some = in;
    for (int t = 0; t < evened(count); ++t) some.rounded[t] = some.rounded[t].from(g, a.m->group);
    for (int64_t p = start; p < stop; ++p)
      codes_values(part, a.l.run_at(p, g), some, count, p, (g ? BEGUN : 0) | (end < a.l.groups ? UNENDED : 0), out + (p - start) * evened(count) * PANEL);
  }
}

// Panels a thread takes at a time: enough bytes to read on without a gap, few enough to even out.
inline int64_t panels_at_once(const Layout &l, int threads) {
  if (l.in_runs() && threads == 1) return l.panels;
  const int64_t by_bytes = 1 + static_cast<int64_t>(262144 / (l.read + 1));
  const int64_t even = (l.panels + 2 * threads - 1) / (2 * threads);
  return by_bytes < even ? by_bytes : even > 0 ? even : 1;
}
inline int64_t panels_at_once(const Ready &a, int threads) {
  return by_columns(*a.m) ? panels_together(a, 1) : panels_at_once(a.l, threads);
}

// As many threads as have some 32 KB each to read, and one at least: waking one costs as much.
inline int worth(int threads, size_t bytes) {
  if (threads < 1) return 1;
  const size_t most = bytes / 32768 + 1;
  return most < static_cast<size_t>(threads) ? static_cast<int>(most) : threads;
}

// Products of a few tokens at a time. with(token, floats, memory, in, slot) makes a token ready.
template <class With>
inline int few_tokens(const Ready &a, void *y, int64_t tokens, int dtype, int threads, With &&with) {
  const rg_matrix *m = a.m;
  threads = worth(threads, a.l.read * static_cast<size_t>(a.l.panels));
  const size_t each = inputs_bytes(a.l), row = (static_cast<size_t>(m->columns) * 4 + 127) / 64 * 64;
  uint8_t *memory = scratch(FEW * each + FEW * row + 128);
  if (!memory) return RG_NO_MEMORY;
  memory = aligned(memory);
  for (int64_t first = 0; first < tokens; first += FEW) {
    const int count = static_cast<int>(tokens - first < FEW ? tokens - first : FEW);
    Inputs in;
    rg::Share share;
    rg::parallel(threads, [&](int thread, rg::Team &team) {
      for (int t = thread; t < count; t += team.threads) {
        float *floats = reinterpret_cast<float *>(aligned(memory + FEW * each + static_cast<size_t>(t) * row));
        with(first + t, floats, memory + static_cast<size_t>(t) * each, in, t);
        if (a.activations != RG_FLOAT32) centre(in.rounded[t], a.l, m->offset);
      }
      team.barrier();
      if (evened(count) != count) {
        if (thread == 0) even_out(in, count, memory, each);
        team.barrier();
      }
      alignas(64) float out[ROOM];
      int64_t start, stop;
      const int64_t together = panels_together(a, count);
      while (share.take(thread, team.threads, a.l.panels, panels_at_once(a, team.threads), start, stop)) {
        for (int64_t end; start < stop; start = end) {
          end = start + together < stop ? start + together : stop;
          panels_values(a, start, end, in, count, out);
          for (int64_t p = start; p < end; ++p) {
            const int rows = static_cast<int>(m->rows - p * PANEL < PANEL ? m->rows - p * PANEL : PANEL);
            const float *own = out + (p - start) * evened(count) * PANEL;
            for (int t = 0; t < count; ++t) store_row(y, (first + t) * m->rows + p * PANEL, rows, dtype, own + t * PANEL);
          }
        }
      }
    });
  }
  return RG_DONE;
}

inline int linear(const rg_matrix *m, const void *x, void *y, int64_t tokens, int dtype, int activations, int threads) {
  const Ready a(*m, activations);
  return few_tokens(a, y, tokens, dtype, threads, [&](int64_t token, float *floats, uint8_t *memory, Inputs &in, int slot) {
    load_row(x, token * m->columns, m->columns, dtype, floats);
    prepare(floats, *m, a.l, a.activations, memory, in, slot);
  });
}

}  // namespace
