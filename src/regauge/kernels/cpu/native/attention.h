// One query token against the cache, and the small functions of a transformer between its matrices.
#pragma once
#include "linear.h"

namespace {

// e^x, relative error 2e-7. Below -87 it is e^-87, which no sum notices.
RG_INLINE Floats exponential(Floats x) {
  const Floats low = set_floats(-87.0f), high = set_floats(88.0f);
  x = maximum(x, low);
  x = set_floats(0.0f) - maximum(set_floats(0.0f) - x, set_floats(0.0f) - high);
  const Ints n = rounded(x * set_floats(1.44269504f));
  const Floats whole = to_floats(n);
  const Floats r = fma(whole, set_floats(2.12194440e-4f), fma(whole, set_floats(-0.693359375f), x));
  Floats p = set_floats(1.0f / 720);
  p = fma(p, r, set_floats(1.0f / 120));
  p = fma(p, r, set_floats(1.0f / 24));
  p = fma(p, r, set_floats(1.0f / 6));
  p = fma(p, r, set_floats(0.5f));
  p = fma(p, r, set_floats(1.0f));
  p = fma(p, r, set_floats(1.0f));
  return p * as_floats(shifted_left(n + set_ints(127), 23));
}

RG_INLINE Floats reciprocal(Floats x) {
#if defined(RG_WIDE)
  return {_mm512_div_ps(_mm512_set1_ps(1.0f), x.v)};
#else
  for (int i = 0; i < PARTS; ++i) x.v[i] = 1.0f / x.v[i];
  return x;
#endif
}

RG_INLINE Floats sigmoid(Floats x) { return reciprocal(set_floats(1.0f) + exponential(set_floats(0.0f) - x)); }

RG_INLINE Floats hyperbolic_tangent(Floats x) { return fma(set_floats(2.0f), sigmoid(x + x), set_floats(-1.0f)); }

// Abramowitz and Stegun 7.1.26: absolute error 1.5e-7.
RG_INLINE Floats error_function(Floats x) {
  const Floats size = absolute(x), t = reciprocal(fma(set_floats(0.3275911f), size, set_floats(1.0f)));
  Floats p = set_floats(1.061405429f);
  p = fma(p, t, set_floats(-1.453152027f));
  p = fma(p, t, set_floats(1.421413741f));
  p = fma(p, t, set_floats(-0.284496736f));
  p = fma(p, t, set_floats(0.254829592f));
  const Floats y = set_floats(1.0f) - p * t * exponential(set_floats(0.0f) - size * size);
  return as_floats((as_ints(y) & set_ints(0x7fffffff)) | (as_ints(x) & set_ints(INT32_MIN)));
}

RG_INLINE Floats activated(Floats x, int kind) {
  switch (kind) {
    case RG_GELU: return set_floats(0.5f) * x * (set_floats(1.0f) + error_function(x * set_floats(0.70710678f)));
    case RG_GELU_TANH: return x * sigmoid(set_floats(1.5957691f) * fma(set_floats(0.044715f) * x * x, x, x));
    case RG_RELU: return maximum(x, set_floats(0.0f));
    case RG_RELU2: { const Floats r = maximum(x, set_floats(0.0f)); return r * r; }
    case RG_QUICK_GELU: return x * sigmoid(x * set_floats(1.702f));
    default: return x * sigmoid(x);
  }
}

inline float softcapped(float x, float cap) { return cap > 0 ? cap * std::tanh(x / cap) : x; }

// `out` may be `x`.
inline void normalised(const rg_norm &n, const float *x, float *out) {
  if (n.kind == RG_NO_NORM) {
    if (out != x) std::memcpy(out, x, static_cast<size_t>(n.size) * 4);
    return;
  }
  const int size = n.size;
  Floats sums = zero_floats();
  float mean = 0, square = 0;
  int i = 0;
  if (n.kind == RG_LAYER) {
    for (; i + PANEL <= size; i += PANEL) sums = sums + load_floats(x + i);
    for (; i < size; ++i) mean += x[i];
    mean = (mean + total(sums)) / static_cast<float>(size);
  }
  sums = zero_floats();
  const Floats middle = set_floats(mean);
  for (i = 0; i + PANEL <= size; i += PANEL) {
    const Floats d = load_floats(x + i) - middle;
    sums = fma(d, d, sums);
  }
  for (; i < size; ++i) square += (x[i] - mean) * (x[i] - mean);
  const float by = 1.0f / std::sqrt((square + total(sums)) / static_cast<float>(size) + n.eps);
  for (i = 0; i + PANEL <= size; i += PANEL) {
    Floats y = (load_floats(x + i) - middle) * set_floats(by);
    if (n.gain) y = y * load_floats(n.gain + i);
    if (n.bias) y = y + load_floats(n.bias + i);
    store_floats(out + i, y);
  }
  for (; i < size; ++i) {
    float y = (x[i] - mean) * by;
    if (n.gain) y *= n.gain[i];
    if (n.bias) y += n.bias[i];
    out[i] = y;
  }
}

inline void turned(float *head, const rg_block &b, const float *cosines, const float *sines) {
  const int half = b.rotary / 2;
  if (b.interleaved) {
    for (int i = 0; i < half; ++i) {
      const float x = head[2 * i], y = head[2 * i + 1];
      head[2 * i] = x * cosines[i] - y * sines[i];
      head[2 * i + 1] = y * cosines[i] + x * sines[i];
    }
    return;
  }
  int i = 0;
  for (; i + PANEL <= half; i += PANEL) {
    const Floats x = load_floats(head + i), y = load_floats(head + half + i), c = load_floats(cosines + i), s = load_floats(sines + i);
    store_floats(head + i, x * c - y * s);
    store_floats(head + half + i, y * c + x * s);
  }
  for (; i < half; ++i) {
    const float x = head[i], y = head[half + i];
    head[i] = x * cosines[i] - y * sines[i];
    head[half + i] = y * cosines[i] + x * sines[i];
  }
}

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

template <int R, int DTYPE>
inline void attend_heads(const rg_block &b, const float *q, const uint8_t *keys, const uint8_t *values, int from, int to,
                         float *scores, size_t score_row, float *out) {
  const int d = b.head_dim;
  score_heads<R, DTYPE>(q, d, keys, from, to, scores, score_row);
  for (int r = 0; r < R; ++r) soften(b, scores + static_cast<size_t>(r) * score_row, from, to);
  int i = 0;
  for (; i + 4 * PANEL <= d; i += 4 * PANEL) mix_channels<R, DTYPE, 4>(i, d, values, from, to, scores, score_row, out);
  for (; i < d; i += PANEL) mix_channels<R, DTYPE, 1>(i, d, values, from, to, scores, score_row, out);
}

// Heads of any size: the end of a row is read into a buffer.
inline void attend_any(const rg_block &b, const float *q, const uint8_t *keys, const uint8_t *values, int dtype, int from, int to,
                       float *scores, float *out) {
  const int d = b.head_dim;
  const size_t row = static_cast<size_t>(d) * (dtype == RG_F32 ? 4 : 2);
  for (int t = from; t < to; ++t) {
    Floats sum = zero_floats();
    // Rows of q are padded: what follows a head is multiplied by zeros of the key.
    for (int i = 0; i < d; i += PANEL)
      sum = fma(load_cached(keys + row * static_cast<size_t>(t), i, d - i < PANEL ? d - i : PANEL, dtype), load_floats(q + i), sum);
    scores[t] = total(sum);
  }
  soften(b, scores, from, to);
  for (int i = 0; i < d; i += PANEL) {
    const int count = d - i < PANEL ? d - i : PANEL;
    Floats sum = zero_floats();
    for (int t = from; t < to; ++t)
      sum = fma(load_cached(values + row * static_cast<size_t>(t), i, count, dtype), set_floats(scores[t]), sum);
    alignas(64) float part[PANEL];
    store_floats(part, sum);
    std::memcpy(out + i, part, static_cast<size_t>(count) * 4);
  }
}

template <int DTYPE>
inline void attend_sixteens(const rg_block &b, const float *q, int heads, const uint8_t *keys, const uint8_t *values, int from, int to,
                            float *scores, size_t score_row, float *out) {
  int r = 0;
  for (; r + 4 <= heads; r += 4) attend_heads<4, DTYPE>(b, q + static_cast<size_t>(r) * b.head_dim, keys, values, from, to, scores, score_row, out + static_cast<size_t>(r) * b.head_dim);
  const float *rest = q + static_cast<size_t>(r) * b.head_dim;
  float *rest_out = out + static_cast<size_t>(r) * b.head_dim;
  if (heads - r == 3) attend_heads<3, DTYPE>(b, rest, keys, values, from, to, scores, score_row, rest_out);
  if (heads - r == 2) attend_heads<2, DTYPE>(b, rest, keys, values, from, to, scores, score_row, rest_out);
  if (heads - r == 1) attend_heads<1, DTYPE>(b, rest, keys, values, from, to, scores, score_row, rest_out);
}

// Attention of `heads` query heads over the tokens [from, to) of one key-value head; four heads share one reading of keys
// and values. q is scaled. `scores`: four rows of `to` floats; `out`: heads rows of head_dim.
inline void attend(const rg_block &b, const float *q, int heads, const uint8_t *keys, const uint8_t *values, int dtype, int from, int to,
                   float *scores, size_t score_row, float *out) {
  if (b.head_dim % PANEL) {
    for (int r = 0; r < heads; ++r)
      attend_any(b, q + static_cast<size_t>(r) * b.head_dim, keys, values, dtype, from, to, scores, out + static_cast<size_t>(r) * b.head_dim);
  } else if (dtype == RG_F32) attend_sixteens<RG_F32>(b, q, heads, keys, values, from, to, scores, score_row, out);
  else if (dtype == RG_BF16) attend_sixteens<RG_BF16>(b, q, heads, keys, values, from, to, scores, score_row, out);
  else attend_sixteens<RG_F16>(b, q, heads, keys, values, from, to, scores, score_row, out);
}

}  // namespace
