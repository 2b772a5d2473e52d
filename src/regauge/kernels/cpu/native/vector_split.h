// Everything narrower than AVX-512: native vectors of WIDTH bytes side by side, written with the compiler's vector
// extensions, so that one text serves AVX2, NEON and plain C++. Only what they cannot say is written apart.
#pragma once
#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace {

#if defined(__AVX2__)
constexpr int WIDTH = 32;
#else
constexpr int WIDTH = 16;
#endif
constexpr int PARTS = 64 / WIDTH;
constexpr int LANES = WIDTH / 4;

typedef uint8_t NativeBytes __attribute__((vector_size(WIDTH)));
typedef uint16_t NativeWords __attribute__((vector_size(WIDTH)));
typedef int16_t NativeShorts __attribute__((vector_size(WIDTH)));
typedef int32_t NativeInts __attribute__((vector_size(WIDTH)));
typedef float NativeFloats __attribute__((vector_size(WIDTH)));

struct Bytes { NativeBytes v[PARTS]; };
struct Ints { NativeInts v[PARTS]; };
struct Floats { NativeFloats v[PARTS]; };

#define RG_EACH for (int i = 0; i < PARTS; ++i)

RG_INLINE Bytes load_bytes(const uint8_t *p) { Bytes r; RG_EACH std::memcpy(&r.v[i], p + i * WIDTH, WIDTH); return r; }
RG_INLINE void store_bytes(uint8_t *p, Bytes a) { RG_EACH std::memcpy(p + i * WIDTH, &a.v[i], WIDTH); }
RG_INLINE Bytes set_bytes(int byte) { Bytes r; RG_EACH r.v[i] = NativeBytes{} + static_cast<uint8_t>(byte); return r; }
RG_INLINE Bytes operator&(Bytes a, Bytes b) { RG_EACH a.v[i] &= b.v[i]; return a; }
RG_INLINE Bytes operator|(Bytes a, Bytes b) { RG_EACH a.v[i] |= b.v[i]; return a; }
RG_INLINE Bytes with_bits(Bytes code, Bytes bits, Bytes mask) { return code | (bits & mask); }
RG_INLINE Bytes picked(Bytes mask, Bytes a, Bytes b) { RG_EACH a.v[i] = (a.v[i] & mask.v[i]) | (b.v[i] & ~mask.v[i]); return a; }
template <int N>
RG_INLINE Bytes shifted(Bytes a) {
  if constexpr (N > 0) RG_EACH a.v[i] = (NativeBytes)((NativeWords)a.v[i] >> N);
  if constexpr (N < 0) RG_EACH a.v[i] = (NativeBytes)((NativeWords)a.v[i] << -N);
  return a;
}
struct ByteTable { NativeBytes v; };
RG_INLINE ByteTable byte_table(const uint8_t *t16) {
  ByteTable t;
  for (int i = 0; i < WIDTH; i += 16) std::memcpy(reinterpret_cast<char *>(&t.v) + i, t16, 16);
  return t;
}
RG_INLINE Bytes look_up(ByteTable t, Bytes codes) {
#if defined(__AVX2__)
  RG_EACH codes.v[i] = (NativeBytes)_mm256_shuffle_epi8((__m256i)t.v, (__m256i)codes.v[i]);
#elif defined(__aarch64__)
  RG_EACH codes.v[i] = (NativeBytes)vqtbl1q_u8((uint8x16_t)t.v, (uint8x16_t)codes.v[i]);
#else
  RG_EACH for (int k = 0; k < WIDTH; ++k) codes.v[i][k] = t.v[codes.v[i][k] & 15];
#endif
  return codes;
}

