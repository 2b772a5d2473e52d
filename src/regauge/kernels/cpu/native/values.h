// Rounding to a grid, and steps as they are stored, sixteen lanes at a time: each lane a row, or a group, of its own.
#pragma once
#include "vector.h"

#include "regauge.h"

namespace {

// The nearest value of the grid to z, and its code in the low byte of `code`.
template <int KIND>
RG_INLINE Floats snapped(const rg_grid &g, Floats z, Ints &code) {
  if constexpr (KIND == RG_INTEGERS) {
    const Ints whole = rounded(minimum(maximum(z, set_floats(g.low)), set_floats(g.high)));
    code = whole - set_ints(static_cast<int>(g.low));
    return to_floats(whole);
  } else if constexpr (KIND == RG_FLOATS) {
    const Floats size = minimum(absolute(z), set_floats(g.high)), tiny = set_floats(g.tiny);
    const Floats below = maximum(as_floats(as_ints(size) & set_ints(0xff << 23)), tiny);
    const Floats spacing = below * set_floats(1.0f / static_cast<float>(1 << g.mantissa));
    const Floats found = to_floats(rounded(size / spacing)) * spacing;
    const int up = 23 - g.mantissa;
    const Ints normal = shifted_right(as_ints(found) - as_ints(tiny), up) + set_ints(1 << g.mantissa);
    const Ints small = rounded(minimum(found, tiny) / tiny * set_floats(static_cast<float>(1 << g.mantissa)));
    const Ints sign = as_ints(z) & set_ints(INT32_MIN);
    const Ints unsigned_code = as_ints(if_less(found, tiny, as_floats(small), as_floats(normal)));
    code = unsigned_code | (shifted_right(sign, 32 - g.bits) & set_ints(1 << (g.bits - 1)));
    return as_floats(as_ints(found) | sign);
  } else {
    Floats found = set_floats(g.values[0]), place = zero_floats();
    for (int i = 0; i + 1 < g.count; ++i) {
      const Floats middle = set_floats(g.middles[i]);
      found = if_less(middle, z, set_floats(g.values[i + 1]), found);
      place = if_less(middle, z, set_floats(static_cast<float>(i + 1)), place);
    }
    code = rounded(place);
    return found;
  }
}

inline float stored_e8m0(const rg_ranger &r, float raw) {
  const double peak = static_cast<double>(std::fmin(std::fmax(raw, 0x1p-126f), 0x1p126f)) * (r.top * (1 + 0x1p-21));
  int exponent = std::ilogb(peak);
  if (!r.strict && peak >= (r.top + 2) / 2 * std::ldexp(1.0, exponent)) ++exponent;
  exponent = exponent < -126 ? -126 : exponent > 127 ? 127 : exponent;
  return std::ldexp(1.0f, exponent);
}

inline float stored_e4m3(const rg_ranger &r, float raw) {
  const float level = std::fmin(std::fmax(raw * r.whole, 0x1p-9f), 448.0f);
  const float spacing = std::ldexp(1.0f, (level < 0x1p-6f ? -6 : std::ilogb(level)) - 3);
  return std::nearbyint(level / spacing) * spacing / r.whole;
}

// Steps as they will be read again: positive and finite, of 0 and of what is no number 1.
RG_INLINE Floats stored(const rg_ranger &r, Floats raw) {
  if (r.step != RG_STEP_E4M3) raw = if_less(zero_floats(), raw, raw, set_floats(1.0f));
  if (r.step == RG_STEP_F32) return minimum(maximum(raw, set_floats(0x1p-126f)), set_floats(0x1.fffffep127f));
  if (r.step == RG_STEP_BF16) {
    const Ints bits = as_ints(minimum(maximum(raw, set_floats(0x1p-126f)), set_floats(0x1.fep127f)));
    return as_floats((bits + set_ints(0x7fff) + (shifted_right(bits, 16) & set_ints(1))) & set_ints(~0xffff));
  }
  float lanes[PANEL];
  store_floats(lanes, raw);
  for (float &lane : lanes) {
    if (r.step == RG_STEP_F16) lane = half_to_float(float_to_half(std::fmin(std::fmax(lane, 0x1p-14f), 65504.0f)));
    else lane = r.step == RG_STEP_E8M0 ? stored_e8m0(r, lane) : stored_e4m3(r, lane);
  }
  return load_floats(lanes);
}

}  // namespace
