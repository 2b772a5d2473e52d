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
  for (int i = 0; i < half; ++i) {
    float &first = head[b.interleaved ? 2 * i : i], &second = head[b.interleaved ? 2 * i + 1 : i + half];
    const float x = first, y = second;
    first = x * cosines[i] - y * sines[i];
    second = y * cosines[i] + x * sines[i];
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

constexpr int TOGETHER = 4;  // query heads that share one reading of keys and values

// Attention of `heads` query heads over the tokens [from, to) of one key-value head. q is scaled. `scores`: heads rows
// of `to` floats; `out`: heads rows of head_dim.
inline void attend(const rg_block &b, const float *q, int heads, const uint8_t *keys, const uint8_t *values, int dtype, int from, int to,
                   float *scores, size_t score_row, float *out) {
  const int d = b.head_dim;
  const size_t row = static_cast<size_t>(d) * (dtype == RG_F32 ? 4 : 2);
  for (int first = 0; first < heads; first += TOGETHER) {
    const int some = heads - first < TOGETHER ? heads - first : TOGETHER;
    for (int t = from; t < to; ++t) {
      Floats sum[TOGETHER];
      for (int r = 0; r < TOGETHER; ++r) sum[r] = zero_floats();
      for (int i = 0; i < d; i += PANEL) {
        const int count = d - i < PANEL ? d - i : PANEL;
        const Floats key = load_cached(keys + row * static_cast<size_t>(t), i, count, dtype);
        for (int r = 0; r < some; ++r) {
          // Rows of q are padded: what follows a head is multiplied by zeros of the key.
          sum[r] = fma(key, load_floats(q + static_cast<size_t>(first + r) * d + i), sum[r]);
        }
      }
      for (int r = 0; r < some; ++r) scores[static_cast<size_t>(first + r) * score_row + t] = softcapped(total(sum[r]), b.softcap);
    }
    for (int r = 0; r < some; ++r) {
      float *s = scores + static_cast<size_t>(first + r) * score_row;
      float top = s[from];
      for (int t = from; t < to; ++t) top = s[t] > top ? s[t] : top;
      Floats sums = zero_floats();
      float all = 0;
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
    for (int i = 0; i < d; i += PANEL) {
      const int count = d - i < PANEL ? d - i : PANEL;
      Floats sum[TOGETHER];
      for (int r = 0; r < TOGETHER; ++r) sum[r] = zero_floats();
      for (int t = from; t < to; ++t) {
        const Floats value = load_cached(values + row * static_cast<size_t>(t), i, count, dtype);
        for (int r = 0; r < some; ++r) sum[r] = fma(value, set_floats(scores[static_cast<size_t>(first + r) * score_row + t]), sum[r]);
      }
      for (int r = 0; r < some; ++r) {
        alignas(64) float part[PANEL];
        store_floats(part, sum[r]);
        std::memcpy(out + static_cast<size_t>(first + r) * d + i, part, static_cast<size_t>(count) * 4);
      }
    }
  }
}

}  // namespace
