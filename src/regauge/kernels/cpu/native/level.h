// The body of every dispatch level's source file, which defines RG_LEVEL and, for AVX-512, RG_WIDE.
#pragma once
#include "blocked.h"
#include "feedback.h"
#include "kernels.h"
#include "layer.h"
#include "step.h"

namespace {

// Reads every byte, in order, as fast as loads go: the bandwidth probe.
inline uint64_t read_all(const uint8_t *p, size_t bytes) {
  Bytes a = set_bytes(0), b = a, c = a, d = a;
  for (size_t i = 0; i + 256 <= bytes; i += 256) {
    a = a | load_bytes(p + i);
    b = b | load_bytes(p + i + 64);
    c = c | load_bytes(p + i + 128);
    d = d | load_bytes(p + i + 192);
  }
  alignas(64) uint8_t out[64];
  store_bytes(out, (a | b) | (c | d));
  uint64_t sum = 0;
  for (uint8_t byte : out) sum += byte;
  return sum;
}

}  // namespace

namespace rg {
const Kernels RG_LEVEL = {linear, gemm, coded, decode, integers, step, attend, range, feedback, read_all};
}
