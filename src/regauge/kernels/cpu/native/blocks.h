// Packed keys and values of older tokens, some tokens at a time: scores of queries, and sums of values by probabilities.
//
// Products are of integers wherever a group holds whole pieces: queries times the steps of keys, and probabilities times
// the steps of values, are rounded anew for each group of steps (queries to 8 bits where codes have at most 4, else to 16;
// probabilities to 16). What rounding leaves multiplies a code less the middle of all codes, not the code. Other blocks are
// decoded in registers, sixteen lanes at a time.
#pragma once
#include "coded.h"

namespace {

// scores[r][t] = q_r . key_t of one block. q: rows of `wide` floats, zeros behind the head.
inline void score_block(const Coded &k, const uint8_t *block, const float *q, int count, Rounding &w, float *scores, size_t score_row) {
  const rg_blocks &b = k.b;
  const bool two = b.bits > 4, time = b.axis == RG_TIME;
  const int planes = two ? 2 : 1, panels = k.tokens / PANEL;
  const float middle = k.middle(), less = middle - static_cast<float>(b.offset);
  const uint8_t *codes = block + k.codes_at, *lows = block + k.step_bytes;
  if (!k.whole) {
    for (int p = 0; p < panels; ++p) {
      Floats sum[TOGETHER] = {zero_floats(), zero_floats(), zero_floats(), zero_floats()};
      each_lane(b.bits, codes + static_cast<size_t>(p) * k.panel, k.channels, b.value == RG_FLOAT, [&](Floats v, int c) {
        const size_t at = time ? static_cast<size_t>(p * PANEL / b.group) * k.wide + c : static_cast<size_t>(c / b.group) * k.tokens + p * PANEL;
        Floats step, low = zero_floats();
        if (time && b.group % PANEL) {  // tokens of one panel have steps of several groups
          alignas(64) float steps[PANEL], more[PANEL] = {};
          for (int t = 0; t < PANEL; ++t) {
            const size_t own = 2 * (static_cast<size_t>((p * PANEL + t) / b.group) * k.wide + c);
            steps[t] = k.one(block + own);
            if (b.low) more[t] = k.one(lows + own);
          }
          step = load_floats(steps), low = load_floats(more);
        } else {
          step = time ? set_floats(k.one(block + 2 * at)) : k.load(block + 2 * at);
          if (b.low) low = time ? set_floats(k.one(lows + 2 * at)) : k.load(lows + 2 * at);
        }
        const Floats key = fma(v - set_floats(static_cast<float>(b.offset)), step, low);
        for (int r = 0; r < count; ++r) sum[r] = fma(key, set_floats(q[static_cast<size_t>(r) * k.wide + c]), sum[r]);
      });
      for (int r = 0; r < count; ++r) store_floats(scores + static_cast<size_t>(r) * score_row + p * PANEL, sum[r]);
    }
    return;
  }
  const Dots product = dots_of(b.bits, planes * count);
  const auto rows = [&](int r) { return w.bytes + static_cast<size_t>(planes * r) * w.row; };
  if (time) {
    alignas(64) float own[MOST_CHANNELS + PANEL];
    const int each = b.group / PANEL;
    for (int g = 0; g < k.groups; ++g) {
      const uint8_t *steps = block + static_cast<size_t>(g) * k.wide * 2, *low = lows + static_cast<size_t>(g) * k.wide * 2;
      for (int r = 0; r < count; ++r) {
        const float *query = q + static_cast<size_t>(r) * k.wide;
        Floats base = zero_floats();
        for (int i = 0; i < k.wide; i += PANEL) {
          const Floats part = load_floats(query + i), step = k.load(steps + 2 * i);
          store_floats(own + i, part * step);
          base = fma(part, b.low ? fma(set_floats(less), step, k.load(low + 2 * i)) : step * set_floats(less), base);
        }
        float sum;
        const float scale = two ? rounded_to<true>(own, k.wide, rows(r), rows(r) + w.row, sum) : rounded_to<false>(own, k.wide, rows(r), nullptr, sum);
        w.scale[r] = scale;
        w.base[r] = total(base) - middle * scale * sum;
      }
      std::memset(w.sums, 0, static_cast<size_t>(each * planes * count) * PANEL * 4);
      product(codes + static_cast<size_t>(g * each) * k.panel, k.runs, each, k.panel, w.bytes, w.row, w.sums);
      for (int p = 0; p < each; ++p)
        for (int r = 0; r < count; ++r) {
          const Floats found = product_of(w.sums + static_cast<size_t>(p * count + r) * planes * PANEL, two);
          store_floats(scores + static_cast<size_t>(r) * score_row + (g * each + p) * PANEL, fma(found, set_floats(w.scale[r]), set_floats(w.base[r])));
        }
    }
    return;
  }
  const int runs = k.runs / k.groups;
  for (int g = 0; g < k.groups; ++g) {
    std::memset(w.sums, 0, static_cast<size_t>(panels * planes * count) * PANEL * 4);
    product(codes + static_cast<size_t>(g * runs) * block_bytes(b.bits), runs, panels, k.panel, w.bytes + g * b.group, w.row, w.sums);
    for (int p = 0; p < panels; ++p) {
      const size_t at = 2 * (static_cast<size_t>(g) * k.tokens + p * PANEL);
      const Floats step = k.load(block + at), low = b.low ? k.load(lows + at) : zero_floats();
      for (int r = 0; r < count; ++r) {
        const size_t own = static_cast<size_t>(r) * k.groups + g;
        const Floats found = product_of(w.sums + static_cast<size_t>(p * count + r) * planes * PANEL, two);
        Floats score = fma(found, set_floats(w.scale[own]), set_floats(w.base[own])) * step;
        if (b.low) score = fma(low, set_floats(w.extra[own]), score);
        float *to = scores + static_cast<size_t>(r) * score_row + p * PANEL;
        store_floats(to, g ? score + load_floats(to) : score);
      }
    }
  }
}

// Queries rounded for keys with a step a token: once for all blocks.
inline void round_queries(const Coded &k, const float *q, int count, Rounding &w) {
  const rg_blocks &b = k.b;
  if (!k.whole || b.axis == RG_TIME) return;
  const bool two = b.bits > 4;
  alignas(64) float own[MOST_CHANNELS + PANEL];
  for (int r = 0; r < count; ++r)
    for (int g = 0; g < k.groups; ++g) {
      const int padded = (b.group + PANEL - 1) / PANEL * PANEL;
      std::memset(own + b.group, 0, static_cast<size_t>(padded - b.group) * 4);
      std::memcpy(own, q + static_cast<size_t>(r) * k.wide + g * b.group, static_cast<size_t>(b.group) * 4);
      float sum, all = 0;
      for (int i = 0; i < b.group; ++i) all += own[i];
      int8_t *high = w.bytes + static_cast<size_t>((two ? 2 : 1) * r) * w.row + g * b.group;
      const float scale = two ? rounded_to<true>(own, padded, high, high + w.row, sum) : rounded_to<false>(own, padded, high, nullptr, sum);
      const size_t at = static_cast<size_t>(r) * k.groups + g;
      w.scale[at] = scale;
      w.base[at] = (k.middle() - static_cast<float>(b.offset)) * all - k.middle() * scale * sum;
      w.extra[at] = all;
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
    for (int k = 0; k < blocks; ++k)
      product(first + static_cast<size_t>(k) * v.block + v.codes_at + static_cast<size_t>(g * own_panels) * v.panel, v.runs, own_panels, v.panel, w.bytes + k * v.tokens, w.row, w.sums);
    for (int at = 0; at < own_panels; ++at)
      for (int r = 0; r < count; ++r) {
        float *to = out + static_cast<size_t>(r) * v.wide + (g * own_panels + at) * PANEL;
        const Floats found = product_of(w.sums + static_cast<size_t>(at * count + r) * 2 * PANEL, true);
        store_floats(to, load_floats(to) + fma(found, set_floats(w.scale[r]), set_floats(w.base[r])));
      }
  }
}

}  // namespace
