// AVX-512: one register each.
#pragma once
#include <immintrin.h>

namespace {

struct Bytes { __m512i v; };
struct Ints { __m512i v; };
struct Floats { __m512 v; };

RG_INLINE Bytes load_bytes(const uint8_t *p) { return {_mm512_loadu_si512(p)}; }
RG_INLINE void store_bytes(uint8_t *p, Bytes a) { _mm512_storeu_si512(p, a.v); }
RG_INLINE Bytes set_bytes(int byte) { return {_mm512_set1_epi8(static_cast<char>(byte))}; }
RG_INLINE Bytes operator&(Bytes a, Bytes b) { return {_mm512_and_si512(a.v, b.v)}; }
RG_INLINE Bytes operator|(Bytes a, Bytes b) { return {_mm512_or_si512(a.v, b.v)}; }
// code | (bits & mask).
RG_INLINE Bytes with_bits(Bytes code, Bytes bits, Bytes mask) { return {_mm512_ternarylogic_epi64(code.v, bits.v, mask.v, 0xf8)}; }
// mask ? a : b, bit by bit.
RG_INLINE Bytes picked(Bytes mask, Bytes a, Bytes b) { return {_mm512_ternarylogic_epi64(mask.v, a.v, b.v, 0xca)}; }
// Shifts of 16-bit lanes by a constant, left where negative; the caller masks what crosses into a neighbour.
template <int N>
RG_INLINE Bytes shifted(Bytes a) {
  if constexpr (N > 0) return {_mm512_srli_epi16(a.v, N)};
  else if constexpr (N < 0) return {_mm512_slli_epi16(a.v, -N)};
  else return a;
}
// table[code] for codes 0 ... 15.
struct ByteTable { __m512i v; };
RG_INLINE ByteTable byte_table(const uint8_t *t16) {
  return {_mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(t16)))};
}
RG_INLINE Bytes look_up(ByteTable t, Bytes codes) { return {_mm512_shuffle_epi8(t.v, codes.v)}; }

