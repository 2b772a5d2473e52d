// The small functions of a transformer between its matrices: norms, activations, rotations.
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

// e^x of x <= 0, relative error 4e-7 (of the rounding of x log2 e: 1e-7 |x|); of what is far below, 0 or e^-87.
RG_INLINE Floats decayed(Floats x) {
#if defined(RG_WIDE)
  const Floats t = x * set_floats(1.44269504f), f{_mm512_reduce_ps(t.v, 8)};
  Floats p = set_floats(0.0013266970636323094f);
  p = fma(p, f, set_floats(0.009675459936261177f));
  p = fma(p, f, set_floats(0.05550742521882057f));
  p = fma(p, f, set_floats(0.24022121727466583f));
  p = fma(p, f, set_floats(0.6931469440460205f));
  p = fma(p, f, set_floats(1.0f));
  return {_mm512_scalef_ps(p.v, (t - f).v)};
#else
  return exponential(x);
#endif
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

}  // namespace