RG_INLINE Ints zero_ints() { return {}; }
RG_INLINE Ints set_ints(int32_t x) { Ints r; RG_EACH r.v[i] = NativeInts{} + x; return r; }
RG_INLINE Ints operator+(Ints a, Ints b) { RG_EACH a.v[i] += b.v[i]; return a; }
RG_INLINE Ints operator-(Ints a, Ints b) { RG_EACH a.v[i] -= b.v[i]; return a; }
RG_INLINE Ints operator*(Ints a, Ints b) { RG_EACH a.v[i] *= b.v[i]; return a; }
RG_INLINE Ints operator&(Ints a, Ints b) { RG_EACH a.v[i] &= b.v[i]; return a; }
RG_INLINE Ints operator|(Ints a, Ints b) { RG_EACH a.v[i] |= b.v[i]; return a; }
RG_INLINE void store_ints(int32_t *p, Ints a) { RG_EACH std::memcpy(p + i * LANES, &a.v[i], WIDTH); }
RG_INLINE Ints shifted_left(Ints a, int n) { RG_EACH a.v[i] <<= n; return a; }
RG_INLINE Ints shifted_right(Ints a, int n) { RG_EACH a.v[i] >>= n; return a; }
template <bool SMALL>
RG_INLINE Ints dot4(Ints a, Bytes codes, const int32_t *word) {
  const int32_t x = *word;
#if defined(__AVX2__)
  const __m256i four = _mm256_set1_epi32(x), ones = _mm256_set1_epi16(1), low = _mm256_set1_epi8(15);
  RG_EACH {
    const __m256i c = (__m256i)codes.v[i];
    if constexpr (SMALL) {
      a.v[i] += (NativeInts)_mm256_madd_epi16(_mm256_maddubs_epi16(c, four), ones);
    } else {  // two products of 255 x 127 do not fit 16 bits: half the code at a time
      const __m256i one = _mm256_maddubs_epi16(_mm256_and_si256(c, low), four);
      const __m256i two = _mm256_maddubs_epi16(_mm256_and_si256(_mm256_srli_epi16(c, 4), low), four);
      a.v[i] += (NativeInts)_mm256_madd_epi16(one, ones) + ((NativeInts)_mm256_madd_epi16(two, ones) << 4);
    }
  }
#elif defined(__ARM_FEATURE_DOTPROD)
  const int8x16_t four = vreinterpretq_s8_s32(vdupq_n_s32(x));
  RG_EACH {
    if constexpr (SMALL) {
      a.v[i] = (NativeInts)vdotq_s32((int32x4_t)a.v[i], (int8x16_t)codes.v[i], four);
    } else {  // signed codes, 128 less, and what that took away
      const int8x16_t less = (int8x16_t)(codes.v[i] ^ static_cast<uint8_t>(128)), half = vdupq_n_s8(64);
      int32x4_t sum = vdotq_s32((int32x4_t)a.v[i], less, four);
      a.v[i] = (NativeInts)vdotq_s32(vdotq_s32(sum, half, four), half, four);
    }
  }
#else
  const int32_t x0 = static_cast<int8_t>(x), x1 = static_cast<int8_t>(x >> 8), x2 = static_cast<int8_t>(x >> 16), x3 = x >> 24;
  RG_EACH {
    const NativeInts c = (NativeInts)codes.v[i];
    a.v[i] += (c & 255) * x0 + ((c >> 8) & 255) * x1 + ((c >> 16) & 255) * x2 + ((c >> 24) & 255) * x3;
  }
#endif
  return a;
}
RG_INLINE Ints byte_of(Bytes a, int k) {
  Ints r;
  RG_EACH r.v[i] = ((NativeInts)a.v[i] >> (8 * k)) & 255;
  return r;
}

