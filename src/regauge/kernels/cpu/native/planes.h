// Codes whose bits lie apart: a two-bit plane first and then one a bit, each in one run along the panel, so that a few bits
// are read without the others' bytes.
#pragma once
#include "vector.h"

namespace {

// Kernels know such codes as NESTED + bits; a block is 8 steps.
constexpr int NESTED = 16;
constexpr int bits_of(int kind) { return kind & 15; }
constexpr int PAIR = 2 * STEP;  // bytes of a block of the first plane; one of any other has half of them

// Where the codes of a group begin in the planes.
struct Planes {
  const uint8_t *first, *next;
  size_t apart;  // bytes from each single plane to the next
  RG_INLINE void operator+=(int blocks) { first += blocks * PAIR, next += blocks * STEP; }
};

// The bits below the first two of a step's codes, plane after plane.
template <int LEFT, int I>
RG_INLINE Bytes with_planes(Bytes code, const uint8_t *plane, size_t apart) {
  if constexpr (LEFT == 0) return code;
  else return with_planes<LEFT - 1, I>(code | (shifted<I - (LEFT - 1)>(load_bytes(plane)) & set_bytes(1 << (LEFT - 1))), plane + apart, apart);
}

template <int B, int I, class F>
RG_INLINE void step_of_planes(const Planes &planes, F &&f) {
  if constexpr (I < 8) {
    constexpr int UP = B - 2;
    const Bytes pair = shifted<I % 4 * 2 - UP>(load_bytes(planes.first + I / 4 * STEP)) & set_bytes(3 << UP);
    f(I, with_planes<UP, I>(pair, planes.next, planes.apart));
    step_of_planes<B, I + 1>(planes, f);
  }
}

template <int B, bool RAISED = false, class F>
RG_INLINE void each_step(const Planes &planes, F &&f) {
  step_of_planes<bits_of(B), 0>(planes, f);
}

RG_INLINE void next_block(const uint8_t *&codes, int bytes) { codes += bytes; }
RG_INLINE void next_block(Planes &codes, int) { codes += 1; }

}  // namespace
