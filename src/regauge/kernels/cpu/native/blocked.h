// Many tokens: 8-bit activations, two panels at a time spread to bytes once, then tiles of 32 rows x 12 tokens whose
// sums stay in registers for a whole group.
//
// Floor: rows x columns x tokens / 64 dot products; a group's end costs four more operations a sum.
#pragma once
#include "decode.h"

namespace {

constexpr int TILE = 12;  // tokens whose 24 sums, with two operands, fill the registers of AVX-512

// Rounded tokens in tiles: four bytes of each of 12 tokens side by side, so that a tile is read in order.
struct Tiles {
  int32_t *words;  // (tiles, padded / 4, 12)
  int32_t *sums;   // (tiles, groups, 12) sums of a group, less the zero points of its codes
  int32_t *zeros;  // (tiles, groups, 12) of ready codes that have any
  float *steps;    // (tiles, groups, 12)
};

// What is taken from the sums of a panel pair because the codes of tokens have zero points.
struct Shifts {
  const Ints *codes;     // (groups, 2): the sums of each row's codes, times the zero point where all tokens share it
  const int32_t *zeros;  // (groups, 12); NULL: shared
};

// 32 rows x MR tokens over all groups. `codes`: (padded / 4, 2, 64); f: sums of MR x 2 vectors.
template <int MR, bool SMALL>
inline void tile(const Layout &l, int steps_a_group, int offset, const uint8_t *codes, const Floats *step, const Floats *zero,
                 const int32_t *x, const int32_t *sums, const float *by, const Shifts &shifts, Floats *f) {
  for (int i = 0; i < MR * 2; ++i) f[i] = zero_floats();
  for (int g = 0; g < l.groups; ++g) {
    Ints a[MR][2];
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) a[r][0] = a[r][1] = set_ints(-offset * sums[g * TILE + r]);
    if (shifts.codes)
      for (int r = 0; r < MR; ++r)
        for (int h = 0; h < 2; ++h) {
          const Ints all = shifts.codes[2 * g + h];
          a[r][h] = a[r][h] - (shifts.zeros ? all * set_ints(shifts.zeros[g * TILE + r]) : all);
        }
    for (int k = 0; k < steps_a_group; ++k) {
      const Bytes one = load_bytes(codes), two = load_bytes(codes + STEP);
      codes += 2 * STEP;
#pragma GCC unroll 12
      for (int r = 0; r < MR; ++r) {
        a[r][0] = dot4<SMALL>(a[r][0], one, x + r);
        a[r][1] = dot4<SMALL>(a[r][1], two, x + r);
      }
      x += TILE;
    }
#pragma GCC unroll 12
    for (int r = 0; r < MR; ++r) {
      const Floats scale = set_floats(by[g * TILE + r]);
      Floats one = to_floats(a[r][0]), two = to_floats(a[r][1]);
      if (zero) {
        const Floats sum = set_floats(static_cast<float>(sums[g * TILE + r]));
        one = one - zero[2 * g] * sum;
        two = two - zero[2 * g + 1] * sum;
      }
      f[2 * r] = fma(one * scale, step[2 * g], f[2 * r]);
      f[2 * r + 1] = fma(two * scale, step[2 * g + 1], f[2 * r + 1]);
    }
  }
}

template <bool SMALL>
inline void any_tile(int count, const Layout &l, int steps, int offset, const uint8_t *codes, const Floats *step, const Floats *zero,
                     const int32_t *x, const int32_t *sums, const float *by, const Shifts &shifts, Floats *f) {
  if (count > 8) tile<12, SMALL>(l, steps, offset, codes, step, zero, x, sums, by, shifts, f);
  else if (count > 4) tile<8, SMALL>(l, steps, offset, codes, step, zero, x, sums, by, shifts, f);
  else tile<4, SMALL>(l, steps, offset, codes, step, zero, x, sums, by, shifts, f);
}

// One token of a tile: ready codes, or floats that are rounded here.
inline void put_in_tile(const float *x, const rg_codes *codes, int64_t token, int columns, int group, const Layout &l, const Tiles &t, uint8_t *memory) {
  const size_t n = static_cast<size_t>(token / TILE), slot = static_cast<size_t>(token % TILE), first = n * static_cast<size_t>(l.groups) * TILE + slot;
  const int8_t *bytes;
  if (codes) {
    int8_t *copy = reinterpret_cast<int8_t *>(aligned(memory));
    std::memcpy(copy, codes->codes + token * columns, static_cast<size_t>(columns));
    bytes = copy;
    for (int g = 0; g < l.groups; ++g) {
      const int begin = g * group, stop = columns - begin < group ? columns : begin + group;
      const size_t at = first + static_cast<size_t>(g) * TILE;
      const int32_t zero = zero_of(*codes, token, columns, begin);
      int32_t sum = 0;
      for (int i = begin; i < stop; ++i) sum += copy[i];
      for (int i = stop; i < begin + group; ++i) copy[i] = static_cast<int8_t>(zero);  // stands for 0
      t.sums[at] = sum - zero * (stop - begin);
      t.steps[at] = codes->steps ? codes->steps[entry_of(*codes, token, columns, begin)] : 1.0f;
      if (codes->zeros) t.zeros[at] = zero;
    }
  } else {
    const Rounded r = round_token<false>(x, columns, group, l, memory);
    bytes = reinterpret_cast<const int8_t *>(r.high);
    for (int g = 0; g < l.groups; ++g) {
      t.sums[first + static_cast<size_t>(g) * TILE] = r.sum_high[g];
      t.steps[first + static_cast<size_t>(g) * TILE] = r.step[g];
    }
  }
  int32_t *words = t.words + n * static_cast<size_t>(l.padded / 4) * TILE + slot;
  for (int k = 0; k < l.padded / 4; ++k) std::memcpy(words + k * TILE, bytes + 4 * k, 4);
}

