// One token through every block, in one run of the threads.
//
// Each thread keeps its own copy of the residual and rounds its own inputs: a few microseconds of work twice over cost
// less than waiting for each other. Threads meet four times a block: after q k v, attention, o, and the hidden layer;
// what lies between is shared out by panels, or by key-value heads.
//
// Floor: every packed byte once, and the cache once, for all sequences of the batch.
#pragma once
#include <new>

#include "attention.h"

namespace {

constexpr int MOST = 64;      // sequences a step takes
constexpr int USED = 16;      // experts a token may use
constexpr int DISTINCT = 4;   // ways in which one input may have to be rounded

// A site with its kernel chosen.
struct Site {
  Ready ready;
  const float *bias;
  explicit Site(const rg_site &s) : ready(s.matrix, s.activations), bias(s.bias) {}
};

// One input of some tokens, rounded for every site that reads it.
struct Prepared {
  const rg_matrix *like[DISTINCT];
  int activations[DISTINCT];
  Inputs in[DISTINCT][(MOST + FEW - 1) / FEW];
  int kinds = 0;
  uint8_t *memory;
  size_t used = 0;

  void restart() { kinds = 0, used = 0; }

  // Index of the way this site wants its input.
  int of(const Ready &a, const float *x, size_t row, int tokens) {
    for (int i = 0; i < kinds; ++i)
      if (activations[i] == a.activations && like[i]->columns == a.m->columns && like[i]->group == a.m->group) return i;
    const int slot = kinds++;
    like[slot] = a.m;
    activations[slot] = a.activations;
    const size_t each = (inputs_bytes(a.l) + 63) / 64 * 64;
    for (int t = 0; t < tokens; ++t, used += each)
      prepare(x + static_cast<size_t>(t) * row, *a.m, a.l, a.activations, memory + used, in[slot][t / FEW], t % FEW);
    return slot;
  }
};

inline Inputs alone(const Inputs &in, int slot) {
  Inputs one;
  one.rounded[0] = in.rounded[slot];
  one.floats[0] = in.floats[slot];
  one.sums[0] = in.sums[slot];
  return one;
}

struct Stepper {
  const rg_program &p;
  const rg_call &c;
  int threads;
  size_t weights = 0;
  int ffn = 0, pairs = 1, heads_width = 0, kv_width = 0, experts = 0;
  size_t prepared_bytes = 0, private_bytes = 0;
  float *q = nullptr, *k = nullptr, *v = nullptr, *mixed = nullptr, *first = nullptr, *hidden = nullptr, *second = nullptr, *routed = nullptr;
  rg::Share *shares = nullptr;
  std::atomic<int> failed{0};

  Stepper(const rg_program &program, const rg_call &call, int n) : p(program), c(call), threads(n) {}

  static int at_least(int a, int b) { return a > b ? a : b; }

  // Sizes of everything; false where the program is unsound.
  bool measure() {
    if (c.batch < 1 || c.batch > MOST || c.past < 0 || c.past >= c.capacity) return false;
    size_t most = 0;
    const auto site = [&](const rg_site &s, int columns) {
      if (!s.matrix.rows) return true;
      if (s.matrix.columns != columns) return false;
      const Layout l(s.matrix);
      weights += s.matrix.value == RG_FULL ? static_cast<size_t>(s.matrix.rows) * s.matrix.columns * 2 : l.panel * static_cast<size_t>(l.panels);
      const size_t each = (inputs_bytes(l) + 63) / 64 * 64;
      most = each > most ? each : most;
      return true;
    };
    for (int i = 0; i < p.block_count; ++i) {
      const rg_block &b = p.blocks[i];
      if (!b.q.matrix.rows || !b.k.matrix.rows || !b.v.matrix.rows || !b.o.matrix.rows || b.kv_heads < 1 || b.heads % b.kv_heads) return false;
      const int width = b.heads * b.head_dim, kv = b.kv_heads * b.head_dim;
      if (b.q.matrix.rows != width || b.k.matrix.rows != kv || b.v.matrix.rows != kv || b.o.matrix.rows != p.hidden) return false;
      heads_width = at_least(heads_width, width);
      kv_width = at_least(kv_width, kv);
      if (!site(b.q, p.hidden) || !site(b.k, p.hidden) || !site(b.v, p.hidden) || !site(b.o, width)) return false;
      const int count = b.expert_count ? b.expert_count : 1;
      if (b.expert_count && (!site(b.router, p.hidden) || b.router.matrix.rows != b.expert_count || b.experts_used < 1 || b.experts_used > b.expert_count || b.experts_used > USED)) return false;
      experts = at_least(experts, b.expert_count);
      pairs = at_least(pairs, b.expert_count ? b.experts_used : 1);
      for (int e = 0; e < count; ++e) {
        const rg_site &gate = b.expert_count ? b.experts[3 * e] : b.gate, &up = b.expert_count ? b.experts[3 * e + 1] : b.up;
        const rg_site &down = b.expert_count ? b.experts[3 * e + 2] : b.down;
        if (!up.matrix.rows || !down.matrix.rows || down.matrix.rows != p.hidden || (gate.matrix.rows && gate.matrix.rows != up.matrix.rows)) return false;
        if (!site(gate, p.hidden) || !site(up, p.hidden) || !site(down, up.matrix.rows)) return false;
        ffn = at_least(ffn, up.matrix.rows);
      }
    }
    if (!site(p.head, p.hidden)) return false;
    prepared_bytes = most * DISTINCT * static_cast<size_t>(c.batch) * static_cast<size_t>(pairs) + 64;
    const size_t rows = static_cast<size_t>(c.batch) * (2 * static_cast<size_t>(p.hidden) + 64);
    const size_t attention = 4 * (static_cast<size_t>(c.past) + 1 + PANEL) + 2 * PANEL;
    private_bytes = rows * 4 + attention * 4 + prepared_bytes + 1024;
    return true;
  }

