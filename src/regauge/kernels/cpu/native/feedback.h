// Rounding with error feedback (regauge.rounding.rounders): a tile of 64 rows at a time, turned so that a vector holds one
// column of sixteen rows. What earlier columns owe comes as a product of blocks, what those of the same 128 owe as sums
// kept in registers. No row sees another, so neither tiles nor threads change a bit of it.
#pragma once
#include <atomic>

#include "ranges.h"

namespace {

constexpr int BANDS = 4;  // of 64 rows: at most so many at a time
constexpr int SEGMENT = 128, DEPTH = 128, PITCH = SEGMENT + 4;  // columns; a pitch that is no power of two spreads over the cache
#if defined(RG_WIDE)
constexpr int ABREAST = 4, NEAR = 4;  // vectors of rows that sums are kept for: in products, in a column
#else
constexpr int ABREAST = 1, NEAR = 2;
#endif

// t[c] += sum over i of e_i f[i][c] for C columns and V vectors of rows; LESS: -=.
template <int V, int C, bool LESS>
inline void add_product(const float *e, const float *f, int64_t count, float *t) {
  Floats sums[C][V];
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) sums[c][v] = zero_floats();
  for (int64_t i = 0; i < count; ++i) {
    Floats row[V];
    for (int v = 0; v < V; ++v) row[v] = load_floats(e + i * BAND + v * PANEL);
    for (int c = 0; c < C; ++c) {
      const Floats factor = set_floats(f[i * PITCH + c]);
      for (int v = 0; v < V; ++v) sums[c][v] = fma(row[v], factor, sums[c][v]);
    }
  }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) {
      float *at = t + c * BAND + v * PANEL;
      store_floats(at, LESS ? load_floats(at) - sums[c][v] : load_floats(at) + sums[c][v]);
    }
}

template <bool LESS>
inline void add_products(const float *e, const float *f, int64_t count, int64_t columns, float *t) {
  for (int v = 0; v < BAND / PANEL; v += ABREAST)
    for (int64_t c = 0; c < columns; c += 6) {
      const float *from = e + v * PANEL;
      float *to = t + c * BAND + v * PANEL;
      switch (columns - c) {
        case 1: add_product<ABREAST, 1, LESS>(from, f + c, count, to); break;
        case 2: add_product<ABREAST, 2, LESS>(from, f + c, count, to); break;
        case 3: add_product<ABREAST, 3, LESS>(from, f + c, count, to); break;
        case 4: add_product<ABREAST, 4, LESS>(from, f + c, count, to); break;
        case 5: add_product<ABREAST, 5, LESS>(from, f + c, count, to); break;
        default: add_product<ABREAST, 6, LESS>(from, f + c, count, to);
      }
    }
}

// sums[v] = sum over i < count of e_i f[i].
inline void column_sums(const float *e, const float *f, int64_t count, Floats (&sums)[NEAR]) {
  Floats odd[NEAR];
  for (int v = 0; v < NEAR; ++v) sums[v] = odd[v] = zero_floats();
  int64_t i = 0;
  for (; i + 2 <= count; i += 2) {
    const Floats one = set_floats(f[i]), two = set_floats(f[i + 1]);
    for (int v = 0; v < NEAR; ++v) {
      sums[v] = fma(load_floats(e + i * BAND + v * PANEL), one, sums[v]);
      odd[v] = fma(load_floats(e + (i + 1) * BAND + v * PANEL), two, odd[v]);
    }
  }
  if (i < count)
    for (int v = 0; v < NEAR; ++v) sums[v] = fma(load_floats(e + i * BAND + v * PANEL), set_floats(f[i]), sums[v]);
  for (int v = 0; v < NEAR; ++v) sums[v] = sums[v] + odd[v];
}