RG_INLINE Ints zero_ints() { return {_mm512_setzero_si512()}; }
RG_INLINE Ints set_ints(int32_t x) { return {_mm512_set1_epi32(x)}; }
RG_INLINE Ints operator+(Ints a, Ints b) { return {_mm512_add_epi32(a.v, b.v)}; }
RG_INLINE Ints operator-(Ints a, Ints b) { return {_mm512_sub_epi32(a.v, b.v)}; }
RG_INLINE Ints operator*(Ints a, Ints b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
RG_INLINE void store_ints(int32_t *p, Ints a) { _mm512_storeu_si512(p, a.v); }
// a + the dot product of each four bytes of `codes` (unsigned) with the four of `x` (signed). SMALL: codes < 128.
template <bool SMALL>
RG_INLINE Ints dot4(Ints a, Bytes codes, const int32_t *x) {
#if defined(__AVX512VNNI__)
  // Written out because the compiler splits the broadcast from the product and moves every sum twice: 1.4 times the work.
  asm("vpdpbusd %2%{1to16%}, %1, %0" : "+v"(a.v) : "v"(codes.v), "m"(*x));
  return a;
#else
  const __m512i four = _mm512_set1_epi32(*x);
  const __m512i ones = _mm512_set1_epi16(1);
  if constexpr (SMALL) {
    return {_mm512_add_epi32(a.v, _mm512_madd_epi16(_mm512_maddubs_epi16(codes.v, four), ones))};
  } else {  // two products of 255 x 127 do not fit 16 bits: half the code at a time
    const __m512i low = _mm512_set1_epi8(15);
    const __m512i one = _mm512_maddubs_epi16(_mm512_and_si512(codes.v, low), four);
    const __m512i two = _mm512_maddubs_epi16(_mm512_and_si512(_mm512_srli_epi16(codes.v, 4), low), four);
    const __m512i sum = _mm512_add_epi32(_mm512_madd_epi16(one, ones), _mm512_slli_epi32(_mm512_madd_epi16(two, ones), 4));
    return {_mm512_add_epi32(a.v, sum)};
  }
#endif
}
// Byte number `i` of every lane.
RG_INLINE Ints byte_of(Bytes a, int i) {
  return {_mm512_and_si512(_mm512_srl_epi32(a.v, _mm_cvtsi32_si128(8 * i)), _mm512_set1_epi32(255))};
}

RG_INLINE Floats zero_floats() { return {_mm512_setzero_ps()}; }
RG_INLINE Floats set_floats(float x) { return {_mm512_set1_ps(x)}; }
RG_INLINE Floats load_floats(const float *p) { return {_mm512_loadu_ps(p)}; }
RG_INLINE void store_floats(float *p, Floats a) { _mm512_storeu_ps(p, a.v); }
RG_INLINE Floats operator+(Floats a, Floats b) { return {_mm512_add_ps(a.v, b.v)}; }
RG_INLINE Floats operator-(Floats a, Floats b) { return {_mm512_sub_ps(a.v, b.v)}; }
RG_INLINE Floats operator*(Floats a, Floats b) { return {_mm512_mul_ps(a.v, b.v)}; }
RG_INLINE Floats fma(Floats a, Floats b, Floats c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
RG_INLINE Floats maximum(Floats a, Floats b) { return {_mm512_max_ps(a.v, b.v)}; }
RG_INLINE Floats minimum(Floats a, Floats b) { return {_mm512_min_ps(a.v, b.v)}; }
RG_INLINE Floats operator/(Floats a, Floats b) { return {_mm512_div_ps(a.v, b.v)}; }
// Where a < b, x; else y.
RG_INLINE Floats if_less(Floats a, Floats b, Floats x, Floats y) {
  return {_mm512_mask_blend_ps(_mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ), y.v, x.v)};
}
// The greater size of two.
RG_INLINE Floats greater_size(Floats a, Floats b) { return {_mm512_range_ps(a.v, b.v, 11)}; }
RG_INLINE Floats absolute(Floats a) { return {_mm512_abs_ps(a.v)}; }
RG_INLINE float total(Floats a) { return _mm512_reduce_add_ps(a.v); }
RG_INLINE float largest(Floats a) { return _mm512_reduce_max_ps(a.v); }
RG_INLINE Floats to_floats(Ints a) { return {_mm512_cvtepi32_ps(a.v)}; }
RG_INLINE Ints rounded(Floats a) { return {_mm512_cvtps_epi32(a.v)}; }  // ties to even
RG_INLINE Floats as_floats(Ints a) { return {_mm512_castsi512_ps(a.v)}; }
RG_INLINE Ints as_ints(Floats a) { return {_mm512_castps_si512(a.v)}; }
RG_INLINE Ints operator&(Ints a, Ints b) { return {_mm512_and_si512(a.v, b.v)}; }
RG_INLINE Ints operator|(Ints a, Ints b) { return {_mm512_or_si512(a.v, b.v)}; }
RG_INLINE Ints shifted_left(Ints a, int n) { return {_mm512_sll_epi32(a.v, _mm_cvtsi32_si128(n))}; }
RG_INLINE Ints shifted_right(Ints a, int n) { return {_mm512_sra_epi32(a.v, _mm_cvtsi32_si128(n))}; }
RG_INLINE void store_low_bytes(int8_t *p, Ints a) {
  _mm_storeu_si128(reinterpret_cast<__m128i *>(p), _mm512_cvtepi32_epi8(a.v));
}
// The low bytes of four vectors behind each other.
RG_INLINE void store_low_bytes(int8_t *p, const Ints *a) {
  const __m512i turned = _mm512_packs_epi16(_mm512_packs_epi32(a[0].v, a[1].v), _mm512_packs_epi32(a[2].v, a[3].v));
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, turned));
}
// The greater of 32 unsigned words; the highest bit of the second ones does not count.
RG_INLINE Bytes greater_words(Bytes a, Bytes b) {
  return {_mm512_max_epu16(a.v, _mm512_and_si512(b.v, _mm512_set1_epi16(0x7fff)))};
}
RG_INLINE int32_t total(Ints a) { return _mm512_reduce_add_epi32(a.v); }

RG_INLINE __m256i load_words(const void *p) { return _mm256_loadu_si256(static_cast<const __m256i *>(p)); }
RG_INLINE Floats load_half(const void *p) { return {_mm512_cvtph_ps(load_words(p))}; }
RG_INLINE Floats load_bf16(const void *p) {
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(load_words(p)), 16))};
}
RG_INLINE __m512i load_wide(const void *p) { return _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i *>(p))); }
RG_INLINE Floats load_e8m0(const void *p) { return {_mm512_castsi512_ps(_mm512_slli_epi32(load_wide(p), 23))}; }
// 16 unsigned bytes.
RG_INLINE Ints load_byte_ints(const void *p) { return {load_wide(p)}; }
RG_INLINE void store_half(void *p, Floats a) {
  _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
RG_INLINE void store_bf16(void *p, Floats a) {
  const __m512i bits = _mm512_castps_si512(a.v);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  __m512i sum = _mm512_srli_epi32(_mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff))), 16);
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  sum = _mm512_mask_mov_epi32(sum, nan, _mm512_set1_epi32(0x7fc0));
  _mm256_storeu_si256(static_cast<__m256i *>(p), _mm512_cvtepi32_epi16(sum));
}
RG_INLINE void prefetch(const void *p) { _mm_prefetch(static_cast<const char *>(p), _MM_HINT_T0); }

}  // namespace
