// Rounding to code words: the row of a list of magnitudes with the least squared error, each weight with its own sign.
//
// A row is a number of 16 bits, two bytes that each say half of a piece (four magnitudes in two bits, or two in four). So the
// cost of a row is a sum of two, each of them one of at most 81 that a piece's own numbers make; sixteen pieces lie side by
// side. A row is then a load, a sum and a comparison for 64 or 128 weights.
#pragma once
#include <new>

#include "ranges.h"
#include "trellis_levels.h"

namespace {

constexpr int WORD = 8;  // weights that share their signs' parity

struct ListSearch {
  alignas(64) float costs[2][256][PANEL];  // of halves of a row, by their byte; only those of the list are made
  uint8_t bytes[2][256];                   // those
  int count[2] = {0, 0};

  explicit ListSearch(const rg_list &l) {
    for (int half = 0; half < 2; ++half) {
      bool seen[256] = {};
      for (int i = 0; i < l.count; ++i) seen[l.rows[i] >> (8 * half) & 255] = true;
      for (int b = 0; b < 256; ++b)
        if (seen[b]) bytes[half][count[half]++] = static_cast<uint8_t>(b);
    }
  }

  // The costs of a half: of `wide` weights, each with the costs of its magnitudes.
  void fill(int half, int wide, int width, const float (*own)[8][PANEL]) {
    const int mask = (1 << width) - 1;
    for (int n = 0; n < count[half]; ++n) {
      const int byte = bytes[half][n];
      Floats sum = load_floats(own[0][byte & mask]);
      for (int c = 1; c < wide; ++c) sum = sum + load_floats(own[c][byte >> (c * width) & mask]);
      store_floats(costs[half][byte], sum);
    }
  }

  // The best row of each of sixteen pieces: the first of those that are alike.
  void find(const rg_list &l, float *at) const {
    Floats best = load_floats(costs[0][l.rows[0] & 255]) + load_floats(costs[1][l.rows[0] >> 8]), row = zero_floats();
    for (int i = 1; i < l.count; ++i) {
      const Floats cost = load_floats(costs[0][l.rows[i] & 255]) + load_floats(costs[1][l.rows[i] >> 8]);
      row = if_less(cost, best, set_floats(static_cast<float>(i)), row);
      best = minimum(best, cost);
    }
    store_floats(at, row);
  }
};

// Sixteen words: sizes into x and signs into `negative`; with `even` the least weighed size of an odd word changes its sign.
inline void signed_words(const rg_list &l, const float *z, const float *weight, int64_t pitch, int64_t count, float (*x)[PANEL],
                         float (*w)[PANEL], uint8_t (*negative)[PANEL]) {
  for (int r = 0; r < PANEL; ++r) {
    int odd = 0, least = 0;
    float smallest = 3e38f;
    for (int c = 0; c < WORD; ++c) {
      float value = r < count ? z[r * WORD + c] : 0.0f;
      value = value == value ? std::fmin(std::fmax(value, -1e4f), 1e4f) : 0.0f;
      const float by = weight && r < count ? weight[r * pitch + c] : 1.0f, size = std::fabs(value);
      x[c][r] = size;
      w[c][r] = by;
      negative[c][r] = value < 0;
      odd ^= value < 0;
      if (size * by < smallest) smallest = size * by, least = c;
    }
    if (l.even && odd) {
      x[least][r] = -x[least][r];
      negative[least][r] ^= 1;
    }
  }
}

inline int lists(const rg_list &l, const float *z, const float *weight, int64_t pitch, int64_t words, float *values, int threads) {
  const int width = 16 / l.piece, wide = l.piece / 2, mask = (1 << width) - 1;
  struct Own {
    Room<ListSearch> search;
    explicit Own(const rg_list &list) : search(1) {
      if (search.data) new (search.data) ListSearch(list);
    }
    bool whole() const { return search.data; }
  };
  return each_tile(words, PANEL, threads, [&] { return Own(l); }, [&](Own &m, int64_t first, int64_t count) -> int {
    ListSearch &search = *m.search.data;
    alignas(64) float x[WORD][PANEL], w[WORD][PANEL], own[WORD][8][PANEL], at[PANEL];
    uint8_t negative[WORD][PANEL];
    signed_words(l, z + first * WORD, weight ? weight + first * pitch : nullptr, pitch, count, x, w, negative);
    for (int start = 0; start < WORD; start += l.piece) {
      for (int c = start; c < start + l.piece; ++c) {
        const Floats here = load_floats(x[c]) * load_floats(w[c]), by = load_floats(w[c]);
        for (int k = 0; k < l.kinds; ++k) {
          const Floats size = set_floats(l.sizes[k]);
          store_floats(own[c][k], size * fma(by, size, set_floats(-2.0f) * here));
        }
      }
      for (int half = 0; half < 2; ++half) search.fill(half, wide, width, own + start + half * wide);
      search.find(l, at);
      for (int64_t r = 0; r < count; ++r) {
        const int row = l.rows[static_cast<int>(at[r])];
        for (int c = 0; c < l.piece; ++c) {
          const float size = l.sizes[row >> (c * width) & mask];
          values[(first + r) * WORD + start + c] = negative[start + c][r] ? -size : size;
        }
      }
    }
    return RG_DONE;
  });
}

}  // namespace
