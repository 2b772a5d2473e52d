// The few vector types that the kernels are written in, for one dispatch level. Each source file that includes this
// has its own copies in an anonymous namespace: a function compiled for AVX-512 must never be shared with a file
// compiled for less.
//
// Bytes: 64 unsigned bytes. Ints: 16 of 32 bits. Floats: 16 of 32 bits. On AVX-512 each is one register; elsewhere two
// or four, and the compiler unrolls.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#define RG_INLINE inline __attribute__((always_inline))

namespace {

constexpr int PANEL = 16;  // rows of a panel
constexpr int STEP = 64;   // bytes of a step of 8-bit codes: 16 rows x 4 inputs

RG_INLINE float half_to_float(uint16_t h) {
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  uint32_t rest = static_cast<uint32_t>(h & 0x7fffu) << 13, bits;
  float out;
  if (rest >= 0x0f800000u) bits = rest + (112u << 23) + (112u << 23);  // infinity and NaN
  else {
    float scaled;  // multiplying by 2^112 also makes subnormals right
    std::memcpy(&scaled, &rest, 4);
    scaled *= 5.192296858534828e33f;
    std::memcpy(&bits, &scaled, 4);
  }
  bits |= sign;
  std::memcpy(&out, &bits, 4);
  return out;
}

RG_INLINE float bf16_to_float(uint16_t b) {
  const uint32_t bits = static_cast<uint32_t>(b) << 16;
  float out;
  std::memcpy(&out, &bits, 4);
  return out;
}

RG_INLINE uint16_t float_to_bf16(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<uint16_t>((bits >> 16) | 64u);
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

RG_INLINE uint16_t float_to_half(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, size = bits & 0x7fffffffu;
  if (size > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (size >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);
  if (size < 0x38800000u) {  // subnormal: adding a half aligns the mantissa and rounds to even
    float value;
    std::memcpy(&value, &size, 4);
    value += 0.5f;
    uint32_t sum;
    std::memcpy(&sum, &value, 4);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  return static_cast<uint16_t>(sign | ((size + 0xc8000fffu + ((size >> 13) & 1u)) >> 13));
}

}  // namespace

#if defined(RG_WIDE)
#include "vector_512.h"
#else
#include "vector_split.h"
#endif
