// Packed values of older tokens, some tokens at a time: their sums by probabilities. How factors are rounded: blocks.h.
#pragma once
#include "blocks.h"

namespace {

// Values of at most four bits with a step a token: probabilities times steps in one byte each, block by block.
template <int R>
inline void mix_by_token(const Coded &v, const uint8_t *first, int blocks, const float *p, size_t p_row, Rounding &w, float *out) {
  const rg_blocks &b = v.b;
  const float middle = rough(b) ? 0.0f : v.middle(), less = middle - static_cast<float>(b.offset);
  const int panels = v.groups == 1 ? v.wide / PANEL : b.group / PANEL, n = blocks * v.tokens;
  const size_t row = Rounding::wide(v.channels);
  const ScaledDots product = scaled_dots_of(b.bits, R);
  for (int g = 0; g < v.groups; ++g) {
    Floats base[TOGETHER];
    for (int r = 0; r < TOGETHER; ++r) base[r] = zero_floats();
    for (int k = 0; k < blocks; ++k) {
      const uint8_t *steps = first + static_cast<size_t>(k) * v.block + static_cast<size_t>(g) * v.tokens * 2;
      w.ahead.some();
      Floats top[TOGETHER];
      for (int r = 0; r < TOGETHER; ++r) top[r] = zero_floats();
      for (int t = 0; t < v.tokens; t += PANEL) {
        const Floats step = v.load(steps + 2 * t), lowest = fma(set_floats(less), step, b.low ? v.load(steps + v.step_bytes + 2 * t) : zero_floats());
        for (int r = 0; r < R; ++r) {
          const size_t at = static_cast<size_t>(k * v.tokens + t);
          const Floats part = load_floats(p + static_cast<size_t>(r) * p_row + at), by = part * step;
          store_floats(w.own + static_cast<size_t>(r) * row + at, by);
          top[r] = greater_size(top[r], by);
          base[r] = fma(part, lowest, base[r]);
        }
      }
      float reach[TOGETHER];
      four_largest(top, reach);
      scales_of(reach, w.scale + k * TOGETHER, w.by + k * TOGETHER);
    }
    int block = 0, left = v.tokens;
    const auto round = [&](int t, int vectors) __attribute__((always_inline)) {
      int from[4];
      for (int i = 0; i < vectors; ++i) {
        from[i] = block * TOGETHER;
        left -= PANEL;
        if (!left) left = v.tokens, ++block;
      }
      for (int r = 0; r < R; ++r) {
        Ints whole[4];
        for (int i = 0; i < vectors; ++i) {
          whole[i] = rounded(load_floats(w.own + static_cast<size_t>(r) * row + static_cast<size_t>(t + i * PANEL)) * set_floats(w.by[from[i] + r]));
          base[r] = fma(to_floats(whole[i]), set_floats(-middle * w.scale[from[i] + r]), base[r]);
        }
        int8_t *to = w.bytes + static_cast<size_t>(r) * w.row + t;
        if (vectors == 4) store_low_bytes(to, whole);
        else store_low_bytes(to, whole[0]);
      }
    };
    int t = 0;
    for (; t + 4 * PANEL <= n; t += 4 * PANEL) round(t, 4);
    for (; t < n; t += PANEL) round(t, 1);
    for (int k = 0; k < blocks; ++k) {
      w.ahead.some();
      product(first + static_cast<size_t>(k) * v.block + v.codes_at + static_cast<size_t>(g * panels) * v.panel, v.runs, panels, v.panel, w.bytes + k * v.tokens, w.row, w.scale + k * TOGETHER, nullptr,
              out + g * panels * PANEL, static_cast<size_t>(v.wide));
    }
    float more[TOGETHER];
    four_totals(base, more);
    for (int r = 0; r < R; ++r)
      for (int at = 0; at < panels; ++at) {
        float *to = out + static_cast<size_t>(r) * v.wide + (g * panels + at) * PANEL;
        store_floats(to, load_floats(to) + set_floats(more[r]));
      }
  }
}

// out_r += sum over t of p[r][t] value_t, over n tokens of whole blocks. `own`: n floats.
inline void mix_blocks(const Coded &v, const uint8_t *first, int n, const float *p, size_t p_row, int count, Rounding &w, float *own, float *out) {
  const rg_blocks &b = v.b;
  const bool time = b.axis == RG_TIME;
  const int blocks = n / v.tokens, panels = v.wide / PANEL;
  const float middle = v.middle(), less = middle - static_cast<float>(b.offset);
  if (!v.whole) {
    for (int k = 0; k < blocks; ++k) {
      const uint8_t *block = first + static_cast<size_t>(k) * v.block, *lows = block + v.step_bytes;
      w.ahead.some();
      w.ahead.some();
      for (int at = 0; at < panels; ++at) {
        Floats sum[TOGETHER];
        for (int r = 0; r < count; ++r) sum[r] = load_floats(out + static_cast<size_t>(r) * v.wide + at * PANEL);
        each_lane(b.bits, block + v.codes_at + static_cast<size_t>(at) * v.panel, v.tokens, b.value == RG_FLOAT, [&](Floats code, int t) {
          Floats step, low = zero_floats();
          if (time) {
            const size_t place = 2 * (static_cast<size_t>(t / b.group) * v.wide + at * PANEL);
            step = v.load(block + place);
            if (b.low) low = v.load(lows + place);
          } else {
            alignas(64) float steps[PANEL] = {}, more[PANEL] = {};
            for (int i = 0; i < PANEL && at * PANEL + i < v.channels; ++i) {
              const size_t place = 2 * (static_cast<size_t>((at * PANEL + i) / b.group) * v.tokens + t);
              steps[i] = v.one(block + place);
              if (b.low) more[i] = v.one(lows + place);
            }
            step = load_floats(steps), low = load_floats(more);
          }
          const Floats value = fma(code - set_floats(static_cast<float>(b.offset)), step, low);
          for (int r = 0; r < count; ++r) sum[r] = fma(value, set_floats(p[static_cast<size_t>(r) * p_row + k * v.tokens + t]), sum[r]);
        });
        for (int r = 0; r < count; ++r) store_floats(out + static_cast<size_t>(r) * v.wide + at * PANEL, sum[r]);
      }
    }
    return;
  }
  const Dots product = dots_of(b.bits, 2 * count);
  const auto high = [&](int r) { return w.bytes + static_cast<size_t>(2 * r) * w.row; };
  if (time) {
    const int runs = v.runs / v.groups, span = v.tokens / v.groups;
    for (int r = 0; r < count; ++r) {
      float sum;
      w.scale[r] = rounded_to<true>(p + static_cast<size_t>(r) * p_row, n, high(r), high(r) + w.row, sum);
    }
    for (int k = 0; k < blocks; ++k)
      for (int g = 0; g < v.groups; ++g) {
        const uint8_t *block = first + static_cast<size_t>(k) * v.block, *steps = block + static_cast<size_t>(g) * v.wide * 2, *lows = steps + v.step_bytes;
        const int begin = k * v.tokens + g * span;
        w.ahead.some();
        w.ahead.some();
        std::memset(w.sums, 0, static_cast<size_t>(panels * 2 * count) * PANEL * 4);
        product(block + v.codes_at + static_cast<size_t>(g * runs) * block_bytes(b.bits), runs, panels, v.panel, w.bytes + begin, w.row, w.sums);
        for (int r = 0; r < count; ++r) {
          float all = 0;
          int32_t codes = 0;
          for (int t = begin; t < begin + span; ++t) all += p[static_cast<size_t>(r) * p_row + t], codes += 256 * high(r)[t] + high(r)[w.row + static_cast<size_t>(t)];
          const Floats base = set_floats(less * all - middle * w.scale[r] * static_cast<float>(codes));
          for (int at = 0; at < panels; ++at) {
            float *to = out + static_cast<size_t>(r) * v.wide + at * PANEL;
            const Floats found = product_of(w.sums + static_cast<size_t>(at * count + r) * 2 * PANEL, true);
            Floats sum = fma(fma(found, set_floats(w.scale[r]), base), v.load(steps + at * PANEL * 2), load_floats(to));
            if (b.low) sum = fma(set_floats(all), v.load(lows + at * PANEL * 2), sum);
            store_floats(to, sum);
          }
        }
      }
    return;
  }
  if (b.bits <= 4) {
    if (count == 4) return mix_by_token<4>(v, first, blocks, p, p_row, w, out);
    if (count == 3) return mix_by_token<3>(v, first, blocks, p, p_row, w, out);
    if (count == 2) return mix_by_token<2>(v, first, blocks, p, p_row, w, out);
    return mix_by_token<1>(v, first, blocks, p, p_row, w, out);
  }
  const int own_panels = v.groups == 1 ? panels : b.group / PANEL;
  for (int g = 0; g < v.groups; ++g) {
    for (int r = 0; r < count; ++r) {
      Floats lower = zero_floats(), all = zero_floats();
      for (int k = 0; k < blocks; ++k) {
        const uint8_t *steps = first + static_cast<size_t>(k) * v.block + static_cast<size_t>(g) * v.tokens * 2;
        for (int t = 0; t < v.tokens; t += PANEL) {
          const Floats part = load_floats(p + static_cast<size_t>(r) * p_row + k * v.tokens + t), by = part * v.load(steps + 2 * t);
          store_floats(own + k * v.tokens + t, by);
          all = all + by;
          if (b.low) lower = fma(part, v.load(steps + v.step_bytes + 2 * t), lower);
        }
      }
      float sum;
      w.scale[r] = rounded_to<true>(own, n, high(r), high(r) + w.row, sum);
      w.base[r] = total(lower) + less * total(all) - middle * w.scale[r] * sum;
    }
    std::memset(w.sums, 0, static_cast<size_t>(own_panels * 2 * count) * PANEL * 4);
    for (int k = 0; k < blocks; ++k) {
      w.ahead.some();
      w.ahead.some();
      product(first + static_cast<size_t>(k) * v.block + v.codes_at + static_cast<size_t>(g * own_panels) * v.panel, v.runs, own_panels, v.panel, w.bytes + k * v.tokens, w.row, w.sums);
    }
    for (int at = 0; at < own_panels; ++at)
      for (int r = 0; r < count; ++r) {
        float *to = out + static_cast<size_t>(r) * v.wide + (g * own_panels + at) * PANEL;
        const Floats found = product_of(w.sums + static_cast<size_t>(at * count + r) * 2 * PANEL, true);
        store_floats(to, load_floats(to) + fma(found, set_floats(w.scale[r]), set_floats(w.base[r])));
      }
  }
}

}  // namespace
