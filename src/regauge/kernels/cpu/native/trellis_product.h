// Products of a few tokens with a trellis, panel by panel.
//
// With VBMI the windows of 64 weights come by one shift of words and their values by one look-up in two registers: three
// operations where integers of two bits take two. Elsewhere a word at a time is spread to bytes by hand.
#pragma once
#include "codes.h"
#include "trellis_levels.h"

namespace {

struct TrellisBytes {
  alignas(64) uint8_t of[TRELLIS_ENTRIES];
  explicit TrellisBytes(const rg_matrix &m) {
    const Floats unit = set_floats(m.table[TRELLIS_ENTRIES]);
    for (int i = 0; i < TRELLIS_ENTRIES; i += PANEL) store_low_bytes(reinterpret_cast<int8_t *>(of + i), rounded(load_floats(m.table + i) * unit) + set_ints(128));
  }
};

// f(s, values of step s) of a word's steps of 16 rows x 4 inputs.
template <class F>
RG_INLINE void trellis_steps(const TrellisKind &k, const uint8_t *bytes, const uint8_t *word, F &&f) {
  alignas(64) uint8_t out[64 * PANEL];
  spread_trellis(k, bytes, word, k.run, out);
  for (int s = 0; s < k.run / 4; ++s) f(s, load_bytes(out + s * STEP));
}

#if defined(__AVX512VBMI__) && defined(__AVX512VNNI__)
// A word of 16 rows: f(s, half, values of eight weights of eight rows) for its steps of eight weights. K fresh, P plain bits.
template <int K, int P>
struct Windows {
  static constexpr int RUN = 64 / K, EIGHTS = RUN / 8, L = 7 - P, SIDE = P ? EIGHTS * P / 8 : 0;
  __m512i low, high, at[EIGHTS];
  explicit Windows(const uint8_t *bytes) : low(_mm512_load_si512(bytes)), high(_mm512_load_si512(bytes + 64)) {
    for (int s = 0; s < EIGHTS; ++s) {
      uint64_t control = 0;
      for (int j = 0; j < 8; ++j) control |= static_cast<uint64_t>((K * (8 * s + j) + K - L) & 63) << (8 * j);
      at[s] = _mm512_set1_epi64(static_cast<int64_t>(control));
    }
  }
  template <int S, int HALF>
  RG_INLINE __m512i values(__m512i word, const uint8_t *codes) const {
    __m512i entry = _mm512_multishift_epi64_epi8(at[S], word);
    if constexpr (P > 0) {
      constexpr int EACH = 8 / P, DOWN = S % EACH * P - L;  // plain bits stand above the window's
      const __m512i own = _mm512_loadu_si512(codes + 128 + (HALF * SIDE + S / EACH) * 64);
      const __m512i there = DOWN >= 0 ? _mm512_srli_epi16(own, DOWN >= 0 ? DOWN : 0) : _mm512_slli_epi16(own, DOWN < 0 ? -DOWN : 0);
      entry = _mm512_ternarylogic_epi32(_mm512_set1_epi8((1 << L) - 1), entry, there, 0xca);
    }
    return _mm512_permutex2var_epi8(low, entry, high);
  }
  template <int S = 0, class F>
  RG_INLINE void each(const uint8_t *codes, __m512i first, __m512i second, F &&f) const {
    if constexpr (S < EIGHTS) {
      f(S, values<S, 0>(first, codes), values<S, 1>(second, codes));
      each<S + 1>(codes, first, second, f);
    }
  }
};

// Sums of rows 0 ... 7 and 8 ... 15, two of each row side by side, to one of each row.
RG_INLINE __m512i paired(__m512i first, __m512i second) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  return _mm512_add_epi32(_mm512_permutex2var_epi32(first, even, second), _mm512_permutex2var_epi32(first, _mm512_or_si512(even, _mm512_set1_epi32(1)), second));
}

