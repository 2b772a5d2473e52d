// Rounding to a trellis: the value of a weight is a table's entry under a window of bits that neighbours share, so the codes
// of a word are a path through 2^(window - fresh) states, and the least squared error is found by Viterbi's algorithm.
//
// Weight i of a word of `run` brings `fresh` bits (the low ones of its code) into a circular string; its window is those,
// highest, and the window - fresh bits before them. `plain` further bits (the high ones of the code) choose among values
// of the same window: value = table[plain << window | fresh << (window - fresh) | state]. The state after it is its window
// without the lowest `fresh` bits. Sixteen rows lie side by side, so that a candidate costs four operations.
//
// A word is closed in two passes: the word rolled by half, from any state; then from and to the state it took at the seam.
// With feedback, what the errors of a part of a word owe is paid by the rest of the same word: the rest is solved again, from
// the state that was reached, to the state at the seam.
#pragma once
#include "lists.h"
#include "trellis_product.h"

namespace {

constexpr int MOST_RUN = 64;

// N columns of sixteen rows: column i in x + i * PANEL.
template <int L, int K, int P>
struct Viterbi {
  static constexpr int STATES = 1 << (L - K), FRESH = 1 << K, WINDOWS = 1 << L, PLAIN = 1 << P;
  const float *table;
  uint8_t back[MOST_RUN][STATES][PANEL];  // the lowest `fresh` bits of the window that led to a state
  uint8_t windows[MOST_RUN][PANEL];       // of the path

  // The squared distance of x to the nearest value of a window, on top of what was; x comes times its column's weight, whose
  // negative is `less`.
  RG_INLINE Floats distance(Floats x, Floats less, int window, Floats so_far) const {
    Floats gap = fma(set_floats(table[window]), less, x);
    if constexpr (P > 0) gap = absolute(gap);
    for (int p = 1; p < PLAIN; ++p) gap = minimum(gap, absolute(fma(set_floats(table[p << L | window]), less, x)));
    return fma(gap, gap, so_far);
  }

  // The best path of `count` columns into `windows`, errors times each column's weight. start, end: states of each row, or
  // NULL for any.
  void solve(const float *x, const float *weight, int count, const uint8_t *start, const uint8_t *end) {
    Floats costs[2][STATES];
    for (int s = 0; s < STATES; ++s) {
      alignas(64) float own[PANEL];
      for (int r = 0; r < PANEL; ++r) own[r] = !start || start[r] == s ? 0.0f : 1e30f;
      costs[0][s] = load_floats(own);
    }
    const Ints keep = set_ints(~(FRESH - 1));
    for (int i = 0; i < count; ++i) {
      const Floats here = load_floats(x + i * PANEL) * set_floats(weight[i]), less = set_floats(-weight[i]);
      const Floats *from = costs[i & 1];
      Floats *to = costs[(i + 1) & 1];
      for (int s = 0; s < STATES; ++s) {
        Floats best = set_floats(3e38f);
        for (int j = 0; j < FRESH; ++j) {  // which of them stands in the lowest bits of its cost
          const int window = s << K | j;
          const Floats cost = distance(here, less, window, from[window & (STATES - 1)]);
          best = minimum(best, as_floats((as_ints(cost) & keep) | set_ints(j)));
        }
        to[s] = best;
        store_low_bytes(reinterpret_cast<int8_t *>(back[i][s]), as_ints(best) & set_ints(FRESH - 1));
      }
    }
    alignas(64) float last[STATES][PANEL];
    for (int s = 0; s < STATES; ++s) store_floats(last[s], costs[count & 1][s]);
    uint8_t at[PANEL];
    for (int r = 0; r < PANEL; ++r) {
      int best = 0;
      for (int s = 1; s < STATES; ++s) best = last[s][r] < last[best][r] ? s : best;
      at[r] = end ? end[r] : static_cast<uint8_t>(best);
    }
    for (int i = count - 1; i >= 0; --i)
      for (int r = 0; r < PANEL; ++r) {
        const int window = at[r] << K | back[i][at[r]][r];
        windows[i][r] = static_cast<uint8_t>(window);
        at[r] = static_cast<uint8_t>(window & (STATES - 1));
      }
  }

  static void after(const uint8_t *window, uint8_t *state) {
    for (int r = 0; r < PANEL; ++r) state[r] = static_cast<uint8_t>(window[r] >> K);
  }

