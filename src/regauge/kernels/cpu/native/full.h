// Matrices that are not packed: row by row, or column by column where the first columns are a matrix that is read alone too.
#pragma once
#include "tokens.h"

namespace {

// Bytes of so many numbers of a matrix in full precision.
inline size_t full_bytes(const rg_matrix &m, int64_t numbers) { return static_cast<size_t>(numbers) * (m.bits == RG_F32 ? 4 : 2); }

// From row to row of a matrix in full precision.
inline size_t full_row_bytes(const rg_matrix &m) {
  return m.stride ? static_cast<size_t>(m.stride) : full_bytes(m, m.columns);
}

// Whether its columns lie one behind another, and not its rows.
inline bool by_columns(const rg_matrix &m) { return m.value == RG_FULL && m.stride < 0; }

inline float full_value(const rg_matrix &m, const uint8_t *row, int column) {
  float value;
  if (m.bits == RG_F32) {
    std::memcpy(&value, row + 4 * column, 4);
    return value;
  }
  uint16_t half = 0;
  std::memcpy(&half, row + 2 * column, 2);
  return m.bits == RG_BF16 ? bf16_to_float(half) : half_to_float(half);
}

// f(what loads sixteen numbers of a matrix in full precision).
template <class F>
RG_INLINE void with_load(const rg_matrix &m, F &&f) {
  if (m.bits == RG_F32) return f([](const uint8_t *p) __attribute__((always_inline)) { return load_floats(reinterpret_cast<const float *>(p)); });
  if (m.bits == RG_BF16) return f([](const uint8_t *p) __attribute__((always_inline)) { return load_bf16(p); });
  f([](const uint8_t *p) __attribute__((always_inline)) { return load_half(p); });
}

// ROWS rows, `apart` bytes from each other, by MR tokens: four sums each, so that additions do not wait for each other. out: from row
// to row `next` floats, from token to token PANEL.
template <int ROWS, int MR, class Load>
RG_INLINE void full_product(const rg_matrix &m, const uint8_t *w, size_t apart, const float *const *x, float *out, size_t next, Load &&load) {
  const size_t size = full_bytes(m, 1);
  const int columns = m.columns;
  Floats sum[ROWS][MR][4];
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < MR; ++t) sum[r][t][0] = sum[r][t][1] = sum[r][t][2] = sum[r][t][3] = zero_floats();
  const auto add = [&](int i, int k) __attribute__((always_inline)) {
    for (int r = 0; r < ROWS; ++r) {
      const Floats part = load(w + r * apart + i * size);
      for (int t = 0; t < MR; ++t) sum[r][t][k] = fma(part, load_floats(x[t] + i), sum[r][t][k]);
    }
  };
  int i = 0;
  for (; i + 4 * PANEL <= columns; i += 4 * PANEL) add(i, 0), add(i + PANEL, 1), add(i + 2 * PANEL, 2), add(i + 3 * PANEL, 3);
  for (; i + PANEL <= columns; i += PANEL) add(i, 0);
  for (int r = 0; r < ROWS; ++r)
    for (int t = 0; t < MR; ++t) {
      float rest = 0;
      for (int k = i; k < columns; ++k) rest += full_value(m, w + r * apart, k) * x[t][k];
      out[r * next + t * PANEL] = total((sum[r][t][0] + sum[r][t][1]) + (sum[r][t][2] + sum[r][t][3])) + rest;
    }
}

// So many rows by a few tokens.
template <int ROWS, class Load>
RG_INLINE void full_row(const rg_matrix &m, const uint8_t *w, size_t apart, const Inputs &in, int count, float *out, size_t next, Load &&load) {
  if (count == 1) return full_product<ROWS, 1>(m, w, apart, in.floats, out, next, load);
  int t = 0;
  for (; t + 4 <= count; t += 4)
    for (int r = 0; r < ROWS; ++r) full_product<1, 4>(m, w + r * apart, 0, in.floats + t, out + r * next + t * PANEL, 0, load);
  for (; t + 2 <= count; t += 2) full_product<ROWS, 2>(m, w, apart, in.floats + t, out + t * PANEL, next, load);
  if (t < count) full_product<ROWS, 1>(m, w, apart, in.floats + t, out + t * PANEL, next, load);
}

constexpr int APART = 2;  // rows far from each other that are read side by side

