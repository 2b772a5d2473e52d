// Attention of some queries over what a store holds of one key-value head: packed parts, then the window, in one pass.
//
// Tokens come in chunks: scores of a chunk, their exponentials against the greatest score so far, and the chunk's values by
// them, which is brought into line with what came before (online softmax). A chunk stays in a core's second-level cache while
// all queries read it. A head's chunks are cut into pieces for several threads; who finishes a head's last piece adds them up.
//
// Floor: every byte of the parts and of the window once for each four queries of a head.
#pragma once
#include <atomic>

#include "store.h"

namespace {

constexpr int NEW_ROWS = 64;         // new tokens, which stay in one chunk
constexpr int SCORE_ROW = MOST_BLOCK + NEW_ROWS + PANEL;
constexpr float NOTHING = -3e38f;    // the score of a token that does not count
constexpr float LEAST = -1e30f;      // the greatest score of none

// One head of a store, and how its queries read it.
struct Head {
  const rg_store &s;
  int index;         // sequence * kv_heads + head
  int channels, wide;
  int held, first;   // rows of the window, the new ones too; the first that counts for any query
  int row;           // of the first new token
  int fresh;         // the last rows, which the thread that reads them has written
  int window, all;   // as in rg_attention
  float softcap;

  Rows rows(bool values) const {
    const int dtype = values ? s.values_dtype : s.keys_dtype;
    const uint8_t *memory = static_cast<const uint8_t *>(values ? s.values : s.keys);
    const size_t head = static_cast<size_t>(s.room) * channels * number_bytes(dtype);
    return {memory + static_cast<size_t>(index) * head, dtype, channels, wide};
  }

  int window_chunks() const { return ::window_chunks(held - fresh - first); }
  int chunks() const {
    int n = window_chunks();
    for (int i = 0; i < s.part_count; ++i) n += chunks_of(s.parts[i], static_cast<size_t>(index));
    return n;
  }
};

// Keys or values of a head in a part, or in its window (blocks of one row).
struct Side {
  rg_blocks own;
  Coded c;
  const uint8_t *data;

  Side(const rg_part &p, bool values, size_t index, int d)
      : own(values ? p.values : p.keys), c(own, values, p.tokens, d), data(own.blocks + own.offsets[index]) {}
  Side(const Rows &r, bool values) : own(of_rows(r)), c(own, values, 1, r.channels), data(r.data) {}
  Side(const Side &) = delete;

  static rg_blocks of_rows(const Rows &r) {
    rg_blocks b{};
    b.bits = 16, b.dtype = r.dtype;
    return b;
  }
  bool floats() const { return own.bits == 16; }
  Rows rows(int wide) const { return {data, own.dtype, c.channels, wide}; }
  const uint8_t *at(int token) const { return data + static_cast<size_t>(token / c.tokens) * c.block; }
  size_t bytes(int tokens) const { return static_cast<size_t>(tokens / c.tokens) * c.block; }
  // How often reading so many tokens asks for what comes next.
  int times(int tokens) const { return floats() ? (c.values ? tokens : tokens / 4) : 2 * (tokens / c.tokens) * (c.groups > 0 ? c.groups : 1); }
};

// Where the next tokens to read lie: in a part, or in the window (`part`: NULL).
struct Source {
  const rg_part *part;
  Side keys, values;
  int first, end, step;  // tokens: the first, the last, and those of a chunk

  Source(const Head &h, const rg_part &p)
      : part(&p), keys(p, false, static_cast<size_t>(h.index), h.channels), values(p, true, static_cast<size_t>(h.index), h.channels),
        first(skipped(p, static_cast<size_t>(h.index))), end(p.lengths[h.index]), step(per_chunk(p)) {}
  explicit Source(const Head &h) : part(nullptr), keys(h.rows(false), false), values(h.rows(true), true), first(h.first), end(h.held), step(CHUNK) {}
};

// A chunk: tokens [begin, end), and those of the next one where it is of the same source.
struct Span {
  int begin, end, next;
};

inline Span span_of(const Source &s, int chunk, int chunks) {
  const int begin = s.first + chunk * s.step, end = chunk + 1 == chunks ? s.end : begin + s.step, next = end + s.step;
  return {begin, end, next < s.end ? next : s.end};
}

// What a thread attends in: queries (scaled) and what is mixed for each, in rows of `wide`.
struct Bench {
  float *q, *out, *top, *sum, *scores, *own;
  Rounding rounding;