  // A whole word, closed: its path into `windows`, its state at the seam into `seam`.
  void close(const float *x, const float *weight, int run, uint8_t *seam) {
    alignas(64) float rolled[MOST_RUN * PANEL], weights[MOST_RUN];
    const int half = run / 2;
    for (int i = 0; i < run; ++i) {
      std::memcpy(rolled + i * PANEL, x + (i + half) % run * PANEL, PANEL * 4);
      weights[i] = weight[(i + half) % run];
    }
    solve(rolled, weights, run, nullptr, nullptr);
    after(windows[run - half - 1], seam);
    solve(x, weight, run, seam, seam);
  }

  // Code and value of one column under its windows.
  void column(const float *x, const uint8_t *window, uint8_t *code, float *value) const {
    for (int r = 0; r < PANEL; ++r) {
      int plain = 0;
      for (int p = 1; p < PLAIN; ++p)
        if (std::fabs(x[r] - table[p << L | window[r]]) < std::fabs(x[r] - table[plain << L | window[r]])) plain = p;
      code[r] = static_cast<uint8_t>(plain << K | window[r] >> (L - K));
      value[r] = table[plain << L | window[r]];
    }
  }
};

// What a tile of sixteen rows works in.
template <int L, int K, int P>
struct Trellised {
  Room<float> x, w, f;
  Room<Viterbi<L, K, P>> viterbi;
  explicit Trellised(int64_t columns) : x(columns * PANEL), w(columns * PANEL), f(columns * PANEL), viterbi(1) {}
  bool whole() const { return x.data && w.data && f.data && viterbi.data; }
};

// `count` rows turned, so that a column of sixteen lies side by side; missing rows are 0. Answers whether all are finite.
inline bool turned_rows(const float *from, int64_t count, int64_t columns, int64_t pitch, float *to) {
  float none = 0;
  for (int64_t r = 0; r < PANEL; ++r)
    for (int64_t i = 0; i < columns; ++i) {
      const float value = r < count ? from[r * pitch + i] : 0.0f;
      to[i * PANEL + r] = value;
      none += value * 0.0f;
    }
  return none == 0.0f;
}

template <int L, int K, int P>
inline int trellis_of(const rg_trellis &t, const float *z, int64_t rows, int64_t columns, uint8_t *codes, float *values, int threads) {
  using Own = Trellised<L, K, P>;
  return each_tile(rows, PANEL, threads, [&] { return Own(columns); }, [&](Own &m, int64_t first, int64_t count) -> int {
    if (!turned_rows(z + first * columns, count, columns, columns, m.x.data)) return RG_ENDLESS;
    Viterbi<L, K, P> &v = *m.viterbi.data;
    v.table = t.table;
    uint8_t seam[PANEL], code[PANEL];
    float value[PANEL], alike[MOST_RUN];
    for (float &one : alike) one = 1.0f;
    for (int64_t at = 0; at < columns; at += t.run) {
      v.close(m.x.data + at * PANEL, alike, t.run, seam);
      for (int i = 0; i < t.run; ++i) {
        v.column(m.x.data + (at + i) * PANEL, v.windows[i], code, value);
        for (int64_t r = 0; r < count; ++r) {
          codes[(first + r) * columns + at + i] = code[r];
          if (values) values[(first + r) * columns + at + i] = value[r];
        }
      }
    }
    return RG_DONE;
  });
}

// What columns from ... to of a word would best be were they free, in steps: w + (t - w) F^-1 of their own block.
inline void freed_word(const rg_trellis_sweep &s, const float *w, const float *t, int64_t from, int64_t to, float *moved, float *x) {
  for (int64_t j = from; j < to; ++j) {
    Floats sum = load_floats(t + j * PANEL) - load_floats(w + j * PANEL);
    for (int64_t i = from; i < j; ++i) sum = sum - load_floats(moved + i * PANEL) * set_floats(s.feedback[i * s.pitch + j]);
    store_floats(moved + j * PANEL, sum);
    store_floats(x + j * PANEL, load_floats(w + j * PANEL) + sum);
  }
}

template <int L, int K, int P>
inline int trellis_sweep_of(const rg_trellis &t, const rg_trellis_sweep &s, int threads) {
  using Own = Trellised<L, K, P>;
  return each_tile(s.rows, PANEL, threads, [&] { return Own(s.columns); }, [&](Own &m, int64_t first, int64_t count) -> int {
    float *const owed = m.x.data, *const w = m.w.data, *const moved = m.f.data;
    bool finite = turned_rows(s.targets + first * s.columns, count, s.columns, s.columns, owed);
    finite &= turned_rows(s.w + first * s.w_pitch, count, s.columns, s.w_pitch, w);
    if (!finite) return RG_ENDLESS;
    Viterbi<L, K, P> &v = *m.viterbi.data;
    v.table = t.table;
    const int64_t span = s.columns / s.groups;
    alignas(64) float x[MOST_RUN * PANEL], free_x[MOST_RUN * PANEL], step[PANEL], value[PANEL];
    uint8_t seam[PANEL], state[PANEL], code[PANEL];
    for (int64_t at = 0; at < s.columns; at += t.run) {
      for (int r = 0; r < PANEL; ++r) step[r] = r < count ? s.scale[(first + r) * s.groups + at / span] : 1.0f;
      const Floats steps = load_floats(step);
      const int64_t end = at + t.run;
      float weight[MOST_RUN], most = 0;
      for (int i = 0; i < t.run; ++i) most = std::fmax(most, weight[i] = s.feedback[(at + i) * s.pitch + at + i]);
      for (int i = 0; i < t.run; ++i) weight[i] = most > 0 ? weight[i] / most : 1.0f;
      for (int64_t from = at; from < end; from += s.part) {
        const int64_t upto = from + s.part < end ? from + s.part : end;
        freed_word(s, w, owed, from, end, moved, free_x - at * PANEL);
        for (int64_t i = from; i < end; ++i) store_floats(x + (i - from) * PANEL, load_floats(free_x + (i - at) * PANEL) / steps);
        if (from == at) v.close(x, weight, t.run, seam);
        else v.solve(x, weight + (from - at), static_cast<int>(end - from), state, seam);
        for (int64_t i = from; i < upto; ++i) {
          // Of this part alone: what its earlier columns owe bears on the plain bits too.
          v.column(x + (i - from) * PANEL, v.windows[i - from], code, value);
          const Floats error = load_floats(w + i * PANEL) - load_floats(value) * steps;
          store_floats(w + i * PANEL, error);
          for (int64_t r = 0; r < count; ++r) s.codes[(first + r) * s.codes_pitch + i] = code[r];
        }
        Viterbi<L, K, P>::after(v.windows[upto - 1 - from], state);
        for (int64_t j = upto; j < end; ++j) {
          Floats sum = load_floats(owed + j * PANEL);
          for (int64_t i = from; i < upto; ++i) sum = fma(load_floats(w + i * PANEL), set_floats(s.feedback[i * s.pitch + j]), sum);
          store_floats(owed + j * PANEL, sum);
        }
      }
      for (int64_t j = end; j < s.columns; j += 4) {  // whole words follow, of a multiple of four columns
        Floats sum[4];
        for (int c = 0; c < 4; ++c) sum[c] = load_floats(owed + (j + c) * PANEL);
        for (int64_t i = at; i < end; ++i)
          for (int c = 0; c < 4; ++c) sum[c] = fma(load_floats(w + i * PANEL), set_floats(s.feedback[i * s.pitch + j + c]), sum[c]);
        for (int c = 0; c < 4; ++c) store_floats(owed + (j + c) * PANEL, sum[c]);
      }
    }
    for (int64_t r = 0; r < count; ++r)
      for (int64_t i = 0; i < s.columns; ++i) s.w[(first + r) * s.w_pitch + i] = w[i * PANEL + r];
    return RG_DONE;
  });
}

inline int trellis(const rg_trellis &t, const float *z, int64_t rows, int64_t columns, uint8_t *codes, float *values, int threads) {
  switch (t.window * 100 + t.fresh * 10 + t.plain) {
    case 720: return trellis_of<7, 2, 0>(t, z, rows, columns, codes, values, threads);
    case 740: return trellis_of<7, 4, 0>(t, z, rows, columns, codes, values, threads);
    case 512: return trellis_of<5, 1, 2>(t, z, rows, columns, codes, values, threads);
    case 611: return trellis_of<6, 1, 1>(t, z, rows, columns, codes, values, threads);
    default: return RG_UNSOUND;
  }
}

inline int trellis_sweep(const rg_trellis &t, const rg_trellis_sweep &s, int threads) {
  switch (t.window * 100 + t.fresh * 10 + t.plain) {
    case 720: return trellis_sweep_of<7, 2, 0>(t, s, threads);
    case 740: return trellis_sweep_of<7, 4, 0>(t, s, threads);
    case 512: return trellis_sweep_of<5, 1, 2>(t, s, threads);
    case 611: return trellis_sweep_of<6, 1, 1>(t, s, threads);
    default: return RG_UNSOUND;
  }
}

}  // namespace

namespace rg {
const Trellises RG_TRELLIS = {trellis, trellis_sweep, trellis_product, trellis_floats, trellis_spread, lists};
}
