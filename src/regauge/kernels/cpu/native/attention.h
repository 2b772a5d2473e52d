// One query token against the rows that a store holds in full precision.
#pragma once
#include "functions.h"

namespace {

// Sixteen cached channels; fewer at the end of a head, with zeros after.
RG_INLINE Floats load_cached(const uint8_t *row, int at, int count, int dtype) {
  const int size = dtype == RG_F32 ? 4 : 2;
  const uint8_t *p = row + at * size;
  alignas(64) uint8_t part[64] = {};
  if (count < PANEL) {
    std::memcpy(part, p, static_cast<size_t>(count) * size);
    p = part;
  }
  return dtype == RG_F32 ? load_floats(reinterpret_cast<const float *>(p)) : dtype == RG_BF16 ? load_bf16(p) : load_half(p);
}

template <int DTYPE>
RG_INLINE Floats load_sixteen(const uint8_t *p) {
  if constexpr (DTYPE == RG_F32) return load_floats(reinterpret_cast<const float *>(p));
  else if constexpr (DTYPE == RG_BF16) return load_bf16(p);
  else return load_half(p);
}

// The sums of four vectors.
RG_INLINE void four_totals(Floats a, Floats b, Floats c, Floats d, float *out) {
#if defined(RG_WIDE)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(a.v, b.v), _mm512_unpackhi_ps(a.v, b.v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(c.v, d.v), _mm512_unpackhi_ps(c.v, d.v));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  out[0] = total(a), out[1] = total(b), out[2] = total(c), out[3] = total(d);
#endif
}

// scores[r][t] = q_r . key_t for R heads, where the head size is a multiple of 16: four tokens at a time.
template <int R, int DTYPE>
inline void score_heads(const float *q, int d, const uint8_t *keys, int from, int to, float *scores, size_t score_row) {
  const size_t size = DTYPE == RG_F32 ? 4 : 2, row = static_cast<size_t>(d) * size;
  int t = from;
  for (; t + 4 <= to; t += 4) {
    Floats sum[R][4];
    for (int r = 0; r < R; ++r) sum[r][0] = sum[r][1] = sum[r][2] = sum[r][3] = zero_floats();
    const uint8_t *at = keys + row * static_cast<size_t>(t);
    for (int i = 0; i < d; i += PANEL) {
      const Floats a = load_sixteen<DTYPE>(at + i * size), b = load_sixteen<DTYPE>(at + row + i * size);
      const Floats c = load_sixteen<DTYPE>(at + 2 * row + i * size), e = load_sixteen<DTYPE>(at + 3 * row + i * size);
      for (int r = 0; r < R; ++r) {
        const Floats part = load_floats(q + static_cast<size_t>(r) * d + i);
        sum[r][0] = fma(a, part, sum[r][0]);
        sum[r][1] = fma(b, part, sum[r][1]);
        sum[r][2] = fma(c, part, sum[r][2]);
        sum[r][3] = fma(e, part, sum[r][3]);
      }
    }
    for (int r = 0; r < R; ++r) four_totals(sum[r][0], sum[r][1], sum[r][2], sum[r][3], scores + static_cast<size_t>(r) * score_row + t);
  }
  for (; t < to; ++t)
    for (int r = 0; r < R; ++r) {
      Floats sum = zero_floats();
      for (int i = 0; i < d; i += PANEL)
        sum = fma(load_sixteen<DTYPE>(keys + row * static_cast<size_t>(t) + i * size), load_floats(q + static_cast<size_t>(r) * d + i), sum);
      scores[static_cast<size_t>(r) * score_row + t] = total(sum);
    }
}

// out_r = sum over t of scores[r][t] value_t, W vectors of channels at a time.
template <int R, int DTYPE, int W>
inline void mix_channels(int at, int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out) {
  const size_t size = DTYPE == RG_F32 ? 4 : 2, row = static_cast<size_t>(d) * size;
  Floats sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = zero_floats();
  for (int t = from; t < to; ++t) {
    const uint8_t *value = values + row * static_cast<size_t>(t) + static_cast<size_t>(at) * size;
    Floats part[W];
    for (int w = 0; w < W; ++w) part[w] = load_sixteen<DTYPE>(value + w * PANEL * size);
    for (int r = 0; r < R; ++r) {
      const Floats by = set_floats(scores[static_cast<size_t>(r) * score_row + t]);
      for (int w = 0; w < W; ++w) sum[r][w] = fma(part[w], by, sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store_floats(out + static_cast<size_t>(r) * d + at + w * PANEL, sum[r][w]);
}

inline void soften(const rg_block &b, float *s, int from, int to) {
  if (b.softcap > 0)
    for (int t = from; t < to; ++t) s[t] = softcapped(s[t], b.softcap);
  float top = s[from], all = 0;
  for (int t = from; t < to; ++t) top = s[t] > top ? s[t] : top;
  Floats sums = zero_floats();
  int t = from;
  for (; t + PANEL <= to; t += PANEL) {
    const Floats e = exponential(load_floats(s + t) - set_floats(top));
    store_floats(s + t, e);
    sums = sums + e;
  }
  for (; t < to; ++t) all += s[t] = std::exp(s[t] - top);
  all = 1.0f / (all + total(sums));
  for (t = from; t < to; ++t) s[t] *= all;
}

// scores[r][t] = q_r . key_t, and out_r = sum over t of scores[r][t] value_t, where the head size is a multiple of 16.
template <int R>
inline void scored(int dtype, const float *q, int d, const uint8_t *keys, int from, int to, float *scores, size_t score_row) {
  if (dtype == RG_F32) score_heads<R, RG_F32>(q, d, keys, from, to, scores, score_row);
  else if (dtype == RG_BF16) score_heads<R, RG_BF16>(q, d, keys, from, to, scores, score_row);
  else score_heads<R, RG_F16>(q, d, keys, from, to, scores, score_row);
}

template <int R, int DTYPE>
inline void mix_heads(int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out) {
  int i = 0;
  for (; i + 4 * PANEL <= d; i += 4 * PANEL) mix_channels<R, DTYPE, 4>(i, d, values, from, to, scores, score_row, out);
  for (; i < d; i += PANEL) mix_channels<R, DTYPE, 1>(i, d, values, from, to, scores, score_row, out);
}

template <int R>
inline void mixed_by(int dtype, int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out) {
  if (dtype == RG_F32) mix_heads<R, RG_F32>(d, values, from, to, scores, score_row, out);
  else if (dtype == RG_BF16) mix_heads<R, RG_BF16>(d, values, from, to, scores, score_row, out);
  else mix_heads<R, RG_F16>(d, values, from, to, scores, score_row, out);
}

// Rows of one key-value head in a window.
struct Rows {
  const uint8_t *keys, *values;
  int keys_dtype, values_dtype;
};

template <int R>
inline void attend_heads(const rg_block &b, const float *q, const Rows &held, int from, int to, float *scores, size_t score_row, float *out) {
  scored<R>(held.keys_dtype, q, b.head_dim, held.keys, from, to, scores, score_row);
  for (int r = 0; r < R; ++r) soften(b, scores + static_cast<size_t>(r) * score_row, from, to);
  mixed_by<R>(held.values_dtype, b.head_dim, held.values, from, to, scores, score_row, out);
}

// Heads of any size: the end of a row is read into a buffer.
inline void attend_any(const rg_block &b, const float *q, const Rows &held, int from, int to, float *scores, float *out) {
  const int d = b.head_dim;
  const size_t key_row = static_cast<size_t>(d) * (held.keys_dtype == RG_F32 ? 4 : 2), value_row = static_cast<size_t>(d) * (held.values_dtype == RG_F32 ? 4 : 2);
  for (int t = from; t < to; ++t) {
    Floats sum = zero_floats();
    // Nothing is read past the head: what follows may be no number, and zeros of the key would not hide it.
    for (int i = 0; i < d; i += PANEL) {
      const int count = d - i < PANEL ? d - i : PANEL;
      const Floats own = load_cached(reinterpret_cast<const uint8_t *>(q), i, count, RG_F32);
      sum = fma(load_cached(held.keys + key_row * static_cast<size_t>(t), i, count, held.keys_dtype), own, sum);
    }
    scores[t] = total(sum);
  }
  soften(b, scores, from, to);
  for (int i = 0; i < d; i += PANEL) {
    const int count = d - i < PANEL ? d - i : PANEL;
    Floats sum = zero_floats();
    for (int t = from; t < to; ++t)
      sum = fma(load_cached(held.values + value_row * static_cast<size_t>(t), i, count, held.values_dtype), set_floats(scores[t]), sum);
    alignas(64) float part[PANEL];
    store_floats(part, sum);
    std::memcpy(out + i, part, static_cast<size_t>(count) * 4);
  }
}

// Attention of `heads` query heads over the rows [from, to) of one key-value head; four heads share one reading of keys
// and values. q is scaled. `scores`: four rows of `to` floats; `out`: heads rows of head_dim.
inline void attend(const rg_block &b, const float *q, int heads, const Rows &held, int from, int to, float *scores, size_t score_row, float *out) {
  const size_t d = static_cast<size_t>(b.head_dim);
  size_t r = 0;
  const size_t all = static_cast<size_t>(heads);
  if (b.head_dim % PANEL) {
    for (; r < all; ++r) attend_any(b, q + r * d, held, from, to, scores, out + r * d);
    return;
  }
  for (; r + 4 <= all; r += 4) attend_heads<4>(b, q + r * d, held, from, to, scores, score_row, out + r * d);
  if (all - r == 3) attend_heads<3>(b, q + r * d, held, from, to, scores, score_row, out + r * d);
  if (all - r == 2) attend_heads<2>(b, q + r * d, held, from, to, scores, score_row, out + r * d);
  if (all - r == 1) attend_heads<1>(b, q + r * d, held, from, to, scores, score_row, out + r * d);
}

}  // namespace
