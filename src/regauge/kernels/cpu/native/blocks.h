// Packed keys of older tokens, some tokens at a time: scores of queries. Of values: mixing.h.
//
// Products are of integers wherever a group holds whole pieces: queries times the steps of keys, and probabilities times
// the steps of values, are rounded to 8 bits where codes have at most 4 (queries on one scale for a chunk, probabilities for
// a block), else to 16. What rounding leaves multiplies a code less the middle of all codes, not the code. Other blocks are
// decoded in registers, sixteen lanes at a time.
#pragma once
#include "coded.h"

namespace {

// Codes of so few bits are so far from what they stand for that what rounding leaves may multiply the code itself.
inline bool rough(const rg_blocks &b) { return b.bits <= 2; }

// The greatest size of each channel's steps over some blocks, as floats.
inline void greatest_steps(const Coded &k, const uint8_t *first, int blocks, float *out) {
  alignas(64) uint8_t most[STEP];
  for (int i = 0; i < k.wide; i += 2 * PANEL) {  // where a head ends in the middle, what lies behind it is read, and left
    Bytes top = set_bytes(0);
    for (int n = 0; n < blocks; ++n)
      for (int g = 0; g < k.groups; ++g) top = greater_words(top, load_bytes(first + static_cast<size_t>(n) * k.block + 2 * (static_cast<size_t>(g) * k.wide + i)));
    store_bytes(most, top);
    store_floats(out + i, k.load(most));
    if (i + PANEL < k.wide) store_floats(out + i + PANEL, k.load(most + 2 * PANEL));
  }
}

// Keys of at most four bits with a step a channel: queries times steps in one byte each, on one scale for all groups of a
// chunk. In two passes over the blocks, for what the products of a block need waits for long.
template <int R>
inline void score_along_time(const Coded &k, const uint8_t *first, int blocks, const float *q, Rounding &w, float *scores, size_t score_row) {
  const rg_blocks &b = k.b;
  const float middle = rough(b) ? 0.0f : k.middle(), less = middle - static_cast<float>(b.offset);
  const int each = b.group / PANEL, all = blocks * k.groups;
  const size_t wide = static_cast<size_t>(k.wide);
  Floats top[TOGETHER], base[TOGETHER], back[R];
  float reach[TOGETHER];
  greatest_steps(k, first, blocks, w.extra);
  for (int r = 0; r < TOGETHER; ++r) top[r] = base[r] = zero_floats();
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < k.wide; i += PANEL) top[r] = greater_size(top[r], load_floats(q + static_cast<size_t>(r) * wide + i) * load_floats(w.extra + i));
  four_largest(top, reach);
  scales_of(reach, w.scale, w.by);
  for (int r = 0; r < R; ++r) {
    back[r] = set_floats(-middle * w.scale[r]);
    for (int i = 0; i < k.wide; i += PANEL) store_floats(w.own + static_cast<size_t>(r) * wide + i, load_floats(q + static_cast<size_t>(r) * wide + i) * set_floats(w.by[r]));
  }
  for (int g = 0; g < all; ++g) {
    const uint8_t *steps = first + static_cast<size_t>(g / k.groups) * k.block + static_cast<size_t>(g % k.groups) * wide * 2;
    int8_t *to = w.bytes + static_cast<size_t>(g * R) * w.row;
    w.ahead.some();
    Ints sum[R];
    for (int r = 0; r < R; ++r) sum[r] = zero_ints(), base[r] = zero_floats();
    const auto round = [&](int i, int vectors) __attribute__((always_inline)) {
      Floats step[4], lowest[4];
      for (int v = 0; v < vectors; ++v) {
        step[v] = k.load(steps + 2 * (i + v * PANEL));
        lowest[v] = fma(set_floats(less), step[v], b.low ? k.load(steps + k.step_bytes + 2 * (i + v * PANEL)) : zero_floats());
      }
      for (int r = 0; r < R; ++r) {
        Ints whole[4];
        for (int v = 0; v < vectors; ++v) {
          const size_t at = static_cast<size_t>(r) * wide + i + v * PANEL;
          whole[v] = rounded(load_floats(w.own + at) * step[v]);
          sum[r] = sum[r] + whole[v];
          base[r] = fma(load_floats(q + at), lowest[v], base[r]);
        }
        int8_t *own = to + static_cast<size_t>(r) * w.row + i;
        if (vectors == 4) store_low_bytes(own, whole);
        else store_low_bytes(own, whole[0]);
      }
    };
    int i = 0;
    for (; i + 4 * PANEL <= k.wide; i += 4 * PANEL) round(i, 4);
    for (; i < k.wide; i += PANEL) round(i, 1);
    for (int r = 0; r < R; ++r) base[r] = fma(to_floats(sum[r]), back[r], base[r]);
    four_totals(base, w.base + g * TOGETHER);
  }
  const ScaledDots product = scaled_dots_of(b.bits, R);
  for (int g = 0; g < all; ++g) {
    const uint8_t *codes = first + static_cast<size_t>(g / k.groups) * k.block + k.codes_at + static_cast<size_t>(g % k.groups * each) * k.panel;
    w.ahead.some();
    product(codes, k.runs, each, k.panel, w.bytes + static_cast<size_t>(g * R) * w.row, w.row, w.scale, w.base + g * TOGETHER, scores + g * b.group, score_row);
  }
}

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

// scores[r][t] = q_r . key_t of some blocks behind each other.
inline void score_blocks(const Coded &k, const uint8_t *first, int blocks, const float *q, int count, Rounding &w, float *scores, size_t score_row) {
  if (k.whole && k.b.axis == RG_TIME && k.b.bits <= 4) {
    if (count == 4) return score_along_time<4>(k, first, blocks, q, w, scores, score_row);
    if (count == 3) return score_along_time<3>(k, first, blocks, q, w, scores, score_row);
    if (count == 2) return score_along_time<2>(k, first, blocks, q, w, scores, score_row);
    return score_along_time<1>(k, first, blocks, q, w, scores, score_row);
  }
  round_queries(k, q, count, w);
  for (int n = 0; n < blocks; ++n) {
    w.ahead.some();
    w.ahead.some();
    score_block(k, first + static_cast<size_t>(n) * k.block, q, count, w, scores + n * k.tokens, score_row);
  }
}

}  // namespace