RG_INLINE Floats zero_floats() { return {}; }
RG_INLINE Floats set_floats(float x) { Floats r; RG_EACH r.v[i] = NativeFloats{} + x; return r; }
RG_INLINE Floats load_floats(const float *p) { Floats r; RG_EACH std::memcpy(&r.v[i], p + i * LANES, WIDTH); return r; }
RG_INLINE void store_floats(float *p, Floats a) { RG_EACH std::memcpy(p + i * LANES, &a.v[i], WIDTH); }
RG_INLINE Floats operator+(Floats a, Floats b) { RG_EACH a.v[i] += b.v[i]; return a; }
RG_INLINE Floats operator-(Floats a, Floats b) { RG_EACH a.v[i] -= b.v[i]; return a; }
RG_INLINE Floats operator*(Floats a, Floats b) { RG_EACH a.v[i] *= b.v[i]; return a; }
RG_INLINE Floats fma(Floats a, Floats b, Floats c) { RG_EACH c.v[i] += a.v[i] * b.v[i]; return c; }
RG_INLINE Floats maximum(Floats a, Floats b) { RG_EACH a.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i]; return a; }
RG_INLINE Floats minimum(Floats a, Floats b) { RG_EACH a.v[i] = a.v[i] < b.v[i] ? a.v[i] : b.v[i]; return a; }
RG_INLINE Floats operator/(Floats a, Floats b) { RG_EACH a.v[i] /= b.v[i]; return a; }
// Where a < b, x; else y.
RG_INLINE Floats if_less(Floats a, Floats b, Floats x, Floats y) { RG_EACH x.v[i] = a.v[i] < b.v[i] ? x.v[i] : y.v[i]; return x; }
RG_INLINE Floats as_floats(Ints a) { Floats r; std::memcpy(&r, &a, 64); return r; }
RG_INLINE Ints as_ints(Floats a) { Ints r; std::memcpy(&r, &a, 64); return r; }
RG_INLINE Floats absolute(Floats a) { return as_floats(as_ints(a) & set_ints(0x7fffffff)); }
// The greater size of two, of which the first is no less than 0.
RG_INLINE Floats greater_size(Floats a, Floats b) { return maximum(a, absolute(b)); }
RG_INLINE float total(Floats a) {
  float sum = 0;
  RG_EACH for (int k = 0; k < LANES; ++k) sum += a.v[i][k];
  return sum;
}
RG_INLINE float largest(Floats a) {
  float top = a.v[0][0];
  RG_EACH for (int k = 0; k < LANES; ++k) top = a.v[i][k] > top ? a.v[i][k] : top;
  return top;
}
RG_INLINE int32_t total(Ints a) {
  int32_t sum = 0;
  RG_EACH for (int k = 0; k < LANES; ++k) sum += a.v[i][k];
  return sum;
}
RG_INLINE Floats to_floats(Ints a) { Floats r; RG_EACH r.v[i] = __builtin_convertvector(a.v[i], NativeFloats); return r; }
RG_INLINE Ints rounded(Floats a) {
  Ints r;
#if defined(__AVX2__)
  RG_EACH r.v[i] = (NativeInts)_mm256_cvtps_epi32((__m256)a.v[i]);
#elif defined(__aarch64__)
  RG_EACH r.v[i] = (NativeInts)vcvtnq_s32_f32((float32x4_t)a.v[i]);
#else
  // Adding and taking 1.5 * 2^23 leaves the nearest integer, ties to even, for the sizes that occur here.
  const Ints whole = as_ints(a + set_floats(12582912.0f));
  RG_EACH r.v[i] = (whole.v[i] & 0x7fffff) - 0x400000;
#endif
  return r;
}
RG_INLINE void store_low_bytes(int8_t *p, Ints a) {
  RG_EACH for (int k = 0; k < LANES; ++k) p[i * LANES + k] = static_cast<int8_t>(a.v[i][k]);
}
// The low bytes of four vectors behind each other.
RG_INLINE void store_low_bytes(int8_t *p, const Ints *a) {
  for (int k = 0; k < 4; ++k) store_low_bytes(p + k * PANEL, a[k]);
}
// The greater of 32 unsigned words; the highest bit of the second ones does not count.
RG_INLINE Bytes greater_words(Bytes a, Bytes b) {
  RG_EACH {
    const NativeWords x = (NativeWords)a.v[i], y = (NativeWords)b.v[i] & 0x7fff;
    a.v[i] = (NativeBytes)(x > y ? x : y);
  }
  return a;
}

RG_INLINE Floats load_half(const void *p) {
  Floats r;
#if defined(__F16C__)
  RG_EACH r.v[i] = (NativeFloats)_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i *>(p) + i));
#elif defined(__aarch64__)
  RG_EACH r.v[i] = (NativeFloats)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(static_cast<const uint16_t *>(p) + 4 * i)));
#else
  uint16_t h[PANEL];
  std::memcpy(h, p, sizeof h);
  RG_EACH for (int k = 0; k < LANES; ++k) r.v[i][k] = half_to_float(h[i * LANES + k]);
#endif
  return r;
}
RG_INLINE Floats load_bf16(const void *p) {
  uint16_t h[PANEL];
  std::memcpy(h, p, sizeof h);
  Ints r;
  RG_EACH for (int k = 0; k < LANES; ++k) r.v[i][k] = static_cast<int32_t>(static_cast<uint32_t>(h[i * LANES + k]) << 16);
  return as_floats(r);
}
RG_INLINE Ints load_byte_ints(const void *p) {
  uint8_t b[PANEL];
  std::memcpy(b, p, sizeof b);
  Ints r;
  RG_EACH for (int k = 0; k < LANES; ++k) r.v[i][k] = b[i * LANES + k];
  return r;
}
RG_INLINE Floats load_e8m0(const void *p) { return as_floats(shifted_left(load_byte_ints(p), 23)); }
RG_INLINE void store_half(void *p, Floats a) {
  uint16_t h[PANEL];
  RG_EACH for (int k = 0; k < LANES; ++k) h[i * LANES + k] = float_to_half(a.v[i][k]);
  std::memcpy(p, h, sizeof h);
}
RG_INLINE void store_bf16(void *p, Floats a) {
  uint16_t h[PANEL];
  RG_EACH for (int k = 0; k < LANES; ++k) h[i * LANES + k] = float_to_bf16(a.v[i][k]);
  std::memcpy(p, h, sizeof h);
}
RG_INLINE void prefetch(const void *p) { __builtin_prefetch(p); }

#undef RG_EACH

}  // namespace
