// New tokens through every block, in one run of the threads.
//
// Each thread keeps its own copy of the residual and rounds its own inputs: a few microseconds of work twice over cost
// less than waiting for each other. Threads meet four times a block: after q k v, attention, o, and the hidden layer, and
// once more before a product with a low-rank term; what lies between is shared out by panels, or by key-value heads.
//
// Floor: every packed byte once for each four tokens (eight on AVX-512), and the cache once a token.
#pragma once
#include <new>

#include "work.h"

namespace {

struct Stepper : Work {
  using Work::Work;

  void turn(const rg_block &b, const rg_norm &n, size_t token, float *head) const {
    const size_t at = static_cast<size_t>(c.positions[token]) * (b.rotary / 2);
    if (n.kind) normalised(n, head, head);
    if (b.rotary) turned(head, b, c.cosines[b.rope] + at, c.sines[b.rope] + at);
  }

  // Keys and values of the new tokens, into the rows of a head.
  void write(const rg_block &b, const rg_store &s, int sequence, int h, int row) const {
    const int d = b.head_dim;
    const int64_t first = (static_cast<int64_t>(sequence) * b.kv_heads + h) * s.room + row;
    for (int j = 0; j < c.tokens; ++j) {
      const size_t t = static_cast<size_t>(sequence) * c.tokens + j, at = (t * b.kv_heads + static_cast<size_t>(h)) * d;
      turn(b, b.k_norm, t, k + at);
      if (s.turned & 1) hadamard(k + at, d);
      if (s.turned & 2) hadamard(v + at, d);
      store_row(s.keys, (first + j) * d, d, s.keys_dtype, k + at);
      store_row(s.values, (first + j) * d, d, s.values_dtype, v + at);
    }
  }

