// What a step works in: memory that the threads share, and products of sites that read one tap.
#pragma once
#include "sizes.h"

namespace {

// The memory of a step, and what is done with several sites at once.
struct Work {
  static constexpr int SHARES = 6;  // of a block: qkv, attention, o, and up to three of the feed-forward
  static constexpr int LOWS = 4;    // and, where there are low-rank terms: those of qkv, o, gate up, down
  const Sizes &z;
  const rg_program &p;
  const rg_call &c;
  const int count, threads, shares_a_block;
  float *q = nullptr, *k = nullptr, *v = nullptr, *mixed = nullptr, *first = nullptr, *hidden = nullptr, *second = nullptr, *routed = nullptr;
  float *narrowed = nullptr;
  float *partial = nullptr;             // of attention: what pieces of heads found
  std::atomic<int> *done = nullptr;     // pieces of each head
  rg::Share *shares = nullptr;
  std::atomic<int> failed{0};

  Work(const Sizes &sizes, int n) : z(sizes), p(sizes.p), c(sizes.c), count(sizes.count), threads(n), shares_a_block(sizes.rank ? SHARES + LOWS : SHARES) {}

  void lay_out(float *memory) {
    const size_t b = static_cast<size_t>(count), n = static_cast<size_t>(z.pairs);
    const auto next = [&](size_t floats) {  // sixteen zeros after each: the last head is read in whole vectors
      float *at = memory;
      memory += floats + PANEL;
      std::memset(at + floats, 0, PANEL * 4);
      return at;
    };
    q = next(b * z.heads_width);
    k = next(b * z.kv_width);
    v = next(b * z.kv_width);
    mixed = next(b * z.heads_width);
    first = next(b * p.hidden);
    hidden = next(b * n * z.ffn);
    second = next(b * n * p.hidden);
    routed = next(b * z.experts);
    narrowed = next(b * 3 * z.rank);
    partial = next(z.partial_floats());
  }

  // right x of those sites that have a low-rank term, for everybody: all wait, but only where there is one.
  void narrow(Site *const *sites, int n, Prepared &own, rg::Share *share, int thread, rg::Team &team) const {
    int64_t ends[3] = {}, all = 0;
    for (int i = 0; i < n; ++i) {
      if (sites[i]->low) all += (sites[i]->low->right.rows + PANEL - 1) / PANEL;
      ends[i] = all;
    }
    if (!all) return;
    for (int i = 0; i < n; ++i) sites[i]->narrowed = narrowed + static_cast<size_t>(i) * count * z.rank;
    int64_t start, stop;
    while (share->take(thread, team.threads, all, 1, start, stop)) {
      int i = 0;
      while (start >= ends[i]) ++i;
      own.narrow(*sites[i], start - (i ? ends[i - 1] : 0), 0, own.tokens, narrowed + static_cast<size_t>(i) * count * z.rank);
    }
    team.barrier();
  }

  // y (tokens, rows) of several sites that read one prepared tap, panels shared out over all of them.
  void products(Site *const *sites, float *const *out, int n_sites, Prepared &own, rg::Share &share, rg::Share *low, int thread, rg::Team &team) const {
    int kind[4] = {};
    int64_t ends[4] = {}, all = 0, chunk = INT64_MAX;
    for (int i = 0; i < n_sites; ++i) {
      kind[i] = own.of(*sites[i]);
      all += sites[i]->ready.l.panels;
      ends[i] = all;
      const int64_t some = panels_at_once(sites[i]->ready, threads);
      chunk = some < chunk ? some : chunk;
    }
    if (threads == 1) chunk = all;  // a thread alone reads run after run of a matrix without a gap
    if (z.rank) narrow(sites, n_sites, own, low, thread, team);
    int64_t start, stop;
    while (share.take(thread, team.threads, all, chunk, start, stop))
      for (int64_t n = start, end; n < stop; n = end) {
        int i = 0;
        while (n >= ends[i]) ++i;
        end = n + panels_together(sites[i]->ready, own.tokens);
        end = end < stop ? end : stop;
        end = end < ends[i] ? end : ends[i];
        const int64_t before = i ? ends[i - 1] : 0, rows_all = sites[i]->ready.m->rows;
        each_panel(*sites[i], own.in[kind[i]], own.tokens, n - before, end - before, [&](int64_t panel, int t, int rows, const float *values) {
          std::memcpy(out[i] + panel * PANEL + t * rows_all, values, static_cast<size_t>(rows) * 4);
        });
      }
  }

  // hidden = activation(gate x) * (up x), or activation(up x), of panels [start, stop).
  void hidden_layers(const Site *gate, const Site &up, int activation, const Inputs *gate_in, const Inputs *up_in, int tokens, float *out,
                     int64_t start, int64_t stop) const {
    int64_t together = panels_together(up.ready, tokens);
    if (gate && panels_together(gate->ready, tokens) < together) together = 1;
    if (together > ROOM / (PANEL * tokens)) together = ROOM / (PANEL * tokens);
    for (int64_t end; start < stop; start = end) {
      end = start + together < stop ? start + together : stop;
      hidden_layer(gate, up, activation, gate_in, up_in, tokens, out, start, end);
    }
  }

  void hidden_layer(const Site *gate, const Site &up, int activation, const Inputs *gate_in, const Inputs *up_in, int tokens, float *out,
                    int64_t start, int64_t stop) const {
    alignas(64) float gates[ROOM];
    static_assert(ROOM >= MOST * PANEL, "a panel of all tokens");
    const auto at = [&](int64_t panel, int t) { return gates + ((panel - start) * tokens + t) * PANEL; };
    if (gate) each_panel(*gate, gate_in, tokens, start, stop, [&](int64_t panel, int t, int, const float *values) { std::memcpy(at(panel, t), values, PANEL * 4); });
    each_panel(up, up_in, tokens, start, stop, [&](int64_t panel, int t, int rows, float *values) {
      const Floats by = load_floats(values);
      store_floats(values, gate ? activated(load_floats(at(panel, t)), activation) * by : activated(by, activation));
      std::memcpy(out + static_cast<size_t>(t) * up.ready.m->rows + panel * PANEL, values, static_cast<size_t>(rows) * 4);
    });
  }

  void add(float *x, const float *y, const rg_norm &post, float *spare) const {
    for (int t = 0; t < count; ++t) {
      const float *from = y + static_cast<size_t>(t) * p.hidden;
      if (post.kind) {
        normalised(post, from, spare);
        from = spare;
      }
      float *to = x + static_cast<size_t>(t) * p.hidden;
      for (int i = 0; i < p.hidden; ++i) to[i] += from[i];
    }
  }

  void norm_all(const rg_norm &n, const float *x, float *out) const {
    for (int t = 0; t < count; ++t) normalised(n, x + static_cast<size_t>(t) * p.hidden, out + static_cast<size_t>(t) * p.hidden);
  }
};

}  // namespace
