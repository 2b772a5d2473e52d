// Blocks of packed keys and values: their sizes, products of integers with their codes, and lanes of decoded ones.
#pragma once
#include "functions.h"

namespace {

constexpr int TOGETHER = 4;        // queries that share one reading of keys and values
constexpr int MOST_BLOCK = 512;    // tokens of a block
constexpr int MOST_CHANNELS = 1024;

// Keys or values of a part: sizes of their blocks.
struct Coded {
  const rg_blocks &b;
  bool values;
  int tokens, channels, wide, lanes, depth, runs, groups, side;
  size_t step_bytes, codes_at, panel, block;
  bool whole;  // integers, and groups of whole pieces

  Coded(const rg_blocks &blocks, bool of_values, int block_tokens, int d)
      : b(blocks), values(of_values), tokens(block_tokens), channels(d), wide((d + PANEL - 1) / PANEL * PANEL) {
    if (b.bits == 16) {
      block = static_cast<size_t>(tokens) * channels * (b.dtype == RG_F32 ? 4 : 2);
      return;
    }
    const int unit = unit_of(b.bits);
    lanes = values ? wide : tokens;
    depth = ((values ? tokens : channels) + unit - 1) / unit * unit;
    runs = depth / unit;
    groups = b.axis == RG_TIME ? tokens / b.group : channels / b.group;
    side = b.axis == RG_TIME ? wide : tokens;
    step_bytes = static_cast<size_t>(groups) * side * 2;
    codes_at = step_bytes * (b.low ? 2 : 1);
    panel = static_cast<size_t>(runs) * block_bytes(b.bits);
    block = codes_at + panel * static_cast<size_t>(lanes / PANEL);
    const bool along = (b.axis == RG_TIME) == values;  // groups run along what a product sums over
    whole = b.value == RG_INT && (groups == 1 || b.group % (along ? unit : PANEL) == 0);
  }