// Sums of the codes of 32 rows in each group, times the zero point of the tokens' codes where all share it.
inline void sum_codes(const rg_codes &ready, const Layout &l, int columns, int group, const uint8_t *codes, Ints *sums) {
  const int32_t ones = 0x01010101;
  for (int g = 0; g < l.groups; ++g)
    for (int h = 0; h < 2; ++h) {
      Ints sum = zero_ints();
      for (int k = 0; k < group / 4; ++k) sum = dot4<false>(sum, load_bytes(codes + (static_cast<size_t>(g) * (group / 4) + k) * 2 * STEP + h * STEP), &ones);
      sums[2 * g + h] = ready.shared ? sum * set_ints(zero_of(ready, 0, columns, g * group)) : sum;
    }
}

inline int gemm(const rg_matrix *given, const void *x, const rg_codes *ready, void *y, int64_t tokens, int dtype, int threads) {
  threads = worth(threads, static_cast<size_t>(given->rows) * given->columns * static_cast<size_t>(tokens) / 256);
  rg_matrix m = *given;
  const Layout stored(m);
  Layout l = stored;
  const bool whole = m.step == RG_STEP_NONE && !m.zero && ready && !ready->group && static_cast<int64_t>(l.padded) * 255 * 128 < INT32_MAX;
  if (whole) {  // one step a row and one a token: one group
    m.group = l.padded;
    l.groups = 1;
  }
  IntegerTable integers{};
  if (m.value == RG_TABLE) integers = integer_table(m.table, 1 << m.bits);
  if (m.value == RG_FLOAT || integers.wide) return RG_UNSOUND;
  const int offset = m.value == RG_TABLE ? integers.offset : m.offset;
  const int64_t tiles = (tokens + TILE - 1) / TILE;
  const size_t words = static_cast<size_t>(tiles) * (l.padded / 4) * TILE, entries = static_cast<size_t>(tiles) * l.groups * TILE;
  const bool less = ready && ready->zeros;
  uint8_t *memory = static_cast<uint8_t *>(__builtin_malloc((words + entries * (less ? 3 : 2)) * 4 + 64));
  if (!memory) return RG_NO_MEMORY;
  Tiles t;
  t.words = reinterpret_cast<int32_t *>(aligned(memory));
  t.sums = t.words + words;
  t.steps = reinterpret_cast<float *>(t.sums + entries);
  t.zeros = reinterpret_cast<int32_t *>(t.steps + entries);
  std::memset(t.words, 0, (words + entries * (less ? 3 : 2)) * 4);
  rg::Share rounding, multiplying;
  std::atomic<int> failed{0};
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    const size_t codes_bytes = static_cast<size_t>(l.padded) * 2 * PANEL, steps_bytes = static_cast<size_t>(l.groups) * 2 * 64;
    const size_t spread_bytes = static_cast<size_t>(m.group) * PANEL, shifts_bytes = less ? steps_bytes : 0;
    uint8_t *own = scratch(codes_bytes + 2 * steps_bytes + shifts_bytes + spread_bytes + static_cast<size_t>(l.padded) * 4 + rounded_bytes(l) + 1024);
    if (!own) failed.store(1);
    int64_t start, stop;
    uint8_t *codes = aligned(own);
    Floats *step = reinterpret_cast<Floats *>(codes + codes_bytes), *zero = step + 2 * l.groups;
    Ints *sums = reinterpret_cast<Ints *>(zero + 2 * l.groups);
    uint8_t *one = reinterpret_cast<uint8_t *>(sums) + shifts_bytes;
    float *floats = reinterpret_cast<float *>(one + spread_bytes);
    uint8_t *rest = reinterpret_cast<uint8_t *>(floats + l.padded);
    while (own && rounding.take(thread, team.threads, tokens, 1, start, stop)) {
      if (!ready) load_row(x, start * m.columns, m.columns, dtype, floats);
      put_in_tile(floats, ready, start, m.columns, m.group, l, t, rest);
    }
    team.barrier();
    if (failed.load()) return;
    const int64_t pairs = (l.panels + 1) / 2;
    while (multiplying.take(thread, team.threads, pairs, 1, start, stop)) {
      for (int h = 0; h < 2; ++h) {
        const int64_t p = start * 2 + h;
        if (p >= l.panels) {  // half a pair
          for (int k = 0; k < l.padded / 4; ++k) store_bytes(codes + (static_cast<size_t>(k) * 2 + 1) * STEP, set_bytes(0));
          for (int g = 0; g < l.groups; ++g) step[2 * g + 1] = zero[2 * g + 1] = zero_floats();
          continue;
        }
        const uint8_t *panel = m.panels + stored.hop * static_cast<size_t>(p);
        for (int g = 0; g < stored.groups; ++g) {
          const uint8_t *at = stored.steps(panel, g);
          if (!whole || g == 0) {
            step[2 * g + h] = load_steps(at, m.step);
            if (m.zero) zero[2 * g + h] = load_zeros(at + stored.steps_bytes, m.bits);
          }
          spread_codes(*given, stored, panel, g, one);
          uint8_t *to = codes + (static_cast<size_t>(g) * (given->group / 4) * 2 + h) * STEP;
          if (m.value == RG_TABLE) {
            const ByteTable table = byte_table(integers.low);
            for (int k = 0; k < given->group / 4; ++k) store_bytes(to + k * 2 * STEP, look_up(table, load_bytes(one + k * STEP)));
          } else {
            for (int k = 0; k < given->group / 4; ++k) store_bytes(to + k * 2 * STEP, load_bytes(one + k * STEP));
          }
        }
      }
      if (less) sum_codes(*ready, l, m.columns, m.group, codes, sums);
      Floats scale[2];
      for (int h = 0; h < 2; ++h) {
        const bool there = start * 2 + h < l.panels;
        scale[h] = m.row_scale && there ? load_floats(m.row_scale + (start * 2 + h) * PANEL) : set_floats(1.0f);
        if (m.value == RG_TABLE) scale[h] = scale[h] * set_floats(integers.scale);
        if (m.value == RG_TRELLIS) scale[h] = scale[h] * set_floats(1.0f / m.table[TRELLIS_ENTRIES]);
      }
      const int64_t row = start * 2 * PANEL;
      const int rows = static_cast<int>(m.rows - row < 2 * PANEL ? m.rows - row : 2 * PANEL);
      for (int64_t n = 0; n < tiles; ++n) {
        const int count = static_cast<int>(tokens - n * TILE < TILE ? tokens - n * TILE : TILE);
        Floats f[TILE * 2];
        const int32_t *words_n = t.words + static_cast<size_t>(n) * (l.padded / 4) * TILE;
        const int32_t *sums_n = t.sums + static_cast<size_t>(n) * l.groups * TILE;
        const float *steps_n = t.steps + static_cast<size_t>(n) * l.groups * TILE;
        const Shifts shifts{less ? sums : nullptr, less && !ready->shared ? t.zeros + static_cast<size_t>(n) * l.groups * TILE : nullptr};
        const bool small = m.bits < 8 && m.value == RG_INT;
        if (small) any_tile<true>(count, l, m.group / 4, offset, codes, step, m.zero ? zero : nullptr, words_n, sums_n, steps_n, shifts, f);
        else any_tile<false>(count, l, m.group / 4, offset, codes, step, m.zero ? zero : nullptr, words_n, sums_n, steps_n, shifts, f);
        for (int r = 0; r < count; ++r) {
          alignas(64) float out[2 * PANEL];
          store_floats(out, f[2 * r] * scale[0]);
          store_floats(out + PANEL, f[2 * r + 1] * scale[1]);
          store_row(y, (n * TILE + r) * m.rows + row, rows, dtype, out);
        }
      }
    }
  });
  __builtin_free(memory);
  return failed.load() ? RG_NO_MEMORY : RG_DONE;
}

// Ready codes of any number of tokens: weights are read where they lie for a few, and spread to bytes for more.
inline int coded(const rg_matrix *m, const rg_codes *ready, void *y, int64_t tokens, int dtype, int threads) {
  if (tokens > FEW) return gemm(m, nullptr, ready, y, tokens, dtype, threads);
  const Ready a(*m, ready->zeros ? RG_INT16 : RG_INT8);
  if (a.activations == RG_FLOAT32 || a.integers.wide) return RG_UNSOUND;
  return few_tokens(a, y, tokens, dtype, threads, [&](int64_t token, float *, uint8_t *memory, Inputs &in, int slot) {
    if (ready->zeros) in.rounded[slot] = ready_token<true>(*ready, token, m->columns, m->group, a.l, memory);
    else in.rounded[slot] = ready_token<false>(*ready, token, m->columns, m->group, a.l, memory);
  });
}

}  // namespace