template <int KIND>
struct Sweep {
  const rg_sweep &s;
  const float *diagonal;  // of each segment F turned: f_ij of its column j, all i before it in one row
  int64_t span, wide;     // columns of a group; columns (whole groups, where they are fitted) that owe earlier ones together
  int64_t bands;          // of rows that one thread takes, so that what it packs of F serves them all

  // Of every band: its errors (weights, where no error is yet), what a run of columns rounds, what it would be were it free.
  struct Work {
    Room<float> e, t, x, pack, scale, zero;
    Room<uint8_t> codes;
    int64_t each_e, each_t, each_scale;
    Work(const Sweep &w)
        : e(w.bands * w.s.columns * BAND), t(w.bands * w.wide * BAND), x(w.s.ranger ? w.bands * w.wide * BAND : 1), pack(DEPTH * PITCH),
          scale(w.bands * w.s.groups * BAND), zero(w.bands * w.s.groups * BAND), codes(SEGMENT * BAND),
          each_e(w.s.columns * BAND), each_t(w.wide * BAND), each_scale(w.s.groups * BAND) {}
    bool whole() const { return e.data && t.data && x.data && pack.data && scale.data && zero.data && codes.data; }
  };

  // t of columns start ... end takes up (LESS: loses) what columns from ... to of e owe, of `count` bands.
  template <bool LESS>
  void owed(const float *e, int64_t each_e, int64_t from, int64_t to, int64_t start, int64_t end, float *t, int64_t each_t, int64_t count, float *pack) const {
    for (int64_t begin = from; begin < to; begin += DEPTH) {
      const int64_t depth = to - begin < DEPTH ? to - begin : DEPTH;
      for (int64_t first = start; first < end; first += SEGMENT) {
        const int64_t some = end - first < SEGMENT ? end - first : SEGMENT;
        for (int64_t i = 0; i < depth; ++i)
          std::memcpy(pack + i * PITCH, s.feedback + (begin + i) * s.columns + first, static_cast<size_t>(some) * 4);
        for (int64_t band = 0; band < count; ++band)
          add_products<LESS>(e + band * each_e + (begin - from) * BAND, pack, depth, some, t + band * each_t + (first - start) * BAND);
      }
    }
  }

  // What columns start ... end would be were they free, into x: w + (t - w) F^-1 of their own block.
  void freed(Work &m, const float *t, int64_t start, int64_t end, int64_t count) const {
    const int64_t all = (end - start) * BAND;
    for (int64_t band = 0; band < count; ++band) {
      const float *w = m.e.data + band * m.each_e + start * BAND;
      float *x = m.x.data + band * m.each_t;
      for (int64_t i = 0; i < all; i += PANEL) store_floats(x + i, load_floats(t + band * m.each_t + i) - load_floats(w + i));
    }
    for (int64_t a = start; a < end; a += SEGMENT) {
      const int64_t b = a + SEGMENT < end ? a + SEGMENT : end;
      if (a > start) owed<true>(m.x.data, m.each_t, start, a, a, b, m.x.data + (a - start) * BAND, m.each_t, count, m.pack.data);
      for (int64_t band = 0; band < count; ++band) {
        float *own = m.x.data + band * m.each_t + (a - start) * BAND;
        for (int64_t j = a + 1; j < b; ++j)
          for (int v = 0; v < BAND / PANEL; v += NEAR) {
            Floats sums[NEAR];
            column_sums(own + v * PANEL, diagonal + j * SEGMENT, j - a, sums);
            float *at = own + (j - a) * BAND + v * PANEL;
            for (int n = 0; n < NEAR; ++n) store_floats(at + n * PANEL, load_floats(at + n * PANEL) - sums[n]);
          }
      }
    }
    for (int64_t band = 0; band < count; ++band) {
      const float *w = m.e.data + band * m.each_e + start * BAND;
      float *x = m.x.data + band * m.each_t;
      for (int64_t i = 0; i < all; i += PANEL) store_floats(x + i, load_floats(x + i) + load_floats(w + i));
    }
  }