// Rows of panels [start, stop): out (panels, each, 16). One row behind another is a single stream of memory, which waits at each
// page; two streams wait in turn.
inline void full_rows(const rg_matrix &m, int64_t start, int64_t stop, const Inputs &in, int count, int each, float *out) {
  const int64_t whole = m.rows / PANEL < stop ? m.rows / PANEL : stop, panels = whole > start ? (whole - start) / APART : 0;
  const size_t bytes = full_row_bytes(m), hop = static_cast<size_t>(panels) * PANEL, next = static_cast<size_t>(panels * each) * PANEL;
  const auto at = [&](int64_t row) { return out + row / PANEL * each * PANEL + row % PANEL; };
  const uint8_t *w = m.panels + static_cast<size_t>(start) * PANEL * bytes;
  const int64_t rows = (stop - start) * PANEL, there = m.rows - start * PANEL < rows ? m.rows - start * PANEL : rows;
  with_load(m, [&](auto &&load) __attribute__((always_inline)) {
    for (int64_t row = 0; row < panels * PANEL; ++row) full_row<APART>(m, w + static_cast<size_t>(row) * bytes, hop * bytes, in, count, at(row), next, load);
    for (int64_t row = panels * PANEL * APART; row < there; ++row) full_row<1>(m, w + static_cast<size_t>(row) * bytes, 0, in, count, at(row), 0, load);
  });
  for (int64_t row = there; row < rows; ++row)
    for (int t = 0; t < count; ++t) at(row)[t * PANEL] = 0;
}

constexpr int STREAMS = 8;  // columns that are read side by side: as many streams of memory as a core follows

// Adds `some` <= STREAMS columns times x (tokens, STREAMS) to sums (panels, each, 16) of a few tokens, or begins them. The columns are
// added to each other first, so that sums of a long row lose little.
template <bool ALL, class Load>
RG_INLINE void columns_product(const uint8_t *w, size_t hop, size_t apart, int some, int64_t panels, const float (*x)[STREAMS], int count, int each, bool begun,
                               float *out, Load &&load) {
  for (int64_t p = 0; p < panels; ++p, w += hop, out += each * PANEL) {
    Floats column[STREAMS];
    for (int k = 0; k < (ALL ? STREAMS : some); ++k) column[k] = load(w + static_cast<size_t>(k) * apart);
    for (int t = 0; t < count; ++t) {
      Floats sum = zero_floats();  // of two products a compiler may round either, and so not the same each time
      for (int k = 0; k < (ALL ? STREAMS : some); ++k) sum = fma(column[k], set_floats(x[t][k]), sum);
      store_floats(out + t * PANEL, begun ? load_floats(out + t * PANEL) + sum : sum);
    }
  }
}

// Rows of panels [start, stop): out (panels, each, 16). Columns are taken STREAMS, in their order, whatever rows are asked for.
template <class Load>
inline void columns_of(const rg_matrix &m, int64_t start, int64_t stop, const Inputs &in, int count, int each, float *out, Load &&load) {
  const size_t apart = static_cast<size_t>(-m.stride), hop = full_bytes(m, PANEL);
  const int64_t whole = m.rows / PANEL < stop ? m.rows / PANEL : stop;  // panels of sixteen rows
  for (int column = 0; column < m.columns; column += STREAMS) {
    const int some = m.columns - column < STREAMS ? m.columns - column : STREAMS;
    float x[FEW][STREAMS] = {};
    for (int t = 0; t < count; ++t) std::memcpy(x[t], in.floats[t] + column, static_cast<size_t>(some) * 4);
    const uint8_t *w = m.panels + static_cast<size_t>(column) * apart;
    const bool begun = column > 0;
    if (some < STREAMS) columns_product<false>(w + static_cast<size_t>(start) * hop, hop, apart, some, whole - start, x, count, each, begun, out, load);
    else if (count == 1) columns_product<true>(w + static_cast<size_t>(start) * hop, hop, apart, some, whole - start, x, 1, each, begun, out, load);
    else columns_product<true>(w + static_cast<size_t>(start) * hop, hop, apart, some, whole - start, x, count, each, begun, out, load);
    if (whole == stop) continue;
    uint8_t last[STREAMS][PANEL * 4] = {};  // of a panel of fewer rows, behind which memory may end
    for (int k = 0; k < some; ++k) std::memcpy(last[k], w + static_cast<size_t>(k) * apart + static_cast<size_t>(whole) * hop, full_bytes(m, m.rows - whole * PANEL));
    columns_product<false>(last[0], 0, sizeof last[0], some, 1, x, count, each, begun, out + (whole - start) * each * PANEL, load);
  }
}

inline void full_columns(const rg_matrix &m, int64_t start, int64_t stop, const Inputs &in, int count, int each, float *out) {
  with_load(m, [&](auto &&load) { columns_of(m, start, stop, in, count, each, out, load); });
}

}  // namespace
