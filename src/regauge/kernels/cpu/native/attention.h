// Queries against rows in full precision, some tokens at a time: scores, and sums of values by probabilities.
#pragma once
#include "coded.h"

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

// scores[r][t] = q_r . key_t for R heads, where the head size is a multiple of 16: four tokens at a time.
template <int R, int DTYPE>
inline void score_heads(const float *q, int d, const uint8_t *keys, int from, int to, float *scores, size_t score_row, Ahead &ahead) {
  const size_t size = DTYPE == RG_F32 ? 4 : 2, row = static_cast<size_t>(d) * size;
  int t = from;
  for (; t + 4 <= to; t += 4) {
    Floats sum[R][4];
    ahead.some();
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
    for (int r = 0; r < R; ++r) four_totals(sum[r], scores + static_cast<size_t>(r) * score_row + t);
  }
  for (; t < to; ++t)
    for (int r = 0; r < R; ++r) {
      Floats sum = zero_floats();
      for (int i = 0; i < d; i += PANEL)
        sum = fma(load_sixteen<DTYPE>(keys + row * static_cast<size_t>(t) + i * size), load_floats(q + static_cast<size_t>(r) * d + i), sum);
      // Added up as among four: a score does not depend on how many tokens come with it.
      const Floats among[4] = {sum, zero_floats(), zero_floats(), zero_floats()};
      float four[4];
      four_totals(among, four);
      scores[static_cast<size_t>(r) * score_row + t] = four[0];
    }
}

// out_r += sum over t of scores[r][t] value_t, W vectors of channels at a time.
template <int R, int DTYPE, int W>
inline void mix_channels(int at, int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out, Ahead &ahead) {
  const size_t size = DTYPE == RG_F32 ? 4 : 2, row = static_cast<size_t>(d) * size;
  Floats sum[R][W];
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) sum[r][w] = load_floats(out + static_cast<size_t>(r) * d + at + w * PANEL);
  for (int t = from; t < to; ++t) {
    const uint8_t *value = values + row * static_cast<size_t>(t) + static_cast<size_t>(at) * size;
    Floats part[W];
    ahead.some();
    for (int w = 0; w < W; ++w) part[w] = load_sixteen<DTYPE>(value + w * PANEL * size);
    for (int r = 0; r < R; ++r) {
      const Floats by = set_floats(scores[static_cast<size_t>(r) * score_row + t]);
      for (int w = 0; w < W; ++w) sum[r][w] = fma(part[w], by, sum[r][w]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int w = 0; w < W; ++w) store_floats(out + static_cast<size_t>(r) * d + at + w * PANEL, sum[r][w]);
}

// scores[r][t] = q_r . key_t, and out_r += sum over t of scores[r][t] value_t, where the head size is a multiple of 16.
template <int R>
inline void scored(int dtype, const float *q, int d, const uint8_t *keys, int from, int to, float *scores, size_t score_row, Ahead &ahead) {
  if (dtype == RG_F32) score_heads<R, RG_F32>(q, d, keys, from, to, scores, score_row, ahead);
  else if (dtype == RG_BF16) score_heads<R, RG_BF16>(q, d, keys, from, to, scores, score_row, ahead);
  else score_heads<R, RG_F16>(q, d, keys, from, to, scores, score_row, ahead);
}

template <int R, int DTYPE>
inline void mix_heads(int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out, Ahead &ahead) {
  int i = 0;
  for (; i + 4 * PANEL <= d; i += 4 * PANEL) mix_channels<R, DTYPE, 4>(i, d, values, from, to, scores, score_row, out, ahead);
  for (; i < d; i += PANEL) mix_channels<R, DTYPE, 1>(i, d, values, from, to, scores, score_row, out, ahead);
}

template <int R>
inline void mixed_by(int dtype, int d, const uint8_t *values, int from, int to, const float *scores, size_t score_row, float *out, Ahead &ahead) {
  if (dtype == RG_F32) mix_heads<R, RG_F32>(d, values, from, to, scores, score_row, out, ahead);
  else if (dtype == RG_BF16) mix_heads<R, RG_BF16>(d, values, from, to, scores, score_row, out, ahead);
  else mix_heads<R, RG_F16>(d, values, from, to, scores, score_row, out, ahead);
}

// Rows of floats of one key-value head: keys or values.
struct Rows {
  const uint8_t *data;
  int dtype, channels, wide;  // `wide`: floats from query to query, zeros behind the head
  size_t row() const { return static_cast<size_t>(channels) * (dtype == RG_F32 ? 4 : 2); }
};

// scores[r][t] = q_r . key_t of `count` queries and rows [from, to), written from scores[r][0] on.
inline void score_rows(const Rows &k, int from, int to, const float *q, int count, float *scores, size_t score_row, Ahead &ahead) {
  const uint8_t *keys = k.data + k.row() * static_cast<size_t>(from);
  const int n = to - from;
  if (k.channels % PANEL == 0) {
    if (count == 4) return scored<4>(k.dtype, q, k.channels, keys, 0, n, scores, score_row, ahead);
    if (count == 3) return scored<3>(k.dtype, q, k.channels, keys, 0, n, scores, score_row, ahead);
    if (count == 2) return scored<2>(k.dtype, q, k.channels, keys, 0, n, scores, score_row, ahead);
    return scored<1>(k.dtype, q, k.channels, keys, 0, n, scores, score_row, ahead);
  }
  for (int r = 0; r < count; ++r)
    for (int t = 0; t < n; ++t) {
      Floats sum = zero_floats();
      // Nothing is read past the head: what follows may be no number, and zeros of the query would not hide it.
      for (int i = 0; i < k.channels; i += PANEL) {
        const int some = k.channels - i < PANEL ? k.channels - i : PANEL;
        sum = fma(load_cached(keys + k.row() * static_cast<size_t>(t), i, some, k.dtype), load_floats(q + static_cast<size_t>(r) * k.wide + i), sum);
      }
      scores[static_cast<size_t>(r) * score_row + t] = total(sum);
    }
}

// out_r += sum over rows [from, to) of p[r][t] value_t.
inline void mix_rows(const Rows &v, int from, int to, const float *p, size_t p_row, int count, float *out, Ahead &ahead) {
  const uint8_t *values = v.data + v.row() * static_cast<size_t>(from);
  const int n = to - from;
  if (v.channels % PANEL == 0) {
    if (count == 4) return mixed_by<4>(v.dtype, v.channels, values, 0, n, p, p_row, out, ahead);
    if (count == 3) return mixed_by<3>(v.dtype, v.channels, values, 0, n, p, p_row, out, ahead);
    if (count == 2) return mixed_by<2>(v.dtype, v.channels, values, 0, n, p, p_row, out, ahead);
    return mixed_by<1>(v.dtype, v.channels, values, 0, n, p, p_row, out, ahead);
  }
  for (int r = 0; r < count; ++r)
    for (int i = 0; i < v.channels; i += PANEL) {
      const int some = v.channels - i < PANEL ? v.channels - i : PANEL;
      float *to_row = out + static_cast<size_t>(r) * v.wide + i;
      Floats sum = load_floats(to_row);
      for (int t = 0; t < n; ++t)
        sum = fma(load_cached(values + v.row() * static_cast<size_t>(t), i, some, v.dtype), set_floats(p[static_cast<size_t>(r) * p_row + t]), sum);
      store_floats(to_row, sum);
    }
}

}  // namespace