  size_t shared_floats() const {
    const size_t b = static_cast<size_t>(c.batch), n = static_cast<size_t>(pairs);
    return b * (2 * static_cast<size_t>(heads_width) + 2 * static_cast<size_t>(kv_width) + p.hidden + n * (static_cast<size_t>(ffn) + p.hidden) + experts) + 8 * PANEL;
  }

  void lay_out(float *memory) {
    const size_t b = static_cast<size_t>(c.batch), n = static_cast<size_t>(pairs);
    const auto next = [&](size_t floats) {  // sixteen zeros after each: the last head is read in whole vectors
      float *at = memory;
      memory += floats + PANEL;
      std::memset(at + floats, 0, PANEL * 4);
      return at;
    };
    q = next(b * heads_width);
    k = next(b * kv_width);
    v = next(b * kv_width);
    mixed = next(b * heads_width);
    first = next(b * p.hidden);
    hidden = next(b * n * ffn);
    second = next(b * n * p.hidden);
    routed = next(b * experts);
  }

  // One panel of a site for all tokens of a prepared input; rows beyond the matrix are not written. with(t, rows, values)
  template <class With>
  static void each_panel(const Site &s, const Inputs *in, int tokens, int64_t panel, With &&with) {
    alignas(64) float out[FEW * PANEL];
    for (int t = 0; t < tokens; t += FEW) {
      const int count = tokens - t < FEW ? tokens - t : FEW;
      panel_values(s.ready, panel, in[t / FEW], count, out);
      const int64_t left = s.ready.m->rows - panel * PANEL;
      const int rows = static_cast<int>(left < PANEL ? left : PANEL);
      for (int r = 0; r < count; ++r) {
        float *row = out + r * PANEL;
        if (s.bias) for (int i = 0; i < rows; ++i) row[i] += s.bias[panel * PANEL + i];
        with(t + r, rows, row);
      }
    }
  }

  // y (tokens, rows) of several sites that read one input, panels shared out over all of them.
  void products(const Site *const *sites, float *const *out, int count, const float *x, size_t row, Prepared &own, rg::Share &share, int thread, rg::Team &team) {
    own.restart();
    int kind[4] = {};
    int64_t ends[4] = {}, all = 0, chunk = INT64_MAX;
    for (int i = 0; i < count; ++i) {
      kind[i] = own.of(sites[i]->ready, x, row, c.batch);
      all += sites[i]->ready.l.panels;
      ends[i] = all;
    }
    for (int i = 0; i < count; ++i) {
      const int64_t some = panels_at_once(sites[i]->ready.l, threads);
      chunk = some < chunk ? some : chunk;
    }
    int64_t start, stop;
    while (share.take(thread, team.threads, all, chunk, start, stop))
      for (int64_t n = start; n < stop; ++n) {
        int i = 0;
        while (n >= ends[i]) ++i;
        const int64_t panel = n - (i ? ends[i - 1] : 0);
        const int64_t rows_all = sites[i]->ready.m->rows;
        float *y = out[i] + panel * PANEL;
        each_panel(*sites[i], own.in[kind[i]], c.batch, panel, [&](int t, int rows, const float *values) {
          std::memcpy(y + t * rows_all, values, static_cast<size_t>(rows) * 4);
        });
      }
  }

