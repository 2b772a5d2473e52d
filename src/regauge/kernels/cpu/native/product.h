// y = W x for a few tokens: weights are read once, in order; activations are bytes in cache.
//
// Floor: the bytes of the panels. Each 64 codes cost one four-way dot product a token and 8 bits of activation, plus
// one to five operations to pull them out of their planes.
//
// Activations are rounded a group at a time, to 8 bits, or to 16 in two bytes (x = 256 high + low): then the error is
// 2^-16 of the group's largest, below that of bfloat16, and integers stay exact: nothing is lost in the sums.
#pragma once
#include "codes.h"

namespace {

#if defined(__AVX512VNNI__)
constexpr bool UNSHIFTED = true;
#else
constexpr bool UNSHIFTED = false;  // sums of two products of 16 bits, or signed bytes: codes must stay small
#endif
// Tokens that share one reading of the weights: as many as have their sums in registers.
#if defined(RG_WIDE)
constexpr int FEW = 8;
#else
constexpr int FEW = 4;
#endif

// One token, rounded. Arrays have `padded` bytes and `groups` entries.
struct Rounded {
  const int32_t *high, *low;          // four bytes a word; `low` only with 16 bits
  const int32_t *sum_high, *sum_low;  // sums of a group
  const float *step, *sum;            // step of a group; sum of the rounded integers, as a float
  float *centred;                     // the sum times the offset of codes, which is taken from their products

  // From some group on.
  Rounded from(int g, int group) const {
    const int words = g * (group / 4);
    return {high + words, low + words, sum_high + g, sum_low + g, step + g, sum + g, centred + g};
  }
};

// Scratch for `tokens` rounded tokens: bytes needed.
inline size_t rounded_bytes(const Layout &l) {
  return static_cast<size_t>(l.padded) * 2 + static_cast<size_t>(l.groups) * 20 + 64 * 6;
}

RG_INLINE uint8_t *aligned(uint8_t *p) {
  return reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(p) + 63) & ~static_cast<uintptr_t>(63));
}

// Where a token's bytes, sums and steps lie in scratch.
struct TokenRoom {
  int8_t *high, *low;
  int32_t *sum_high, *sum_low;
  float *step, *sum, *centred;
  TokenRoom(const Layout &l, uint8_t *scratch, bool two) {
    uint8_t *at = aligned(scratch);
    high = reinterpret_cast<int8_t *>(at);
    at += (l.padded + 63) / 64 * 64;
    low = reinterpret_cast<int8_t *>(at);
    if (two) at += (l.padded + 63) / 64 * 64;
    sum_high = reinterpret_cast<int32_t *>(at);
    sum_low = sum_high + l.groups;
    step = reinterpret_cast<float *>(sum_low + l.groups);
    sum = step + l.groups;
    centred = sum + l.groups;
  }
  Rounded rounded() const { return {reinterpret_cast<const int32_t *>(high), reinterpret_cast<const int32_t *>(low), sum_high, sum_low, step, sum, centred}; }
};