  static size_t bytes(int queries, int d) {
    const size_t wide = static_cast<size_t>((d + PANEL - 1) / PANEL * PANEL);
    return (static_cast<size_t>(queries) * (2 * wide + 2) + (TOGETHER + 1) * static_cast<size_t>(SCORE_ROW) + 6 * PANEL) * 4 + Rounding::bytes_of(d) + 128;
  }
  void lay_out(uint8_t *memory, int queries, int d) {
    const size_t wide = static_cast<size_t>((d + PANEL - 1) / PANEL * PANEL), n = static_cast<size_t>(queries);
    q = reinterpret_cast<float *>(aligned(memory));
    out = q + n * wide;
    scores = out + n * wide;
    own = scores + TOGETHER * static_cast<size_t>(SCORE_ROW);
    top = own + SCORE_ROW;
    sum = top + n;
    rounding.lay_out(reinterpret_cast<uint8_t *>(sum + n), d);
  }
};

// Scores s of n tokens, of which [low, high) count, become e^(score - top), 0 behind them to a whole vector; top, sum and
// what was mixed before are brought into line. `rows`: a multiplier a score.
inline void soften(float softcap, const float *rows, float *s, int n, int low, int high, float &top, float &sum, float *out, int wide) {
  const int padded = (n + PANEL - 1) / PANEL * PANEL;
  for (int t = n; t < padded; ++t) s[t] = NOTHING;
  if (rows)
    for (int t = 0; t < padded; t += PANEL) store_floats(s + t, load_floats(s + t) * load_floats(rows + t));
  if (softcap > 0)
    for (int t = 0; t < padded; t += PANEL) store_floats(s + t, set_floats(softcap) * hyperbolic_tangent(load_floats(s + t) * set_floats(1.0f / softcap)));
  for (int t = 0; t < low; ++t) s[t] = NOTHING;
  for (int t = high; t < padded; ++t) s[t] = NOTHING;
  Floats most = set_floats(top);
  for (int t = 0; t < padded; t += PANEL) most = maximum(most, load_floats(s + t));
  const float now = largest(most);
  if (now > top) {
    const float by = std::exp(top - now);
    for (int i = 0; i < wide; i += PANEL) store_floats(out + i, load_floats(out + i) * set_floats(by));
    sum *= by;
    top = now;
  }
  Floats all = zero_floats();
  for (int t = 0; t < padded; t += PANEL) {
    const Floats e = decayed(load_floats(s + t) - set_floats(top));
    store_floats(s + t, e);
    all = all + e;
  }
  for (int t = 0; t < low; ++t) s[t] = 0;
  for (int t = high; t < padded; ++t) s[t] = 0;
  sum += total(all);
}

// The rows of a window that new token j sees.
inline void seen_by(const Head &h, int j, int &from, int &to) {
  const int own = h.row + j, behind = h.window > 0 ? own + 1 - h.window : 0;
  from = behind > h.first ? behind : h.first;
  to = h.all ? h.held : own + 1;
}

// `count` queries from number `first` on (new token by new token, `group` heads each) read one span.
inline void read_span(const Head &h, const Source &from, const Span &span, Bench &w, int first, int count, int group) {
  const int n = span.end - span.begin;
  const float *q = w.q + static_cast<size_t>(first) * h.wide;
  float *out = w.out + static_cast<size_t>(first) * h.wide;
  const rg_part *p = from.part;
  const size_t index = static_cast<size_t>(h.index);
  int low[TOGETHER], high[TOGETHER], least = n, most = 0;
  for (int r = 0; r < count; ++r) {
    low[r] = 0, high[r] = n;
    if (p) {
      const int counts = p->firsts ? p->firsts[index] - span.begin : 0;
      low[r] = counts > 0 ? counts : 0;
    } else {
      int since, to;
      seen_by(h, (first + r) / group, since, to);
      low[r] = since > span.begin ? since - span.begin : 0;
      high[r] = to < span.end ? to - span.begin : n;
    }
    if (low[r] > high[r]) low[r] = high[r] > 0 ? high[r] : 0, high[r] = low[r];
    if (low[r] < high[r]) least = low[r] < least ? low[r] : least, most = high[r] > most ? high[r] : most;
  }
  if (least >= most) return;
  const Side &keys = from.keys, &values = from.values;
  w.rounding.ahead = Ahead();
  if (!first) w.rounding.ahead.look(values.at(span.begin), values.bytes(n), keys.times(n));
  if (keys.floats()) {
    score_rows(keys.rows(h.wide), span.begin, span.end, q, count, w.scores, SCORE_ROW, w.rounding.ahead);
  } else {
    w.rounding.row = Rounding::row_of(h.channels);
    score_blocks(keys.c, keys.at(span.begin), n / keys.c.tokens, q, count, w.rounding, w.scores, SCORE_ROW);
  }
  const size_t at = p && p->row_offsets ? static_cast<size_t>(p->row_offsets[index]) + static_cast<size_t>(span.begin) : 0;
  for (int r = 0; r < count; ++r) {
    float *s = w.scores + static_cast<size_t>(r) * SCORE_ROW;
    soften(h.softcap, p && p->keys.rows ? p->keys.rows + at : nullptr, s, n, low[r], high[r], w.top[first + r], w.sum[first + r], out + static_cast<size_t>(r) * h.wide, h.wide);
    if (p && p->values.rows)
      for (int t = 0; t < n; t += PANEL) store_floats(s + t, load_floats(s + t) * load_floats(p->values.rows + at + t));
  }
  w.rounding.ahead = Ahead();
  if (!first) w.rounding.ahead.look(keys.at(span.end), keys.bytes(span.next - span.end), values.times(n));
  if (values.floats()) {
    mix_rows(values.rows(h.wide), span.begin, span.end, w.scores, SCORE_ROW, count, out, w.rounding.ahead);
  } else {
    w.rounding.row = Rounding::chunk_row(h.channels);
    mix_blocks(values.c, values.at(span.begin), n, w.scores, SCORE_ROW, count, w.rounding, w.own, out);
  }
}

// All queries of a head read those of its chunks [begin, end) that are of this source, whose first is number `before`.
inline void read_source(const Head &h, const Source &from, Bench &w, int queries, int group, int before, int chunks, int begin, int end) {
  for (int chunk = begin > before ? begin - before : 0; chunk < chunks && chunk < end - before; ++chunk) {
    const Span span = span_of(from, chunk, chunks);
    for (int first = 0; first < queries; first += TOGETHER) read_span(h, from, span, w, first, queries - first < TOGETHER ? queries - first : TOGETHER, group);
  }
}

// All queries of a head read one of its pieces; afterwards `out` holds sums that are not divided yet.
inline void read_piece(const Head &h, Bench &w, int queries, int group, int piece, int pieces) {
  for (int i = 0; i < queries; ++i) w.top[i] = LEAST, w.sum[i] = 0;
  std::memset(w.out, 0, static_cast<size_t>(queries) * h.wide * 4);
  const int64_t all = h.chunks();
  const int begin = static_cast<int>(all * piece / pieces), end = static_cast<int>(all * (piece + 1) / pieces);
  int before = 0;
  for (int i = 0; i < h.s.part_count; ++i) {
    const int chunks = chunks_of(h.s.parts[i], static_cast<size_t>(h.index));
    if (begin < before + chunks && before < end) read_source(h, Source(h, h.s.parts[i]), w, queries, group, before, chunks, begin, end);
    before += chunks;
  }
  if (before < end) read_source(h, Source(h), w, queries, group, before, h.window_chunks(), begin, end);
}

// What the pieces of a head found. Of each piece: what was mixed, then the greatest score and the sum of each query.
struct Partials {
  float *memory;
  std::atomic<int> *done;  // pieces of each head
  static size_t floats(int queries, int wide) { return static_cast<size_t>(queries) * (static_cast<size_t>(wide) + 2); }

