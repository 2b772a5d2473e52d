// What a step needs to know before it runs: whether program, call and stores are sound, and how much memory they take.
#pragma once
#include "inputs.h"
#include "attend.h"

namespace {

constexpr int USED = 16;      // experts a token may use

struct Sizes {
  const rg_program &p;
  const rg_call &c;
  int count = 0;                // new tokens of all sequences
  size_t weights = 0;           // bytes of all matrices
  int ffn = 0, pairs = 1, heads_width = 0, kv_width = 0, experts = 0, channels = 0;
  int chunks = 1, queries = 1, head_most = 1;  // of attention: the longest head, queries of one head, its channels
  size_t heads_most = 1, partials = 0, cached = 0;  // heads of all sequences; floats of their pieces; bytes of all stores
  size_t rank = 0;              // the widest right x; 0: no site has a low-rank term
  size_t prepared_bytes = 0, private_bytes = 0, most = 0;
  bool worked = false;          // a tap transforms or rounds

  Sizes(const rg_program &program, const rg_call &call) : p(program), c(call) {}

  static int at_least(int a, int b) { return a > b ? a : b; }

  bool site(const rg_site &s, const rg_tap &t, int columns) {
    if (!s.matrix.rows) return true;
    const bool whole = s.matrix.value == RG_FULL;
    if (!(whole ? sound_full(s.matrix) : sound(s.matrix) && s.matrix.panels)) return false;
    if (s.matrix.columns != columns || !sound(t, columns)) return false;
    const int by = s.activations;
    if (!(by >= RG_INT8 && by <= RG_FLOAT32) && !(by >= RG_TOKEN + 2 && by <= RG_TOKEN + 8)) return false;
    const Layout l(s.matrix);
    weights += whole ? static_cast<size_t>(s.matrix.rows) * s.matrix.columns * 2 : l.read * static_cast<size_t>(l.panels);
    const size_t each = inputs_bytes(l);
    most = each > most ? each : most;
    worked = worked || !plain(t);
    channels = at_least(channels, columns);
    if (!s.low_rank) return true;
    const rg_matrix &left = s.low_rank->left, &right = s.low_rank->right;
    if (!sound_full(left) || !sound_full(right) || left.stride < 0 || right.stride < 0 || left.rows != s.matrix.rows || left.columns != right.rows || right.columns != columns) return false;
    const size_t width = (static_cast<size_t>(right.rows) + PANEL - 1) / PANEL * PANEL;
    rank = width > rank ? width : rank;
    return true;
  }

  // A norm of so many channels; one that may be absent has kind RG_NO_NORM then, and is not asked for its size.
  static bool norm(const rg_norm &n, int size, bool needed) {
    return n.kind >= RG_NO_NORM && n.kind <= RG_LAYER && (n.size == size || (!needed && n.kind == RG_NO_NORM));
  }

  bool norms(const rg_block &b) const {
    return norm(b.attn_norm, p.hidden, true) && norm(b.mlp_norm, p.hidden, true) && norm(b.attn_post, p.hidden, false) && norm(b.mlp_post, p.hidden, false) &&
           norm(b.q_norm, b.head_dim, false) && norm(b.k_norm, b.head_dim, false);
  }

  bool block(const rg_block &b) {
    if (!b.q.matrix.rows || !b.k.matrix.rows || !b.v.matrix.rows || !b.o.matrix.rows || b.kv_heads < 1 || b.heads < 1 || b.heads % b.kv_heads) return false;
    if (b.head_dim < 1 || static_cast<int64_t>(b.heads) * b.head_dim > MOST_COLUMNS || !norms(b)) return false;
    if (b.rotary < 0 || b.rotary > b.head_dim || b.rotary % 2 || (b.rotary && (b.rope < 0 || b.rope >= p.rope_count))) return false;
    if (b.activation < RG_SILU || b.activation > RG_QUICK_GELU || b.expert_count < 0 || (b.expert_count && !b.experts)) return false;
    const int width = b.heads * b.head_dim, kv = b.kv_heads * b.head_dim;
    if (b.q.matrix.rows != width || b.k.matrix.rows != kv || b.v.matrix.rows != kv || b.o.matrix.rows != p.hidden) return false;
    heads_width = at_least(heads_width, width);
    kv_width = at_least(kv_width, kv);
    if (!site(b.q, b.attn_in, p.hidden) || !site(b.k, b.attn_in, p.hidden) || !site(b.v, b.attn_in, p.hidden) || !site(b.o, b.attn_mixed, width)) return false;
    const int units = b.expert_count ? b.expert_count : 1;
    if (b.expert_count && (!site(b.router, b.mlp_in, p.hidden) || b.router.matrix.rows != b.expert_count || b.experts_used < 1 || b.experts_used > b.expert_count || b.experts_used > USED)) return false;
    experts = at_least(experts, b.expert_count);
    pairs = at_least(pairs, b.expert_count ? b.experts_used : 1);
    for (int e = 0; e < units; ++e) {
      const rg_site &gate = b.expert_count ? b.experts[3 * e] : b.gate, &up = b.expert_count ? b.experts[3 * e + 1] : b.up;
      const rg_site &down = b.expert_count ? b.experts[3 * e + 2] : b.down;
      if (!up.matrix.rows || !down.matrix.rows || down.matrix.rows != p.hidden || (gate.matrix.rows && gate.matrix.rows != up.matrix.rows)) return false;
      if (b.expert_count && up.matrix.rows != b.experts[1].matrix.rows) return false;
      if (!site(gate, b.mlp_in, p.hidden) || !site(up, b.mlp_in, p.hidden) || !site(down, b.mlp_hidden, up.matrix.rows)) return false;
      ffn = at_least(ffn, up.matrix.rows);
    }
    return true;
  }