  // Each new token attends to all that its sequence's store holds before it, and to itself. Who reads the end of a head's
  // window writes the new rows there first.
  void attention(int number, rg::Share &share, Bench &w, int thread, rg::Team &team) const {
    const rg_block &b = p.blocks[number];
    const rg_store &s = c.stores[number];
    const int group = b.heads / b.kv_heads, d = b.head_dim, wide = (d + PANEL - 1) / PANEL * PANEL, queries = group * c.tokens;
    const int pieces = pieces_of(c.batch * b.kv_heads, z.chunks);
    const Partials partials{partial, done};
    int64_t item, stop;
    while (share.take(thread, team.threads, static_cast<int64_t>(c.batch) * b.kv_heads * pieces, 1, item, stop)) {
      const int index = static_cast<int>(item / pieces), piece = static_cast<int>(item % pieces), sequence = index / b.kv_heads, head = index % b.kv_heads;
      const Held now = held(s, static_cast<size_t>(index), c.lengths[number] - s.origin, c.starts[sequence]);
      if (piece + 1 == pieces) write(b, s, sequence, head, now.rows);
      const size_t first = static_cast<size_t>(head) * group * d;
      for (int i = 0; i < queries; ++i) {
        const size_t t = static_cast<size_t>(sequence) * c.tokens + i / group;
        float *own = w.q + static_cast<size_t>(i) * wide;
        std::memcpy(own, q + t * b.heads * d + first + static_cast<size_t>(i % group) * d, static_cast<size_t>(d) * 4);
        std::memset(own + d, 0, static_cast<size_t>(wide - d) * 4);
        turn(b, b.q_norm, t, own);
        if (s.turned & 1) hadamard(own, d);
        for (int k = 0; k < d; ++k) own[k] *= b.scale;
      }
      const Head h{s, index, d, wide, now.rows + c.tokens, from_row(b.window, now, now.rows), now.rows, c.tokens, b.window, 0, b.softcap};
      read_piece(h, w, queries, group, piece, pieces);
      if (!partials.finished(w, h, piece, pieces, queries, static_cast<size_t>(index))) continue;
      for (int i = 0; i < queries; ++i) {
        const size_t t = static_cast<size_t>(sequence) * c.tokens + i / group;
        float *to = mixed + t * b.heads * d + first + static_cast<size_t>(i % group) * d;
        divided(w, h, i, to);
        if (s.turned & 2) hadamard(to, d);
      }
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

  void dense(const rg_block &b, const float *x, float *residual, float *spare, Prepared &own, rg::Share *next, int thread, rg::Team &team) const {
    const bool gated = b.gate.matrix.rows > 0;
    Site gate(gated ? b.gate : b.up, b.mlp_in), up(b.up, b.mlp_in), down(b.down, b.mlp_hidden);
    own.restart(b.mlp_in, x, static_cast<size_t>(p.hidden), p.hidden, count);
    const int up_kind = own.of(up), gate_kind = gated ? own.of(gate) : 0;
    Site *pair[] = {&up, &gate};
    if (z.rank) narrow(pair, gated ? 2 : 1, own, next + (SHARES - 3 + 2), thread, team);
    int64_t start, stop;
    const int64_t chunk = threads == 1 ? up.ready.l.panels : (panels_at_once(up.ready.l, threads) + 1) / (gated ? 2 : 1);
    while (next[0].take(thread, team.threads, up.ready.l.panels, chunk > 0 ? chunk : 1, start, stop))
      hidden_layers(gated ? &gate : nullptr, up, b.activation, own.in[gate_kind], own.in[up_kind], count, hidden, start, stop);
    team.barrier();
    Site *sites[] = {&down};
    float *out[] = {second};
    own.restart(b.mlp_hidden, hidden, static_cast<size_t>(up.ready.m->rows), up.ready.m->rows, count);
    products(sites, out, 1, own, next[1], next + (SHARES - 3 + 3), thread, team);
    team.barrier();
    add(residual, second, b.mlp_post, spare);
  }

  // right x of an expert's site for one token, by the thread that needs it.
  static void narrow_alone(Site &s, Prepared &own, int token, float *to) {
    if (!s.low) return;
    for (int64_t panel = 0; panel * PANEL < s.low->right.rows; ++panel) own.narrow(s, panel, token, 1, to);
    s.narrowed = to;
  }

  void mixture(const rg_block &b, const float *x, float *residual, float *spare, Prepared &own, float *narrow_own, rg::Share *next, int thread, rg::Team &team) const {
    Site router(b.router, b.mlp_in);
    Site *sites[] = {&router};
    float *out[] = {routed};
    own.restart(b.mlp_in, x, static_cast<size_t>(p.hidden), p.hidden, count);
    products(sites, out, 1, own, next[0], next + (SHARES - 3 + 2), thread, team);
    team.barrier();
    const int used = b.experts_used;
    const int64_t panels = (b.experts[1].matrix.rows + PANEL - 1) / PANEL, down_panels = (p.hidden + PANEL - 1) / PANEL;
    int which[MOST * USED];
    float weight[MOST * USED];
    for (int t = 0; t < count; ++t) choose(b, routed + static_cast<size_t>(t) * b.expert_count, which + t * used, weight + t * used);
    own.again();
    int64_t start, stop;
    const int64_t all = static_cast<int64_t>(count) * used;
    while (next[1].take(thread, team.threads, all * panels, 4, start, stop))
      for (int64_t n = start; n < stop; ++n) {
        const int64_t pair = n / panels;
        const int t = static_cast<int>(pair / used);
        const rg_site *expert = b.experts + 3 * which[pair];
        Site gate(expert[expert[0].matrix.rows ? 0 : 1], b.mlp_in), up(expert[1], b.mlp_in);
        if (own.kinds > DISTINCT - 2) own.again();
        const Inputs gate_in = alone(own.in[own.of(gate)][t / FEW], t % FEW), up_in = alone(own.in[own.of(up)][t / FEW], t % FEW);
        narrow_alone(gate, own, t, narrow_own);
        narrow_alone(up, own, t, narrow_own + z.rank);
        hidden_layer(expert[0].matrix.rows ? &gate : nullptr, up, b.activation, &gate_in, &up_in, 1, hidden + static_cast<size_t>(pair) * up.ready.m->rows, n % panels, n % panels + 1);
      }
    team.barrier();
    int64_t pair = -1;
    int kind = 0;
    while (next[2].take(thread, team.threads, all * down_panels, 4, start, stop))
      for (int64_t n = start; n < stop; ++n) {
        Site down(b.experts[3 * which[n / down_panels] + 2], b.mlp_hidden);
        const int columns = down.ready.m->columns;
        if (n / down_panels != pair) {
          pair = n / down_panels;
          own.restart(b.mlp_hidden, hidden + static_cast<size_t>(pair) * columns, static_cast<size_t>(columns), columns, 1);
          kind = own.of(down);
        }
        narrow_alone(down, own, 0, narrow_own);
        each_panel(down, own.in[kind], 1, n % down_panels, n % down_panels + 1, [&](int64_t, int, int rows, const float *values) {
          std::memcpy(second + static_cast<size_t>(pair) * p.hidden + (n % down_panels) * PANEL, values, static_cast<size_t>(rows) * 4);
        });
      }
    team.barrier();
    for (int t = 0; t < count; ++t) {
      std::memset(spare, 0, static_cast<size_t>(p.hidden) * 4);
      for (int u = 0; u < used; ++u) {
        const float *y = second + static_cast<size_t>(t * used + u) * p.hidden;
        for (int i = 0; i < p.hidden; ++i) spare[i] += weight[t * used + u] * y[i];
      }
      if (b.mlp_post.kind) normalised(b.mlp_post, spare, spare);
      for (int i = 0; i < p.hidden; ++i) residual[static_cast<size_t>(t) * p.hidden + i] += spare[i];
    }
  }

  void go(int thread, rg::Team &team) {
    uint8_t *memory = scratch(z.private_bytes);
    if (!memory) failed.store(1);
    team.barrier();
    if (failed.load()) return;
    const size_t rows = static_cast<size_t>(count) * p.hidden;
    float *x = reinterpret_cast<float *>(aligned(memory)), *normed = x + rows + PANEL, *spare = normed + rows + PANEL;
    float *narrow_own = spare + p.hidden + PANEL;
    Bench bench;
    bench.lay_out(reinterpret_cast<uint8_t *>(narrow_own + 2 * z.rank), z.queries, z.head_most);
    Prepared own;
    own.work = reinterpret_cast<float *>(aligned(reinterpret_cast<uint8_t *>(narrow_own + 2 * z.rank) + z.bench_bytes()));
    own.memory = aligned(reinterpret_cast<uint8_t *>(own.work + (z.worked ? static_cast<size_t>(count) * 3 * Prepared::work_row(z.channels) : 0)));
    std::memcpy(x, c.x, rows * 4);
    for (int i = 0; i < p.block_count; ++i) {
      const rg_block &b = p.blocks[i];
      rg::Share *next = shares + static_cast<size_t>(i) * shares_a_block, *low = next + SHARES;
      norm_all(b.attn_norm, x, normed);
      {
        Site sq(b.q, b.attn_in), sk(b.k, b.attn_in), sv(b.v, b.attn_in);
        Site *sites[] = {&sq, &sk, &sv};
        float *out[] = {q, k, v};
        own.restart(b.attn_in, normed, static_cast<size_t>(p.hidden), p.hidden, count);
        products(sites, out, 3, own, next[0], low, thread, team);
      }
      team.barrier();
      attention(i, next[1], bench, thread, team);
      team.barrier();
      {
        Site so(b.o, b.attn_mixed);
        Site *sites[] = {&so};
        float *out[] = {first};
        const int width = b.heads * b.head_dim;
        own.restart(b.attn_mixed, mixed, static_cast<size_t>(width), width, count);
        products(sites, out, 1, own, next[2], low + 1, thread, team);
      }
      if (b.parallel) norm_all(b.mlp_norm, x, normed);
      team.barrier();
      add(x, first, b.attn_post, spare);
      if (!b.parallel) norm_all(b.mlp_norm, x, normed);
      if (b.expert_count) mixture(b, normed, x, spare, own, narrow_own, next + 3, thread, team);
      else dense(b, normed, x, spare, own, next + 3, thread, team);
    }
    rg::Share *next = shares + static_cast<size_t>(p.block_count) * shares_a_block;
    finish(x, normed, own, next, thread, team);
  }

  // The last norm and the head, of all tokens or of the last of each sequence.
  void finish(float *x, float *normed, Prepared &own, rg::Share *next, int thread, rg::Team &team) const {
    const int told = c.last ? c.batch : count, each = c.last ? c.tokens : 1;
    const size_t hidden_row = static_cast<size_t>(p.hidden);
    for (int t = 0; t < told; ++t) normalised(p.norm, x + (static_cast<size_t>(t + 1) * each - 1) * hidden_row, normed + static_cast<size_t>(t) * hidden_row);
    if (!p.head.matrix.rows) {
      if (thread == 0) std::memcpy(c.logits, normed, static_cast<size_t>(told) * hidden_row * 4);
      return;
    }
    Site head(p.head, p.head_in);
    Site *sites[] = {&head};
    float *out[] = {c.logits};
    own.restart(p.head_in, normed, hidden_row, p.hidden, told);
    products(sites, out, 1, own, next[0], next + 2, thread, team);
    if (!(p.head_softcap > 0)) return;
    team.barrier();
    int64_t start, stop;
    const int64_t all = static_cast<int64_t>(told) * p.head.matrix.rows;
    while (next[1].take(thread, team.threads, all, 1024, start, stop))
      for (int64_t n = start; n < stop; ++n) c.logits[n] = softcapped(c.logits[n], p.head_softcap);
  }
};

inline int step(const rg_program *program, const rg_call *call, int threads) {
  Sizes z(*program, *call);
  const int answer = z.measure();
  if (answer) return answer;
  Stepper s(z, worth(threads, (z.weights + z.cached) / (8 * static_cast<size_t>(program->block_count) + 1)));
  const size_t count = static_cast<size_t>(program->block_count) * s.shares_a_block + 3;
  const size_t floats = z.shared_floats() * 4 + 1024, counts = z.heads_most * sizeof(std::atomic<int>);
  uint8_t *memory = scratch<1>(floats + count * sizeof(rg::Share) + 192 + counts);
  if (!memory) return RG_NO_MEMORY;
  uint8_t *at = aligned(memory);
  s.lay_out(reinterpret_cast<float *>(at));
  s.shares = reinterpret_cast<rg::Share *>(at + (floats + 63) / 64 * 64 - 64);
  for (size_t i = 0; i < count; ++i) new (s.shares + i) rg::Share();
  s.done = reinterpret_cast<std::atomic<int> *>(s.shares + count);
  for (size_t i = 0; i < z.heads_most; ++i) new (s.done + i) std::atomic<int>(0);
  rg::parallel(s.threads, [&](int thread, rg::Team &team) { s.go(thread, team); });
  return s.failed.load() ? RG_NO_MEMORY : RG_DONE;
}

}  // namespace
