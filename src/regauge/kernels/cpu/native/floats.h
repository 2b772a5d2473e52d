// The slow, plain way: every code becomes a float and is multiplied by the activation as it is. For grids of floats
// (fp8, fp6), whose range no 16-bit integer holds, and wherever nothing may be rounded.
#pragma once
#include "codes.h"

namespace {

RG_INLINE Floats look_up_floats(const float *table, Ints codes) {
#if defined(RG_WIDE)
  return {_mm512_permutexvar_ps(codes.v, _mm512_loadu_ps(table))};
#else
  int32_t c[PANEL];
  float f[PANEL];
  store_ints(c, codes);
  for (int i = 0; i < PANEL; ++i) f[i] = table[c[i]];
  return load_floats(f);
#endif
}

// `table` has 16 entries. VALUE: an rg_value_kind.
template <int B, int MR, int VALUE>
inline void panel_floats(const rg_matrix &m, const Layout &l, const float *table, const uint8_t *panel,
                         const float *const *x, const float *const *sums, Floats (&out)[MR]) {
  constexpr int D = read_as(B), BITS = bits_of(B);
  const int blocks = m.group / unit_of(D);
  const Ints size_mask = set_ints((1 << (BITS - 1)) - 1), sign_mask = set_ints(1 << (BITS - 1));
  const Floats offset = set_floats(static_cast<float>(m.offset));
  const int up = 23 - m.mantissa;
  const Floats up_again = set_floats(std::ldexp(1.0f, 127 - m.bias));  // before any sum: down there floats lose their bits
  for (int r = 0; r < MR; ++r) out[r] = zero_floats();
  int at = 0;
  Planes planes{};
  alignas(64) uint8_t bytes[put_together(B) ? LONGEST * PANEL : 1];
  const uint8_t *const whole_panel = panel;
  for (int g = 0; g < l.groups; ++g) {
    panel = l.steps(whole_panel, g);
    const uint8_t *codes = panel + l.steps_bytes + l.zeros_bytes;
    if constexpr (put_together(B)) {
      planes = l.codes<B>(whole_panel, g);
      put_codes(m.bits, planes, m.group, bytes);
      codes = bytes;
    }
    Floats sum[MR];
    for (int r = 0; r < MR; ++r) sum[r] = zero_floats();
    for (int b = 0; b < blocks; ++b) {
      each_step<D>(codes, [&](int i, Bytes code) __attribute__((always_inline)) {
        for (int k = 0; k < 4; ++k) {
          const Ints c = byte_of(code, k);
          Floats w;
          if constexpr (VALUE == RG_INT) w = to_floats(c) - offset;
          else if constexpr (VALUE == RG_TABLE) w = look_up_floats(table, c);
          else w = as_floats(shifted_left(c & size_mask, up) | shifted_left(c & sign_mask, 32 - BITS)) * up_again;
          for (int r = 0; r < MR; ++r) sum[r] = fma(w, set_floats(x[r][at + 4 * i + k]), sum[r]);
        }
      });
      codes += block_bytes(D);
      at += unit_of(D);
    }
    const Floats step = load_steps(panel, m.step);
    for (int r = 0; r < MR; ++r) {
      if (m.zero) sum[r] = sum[r] - load_zeros(panel + l.steps_bytes, BITS) * set_floats(sums[r][g]);
      out[r] = fma(sum[r], step, out[r]);
    }
  }
}

}  // namespace