  // hidden = activation(gate x) * (up x), or activation(up x).
  void hidden_layer(const Site *gate, const Site &up, int activation, const Inputs *gate_in, const Inputs *up_in, int tokens, float *out,
                    int64_t panel) const {
    alignas(64) float gates[MOST * PANEL];
    if (gate) each_panel(*gate, gate_in, tokens, panel, [&](int t, int, const float *values) { std::memcpy(gates + t * PANEL, values, PANEL * 4); });
    each_panel(up, up_in, tokens, panel, [&](int t, int rows, float *values) {
      const Floats by = load_floats(values);
      store_floats(values, gate ? activated(load_floats(gates + t * PANEL), activation) * by : activated(by, activation));
      std::memcpy(out + static_cast<size_t>(t) * up.ready.m->rows + panel * PANEL, values, static_cast<size_t>(rows) * 4);
    });
  }

  void attention(const rg_block &b, rg::Share &share, float *scores, int thread, rg::Team &team) {
    const int group = b.heads / b.kv_heads, size = c.dtype == RG_F32 ? 4 : 2, d = b.head_dim;
    int64_t item, stop;
    while (share.take(thread, team.threads, static_cast<int64_t>(c.batch) * b.kv_heads, 1, item, stop)) {
      const int t = static_cast<int>(item / b.kv_heads), h = static_cast<int>(item % b.kv_heads);
      const float *cosines = nullptr, *sines = nullptr;
      if (b.rotary) {
        const size_t at = static_cast<size_t>(c.positions[t]) * (b.rotary / 2);
        cosines = c.cosines[b.rope] + at;
        sines = c.sines[b.rope] + at;
      }
      float *key = k + static_cast<size_t>(t) * b.kv_heads * d + h * d, *value = v + static_cast<size_t>(t) * b.kv_heads * d + h * d;
      if (b.k_norm.kind) normalised(b.k_norm, key, key);
      if (b.rotary) turned(key, b, cosines, sines);
      const int64_t place = (static_cast<int64_t>(t) * b.kv_heads + h) * c.capacity;
      uint8_t *keys = static_cast<uint8_t *>(b.keys) + place * d * size, *values = static_cast<uint8_t *>(b.values) + place * d * size;
      store_row(keys, static_cast<int64_t>(c.past) * d, d, c.dtype, key);
      store_row(values, static_cast<int64_t>(c.past) * d, d, c.dtype, value);
      float *heads = q + static_cast<size_t>(t) * b.heads * d + static_cast<size_t>(h) * group * d;
      for (int r = 0; r < group; ++r) {
        if (b.q_norm.kind) normalised(b.q_norm, heads + r * d, heads + r * d);
        if (b.rotary) turned(heads + r * d, b, cosines, sines);
        for (int i = 0; i < d; ++i) heads[r * d + i] *= b.scale;
      }
      int from = c.starts[t];
      if (b.window > 0 && c.past + 1 - b.window > from) from = c.past + 1 - b.window;
      attend(b, heads, group, keys, values, c.dtype, from, c.past + 1, scores, static_cast<size_t>(c.past) + 1 + PANEL,
             mixed + static_cast<size_t>(t) * b.heads * d + static_cast<size_t>(h) * group * d);
    }
  }

  // Softmax over the experts, the best `used`, and their weights.
  static void choose(const rg_block &b, const float *logits, int *which, float *weight) {
    float top = logits[0], all = 0, kept = 0;
    for (int e = 1; e < b.expert_count; ++e) top = logits[e] > top ? logits[e] : top;
    for (int e = 0; e < b.expert_count; ++e) all += std::exp(logits[e] - top);
    for (int n = 0; n < b.experts_used; ++n) {
      int best = -1;
      for (int e = 0; e < b.expert_count; ++e) {
        bool taken = false;
        for (int m = 0; m < n; ++m) taken = taken || which[m] == e;
        if (!taken && (best < 0 || logits[e] > logits[best])) best = e;
      }
      which[n] = best;
      weight[n] = std::exp(logits[best] - top) / all;
      kept += weight[n];
    }
    if (b.normalise) for (int n = 0; n < b.experts_used; ++n) weight[n] /= kept;
  }

