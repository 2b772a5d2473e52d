// Attention of one layer: some new tokens of each sequence over a store that holds them.
#pragma once
#include <new>

#include "attend.h"

namespace {

constexpr int SOME = 16;  // new tokens whose queries share one reading

inline int attend(const rg_attention *attention, int threads) {
  const rg_attention &a = *attention;
  if (!a.q || !a.out || !a.store || !a.starts || a.batch < 1 || a.tokens < 1 || a.kv_heads < 1 || a.heads < 1 || a.heads % a.kv_heads) return RG_UNSOUND;
  if (a.head_dim < 1 || a.head_dim > MOST_CHANNELS || a.window < 0 || !sound_dtype(a.dtype)) return RG_UNSOUND;
  const rg_store &s = *a.store;
  const int64_t heads_of_all = static_cast<int64_t>(a.batch) * a.kv_heads, spans = (a.tokens + SOME - 1) / SOME;
  if (heads_of_all > MOST_COLUMNS || !s.room || a.rows < 0 || a.rows > s.room || (!s.lengths && a.rows < a.tokens)) return RG_UNSOUND;
  for (int64_t i = 0; s.lengths && i < heads_of_all; ++i)
    if (s.lengths[i] < a.tokens || s.lengths[i] > s.room) return RG_UNSOUND;
  Taken taken{};
  const int answer = check(s, a.batch, a.kv_heads, a.head_dim, a.window, a.rows, 0, a.starts, taken);
  if (answer) return answer;
  const int group = a.heads / a.kv_heads, most = group * SOME, d = a.head_dim, wide = (d + PANEL - 1) / PANEL * PANEL;
  const int pieces = spans == 1 ? pieces_of(static_cast<int>(heads_of_all), taken.chunks) : 1;
  const size_t slots = static_cast<size_t>(heads_of_all * pieces), done = (static_cast<size_t>(heads_of_all) * sizeof(std::atomic<int>) + 63) / 64 * 64;
  uint8_t *memory = scratch<1>(128 + done + (pieces > 1 ? slots * Partials::floats(most, wide) * 4 : 0));
  if (!memory) return RG_NO_MEMORY;
  std::atomic<int> *counts = reinterpret_cast<std::atomic<int> *>(aligned(memory));
  for (int64_t i = 0; i < heads_of_all; ++i) new (counts + i) std::atomic<int>(0);
  const Partials partials{reinterpret_cast<float *>(aligned(memory) + done), counts};
  std::atomic<int> failed{0};
  rg::Share share;
  rg::parallel(worth(threads, taken.bytes * static_cast<size_t>(heads_of_all) / 8), [&](int thread, rg::Team &team) {
    uint8_t *own = scratch(Bench::bytes(most, d));
    if (!own) {
      failed.store(1);
      return;
    }
    Bench w;
    w.lay_out(own, most, d);
    int64_t item, stop;
    while (share.take(thread, team.threads, heads_of_all * spans * pieces, 1, item, stop)) {
      const int piece = static_cast<int>(item % pieces);
      const int64_t index = item / pieces / spans;
      const int begin = static_cast<int>(item / pieces % spans) * SOME, some = a.tokens - begin < SOME ? a.tokens - begin : SOME;
      const int sequence = static_cast<int>(index / a.kv_heads), first_head = static_cast<int>(index % a.kv_heads) * group;
      const Held now = held(s, static_cast<size_t>(index), a.rows, a.starts[sequence]);
      // The window ends for these tokens with the last of them, or of all.
      const int last = a.all ? now.rows : now.rows - a.tokens + begin + some, own_row = now.rows - a.tokens + begin;
      const int behind = from_row(a.window, now, own_row);
      const Head h{s, static_cast<int>(index), d, wide, last, behind < last ? behind : last, own_row, 0, a.window, a.all, a.softcap};
      const auto place = [&](int j, int r) { return ((static_cast<int64_t>(sequence) * a.tokens + begin + j) * a.heads + first_head + r) * d; };
      for (int j = 0; j < some; ++j)
        for (int r = 0; r < group; ++r) {
          float *q = w.q + static_cast<size_t>(j * group + r) * wide;
          load_row(a.q, place(j, r), d, a.dtype, q);
          for (int i = 0; i < d; ++i) q[i] *= a.scale;
          std::memset(q + d, 0, static_cast<size_t>(wide - d) * 4);
        }
      read_piece(h, w, some * group, group, piece, pieces);
      if (!partials.finished(w, h, piece, pieces, some * group, static_cast<size_t>(index))) continue;
      alignas(64) float found[MOST_CHANNELS];
      for (int i = 0; i < some * group; ++i) {
        divided(w, h, i, found);
        store_row(a.out, place(i / group, i % group), d, a.dtype, found);
      }
    }
  });
  return failed.load() ? RG_NO_MEMORY : RG_DONE;
}

}  // namespace
