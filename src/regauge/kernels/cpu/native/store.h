// Where a store keeps what attention reads and a step writes.
#pragma once
#include "attention.h"
#include "mixing.h"

namespace {

constexpr int CHUNK = 256;           // tokens that are attended to at a time, if blocks are no longer
constexpr int PIECES = 16;           // of a head, at most
constexpr int AT_ONCE = 256;         // pieces of all heads, if there are no more heads

inline int number_bytes(int dtype) { return dtype == RG_F32 ? 4 : 2; }

// Rows of one (sequence, head) in the window: how many are held, and the first that counts.
struct Held {
  int rows, first;
};

// `seen`: rows held where the store does not say.
inline Held held(const rg_store &s, size_t at, int seen, int start) {
  const int from = start - s.origin;
  return {s.lengths ? s.lengths[at] : seen, s.firsts ? s.firsts[at] : from > 0 ? from : 0};
}

// The first row that a new token at `row` attends to.
inline int from_row(int window, const Held &h, int row) {
  const int behind = window > 0 ? row + 1 - window : 0;
  return behind > h.first ? behind : h.first;
}

inline int per_chunk(const rg_part &p) { return p.tokens * (p.tokens < CHUNK ? CHUNK / p.tokens : 1); }

// Tokens before the first block that counts.
inline int skipped(const rg_part &p, size_t at) { return p.firsts ? p.firsts[at] / p.tokens * p.tokens : 0; }

inline int chunks_of(const rg_part &p, size_t at) { return (p.lengths[at] - skipped(p, at) + per_chunk(p) - 1) / per_chunk(p); }

// The window's, whose last one holds the new rows too. `old`: rows before those that count.
inline int window_chunks(int old) { return old > CHUNK ? (old + CHUNK - 1) / CHUNK : 1; }

// What a store takes to read: the most chunks and the most bytes of a head.
struct Taken {
  int chunks;
  size_t bytes;
};

inline bool sound_part(const rg_part &p, size_t heads, int d) {
  if (p.tokens < PANEL || p.tokens > MOST_BLOCK || p.tokens % PANEL || d > MOST_CHANNELS || !p.lengths) return false;
  if (!sound(p.keys, p.tokens, d) || !sound(p.values, p.tokens, d)) return false;
  if ((p.keys.rows || p.values.rows) && !p.row_offsets) return false;
  for (size_t i = 0; i < heads; ++i) {
    if (p.lengths[i] < 0 || p.lengths[i] % p.tokens || p.keys.offsets[i] < 0 || p.values.offsets[i] < 0) return false;
    if ((p.firsts && (p.firsts[i] < 0 || p.firsts[i] > p.lengths[i])) || (p.row_offsets && p.row_offsets[i] < 0)) return false;
  }
  return true;
}

// Whether this store can be read, and written by `tokens` more rows. `seen`: rows held where the store does not say; each
// of `batch` sequences counts from its `start` on.
inline int check(const rg_store &s, int batch, int kv_heads, int d, int window, int seen, int tokens, const int32_t *starts, Taken &taken) {
  if (!s.keys || !s.values || s.origin < 0 || s.room < 0 || !sound_dtype(s.keys_dtype) || !sound_dtype(s.values_dtype)) return RG_UNSOUND;
  if (s.part_count < 0 || (s.part_count && !s.parts) || s.turned < 0 || s.turned > 3 || (s.turned && (d & (d - 1)))) return RG_UNSOUND;
  if (s.part_count && window) return RG_UNREAD;
  const size_t heads = static_cast<size_t>(batch) * kv_heads;
  for (int i = 0; i < s.part_count; ++i)
    if (!sound_part(s.parts[i], heads, d)) return RG_UNSOUND;
  for (size_t at = 0; at < heads; ++at) {
    const int start = starts[at / static_cast<size_t>(kv_heads)];
    // The first new token looks back furthest.
    const int furthest = window > 0 ? seen + s.origin + 1 - window : 0;
    if (!s.lengths && !s.part_count && s.origin > (furthest > start ? furthest : start)) return RG_GONE;
    const Held h = held(s, at, seen, start);
    if (h.rows < 0 || h.first < 0 || (h.first > h.rows && (s.lengths || s.firsts || !s.part_count))) return RG_UNSOUND;
    if (h.rows > s.room - tokens) return RG_FULL_STORE;
    Taken own{window_chunks(h.rows - from_row(window, h, h.rows)), static_cast<size_t>(h.rows) * d * (number_bytes(s.keys_dtype) + number_bytes(s.values_dtype))};
    for (int i = 0; i < s.part_count; ++i) {
      const rg_part &p = s.parts[i];
      own.chunks += chunks_of(p, at);
      const size_t each = Coded(p.keys, false, p.tokens, d).block + Coded(p.values, true, p.tokens, d).block;
      own.bytes += static_cast<size_t>(p.lengths[at] / p.tokens) * each;
    }
    taken.chunks = own.chunks > taken.chunks ? own.chunks : taken.chunks;
    taken.bytes = own.bytes > taken.bytes ? own.bytes : taken.bytes;
  }
  return RG_DONE;
}

}  // namespace
