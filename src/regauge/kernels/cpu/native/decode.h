// Codes back to floats, rows by rows; packing; exact integer products.
#pragma once
#include "linear.h"

namespace {

// The 64-byte steps of a group: out has group / 4 of them.
template <int B>
inline void spread(const uint8_t *codes, int group, uint8_t *out) {
  for (int b = 0; b < group / unit_of(B); ++b) {
    each_step<B>(codes, [&](int i, Bytes code) __attribute__((always_inline)) { store_bytes(out + i * STEP, code); });
    codes += block_bytes(B);
    out += block_steps(B) * STEP;
  }
}

inline void spread_codes(int bits, const uint8_t *codes, int group, uint8_t *out) {
  switch (bits) {
    case 1: return spread<1>(codes, group, out);
    case 2: return spread<2>(codes, group, out);
    case 3: return spread<3>(codes, group, out);
    case 4: return spread<4>(codes, group, out);
    case 5: return spread<5>(codes, group, out);
    case 6: return spread<6>(codes, group, out);
    case 7: return spread<7>(codes, group, out);
    default: return spread<8>(codes, group, out);
  }
}

// The codes of a group, each in a byte.
inline void spread_codes(const rg_matrix &m, const Layout &l, const uint8_t *panel, int g, uint8_t *out) {
  if (nested(m)) {
    Planes planes = l.codes<NESTED>(panel, g);
    return put_codes(m.bits, planes, m.group, out);
  }
  const uint8_t *codes = l.codes<0>(panel, g);
  if (m.value == RG_TRELLIS) rg::trellises().spread(m, codes, m.group, out);
  else spread_codes(m.bits, codes, m.group, out);
}

// The value of every code; of a trellis of every byte that it is spread to.
inline void value_table(const rg_matrix &m, float *values) {
  if (m.value == RG_TRELLIS) {
    uint8_t bytes[TRELLIS_ENTRIES];
    trellis_bytes(m, bytes);
    for (int i = 0; i < TRELLIS_ENTRIES; ++i) values[bytes[i]] = m.table[i];
    return;
  }
  for (int c = 0; c < 1 << m.bits; ++c) {
    if (m.value == RG_INT) values[c] = static_cast<float>(c - m.offset);
    else if (m.value == RG_TABLE) values[c] = m.table[c];
    else {
      const int size = c & ((1 << (m.bits - 1)) - 1), exponent = size >> m.mantissa, part = size & ((1 << m.mantissa) - 1);
      const float fraction = std::ldexp(static_cast<float>(part), -m.mantissa);
      const float value = exponent ? std::ldexp(1.0f + fraction, exponent - m.bias) : std::ldexp(fraction, 1 - m.bias);
      values[c] = c >> (m.bits - 1) ? -value : value;
    }
  }
}

// One row of a group that is already spread.
inline void decode_row(const rg_matrix &m, const uint8_t *steps, int row, int count, const float *values, float zero,
                       float scale, float *out) {
  alignas(64) uint8_t codes[PANEL];
  for (int i = 0; i < count; i += PANEL) {
    for (int s = 0; s < 4 && i + 4 * s < count; ++s) std::memcpy(codes + 4 * s, steps + (i / 4 + s) * STEP + row * 4, 4);
    const int some = count - i < PANEL ? count - i : PANEL;
    if (m.value == RG_INT && some == PANEL) {
      const Floats z = to_floats(load_byte_ints(codes)) - set_floats(static_cast<float>(m.offset) + zero);
      store_floats(out + i, z * set_floats(scale));
    } else {
      for (int k = 0; k < some; ++k) out[i + k] = (values[codes[k]] - zero) * scale;
    }
  }
}

inline int decode(const rg_matrix *m, int64_t start, int64_t stop, const int64_t *index, void *out, int dtype, int threads) {
  const Layout l(*m);
  float values[256];
  value_table(*m, values);
  if (stop <= start) return RG_DONE;
  threads = worth(threads, static_cast<size_t>(stop - start) * m->columns / 4);
  rg::Share share;
  std::atomic<int> failed{0};
  // A piece is one row by number, or what is wanted of one panel.
  const int64_t first_panel = start / PANEL, pieces = index ? stop - start : (stop - 1) / PANEL - first_panel + 1;
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    uint8_t *memory = scratch(static_cast<size_t>(m->group) * PANEL + static_cast<size_t>(l.padded) * PANEL * 4 + 256);
    if (!memory) {  // its rows are left to the others, who may not come to them
      failed.store(1);
      return;
    }
    uint8_t *steps = aligned(memory);
    float *rows = reinterpret_cast<float *>(aligned(steps + static_cast<size_t>(m->group) * PANEL));
    int64_t piece, after;
    while (share.take(thread, team.threads, pieces, 1, piece, after)) {
      const int64_t top = (first_panel + piece) * PANEL;
      const int64_t first = index ? index[start + piece] : top < start ? start : top;
      const int64_t from = index ? piece : first - start;
      const int64_t panel_number = first / PANEL;
      const int begin = static_cast<int>(first % PANEL);
      const int count = index ? 1 : static_cast<int>((top + PANEL < stop ? top + PANEL : stop) - first);
      const uint8_t *panel = m->panels + l.hop * static_cast<size_t>(panel_number);
      for (int g = 0; g < l.groups; ++g) {
        const uint8_t *at = l.steps(panel, g);
        alignas(64) float scale[PANEL], zero[PANEL];
        Floats by = load_steps(at, m->step);
        if (m->row_scale) by = by * load_floats(m->row_scale + panel_number * PANEL);
        store_floats(scale, by);
        store_floats(zero, m->zero ? load_zeros(at + l.steps_bytes, m->bits) : zero_floats());
        spread_codes(*m, l, panel, g, steps);
        const int left = m->columns - g * m->group, width = left < m->group ? left : m->group;
        for (int r = 0; r < count; ++r)
          decode_row(*m, steps, begin + r, width, values, zero[begin + r], scale[begin + r],
                     rows + static_cast<size_t>(r) * l.padded + g * m->group);
      }
      for (int r = 0; r < count; ++r)
        store_row(out, (from + r) * m->columns, m->columns, dtype, rows + static_cast<size_t>(r) * l.padded);
    }
  });
  return failed.load() ? RG_NO_MEMORY : RG_DONE;
}

