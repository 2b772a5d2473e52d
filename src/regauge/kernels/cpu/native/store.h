// Where a store keeps what a step reads and writes.
#pragma once
#include "attention.h"

namespace {

inline int number_bytes(int dtype) { return dtype == RG_F32 ? 4 : 2; }

// Rows of one (sequence, head): how many are held, and the first that counts.
struct Held {
  int rows, first;
};

inline Held held(const rg_call &c, int block, const rg_block &b, int sequence, int head) {
  const rg_store &s = c.stores[block];
  const size_t at = static_cast<size_t>(sequence) * b.kv_heads + head;
  const int start = c.starts[sequence] - s.origin;
  return {s.lengths ? s.lengths[at] : c.lengths[block] - s.origin, s.firsts ? s.firsts[at] : start > 0 ? start : 0};
}

// The first row that a new token at `row` attends to.
inline int from_row(const rg_block &b, const Held &h, int row) {
  const int behind = b.window > 0 ? row + 1 - b.window : 0;
  return behind > h.first ? behind : h.first;
}

// Whether a step can read and write this store; `rows`: at least as many as any head will hold.
inline int check(const rg_call &c, int block, const rg_block &b, int &rows) {
  const rg_store &s = c.stores[block];
  if (s.packed_keys.codes || s.packed_values.codes) return RG_UNREAD;
  if (!s.keys || !s.values || s.origin < 0 || c.lengths[block] < 0 || s.room < 0 || !sound_dtype(s.keys_dtype) || !sound_dtype(s.values_dtype)) return RG_UNSOUND;
  for (int t = 0; t < c.batch; ++t) {
    // The first new token looks back furthest.
    const int furthest = b.window > 0 ? c.lengths[block] + 1 - b.window : 0;
    if (!s.lengths && s.origin > (furthest > c.starts[t] ? furthest : c.starts[t])) return RG_GONE;
    for (int head = 0; head < (s.lengths || s.firsts ? b.kv_heads : 1); ++head) {
      const Held h = held(c, block, b, t, head);
      if (h.rows < 0 || h.first < 0 || h.first > h.rows) return RG_UNSOUND;
      if (h.rows > s.room - c.tokens) return RG_FULL_STORE;
      rows = h.rows + c.tokens > rows ? h.rows + c.tokens : rows;
    }
  }
  return RG_DONE;
}

}  // namespace