// Rounds one token. `x` has `columns` floats; everything up to `padded` becomes 0.
template <bool TWO>
inline Rounded round_token(const float *x, int columns, int group, const Layout &l, uint8_t *scratch) {
  const TokenRoom room(l, scratch, TWO);
  int8_t *const high = room.high, *const low = room.low;
  constexpr float TOP = TWO ? 32639.0f : 127.0f;
  for (int g = 0; g < l.groups; ++g) {
    const int begin = g * group, count = columns - begin < group ? columns - begin : group;
    const float *part = x + begin;
    int i = 0;
    Floats top = zero_floats(), none = zero_floats();  // `none` stays 0, or is NaN where an input is none or infinite
    for (; i + PANEL <= count; i += PANEL) {
      const Floats some = load_floats(part + i);
      top = maximum(top, absolute(some));
      none = fma(some, zero_floats(), none);
    }
    float reach = largest(top), nothing = total(none);
    for (int k = i; k < count; ++k) {
      reach = std::fabs(part[k]) > reach ? std::fabs(part[k]) : reach;
      nothing += part[k] * 0.0f;
    }
    // A group so small that its inverse step overflows counts as zeros.
    const float inverse = reach > 1e-30f ? TOP / reach : 0.0f;
    const Floats by = set_floats(inverse);
    Ints highs = zero_ints(), lows = zero_ints();
    int32_t tail_high = 0, tail_low = 0;
    for (i = 0; i + PANEL <= count; i += PANEL) {
      const Ints q = rounded(load_floats(part + i) * by);
      if constexpr (TWO) {
        const Ints h = shifted_right(q + set_ints(128), 8);
        const Ints l8 = q - shifted_left(h, 8);
        store_low_bytes(high + begin + i, h);
        store_low_bytes(low + begin + i, l8);
        highs = highs + h;
        lows = lows + l8;
      } else {
        store_low_bytes(high + begin + i, q);
        highs = highs + q;
      }
    }
    for (; i < group; ++i) {
      const float z = i < count ? std::nearbyint(part[i] * inverse) : 0;
      const int32_t q = std::fabs(z) <= TOP ? static_cast<int32_t>(z) : 0;  // not so: none, or infinite
      const int32_t h = TWO ? (q + 128) >> 8 : q;
      high[begin + i] = static_cast<int8_t>(h);
      tail_high += h;
      if (TWO) {
        low[begin + i] = static_cast<int8_t>(q - h * 256);
        tail_low += q - h * 256;
      }
    }
    room.sum_high[g] = total(highs) + tail_high;
    room.sum_low[g] = total(lows) + tail_low;
    room.step[g] = (reach > 1e-30f ? reach / TOP : 0.0f) + nothing;
    room.sum[g] = (TWO ? 256.0f : 1.0f) * static_cast<float>(room.sum_high[g]) + static_cast<float>(room.sum_low[g]);
  }
  return room.rounded();
}

// Tells a rounded token the offset of the codes that it will meet.
inline void centre(const Rounded &x, const Layout &l, int offset) {
  for (int g = 0; g < l.groups; ++g) x.centred[g] = static_cast<float>(offset) * x.sum[g];
}

// Where one thing of each token of a bunch lies: tokens are equally far apart, so that few registers hold all places.
struct Places {
  const char *first, *fifth;
  ptrdiff_t apart, thrice;
  Places(const void *of_first, ptrdiff_t bytes) : first(static_cast<const char *>(of_first)), fifth(first + 4 * bytes), apart(bytes), thrice(3 * bytes) {
    asm("" : "+r"(fifth), "+r"(thrice));  // or the compiler keeps a register a token
  }
  template <class T>
  RG_INLINE const T *of(int token) const {
    const char *p = token < 4 ? first : fifth;
    const int i = token % 4;
    return reinterpret_cast<const T *>(i == 0 ? p : i == 1 ? p + apart : i == 2 ? p + 2 * apart : p + thrice);
  }
  RG_INLINE void go_on(int bytes) { first += bytes, fifth += bytes; }
};

// What a table of at most 16 values looks like in integers: value = scale * (256 high + low - offset).
struct IntegerTable {
  alignas(16) uint8_t high[16];
  alignas(16) uint8_t low[16];
  float scale;
  int offset;
  bool wide;  // needs both bytes
};

inline IntegerTable integer_table(const float *values, int count) {
  IntegerTable t{};
  float top = 0;
  for (int i = 0; i < count; ++i) top = std::fabs(values[i]) > top ? std::fabs(values[i]) : top;
  // Small integers after a power of two (fp4: halves; ternary) are exact in a byte; anything else gets 16 bits.
  for (float unit = 1.0f; unit >= 1.0f / 16; unit /= 2) {
    bool whole = top / unit <= 127;
    for (int i = 0; i < count && whole; ++i) whole = std::nearbyint(values[i] / unit) == values[i] / unit;
    if (!whole) continue;
    t.scale = unit;
    t.offset = 127;
    for (int i = 0; i < count; ++i) t.low[i] = static_cast<uint8_t>(127 + static_cast<int>(values[i] / unit));
    return t;
  }
  t.wide = true;
  t.offset = 32767;
  t.scale = top / 32767;
  for (int i = 0; i < count; ++i) {
    const int whole = 32767 + static_cast<int>(std::nearbyint(values[i] / t.scale));
    t.high[i] = static_cast<uint8_t>(whole >> 8);
    t.low[i] = static_cast<uint8_t>(whole & 255);
  }
  return t;
}

template <int N>
struct Constant {
  static constexpr int value = N;
};