template <int K, int P, int MR, bool TWO>
inline void trellis_panel(const rg_matrix &m, const Layout &l, const uint8_t *bytes, const uint8_t *panel, const rg::TrellisInput *x, Floats *out) {
  const Windows<K, P> windows(bytes);
  constexpr int WORD = PANEL * 64 / K * (K + P) / 8;
  const int words = m.group / Windows<K, P>::RUN;
  for (int r = 0; r < MR; ++r) out[r] = zero_floats();
  int64_t eight = 0;
  for (int g = 0; g < l.groups; ++g) {
    const uint8_t *const own = l.steps(panel, g), *codes = own + l.steps_bytes;
    __m512i high[MR][2], low[MR][2];
    for (int r = 0; r < MR; ++r) high[r][0] = high[r][1] = low[r][0] = low[r][1] = _mm512_setzero_si512();
    for (int w = 0; w < words; ++w, codes += WORD) {
      windows.each(codes, _mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), [&](int s, __m512i one, __m512i two) __attribute__((always_inline)) {
        for (int r = 0; r < MR; ++r) {
          int64_t word;
          std::memcpy(&word, x[r].high + 2 * (eight + s), 8);
          const __m512i by = _mm512_set1_epi64(word);
          high[r][0] = _mm512_dpbusd_epi32(high[r][0], one, by);
          high[r][1] = _mm512_dpbusd_epi32(high[r][1], two, by);
          if constexpr (TWO) {
            std::memcpy(&word, x[r].low + 2 * (eight + s), 8);
            const __m512i and_by = _mm512_set1_epi64(word);
            low[r][0] = _mm512_dpbusd_epi32(low[r][0], one, and_by);
            low[r][1] = _mm512_dpbusd_epi32(low[r][1], two, and_by);
          }
        }
      });
      eight += Windows<K, P>::EIGHTS;
    }
    const Floats step = load_steps(own, m.step);
    for (int r = 0; r < MR; ++r) {
      Floats whole = to_floats(Ints{paired(high[r][0], high[r][1])} + set_ints(-128 * x[r].sum_high[g]));
      if constexpr (TWO) whole = fma(whole, set_floats(256.0f), to_floats(Ints{paired(low[r][0], low[r][1])} + set_ints(-128 * x[r].sum_low[g])));
      out[r] = fma(whole, step * set_floats(x[r].step[g]), out[r]);
    }
  }
}

template <int K, int P, bool TWO>
inline void trellis_panels(const rg_matrix &m, const Layout &l, const uint8_t *bytes, const uint8_t *panel, const rg::TrellisInput *x, int count, Floats *out) {
  switch (count) {
    case 1: return trellis_panel<K, P, 1, TWO>(m, l, bytes, panel, x, out);
    case 2: return trellis_panel<K, P, 2, TWO>(m, l, bytes, panel, x, out);
    case 3: return trellis_panel<K, P, 3, TWO>(m, l, bytes, panel, x, out);
    default: return trellis_panel<K, P, 4, TWO>(m, l, bytes, panel, x, out);
  }
}

template <int K, int P>
inline void trellis_rows(const rg_matrix &m, const Layout &l, const uint8_t *bytes, const uint8_t *panel, const rg::TrellisInput *x, int count, bool two, Floats *out) {
  if (two) trellis_panels<K, P, true>(m, l, bytes, panel, x, count, out);
  else trellis_panels<K, P, false>(m, l, bytes, panel, x, count, out);
}

template <int K, int P>
inline void trellis_spread_of(const uint8_t *bytes, const uint8_t *codes, int group, uint8_t *out) {
  const Windows<K, P> windows(bytes);
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0), odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  for (int w = 0; w < group / Windows<K, P>::RUN; ++w, codes += PANEL * 64 / K * (K + P) / 8) {
    windows.each(codes, _mm512_loadu_si512(codes), _mm512_loadu_si512(codes + 64), [&](int s, __m512i one, __m512i two) __attribute__((always_inline)) {
      _mm512_storeu_si512(out + 2 * s * STEP, _mm512_permutex2var_epi32(one, even, two));
      _mm512_storeu_si512(out + (2 * s + 1) * STEP, _mm512_permutex2var_epi32(one, odd, two));
    });
    out += Windows<K, P>::EIGHTS * 2 * STEP;
  }
}

inline void trellis_spread(const rg_matrix &m, const uint8_t *codes, int group, uint8_t *out) {
  const TrellisBytes bytes(m);
  const TrellisKind k(m);
  if (k.fresh == 2) trellis_spread_of<2, 0>(bytes.of, codes, group, out);
  else if (k.fresh == 4) trellis_spread_of<4, 0>(bytes.of, codes, group, out);
  else if (k.plain == 2) trellis_spread_of<1, 2>(bytes.of, codes, group, out);
  else trellis_spread_of<1, 1>(bytes.of, codes, group, out);
}