  // A block's store, and what its attention takes.
  int store(const rg_store &s, const rg_block &b, int seen) {
    if (seen < 0 || s.origin < 0 || b.head_dim > MOST_CHANNELS) return RG_UNSOUND;
    Taken taken{};
    const int answer = check(s, c.batch, b.kv_heads, b.head_dim, b.window, seen - s.origin, c.tokens, c.starts, taken);
    chunks = at_least(chunks, taken.chunks);
    queries = at_least(queries, b.heads / b.kv_heads * c.tokens);
    head_most = at_least(head_most, b.head_dim);
    const size_t heads = static_cast<size_t>(c.batch) * b.kv_heads;
    heads_most = heads > heads_most ? heads : heads_most;
    cached += taken.bytes * heads;
    return answer;
  }

  void pieces(const rg_block &b) {
    const int heads = c.batch * b.kv_heads, n = pieces_of(heads, chunks), wide = (b.head_dim + PANEL - 1) / PANEL * PANEL;
    const size_t floats = n == 1 ? 0 : static_cast<size_t>(heads) * n * Partials::floats(b.heads / b.kv_heads * c.tokens, wide);
    partials = floats > partials ? floats : partials;
  }

  int measure() {
    if (c.batch < 1 || c.tokens < 1 || c.batch > MOST || c.tokens > MOST || c.batch * c.tokens > MOST) return RG_UNSOUND;
    count = c.batch * c.tokens;
    if (p.hidden < 1 || p.hidden > MOST_COLUMNS || p.block_count < 0 || p.rope_count < 0 || !norm(p.norm, p.hidden, true)) return RG_UNSOUND;
    if (!c.x || !c.logits || !c.positions || !c.starts || (p.block_count && (!p.blocks || !c.stores || !c.lengths)) || (p.rope_count && (!c.cosines || !c.sines))) return RG_UNSOUND;
    for (int t = 0; t < count; ++t)
      if (c.positions[t] < 0) return RG_UNSOUND;
    for (int s = 0; s < c.batch; ++s)
      if (c.starts[s] < 0) return RG_UNSOUND;
    for (int i = 0; i < p.block_count; ++i) {
      if (!block(p.blocks[i])) return RG_UNSOUND;
      const int answer = store(c.stores[i], p.blocks[i], c.lengths[i]);
      if (answer) return answer;
    }
    for (int i = 0; i < p.block_count; ++i) pieces(p.blocks[i]);
    if (!site(p.head, p.head_in, p.hidden)) return RG_UNSOUND;
    const size_t n = static_cast<size_t>(count);
    prepared_bytes = most * DISTINCT * (n + 1) * static_cast<size_t>(pairs) + 64;
    const size_t states = (2 * n + 1) * static_cast<size_t>(p.hidden) + 3 * PANEL;
    const size_t work = worked ? n * 3 * Prepared::work_row(channels) : 0;
    private_bytes = (states + work + 2 * rank) * 4 + bench_bytes() + prepared_bytes + 3 * 64;
    return RG_DONE;
  }

  size_t bench_bytes() const { return Bench::bytes(queries, head_most); }
  size_t partial_floats() const { return partials; }

  size_t shared_floats() const {
    const size_t b = static_cast<size_t>(count), n = static_cast<size_t>(pairs);
    return b * (2 * static_cast<size_t>(heads_width) + 2 * static_cast<size_t>(kv_width) + p.hidden + n * (static_cast<size_t>(ffn) + p.hidden) + experts + 3 * rank) + partials + 10 * PANEL;
  }
};

}  // namespace