  void fit(Work &m, const float *t, int64_t start, int64_t end, int64_t count) const {
    if (start) freed(m, t, start, end, count);
    for (int64_t band = 0; band < count; ++band) {
      const float *from = start ? m.x.data + band * m.each_t : m.e.data + band * m.each_e;
      for (int lane = 0; lane < BAND; lane += PANEL) {
        const Found found = Ranges<KIND>{s.grid, *s.ranger, from + lane, nullptr, end - start}();
        const int64_t at = band * m.each_scale + start / span * BAND + lane;
        store_floats(m.scale.data + at, found.scale);
        store_floats(m.zero.data + at, found.zero);
      }
    }
  }

  // Rounds columns a ... b of a band, whose t holds what is owed from outside; their errors replace their weights.
  Floats segment(Work &m, int64_t band, int64_t a, int64_t b, const float *t, Floats seen) const {
    float *own = m.e.data + band * m.each_e + a * BAND;
    for (int64_t j = a; j < b; ++j) {
      const int64_t group = band * m.each_scale + (s.group_of ? s.group_of[j] : j / span) * BAND;
      for (int v = 0; v < BAND / PANEL; v += NEAR) {
        Floats sums[NEAR];
        column_sums(own + v * PANEL, diagonal + j * SEGMENT, j - a, sums);
        for (int n = 0; n < NEAR; ++n) {
          const int64_t lane = (v + n) * PANEL, at = (j - a) * BAND + lane;
          const Floats target = load_floats(t + at) + sums[n], scale = load_floats(m.scale.data + group + lane);
          Floats z = target / scale;
          Ints code;
          if (KIND == RG_INTEGERS && s.grid.zero) {
            const Floats zero = load_floats(m.zero.data + group + lane);
            z = snapped<KIND>(s.grid, z + zero, code) - zero;
          } else {
            z = snapped<KIND>(s.grid, z, code);
          }
          const Floats error = fma(z, zero_floats() - scale, load_floats(own + at));
          seen = fma(target, zero_floats(), fma(error, zero_floats(), seen));  // 0, until one of them is not finite
          store_floats(own + at, error);
          store_low_bytes(reinterpret_cast<int8_t *>(m.codes.data + at), code);
        }
      }
    }
    return seen;
  }

  // One run of columns that no later group cuts: their codes, and their errors in place of their weights.
  Floats rounded_run(Work &m, float *t, int64_t start, int64_t end, int64_t first, int64_t rows, Floats seen) const {
    const int64_t count = (rows + BAND - 1) / BAND;
    for (int64_t a = start; a < end; a += SEGMENT) {
      const int64_t b = a + SEGMENT < end ? a + SEGMENT : end;
      float *own = t + (a - start) * BAND;
      owed<false>(m.e.data + start * BAND, m.each_e, start, a, a, b, own, m.each_t, count, m.pack.data);
      for (int64_t band = 0; band < count; ++band) {
        seen = segment(m, band, a, b, own + band * m.each_t, seen);
        for (int64_t r = 0; r < BAND && band * BAND + r < rows; ++r) {
          uint8_t *out = s.codes + (first + band * BAND + r) * s.columns;
          for (int64_t j = a; j < b; ++j) out[j] = m.codes.data[(j - a) * BAND + r];
        }
      }
    }
    return seen;
  }