  RG_INLINE Floats load(const uint8_t *p) const { return b.dtype == RG_BF16 ? load_bf16(p) : load_half(p); }
  float one(const uint8_t *p) const {
    uint16_t bits;
    std::memcpy(&bits, p, 2);
    return b.dtype == RG_BF16 ? bf16_to_float(bits) : half_to_float(bits);
  }
  float middle() const { return static_cast<float>((1 << b.bits) - 1) * 0.5f; }
};

inline bool sound(const rg_blocks &b, int tokens, int d) {
  if (!b.blocks || !b.offsets || b.axis < RG_TIME || b.axis > RG_CHANNELS || b.dtype < RG_F32 || b.dtype > RG_F16) return false;
  if (b.bits == 16) return true;
  const int span = b.axis == RG_TIME ? tokens : d;
  if (b.bits < 1 || b.bits > 8 || b.dtype == RG_F32 || b.group < 1 || span % b.group || b.low < 0 || b.low > 1) return false;
  if (b.value != RG_INT && !(b.value == RG_FLOAT && b.bits == 8 && !b.low && !b.offset)) return false;
  return b.offset >= 0 && b.offset <= 256;
}

// acc[panel][n] += dot products of a panel's codes with x_n, for N vectors of bytes and every panel.
template <int B, int N>
inline void dots(const uint8_t *codes, int runs, int panels, size_t stride, const int8_t *x, size_t x_row, int32_t *acc) {
  for (int p = 0; p < panels; ++p, codes += stride, acc += N * PANEL) {
    Ints sum[N];
    for (int n = 0; n < N; ++n) std::memcpy(&sum[n], acc + n * PANEL, 64);
    const uint8_t *at = codes;
    const int8_t *own = x;
    for (int run = 0; run < runs; ++run, at += block_bytes(B), own += unit_of(B))
      each_step<B>(at, [&](int i, Bytes code) __attribute__((always_inline)) {
        for (int n = 0; n < N; ++n) sum[n] = dot4<(B < 8)>(sum[n], code, reinterpret_cast<const int32_t *>(own + static_cast<size_t>(n) * x_row) + i);
      });
    for (int n = 0; n < N; ++n) store_ints(acc + n * PANEL, sum[n]);
  }
}

using Dots = void (*)(const uint8_t *, int, int, size_t, const int8_t *, size_t, int32_t *);

template <int B>
inline Dots dots_of(int vectors) {
  switch (vectors) {
    case 1: return dots<B, 1>;
    case 2: return dots<B, 2>;
    case 3: return dots<B, 3>;
    case 4: return dots<B, 4>;
    case 6: return dots<B, 6>;
    default: return dots<B, 8>;
  }
}

inline Dots dots_of(int bits, int vectors) {
  switch (bits) {
    case 1: return dots_of<1>(vectors);
    case 2: return dots_of<2>(vectors);
    case 3: return dots_of<3>(vectors);
    case 4: return dots_of<4>(vectors);
    case 5: return dots_of<5>(vectors);
    case 6: return dots_of<6>(vectors);
    case 7: return dots_of<7>(vectors);
    default: return dots_of<8>(vectors);
  }
}

// P panels of the below.
template <int B, int N, int P>
RG_INLINE void scaled_panels(const uint8_t *codes, int runs, size_t stride, const int8_t *x, size_t x_row, const float *scale, const float *base, float *out, size_t out_row) {
  Ints sum[P][N];
  for (int p = 0; p < P; ++p)
    for (int n = 0; n < N; ++n) sum[p][n] = zero_ints();
  const uint8_t *at = codes;
  const int8_t *own = x;
  for (int run = 0; run < runs; ++run, at += block_bytes(B), own += unit_of(B))
    for (int p = 0; p < P; ++p)
      each_step<B>(at + static_cast<size_t>(p) * stride, [&](int i, Bytes code) __attribute__((always_inline)) {
        for (int n = 0; n < N; ++n) sum[p][n] = dot4<(B < 8)>(sum[p][n], code, reinterpret_cast<const int32_t *>(own + static_cast<size_t>(n) * x_row) + i);
      });
  for (int p = 0; p < P; ++p)
    for (int n = 0; n < N; ++n) {
      float *to = out + static_cast<size_t>(n) * out_row + p * PANEL;
      store_floats(to, fma(to_floats(sum[p][n]), set_floats(scale[n]), base ? set_floats(base[n]) : load_floats(to)));
    }
}

// The same in floats: out[n][panel] is scale_n times the products and base_n more, or without `base` what was there.
template <int B, int N>
inline void scaled_dots(const uint8_t *codes, int runs, int panels, size_t stride, const int8_t *x, size_t x_row, const float *scale, const float *base, float *out, size_t out_row) {
  // Two panels at a time: a chain of products waits five cycles for each, and N chains alone would wait too.
  int p = 0;
  for (; p + 2 <= panels; p += 2) scaled_panels<B, N, 2>(codes + static_cast<size_t>(p) * stride, runs, stride, x, x_row, scale, base, out + p * PANEL, out_row);
  for (; p < panels; ++p) scaled_panels<B, N, 1>(codes + static_cast<size_t>(p) * stride, runs, stride, x, x_row, scale, base, out + p * PANEL, out_row);
}

using ScaledDots = void (*)(const uint8_t *, int, int, size_t, const int8_t *, size_t, const float *, const float *, float *, size_t);

template <int B>
inline ScaledDots scaled_dots_of(int vectors) {
  return vectors == 1 ? scaled_dots<B, 1> : vectors == 2 ? scaled_dots<B, 2> : vectors == 3 ? scaled_dots<B, 3> : scaled_dots<B, 4>;
}

// Of at most four bits, whose factors are rounded to one byte.
inline ScaledDots scaled_dots_of(int bits, int vectors) {
  return bits == 1 ? scaled_dots_of<1>(vectors) : bits == 2 ? scaled_dots_of<2>(vectors) : bits == 3 ? scaled_dots_of<3>(vectors) : scaled_dots_of<4>(vectors);
}

// The greatest of each of four vectors.
RG_INLINE void four_largest(const Floats *v, float *out) {
#if defined(RG_WIDE)
  const __m512 ab = _mm512_max_ps(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
  const __m512 cd = _mm512_max_ps(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
  const __m512 all = _mm512_max_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_max_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_max_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = largest(v[i]);
#endif
}

// The sums of four vectors.
RG_INLINE void four_totals(const Floats *v, float *out) {
#if defined(RG_WIDE)
  const __m512 ab = _mm512_add_ps(_mm512_unpacklo_ps(v[0].v, v[1].v), _mm512_unpackhi_ps(v[0].v, v[1].v));
  const __m512 cd = _mm512_add_ps(_mm512_unpacklo_ps(v[2].v, v[3].v), _mm512_unpackhi_ps(v[2].v, v[3].v));
  const __m512 all = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
  _mm_storeu_ps(out, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
#else
  for (int i = 0; i < 4; ++i) out[i] = total(v[i]);
#endif
}

// Factors of one byte for four vectors whose greatest sizes are `reach`: x * by is at most 127, and scale puts it back.
RG_INLINE void scales_of(const float *reach, float *scale, float *by) {
#if defined(RG_WIDE)
  const __m128 most = _mm_loadu_ps(reach);
  _mm_storeu_ps(scale, _mm_mul_ps(most, _mm_set1_ps(1.0f / 127.0f)));
  _mm_storeu_ps(by, _mm_maskz_div_ps(_mm_cmp_ps_mask(most, _mm_set1_ps(1e-30f), _CMP_GT_OQ), _mm_set1_ps(127.0f), most));
#else
  for (int r = 0; r < TOGETHER; ++r) {
    scale[r] = reach[r] * (1.0f / 127.0f);
    by[r] = reach[r] > 1e-30f ? 127.0f / reach[r] : 0.0f;
  }
#endif
}

// The codes of a run, 64 bytes a step.
template <int B>
inline void codes_of(const uint8_t *codes, uint8_t *out) {
  each_step<B>(codes, [&](int i, Bytes code) { store_bytes(out + i * STEP, code); });
}

inline void codes_of(int bits, const uint8_t *codes, uint8_t *out) {
  switch (bits) {
    case 1: return codes_of<1>(codes, out);
    case 2: return codes_of<2>(codes, out);
    case 3: return codes_of<3>(codes, out);
    case 4: return codes_of<4>(codes, out);
    case 5: return codes_of<5>(codes, out);
    case 6: return codes_of<6>(codes, out);
    case 7: return codes_of<7>(codes, out);
    default: return codes_of<8>(codes, out);
  }
}

// f(lane vector of values, which of depth) for every code of a panel, decoded but for its step.
template <class F>
inline void each_lane(int bits, const uint8_t *codes, int count, bool floats, F &&f) {
  alignas(64) uint8_t run[8 * STEP];
  const int unit = unit_of(bits);
  for (int at = 0; at < count; at += unit, codes += block_bytes(bits)) {
    codes_of(bits, codes, run);
    for (int c = 0; c < unit && at + c < count; ++c) {
      const Ints own = byte_of(load_bytes(run + c / 4 * STEP), c % 4);
      if (!floats) {
        f(to_floats(own), at + c);
        continue;
      }
      // float8 e4m3: its bits as those of a float, 2^-120 of the value
      const Floats size = as_floats(shifted_left(own & set_ints(127), 20)) * set_floats(1.329227995784916e36f);
      f(as_floats(as_ints(size) | shifted_left(own & set_ints(128), 24)), at + c);
    }
  }
}

// What will be read next: asked for a few lines at a time beside the arithmetic, as the hardware runs ahead of no new stream.
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  int each = 1;
  // `times`: how often `some` will be called.
  void look(const uint8_t *data, size_t bytes, int times) {
    at = data;
    end = data + bytes;
    each = static_cast<int>(bytes / 64) / (times > 0 ? times : 1) + 1;
  }
  RG_INLINE void some() {
    for (int i = 0; i < each && at < end; ++i, at += 64) prefetch(at);
  }
};

// What rounding works in: bytes of some vectors, sums of their products, and figures of each group.
struct Rounding {
  static constexpr int GROUPS = MOST_BLOCK / PANEL;  // of time, in a chunk
  int8_t *bytes;                     // (GROUPS * TOGETHER or 2 * TOGETHER, row)
  size_t row;
  int32_t *sums;                     // of a block's panels
  Ahead ahead;
  float *scale, *by, *base, *extra;  // (TOGETHER, groups) or (groups, TOGETHER)
  float *own;                        // (TOGETHER, channels)
  static size_t wide(int d) { return static_cast<size_t>(d > MOST_BLOCK ? d : MOST_BLOCK) + PANEL; }
  static size_t row_of(int d) { return static_cast<size_t>(d + 127) / 64 * 64; }
  static size_t bytes_of(int d) {
    const size_t of_groups = GROUPS * TOGETHER * row_of(d), of_chunk = 2 * TOGETHER * (wide(d) + 128);
    return (of_groups > of_chunk ? of_groups : of_chunk) + (2 + 5) * TOGETHER * wide(d) * 4 + 2 * 64;
  }
  void lay_out(uint8_t *memory, int d) {
    bytes = reinterpret_cast<int8_t *>(aligned(memory));
    row = row_of(d);
    scale = reinterpret_cast<float *>(aligned(memory) + bytes_of(d) - 2 * 64 - (2 + 5) * TOGETHER * wide(d) * 4);
    by = scale + TOGETHER * wide(d);
    base = by + TOGETHER * wide(d);
    extra = base + TOGETHER * wide(d);
    own = extra + TOGETHER * wide(d);
    sums = reinterpret_cast<int32_t *>(own + TOGETHER * wide(d));
  }
  static size_t chunk_row(int d) { return wide(d) / 64 * 64 + 64; }
};

// x as integers of one or two bytes in units of the answer; their sum goes to `sum`. `count` is a multiple of 16.
template <bool TWO>
inline float rounded_to(const float *x, int count, int8_t *high, int8_t *low, float &sum) {
  Floats top = zero_floats();
  for (int i = 0; i < count; i += PANEL) top = maximum(top, absolute(load_floats(x + i)));
  const float reach = largest(top), most = TWO ? 32639.0f : 127.0f;
  const Floats by = set_floats(reach > 1e-30f ? most / reach : 0.0f);
  Ints all = zero_ints();
  for (int i = 0; i < count; i += PANEL) {
    const Ints v = rounded(load_floats(x + i) * by);
    all = all + v;
    if constexpr (TWO) {
      const Ints upper = shifted_right(v + set_ints(128), 8);
      store_low_bytes(high + i, upper);
      store_low_bytes(low + i, v - shifted_left(upper, 8));
    } else {
      store_low_bytes(high + i, v);
    }
  }
  sum = total(to_floats(all));
  return reach > 1e-30f ? reach / most : 0.0f;
}

inline Floats product_of(const int32_t *sums, bool two) {
  Ints high;
  std::memcpy(&high, sums, 64);
  if (!two) return to_floats(high);
  Ints low;
  std::memcpy(&low, sums + PANEL, 64);
  return fma(to_floats(high), set_floats(256.0f), to_floats(low));
}

}  // namespace
