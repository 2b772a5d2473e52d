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

// Sixteen rows of a matrix that is not packed: four sums a row, so that additions do not wait for each other.
inline void full_rows(const rg_matrix &m, int64_t number, const Inputs &in, int count, float *out) {
  const int columns = m.columns;
  const size_t bytes = full_row_bytes(m);
  const int64_t left = m.rows - number * PANEL;
  for (int row = 0; row < PANEL; ++row) {
    if (row >= left) {
      for (int t = 0; t < count; ++t) out[t * PANEL + row] = 0;
      continue;
    }
    const uint8_t *w = m.panels + (static_cast<size_t>(number) * PANEL + row) * bytes;
    const auto load = [&](int i) __attribute__((always_inline)) {
      return m.bits == RG_F32    ? load_floats(reinterpret_cast<const float *>(w) + i)
             : m.bits == RG_BF16 ? load_bf16(w + 2 * i)
                                 : load_half(w + 2 * i);
    };
    Floats sum[FEW][4];
    for (int t = 0; t < count; ++t) sum[t][0] = sum[t][1] = sum[t][2] = sum[t][3] = zero_floats();
    int i = 0;
    for (; i + 4 * PANEL <= columns; i += 4 * PANEL)
      for (int k = 0; k < 4; ++k) {
        const Floats part = load(i + k * PANEL);
        for (int t = 0; t < count; ++t) sum[t][k] = fma(part, load_floats(in.floats[t] + i + k * PANEL), sum[t][k]);
      }
    for (; i + PANEL <= columns; i += PANEL) {
      const Floats part = load(i);
      for (int t = 0; t < count; ++t) sum[t][0] = fma(part, load_floats(in.floats[t] + i), sum[t][0]);
    }
    for (int t = 0; t < count; ++t) {
      float rest = 0;
      for (int k = i; k < columns; ++k) {
        uint16_t half = 0;
        float value;
        if (m.bits == RG_F32) std::memcpy(&value, w + 4 * k, 4);
        else {
          std::memcpy(&half, w + 2 * k, 2);
          value = m.bits == RG_BF16 ? bf16_to_float(half) : half_to_float(half);
        }
        rest += value * in.floats[t][k];
      }
      out[t * PANEL + row] = total((sum[t][0] + sum[t][1]) + (sum[t][2] + sum[t][3])) + rest;
    }
  }
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
  if (m.bits == RG_F32) return columns_of(m, start, stop, in, count, each, out, [](const uint8_t *p) __attribute__((always_inline)) { return load_floats(reinterpret_cast<const float *>(p)); });
  if (m.bits == RG_BF16) return columns_of(m, start, stop, in, count, each, out, [](const uint8_t *p) __attribute__((always_inline)) { return load_bf16(p); });
  return columns_of(m, start, stop, in, count, each, out, [](const uint8_t *p) __attribute__((always_inline)) { return load_half(p); });
}

}  // namespace