// Exact: sum of (code - offset) x over all columns, for 16 rows and one token.
template <int B>
inline void integer_panel(const rg_matrix &m, const Layout &l, const uint8_t *panel, const int32_t *x, int32_t sum, int32_t *out) {
  Ints acc = set_ints(-m.offset * sum);
  for (int g = 0; g < l.groups; ++g) {
    auto codes = l.codes<B>(panel, g);
    for (int b = 0; b < m.group / unit_of(B); ++b) {
      each_step<B>(codes, [&](int i, Bytes code) __attribute__((always_inline)) { acc = dot4<(bits_of(B) < 8)>(acc, code, x + i); });
      next_block(codes, block_bytes(B));
      x += block_steps(B);
    }
  }
  store_ints(out, acc);
}

inline int integers(const rg_matrix *m, const int8_t *x, int32_t *y, int64_t tokens, int threads) {
  const Layout l(*m);
  threads = worth(threads, l.read * static_cast<size_t>(l.panels));
  const int64_t top = static_cast<int64_t>(l.padded) * ((1 << m->bits) - 1) * 128;
  if (m->value != RG_INT || top > INT32_MAX / 2) return RG_UNSOUND;
  uint8_t *memory = scratch(static_cast<size_t>(l.padded) + 128);
  if (!memory) return RG_NO_MEMORY;
  int8_t *row = reinterpret_cast<int8_t *>(aligned(memory));
  for (int64_t t = 0; t < tokens; ++t) {
    std::memset(row, 0, static_cast<size_t>(l.padded));
    std::memcpy(row, x + t * m->columns, static_cast<size_t>(m->columns));
    int32_t sum = 0;
    for (int i = 0; i < m->columns; ++i) sum += row[i];
    rg::Share share;
    rg::parallel(threads, [&](int thread, rg::Team &team) {
      alignas(64) int32_t out[PANEL];
      const int32_t *words = reinterpret_cast<const int32_t *>(row);
      int64_t start, stop;
      while (share.take(thread, team.threads, l.panels, panels_at_once(l, team.threads), start, stop)) {
        for (int64_t p = start; p < stop; ++p) {
          const uint8_t *panel = m->panels + l.hop * static_cast<size_t>(p);
          switch (kind_of(*m)) {
            case NESTED + 2: integer_panel<NESTED + 2>(*m, l, panel, words, sum, out); break;
            case NESTED + 3: integer_panel<NESTED + 3>(*m, l, panel, words, sum, out); break;
            case NESTED + 4: integer_panel<NESTED + 4>(*m, l, panel, words, sum, out); break;
            case NESTED + 5: integer_panel<NESTED + 5>(*m, l, panel, words, sum, out); break;
            case NESTED + 6: integer_panel<NESTED + 6>(*m, l, panel, words, sum, out); break;
            case NESTED + 7: integer_panel<NESTED + 7>(*m, l, panel, words, sum, out); break;
            case NESTED + 8: integer_panel<NESTED + 8>(*m, l, panel, words, sum, out); break;
            case 1: integer_panel<1>(*m, l, panel, words, sum, out); break;
            case 2: integer_panel<2>(*m, l, panel, words, sum, out); break;
            case 3: integer_panel<3>(*m, l, panel, words, sum, out); break;
            case 4: integer_panel<4>(*m, l, panel, words, sum, out); break;
            case 5: integer_panel<5>(*m, l, panel, words, sum, out); break;
            case 6: integer_panel<6>(*m, l, panel, words, sum, out); break;
            case 7: integer_panel<7>(*m, l, panel, words, sum, out); break;
            default: integer_panel<8>(*m, l, panel, words, sum, out);
          }
          const int64_t left = m->rows - p * PANEL;
          std::memcpy(y + t * m->rows + p * PANEL, out, static_cast<size_t>(left < PANEL ? left : PANEL) * 4);
        }
      }
    });
  }
  return RG_DONE;
}

}  // namespace