  bool steps_in(Work &m, int64_t first, int64_t rows) const {
    bool finite = true;
    for (int64_t row = 0; row < (rows + BAND - 1) / BAND * BAND; ++row)
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t from = (first + row) * s.groups + group, at = row / BAND * m.each_scale + group * BAND + row % BAND;
        const float scale = row < rows ? s.scale[from] : 1.0f, zero = row < rows && s.grid.zero ? s.zero[from] : 0.0f;
        m.scale.data[at] = scale, m.zero.data[at] = zero;
        finite &= scale * 0.0f == 0 && zero * 0.0f == 0;
      }
    return finite;
  }

  void steps_out(const Work &m, int64_t first, int64_t rows) const {
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t group = 0; group < s.groups; ++group) {
        const int64_t to = (first + row) * s.groups + group, at = row / BAND * m.each_scale + group * BAND + row % BAND;
        s.scale[to] = m.scale.data[at];
        if (s.grid.zero) s.zero[to] = m.zero.data[at];
      }
  }

  int tile(Work &m, int64_t first, int64_t rows) const {
    const int64_t count = (rows + BAND - 1) / BAND, each = s.ranger ? span : wide;
    bool finite = true;
    for (int64_t band = 0; band < count; ++band) {
      const int64_t left = rows - band * BAND;
      finite &= turned_in(s.w, RG_F32, (first + band * BAND) * s.columns, left < BAND ? left : BAND, s.columns, s.columns, m.e.data + band * m.each_e);
    }
    if (!finite || (!s.ranger && !steps_in(m, first, rows))) return RG_ENDLESS;
    Floats seen = zero_floats();
    for (int64_t begin = 0; begin < s.columns; begin += wide) {
      const int64_t stop = begin + wide < s.columns ? begin + wide : s.columns;
      for (int64_t band = 0; band < count; ++band)
        std::memcpy(m.t.data + band * m.each_t, m.e.data + band * m.each_e + begin * BAND, static_cast<size_t>(stop - begin) * BAND * 4);
      owed<false>(m.e.data, m.each_e, 0, begin, begin, stop, m.t.data, m.each_t, count, m.pack.data);
      for (int64_t start = begin; start < stop; start += each) {
        const int64_t end = start + each < stop ? start + each : stop;
        float *t = m.t.data + (start - begin) * BAND;
        owed<false>(m.e.data + begin * BAND, m.each_e, begin, start, start, end, t, m.each_t, count, m.pack.data);
        if (s.ranger) fit(m, t, start, end, count);
        seen = rounded_run(m, t, start, end, first, rows, seen);
      }
    }
    if (s.ranger) steps_out(m, first, rows);
    return total(seen) == 0 ? RG_DONE : RG_ENDLESS;
  }
};

template <int KIND>
inline int feedback_of(const rg_sweep &s, int threads) {
  const int64_t span = s.group_of ? s.columns : s.columns / s.groups, run = s.ranger ? span : SEGMENT;
  const int64_t wide = s.ranger && span < SEGMENT ? SEGMENT / span * span : run;
  Room<float> diagonal(s.columns * SEGMENT);
  if (!diagonal.data) return RG_NO_MEMORY;
  for (int64_t start = 0; start < s.columns; start += run)
    for (int64_t a = start; a < start + run && a < s.columns; a += SEGMENT)
      for (int64_t i = a; i < a + SEGMENT && i < start + run && i < s.columns; ++i)
        for (int64_t j = i + 1; j < a + SEGMENT && j < start + run && j < s.columns; ++j) diagonal.data[j * SEGMENT + i - a] = s.feedback[i * s.columns + j];
  const int64_t share = s.rows / BAND / (threads > 1 ? threads : 1), bands = share < 1 ? 1 : share < BANDS ? share : BANDS;
  const Sweep<KIND> sweep{s, diagonal.data, span, wide, bands};
  return each_tile(s.rows, bands * BAND, threads, [&] { return typename Sweep<KIND>::Work(sweep); }, [&](auto &room, int64_t first, int64_t rows) { return sweep.tile(room, first, rows); });
}

inline int feedback(const rg_sweep &s, int threads) {
  if (s.grid.kind == RG_INTEGERS) return feedback_of<RG_INTEGERS>(s, threads);
  if (s.grid.kind == RG_FLOATS) return feedback_of<RG_FLOATS>(s, threads);
  return feedback_of<RG_LIST>(s, threads);
}

}  // namespace