// How the steps of groups are kept: any way, asked at every group; or one of the usual ways, known beforehand, because a
// short group's end is as long as its products: 16-bit floats, with zero points and without, or none, but of the row.
// Several tokens ask which of the usual ways once for all of them (USUAL_STEPS), and compute each as it is computed alone,
// so that a text comes out the same, bit for bit, whatever number of its tokens is read at a time.
enum { ANY_STEPS, HALF_STEPS, HALF_STEPS_AND_ZEROS, NO_STEPS, USUAL_STEPS };

constexpr int AHEAD = 4096;  // bytes, that several tokens are asked for before they are read

// Adds to `out` one run of 16 rows times MR tokens, which are rounded into equal pieces of one memory. TWO: 16-bit activations. TABLE: 0 codes are integers, 1 a byte each, 2 two bytes each.
template <int B, int MR, bool TWO, int TABLE, int KEPT = ANY_STEPS>
inline void panel_product(const rg_matrix &m, const Layout &l, const IntegerTable *table, const uint8_t *panel,
                          const Rounded *x, Floats (&out)[MR]) {
  // Sums side by side: a dot product takes four cycles and two can start in each, so one sum alone would wait for itself.
  // With a product of unsigned bytes that cannot overflow, codes of one token stay where they lie in their bytes, and
  // each place has sums of its own, which are shifted down once a group.
  constexpr bool RAISED = UNSHIFTED && MR == 1 && TABLE == 0 && B <= 4;
  constexpr int PLACES = !RAISED ? 1 : B == 3 ? 2 : 8 / B;
  constexpr int WANTED = TABLE > 1 ? 1 : TWO ? 2 / MR : 4 / MR;  // 16-bit activations bring two sums of their own
  constexpr int CHAINS = WANTED < PLACES ? PLACES : WANTED < 1 ? 1 : WANTED;
  constexpr int D = read_as(B);
  constexpr int UNROLLED = block_steps(D) < CHAINS ? CHAINS / block_steps(D) : 1;
  constexpr bool SMALL = bits_of(B) < 8 && TABLE == 0;
  ByteTable high_table{}, low_table{};
  if constexpr (TABLE > 0) low_table = byte_table(table->low);
  if constexpr (TABLE > 1) high_table = byte_table(table->high);
  const int offset = TABLE ? table->offset : m.offset, blocks = m.group / unit_of(D);
  const int groups = l.groups, steps_bytes = l.steps_bytes, head = l.steps_bytes + l.zeros_bytes, record = l.record;
  const Floats centre = set_floats(static_cast<float>(offset));
  Floats all[MR];
  for (int r = 0; r < MR; ++r) all[r] = out[r];
  const ptrdiff_t apart = MR > 1 ? reinterpret_cast<const char *>(x[1].high) - reinterpret_cast<const char *>(x[0].high) : 0;
  constexpr bool CENTRED = KEPT == USUAL_STEPS && !TWO;  // sums of products are exact as floats, and so is the difference
  Places highs(x->high, apart), lows(TWO ? x->low : x->high, apart), steps(x->step, apart), sums(CENTRED && !m.zero ? x->centred : x->sum, apart);
  Planes planes{};
  if constexpr (B >= NESTED) planes = l.codes<B>(panel, 0);
  alignas(64) uint8_t bytes[put_together(B) ? LONGEST * PANEL : 1];
  panel += l.first;
  for (int g = 0; g < groups; ++g) {
    auto codes = [&] {
      if constexpr (put_together(B)) {
        put_codes(m.bits, planes, m.group, bytes);
        return static_cast<const uint8_t *>(bytes);
      } else if constexpr (B >= NESTED) {
        return planes;
      } else {
        return panel + head;
      }
    }();
    Ints high[MR][CHAINS], low[MR][CHAINS], top_high[MR], top_low[MR];  // top_*: with the table's high byte
    for (int r = 0; r < MR; ++r) {
      for (int c = 0; c < CHAINS; ++c) high[r][c] = low[r][c] = zero_ints();
      if constexpr (KEPT == ANY_STEPS) {  // in integers, as a group may be longer than floats are exact for
        const auto of = [&](const int32_t *sum) { return *reinterpret_cast<const int32_t *>(reinterpret_cast<const char *>(sum + g) + r * apart); };
        high[r][0] = set_ints(-offset * of(x->sum_high));
        if constexpr (TWO) low[r][0] = set_ints(-offset * of(x->sum_low));
      }
      top_high[r] = top_low[r] = zero_ints();
    }
    const auto block = [&](auto first) __attribute__((always_inline)) {
      // One token's loop is so short that a core sees far ahead; that of several asks for what will be read.
      if constexpr (MR > 1 && B < NESTED)
        for (int k = 0; k < block_bytes(B); k += 64) prefetch(codes + k + AHEAD);
      each_step<D, RAISED>(codes, [&](int i, Bytes code) __attribute__((always_inline)) {
        const Bytes lower = TABLE ? look_up(low_table, code) : code;
        const int c = RAISED && B == 3 ? (raised<B>(i) ? CHAINS / 2 : 0) + i / 2 % (CHAINS / 2) : (first.value + i) % CHAINS;
        for (int r = 0; r < MR; ++r) {
          high[r][c] = dot4<SMALL>(high[r][c], lower, highs.of<int32_t>(r) + i);
          if constexpr (TWO) low[r][c] = dot4<SMALL>(low[r][c], lower, lows.of<int32_t>(r) + i);
          if constexpr (TABLE > 1) {
            const Bytes upper = look_up(high_table, code);
            top_high[r] = dot4<false>(top_high[r], upper, highs.of<int32_t>(r) + i);
            if constexpr (TWO) top_low[r] = dot4<false>(top_low[r], upper, lows.of<int32_t>(r) + i);
          }
        }
      });
      next_block(codes, block_bytes(D));
      highs.go_on(4 * block_steps(D));
      if constexpr (TWO) lows.go_on(4 * block_steps(D));
    };
    int b = 0;
    if constexpr (UNROLLED == 4)
      for (; b + 4 <= blocks; b += 4) block(Constant<0>{}), block(Constant<1>{}), block(Constant<2>{}), block(Constant<3>{});
    if constexpr (UNROLLED == 2)
      for (; b + 2 <= blocks; b += 2) block(Constant<0>{}), block(Constant<block_steps(D)>{});
    for (; b < blocks; ++b) block(Constant<0>{});
    if constexpr (B > PUT_SMALL) planes = codes;
    const bool asked = KEPT == ANY_STEPS || KEPT == USUAL_STEPS, zeroed = KEPT == HALF_STEPS_AND_ZEROS || (asked && m.zero);
    const bool none = KEPT == NO_STEPS || (KEPT == USUAL_STEPS && m.step == RG_STEP_NONE);
    const Floats step = KEPT == ANY_STEPS ? load_steps(panel, m.step) : none ? set_floats(1.0f) : load_half(panel);
    const Floats zeros = zeroed ? load_zeros(panel + steps_bytes, bits_of(B)) : centre;
    for (int r = 0; r < MR; ++r) {
      for (int c = 1; c < CHAINS; ++c) {
        const int up = !RAISED ? 0 : B == 3 ? c / (CHAINS / 2) * 3 : raised<B>(c % PLACES);
        high[r][0] = high[r][0] + (up ? shifted_right(high[r][c], up) : high[r][c]);
        if constexpr (TWO) low[r][0] = low[r][0] + (up ? shifted_right(low[r][c], up) : low[r][c]);
      }
      Floats whole = to_floats(high[r][0]);
      if constexpr (TABLE > 1) whole = fma(set_floats(256.0f), to_floats(top_high[r]), whole);
      if constexpr (TWO) {
        Floats rest = to_floats(low[r][0]);
        if constexpr (TABLE > 1) rest = fma(set_floats(256.0f), to_floats(top_low[r]), rest);
        whole = fma(set_floats(256.0f), whole, rest);
      }
      const Floats taken = set_floats(*sums.of<float>(r));
      if (CENTRED && !zeroed) whole = whole - taken;
      else if (KEPT != ANY_STEPS || zeroed) whole = whole - zeros * taken;
      const Floats by = set_floats(*steps.of<float>(r));
      all[r] = fma(whole, KEPT == NO_STEPS ? by : step * by, all[r]);
    }
    panel += record;
    steps.go_on(4);
    sums.go_on(4);
  }
  for (int r = 0; r < MR; ++r) out[r] = all[r];
}

}  // namespace
