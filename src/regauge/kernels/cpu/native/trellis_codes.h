// Where the codes of a trellis lie in a panel, and how they become bytes of values (trellis.h says what a trellis is).
//
// A word of one row is 64 bits, whose `fresh` bits of weight j begin at bit j * fresh. The words of 16 rows lie side by side:
// 128 bytes, row r in bytes 8r ... 8r + 7. Behind them, where there are plain bits, 64 bytes a run of 8 / plain steps for rows
// 0 ... 7, and as many for rows 8 ... 15: byte 8r + k holds those of weights 8s + k of its row, those of step s of a run in
// bits s * plain ... . So the windows of eight weights of eight rows come by one shift of each word, which turns round in 64
// bits as a word does, and their plain bits by one shift of bytes.
#pragma once
#include <cstring>

#include "regauge.h"

namespace {

constexpr int TRELLIS_ENTRIES = 128;  // of a table, one more float than which is kept: the unit
constexpr int ROWS_SIDE = 16;

struct TrellisKind {
  int window, fresh, plain, run, word_bytes;
  explicit TrellisKind(const rg_matrix &m)
      : window(m.mantissa), fresh(m.bits - m.bias), plain(m.bias), run(fresh > 0 ? 64 / fresh : 1), word_bytes(ROWS_SIDE * run * m.bits / 8) {}
};

inline bool sound_trellis_matrix(const rg_matrix &m) {
  if (!m.table || m.zero || m.offset != 128 || m.bias < 0 || m.bias >= m.bits || m.bits > 4) return false;
  const TrellisKind k(m);
  if (k.plain == 3 || 64 % k.fresh || k.window < k.fresh || k.window + k.plain != 7) return false;
  return m.group % k.run == 0;
}

// Byte and bit of the plain bits of weight j of row r, in a word's bytes.
inline int plain_byte(const TrellisKind &k, int r, int j) {
  const int step = j / 8, steps = 8 / k.plain, vectors = k.run / 8 / steps;
  return 128 + (r / 8 * vectors + step / steps) * 64 + r % 8 * 8 + j % 8;
}
inline int plain_bit(const TrellisKind &k, int j) { return j / 8 % (8 / k.plain) * k.plain; }

// The code of weight i of row r into a group's bytes, which are zero there.
inline void put_trellis(const TrellisKind &k, uint8_t *codes, int r, int i, unsigned code) {
  uint8_t *word = codes + i / k.run * k.word_bytes;
  const int j = i % k.run, bit = j * k.fresh;
  word[r * 8 + bit / 8] |= static_cast<uint8_t>((code & ((1u << k.fresh) - 1)) << bit % 8);
  if (k.plain) word[plain_byte(k, r, j)] |= static_cast<uint8_t>(code >> k.fresh << plain_bit(k, j));
}

inline unsigned get_trellis(const TrellisKind &k, const uint8_t *codes, int r, int i) {
  const uint8_t *word = codes + i / k.run * k.word_bytes;
  const int j = i % k.run, bit = j * k.fresh;
  unsigned code = word[r * 8 + bit / 8] >> bit % 8 & ((1u << k.fresh) - 1);
  if (k.plain) code |= (word[plain_byte(k, r, j)] >> plain_bit(k, j) & ((1u << k.plain) - 1)) << k.fresh;
  return code;
}

// Values as bytes: 128 more than the whole numbers of the table.
inline void trellis_bytes(const rg_matrix &m, uint8_t *bytes) {
  for (int i = 0; i < TRELLIS_ENTRIES; ++i) bytes[i] = static_cast<uint8_t>(128 + static_cast<int>(__builtin_rintf(m.table[i] * m.table[TRELLIS_ENTRIES])));
}

// The bytes of a group in steps of 16 rows x 4 inputs, as codes of 8 bits lie.
inline void spread_trellis(const TrellisKind &k, const uint8_t *bytes, const uint8_t *codes, int group, uint8_t *out) {
  const unsigned mask = (1u << k.window) - 1;
  for (int w = 0; w < group / k.run; ++w, codes += k.word_bytes)
    for (int r = 0; r < ROWS_SIDE; ++r) {
      uint64_t word;
      std::memcpy(&word, codes + r * 8, 8);
      for (int j = 0; j < k.run; ++j) {
        const int at = (j * k.fresh + k.fresh - k.window) & 63, i = w * k.run + j;
        unsigned entry = static_cast<unsigned>(word >> at | word << ((64 - at) & 63)) & mask;
        if (k.plain) entry |= static_cast<unsigned>(codes[plain_byte(k, r, j)] >> plain_bit(k, j) & ((1 << k.plain) - 1)) << k.window;
        out[i / 4 * 64 + r * 4 + i % 4] = bytes[entry];
      }
    }
}

}  // namespace