  void keep(const Bench &w, size_t slot, int queries, int wide) const {
    float *to = memory + slot * floats(queries, wide);
    const size_t mixed = static_cast<size_t>(queries) * wide;
    std::memcpy(to, w.out, mixed * 4);
    std::memcpy(to + mixed, w.top, static_cast<size_t>(queries) * 4);
    std::memcpy(to + mixed + queries, w.sum, static_cast<size_t>(queries) * 4);
  }

  // All pieces of a head, always in the same order, whoever read them.
  void add(Bench &w, size_t first_slot, int pieces, int queries, int wide) const {
    for (int i = 0; i < queries; ++i) w.top[i] = LEAST, w.sum[i] = 0;
    std::memset(w.out, 0, static_cast<size_t>(queries) * wide * 4);
    for (int piece = 0; piece < pieces; ++piece) {
      const float *from = memory + (first_slot + static_cast<size_t>(piece)) * floats(queries, wide), *top = from + static_cast<size_t>(queries) * wide, *sum = top + queries;
      for (int i = 0; i < queries; ++i) {
        const float most = top[i] > w.top[i] ? top[i] : w.top[i], mine = std::exp(w.top[i] - most), its = std::exp(top[i] - most);
        w.top[i] = most;
        w.sum[i] = w.sum[i] * mine + sum[i] * its;
        float *to = w.out + static_cast<size_t>(i) * wide;
        for (int c = 0; c < wide; c += PANEL) store_floats(to + c, fma(load_floats(to + c), set_floats(mine), load_floats(from + static_cast<size_t>(i) * wide + c) * set_floats(its)));
      }
    }
  }

  // After a piece was read: true where this thread has the whole of the head in its bench now.
  bool finished(Bench &w, const Head &h, int piece, int pieces, int queries, size_t slot_of_head) const {
    if (pieces == 1) return true;
    keep(w, slot_of_head * static_cast<size_t>(pieces) + static_cast<size_t>(piece), queries, h.wide);
    if (done[slot_of_head].fetch_add(1, std::memory_order_acq_rel) + 1 < pieces) return false;
    done[slot_of_head].store(0, std::memory_order_relaxed);
    add(w, slot_of_head * static_cast<size_t>(pieces), pieces, queries, h.wide);
    return true;
  }
};

// Into how many pieces heads are cut: `items` heads, the longest of so many chunks. Not by the number of threads, so that
// results do not depend on it.
inline int pieces_of(int items, int chunks) {
  int n = AT_ONCE / items;
  n = n < PIECES ? n : PIECES;
  n = n < chunks ? n : chunks;
  return n < 1 ? 1 : n;
}

// A query's sums, divided.
inline void divided(const Bench &w, const Head &h, int query, float *out) {
  const float by = w.sum[query] > 0 ? 1.0f / w.sum[query] : 0.0f, *from = w.out + static_cast<size_t>(query) * h.wide;
  for (int i = 0; i < h.channels; ++i) out[i] = from[i] * by;
}

}  // namespace