inline void trellis_sums(const rg_matrix &m, const Layout &l, const uint8_t *panel, const rg::TrellisInput *x, int count, bool two, Floats *out) {
  const TrellisBytes bytes(m);
  const TrellisKind k(m);
  if (k.fresh == 2) trellis_rows<2, 0>(m, l, bytes.of, panel, x, count, two, out);
  else if (k.fresh == 4) trellis_rows<4, 0>(m, l, bytes.of, panel, x, count, two, out);
  else if (k.plain == 2) trellis_rows<1, 2>(m, l, bytes.of, panel, x, count, two, out);
  else trellis_rows<1, 1>(m, l, bytes.of, panel, x, count, two, out);
}
#else
inline void trellis_spread(const rg_matrix &m, const uint8_t *codes, int group, uint8_t *out) {
  const TrellisBytes bytes(m);
  spread_trellis(TrellisKind(m), bytes.of, codes, group, out);
}

inline void trellis_sums(const rg_matrix &m, const Layout &l, const uint8_t *panel, const rg::TrellisInput *x, int count, bool two, Floats *out) {
  const TrellisBytes bytes(m);
  const TrellisKind k(m);
  for (int r = 0; r < count; ++r) out[r] = zero_floats();
  int64_t at = 0;
  for (int g = 0; g < l.groups; ++g) {
    const uint8_t *const own = l.steps(panel, g), *codes = own + l.steps_bytes;
    Ints high[4], low[4];
    for (int r = 0; r < count; ++r) {
      high[r] = set_ints(-128 * x[r].sum_high[g]);
      low[r] = two ? set_ints(-128 * x[r].sum_low[g]) : zero_ints();
    }
    for (int w = 0; w < m.group / k.run; ++w, codes += k.word_bytes, at += k.run / 4)
      trellis_steps(k, bytes.of, codes, [&](int s, Bytes values) {
        for (int r = 0; r < count; ++r) {
          high[r] = dot4<false>(high[r], values, x[r].high + at + s);
          if (two) low[r] = dot4<false>(low[r], values, x[r].low + at + s);
        }
      });
    const Floats step = load_steps(own, m.step);
    for (int r = 0; r < count; ++r) {
      Floats whole = to_floats(high[r]);
      if (two) whole = fma(whole, set_floats(256.0f), to_floats(low[r]));
      out[r] = fma(whole, step * set_floats(x[r].step[g]), out[r]);
    }
  }
}
#endif

inline void trellis_product(const rg_matrix &m, const uint8_t *panel, const rg::TrellisInput *x, int count, bool two, float *out) {
  Floats sums[4];
  trellis_sums(m, Layout(m), panel, x, count, two, sums);
  const Floats unit = set_floats(1.0f / m.table[TRELLIS_ENTRIES]);
  for (int r = 0; r < count; ++r) store_floats(out + r * PANEL, sums[r] * unit);
}

// The slow way: inputs as they are, `padded` long.
inline void trellis_floats(const rg_matrix &m, const uint8_t *panel, const float *const *x, int count, float *out) {
  const Layout l(m);
  const TrellisBytes bytes(m);
  const TrellisKind k(m);
  const Floats unit = set_floats(1.0f / m.table[TRELLIS_ENTRIES]), middle = set_floats(128.0f);
  Floats all[4];
  for (int r = 0; r < count; ++r) all[r] = zero_floats();
  int64_t at = 0;
  for (int g = 0; g < l.groups; ++g) {
    const uint8_t *const own = l.steps(panel, g), *codes = own + l.steps_bytes;
    Floats sum[4];
    for (int r = 0; r < count; ++r) sum[r] = zero_floats();
    for (int w = 0; w < m.group / k.run; ++w, codes += k.word_bytes, at += k.run)
      trellis_steps(k, bytes.of, codes, [&](int s, Bytes values) {
        for (int i = 0; i < 4; ++i) {
          const Floats value = to_floats(byte_of(values, i)) - middle;
          for (int r = 0; r < count; ++r) sum[r] = fma(value, set_floats(x[r][at + 4 * s + i]), sum[r]);
        }
      });
    const Floats step = load_steps(own, m.step);
    for (int r = 0; r < count; ++r) all[r] = fma(sum[r], step, all[r]);
  }
  for (int r = 0; r < count; ++r) store_floats(out + r * PANEL, all[r] * unit);
}

}  // namespace