  void add(float *x, const float *y, const rg_norm &post, float *spare) const {
    for (int t = 0; t < c.batch; ++t) {
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
    for (int t = 0; t < c.batch; ++t) normalised(n, x + static_cast<size_t>(t) * p.hidden, out + static_cast<size_t>(t) * p.hidden);
  }

  void dense(const rg_block &b, const float *x, float *residual, float *spare, Prepared &own, rg::Share *next, int thread, rg::Team &team) {
    const bool gated = b.gate.matrix.rows > 0;
    const Site gate(gated ? b.gate : b.up), up(b.up), down(b.down);
    own.restart();
    const int up_kind = own.of(up.ready, x, static_cast<size_t>(p.hidden), c.batch);
    const int gate_kind = gated ? own.of(gate.ready, x, static_cast<size_t>(p.hidden), c.batch) : 0;
    int64_t start, stop;
    const int64_t chunk = (panels_at_once(up.ready.l, threads) + 1) / (gated ? 2 : 1);
    while (next[0].take(thread, team.threads, up.ready.l.panels, chunk > 0 ? chunk : 1, start, stop))
      for (int64_t n = start; n < stop; ++n) hidden_layer(gated ? &gate : nullptr, up, b.activation, own.in[gate_kind], own.in[up_kind], c.batch, hidden, n);
    team.barrier();
    const Site *sites[] = {&down};
    float *out[] = {second};
    products(sites, out, 1, hidden, static_cast<size_t>(up.ready.m->rows), own, next[1], thread, team);
    team.barrier();
    add(residual, second, b.mlp_post, spare);
  }

  void mixture(const rg_block &b, const float *x, float *residual, float *spare, Prepared &own, rg::Share *next, int thread, rg::Team &team) {
    const Site router(b.router);
    const Site *sites[] = {&router};
    float *out[] = {routed};
    products(sites, out, 1, x, static_cast<size_t>(p.hidden), own, next[0], thread, team);
    team.barrier();
    const int used = b.experts_used;
    const rg_site &like = b.experts[1];
    const Site shape(like);
    const int64_t panels = shape.ready.l.panels, down_panels = (p.hidden + PANEL - 1) / PANEL;
    int which[MOST * USED];
    float weight[MOST * USED];
    for (int t = 0; t < c.batch; ++t) choose(b, routed + static_cast<size_t>(t) * b.expert_count, which + t * used, weight + t * used);
    own.restart();
    int64_t start, stop;
    const int64_t all = static_cast<int64_t>(c.batch) * used;
    while (next[1].take(thread, team.threads, all * panels, 4, start, stop))
      for (int64_t n = start; n < stop; ++n) {
        const int64_t pair = n / panels;
        const int t = static_cast<int>(pair / used);
        const rg_site *expert = b.experts + 3 * which[pair];
        const Site gate(expert[expert[0].matrix.rows ? 0 : 1]), up(expert[1]);
        if (own.kinds > DISTINCT - 2) own.restart();
        const Inputs gate_in = alone(own.in[own.of(gate.ready, x, static_cast<size_t>(p.hidden), c.batch)][t / FEW], t % FEW);
        const Inputs up_in = alone(own.in[own.of(up.ready, x, static_cast<size_t>(p.hidden), c.batch)][t / FEW], t % FEW);
        hidden_layer(expert[0].matrix.rows ? &gate : nullptr, up, b.activation, &gate_in, &up_in, 1, hidden + static_cast<size_t>(pair) * up.ready.m->rows, n % panels);
      }
    team.barrier();
    int64_t pair = -1;
    Inputs in{};
    while (next[2].take(thread, team.threads, all * down_panels, 4, start, stop))
      for (int64_t n = start; n < stop; ++n) {
        const Site down(b.experts[3 * which[n / down_panels] + 2]);
        if (n / down_panels != pair) {
          pair = n / down_panels;
          prepare(hidden + static_cast<size_t>(pair) * down.ready.m->columns, *down.ready.m, down.ready.l, down.ready.activations, own.memory, in, 0);
        }
        each_panel(down, &in, 1, n % down_panels, [&](int, int rows, const float *values) {
          std::memcpy(second + static_cast<size_t>(pair) * p.hidden + (n % down_panels) * PANEL, values, static_cast<size_t>(rows) * 4);
        });
      }
    team.barrier();
    for (int t = 0; t < c.batch; ++t) {
      std::memset(spare, 0, static_cast<size_t>(p.hidden) * 4);
      for (int u = 0; u < used; ++u) {
        const float *y = second + static_cast<size_t>(t * used + u) * p.hidden;
        for (int i = 0; i < p.hidden; ++i) spare[i] += weight[t * used + u] * y[i];
      }
      if (b.mlp_post.kind) normalised(b.mlp_post, spare, spare);
      for (int i = 0; i < p.hidden; ++i) residual[static_cast<size_t>(t) * p.hidden + i] += spare[i];
    }
  }

  static constexpr int SHARES = 6;  // of a block: qkv, attention, o, and up to three of the feed-forward

  void go(int thread, rg::Team &team) {
    uint8_t *memory = scratch(private_bytes);
    if (!memory) failed.store(1);
    team.barrier();
    if (failed.load()) return;
    const size_t rows = static_cast<size_t>(c.batch) * p.hidden;
    float *x = reinterpret_cast<float *>(aligned(memory)), *normed = x + rows + PANEL, *spare = normed + rows + PANEL;
    float *scores = spare + p.hidden + PANEL;
    uint8_t *rest = aligned(reinterpret_cast<uint8_t *>(scores + 4 * (static_cast<size_t>(c.past) + 1 + PANEL)));
    Prepared own;
    own.memory = rest;
    std::memcpy(x, c.x, rows * 4);
    for (int i = 0; i < p.block_count; ++i) {
      const rg_block &b = p.blocks[i];
      rg::Share *next = shares + static_cast<size_t>(i) * SHARES;
      norm_all(b.attn_norm, x, normed);
      {
        const Site sq(b.q), sk(b.k), sv(b.v);
        const Site *sites[] = {&sq, &sk, &sv};
        float *out[] = {q, k, v};
        products(sites, out, 3, normed, static_cast<size_t>(p.hidden), own, next[0], thread, team);
      }
      team.barrier();
      attention(b, next[1], scores, thread, team);
      team.barrier();
      {
        const Site so(b.o);
        const Site *sites[] = {&so};
        float *out[] = {first};
        products(sites, out, 1, mixed, static_cast<size_t>(b.heads) * b.head_dim, own, next[2], thread, team);
      }
      if (b.parallel) norm_all(b.mlp_norm, x, normed);
      team.barrier();
      add(x, first, b.attn_post, spare);
      if (!b.parallel) norm_all(b.mlp_norm, x, normed);
      if (b.expert_count) mixture(b, normed, x, spare, own, next + 3, thread, team);
      else dense(b, normed, x, spare, own, next + 3, thread, team);
    }
    norm_all(p.norm, x, normed);
    if (!p.head.matrix.rows) {
      if (thread == 0) std::memcpy(c.logits, normed, rows * 4);
      return;
    }
    const Site head(p.head);
    const Site *sites[] = {&head};
    float *out[] = {c.logits};
    products(sites, out, 1, normed, static_cast<size_t>(p.hidden), own, shares[static_cast<size_t>(p.block_count) * SHARES], thread, team);
    if (p.head_softcap > 0) {
      team.barrier();
      int64_t start, stop;
      const int64_t all = static_cast<int64_t>(c.batch) * p.head.matrix.rows;
      while (shares[static_cast<size_t>(p.block_count) * SHARES + 1].take(thread, team.threads, all, 1024, start, stop))
        for (int64_t n = start; n < stop; ++n) c.logits[n] = softcapped(c.logits[n], p.head_softcap);
    }
  }
};

inline int step(const rg_program *program, const rg_call *call, int threads) {
  Stepper s(*program, *call, threads);
  if (!s.measure()) return 2;
  s.threads = threads = worth(threads, s.weights / (8 * static_cast<size_t>(program->block_count) + 1));
  const size_t count = static_cast<size_t>(program->block_count) * Stepper::SHARES + 2;
  const size_t floats = s.shared_floats() * 4 + 1024;
  uint8_t *memory = scratch<1>(floats + count * sizeof(rg::Share) + 128);
  if (!memory) return 1;
  uint8_t *at = aligned(memory);
  s.lay_out(reinterpret_cast<float *>(at));
  s.shares = reinterpret_cast<rg::Share *>(at + (floats + 63) / 64 * 64 - 64);
  for (size_t i = 0; i < count; ++i) new (s.shares + i) rg::Share();
  rg::parallel(threads, [&](int thread, rg::Team &team) { s.go(thread, team); });
  return s.failed.load();
}

}  // namespace
