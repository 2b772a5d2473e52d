// Codes whose bits lie apart: a two-bit plane first and then one a bit, each in one run along the panel, so that a few bits
// are read without the others' bytes.
#pragma once
#include "vector.h"

namespace {

// Kernels know such codes as NESTED + bits, 8 steps a block. Several tokens at once put the codes of a group together
// first, in bytes that lie in cache: PUT, or PUT_SMALL where codes are below 128.
constexpr int NESTED = 16, PUT = NESTED, PUT_SMALL = NESTED + 1;
constexpr bool put_together(int kind) { return kind == PUT || kind == PUT_SMALL; }
constexpr int bits_of(int kind) { return kind == PUT ? 8 : kind == PUT_SMALL ? 7 : kind & 15; }  // at most
constexpr int read_as(int kind) { return put_together(kind) ? 8 : kind; }
constexpr int PLANES_UNIT = 32;  // inputs a block
constexpr int SKEW = 9 * STEP;  // bytes between planes, lest they all lie in the same set of a cache
constexpr int PAIR = 2 * STEP;    // bytes of a block of the first plane; one of any other has half of them

// Where the codes of a group begin in the planes.
struct Planes {
  const uint8_t *first, *next;
  size_t apart;  // bytes from each single plane to the next
};

// Fields of N bits that lie side by side in bytes, joined to fields of twice as many: the even ones of both, and the odd.
struct Two {
  Bytes even, odd;
};
template <int N>
RG_INLINE Two joined(Bytes high, Bytes low) {
  const Bytes mask = set_bytes(N == 1 ? 0x55 : N == 2 ? 0x33 : 0x0f);
  return {picked(mask, low, shifted<-N>(high)), picked(mask, shifted<N>(low), high)};
}

// Bits UP ... UP + N - 1 of a code where N bits lie from AT on.
template <int N, int AT, int UP>
RG_INLINE Bytes field(Bytes from) {
  return shifted<AT - UP>(from) & set_bytes(((1 << N) - 1) << UP);
}
template <int N, int AT, int UP>
RG_INLINE Bytes with_field(Bytes code, Bytes from) {
  return with_bits(code, shifted<AT - UP>(from), set_bytes(((1 << N) - 1) << UP));
}

// A block of planes on the way to codes. Of step i: the two bits of a plane or of two joined lie in one of two, by i's lowest
// bit, from bit i / 2 * 2 on; four bits in one of four, by i's two lowest bits, from bit i / 4 * 4 on.
template <int B>
struct Joined {
  Two pairs;       // the top two bits
  Two fours[2];    // the top four: of even steps, of odd ones
  Two next;        // the two below
  Two bytes[2][2];
  Bytes last;      // the lowest where bits are odd

  RG_INLINE explicit Joined(const Planes &p) {
    const auto plane = [&](int k) __attribute__((always_inline)) { return load_bytes(p.next + static_cast<size_t>(k) * p.apart); };
    pairs = {load_bytes(p.first), load_bytes(p.first + STEP)};
    if constexpr (B >= 4) {
      const Two own = joined<1>(plane(0), plane(1));
      fours[0] = joined<2>(pairs.even, own.even), fours[1] = joined<2>(pairs.odd, own.odd);
    }
    if constexpr (B >= 6) next = joined<1>(plane(2), plane(3));
    if constexpr (B == 8) {
      const Two own = joined<1>(plane(4), plane(5));
      const Two low[2] = {joined<2>(next.even, own.even), joined<2>(next.odd, own.odd)};
      for (int i = 0; i < 2; ++i) bytes[i][0] = joined<4>(fours[i].even, low[i].even), bytes[i][1] = joined<4>(fours[i].odd, low[i].odd);
    }
    if constexpr (B & 1) last = plane(B - 3);
  }

  template <int I>
  RG_INLINE Bytes code() const {
    const Bytes pair = I & 1 ? pairs.odd : pairs.even, four = I & 2 ? fours[I & 1].odd : fours[I & 1].even;
    if constexpr (B == 8) {
      const Two &two = bytes[I & 1][I / 2 & 1];
      return I / 4 ? two.odd : two.even;
    }
    if constexpr (B == 2) return field<2, I / 2 * 2, 0>(pair);
    if constexpr (B == 3) return with_field<1, I, 0>(field<2, I / 2 * 2, 1>(pair), last);
    if constexpr (B == 4) return field<4, I / 4 * 4, 0>(four);
    if constexpr (B == 5) return with_field<1, I, 0>(field<4, I / 4 * 4, 1>(four), last);
    if constexpr (B >= 6) {
      const Bytes six = with_field<2, I / 2 * 2, B - 6>(field<4, I / 4 * 4, B - 4>(four), I & 1 ? next.odd : next.even);
      if constexpr (B == 6) return six;
      else return with_field<1, I, 0>(six, last);
    }
  }
};

template <int B, int I, class F>
RG_INLINE void step_of_planes(const Joined<B> &block, F &&f) {
  if constexpr (I < 8) {
    f(I, block.template code<I>());
    step_of_planes<B, I + 1>(block, f);
  }
}

template <int B, bool RAISED = false, class F>
RG_INLINE void each_step(const Planes &planes, F &&f) {
  step_of_planes<bits_of(B), 0>(Joined<bits_of(B)>(planes), f);
}

// From a block to the next; `bytes` of one whose bits do not lie apart.
RG_INLINE void next_block(const uint8_t *&codes, int bytes) { codes += bytes; }
RG_INLINE void next_block(Planes &codes, int) { codes.first += PAIR, codes.next += STEP; }

// The codes of a group, each in a byte; `planes` go on to the next.
template <int BITS>
inline void put_bits(Planes &planes, int group, uint8_t *out) {
  for (int b = 0; b < group / PLANES_UNIT; ++b) {
    each_step<NESTED + BITS>(planes, [&](int i, Bytes code) __attribute__((always_inline)) { store_bytes(out + i * STEP, code); });
    next_block(planes, 0);
    out += 8 * STEP;
  }
}

inline void put_codes(int bits, Planes &planes, int group, uint8_t *out) {
  switch (bits) {
    case 2: return put_bits<2>(planes, group, out);
    case 3: return put_bits<3>(planes, group, out);
    case 4: return put_bits<4>(planes, group, out);
    case 5: return put_bits<5>(planes, group, out);
    case 6: return put_bits<6>(planes, group, out);
    case 7: return put_bits<7>(planes, group, out);
    default: return put_bits<8>(planes, group, out);
  }
}

}  // namespace
