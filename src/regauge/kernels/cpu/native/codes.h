// Where codes lie, and how a block of them becomes steps of 64 bytes.
#pragma once
#include "planes.h"
#include "regauge.h"
#include "trellis_codes.h"
#include "vector.h"

namespace {

// Planes of a code, highest first: 5 = 4 + 1, 6 = 4 + 2, 7 = 4 + 2 + 1, so that the first planes are the code in fewer
// bits. A plane of p bits packs 8 / p steps into 64 bytes; a block holds as many steps as its narrowest plane. Three bits
// lie otherwise, so that most codes come out by a
// mask alone: bytes A, B, C hold codes 0 1, 2 3 and 4 5 in their low six bits; the top two of A and of B are the low
// bits of codes 6 and 7, whose high bits are the top two of C.
constexpr int block_steps(int bits) { return bits & 1 || bits > PUT_SMALL ? 8 : bits & 2 ? 4 : bits & 4 ? 2 : 1; }
constexpr int unit_of(int bits) { return 4 * block_steps(bits); }  // inputs a block
constexpr int block_bytes(int bits) { return block_steps(bits) * STEP * bits / 8; }

// By how many bits a code may stay shifted left, in a product that puts it right at the end of a group.
template <int B>
constexpr int raised(int i) {
  return B == 4 ? i % 2 * 4 : B == 2 ? i % 4 * 2 : B == 1 ? i : B == 3 && i < 6 ? i % 2 * 3 : 0;
}

// f(i, codes of step i) for every step of a block; i is a constant once inlined. RAISED: codes come shifted left.
template <int B, bool RAISED, int I, class F>
RG_INLINE void step_of(const uint8_t *block, F &&f) {
  if constexpr (I < block_steps(B)) {
    constexpr int STEPS = block_steps(B);
    constexpr int UP = RAISED ? raised<B>(I) : 0;
    Bytes code;
    if constexpr (B == 8) {
      code = load_bytes(block);
    } else if constexpr (RAISED && B != 3) {
      code = load_bytes(block) & set_bytes(((1 << B) - 1) << UP);
    } else if constexpr (B == 3 && I < 6) {
      code = shifted<I % 2 * 3 - UP>(load_bytes(block + I / 2 * STEP)) & set_bytes(7 << UP);
    } else if constexpr (B == 3) {
      const Bytes low = shifted<6>(load_bytes(block + (I - 6) * STEP)) & set_bytes(3);
      code = low | (shifted<I - 2>(load_bytes(block + 2 * STEP)) & set_bytes(4));
    } else {
      const uint8_t *at = block;
      bool first = true;
      if constexpr (B & 4) {
        constexpr int UP = B & 3;  // this plane's bits stand above the later planes'
        const Bytes plane = load_bytes(at + (I / 2) * STEP);
        code = shifted<(I % 2) * 4 - UP>(plane) & set_bytes(15 << UP);
        at += STEPS / 2 * STEP;
        first = false;
      }
      if constexpr (B & 2) {
        constexpr int UP = B & 1;
        const Bytes plane = load_bytes(at + (I / 4) * STEP);
        const Bytes own = shifted<(I % 4) * 2 - UP>(plane) & set_bytes(3 << UP);
        code = first ? own : code | own;
        at += STEPS / 4 * STEP;
        first = false;
      }
      if constexpr (B & 1) {
        const Bytes own = shifted<I>(load_bytes(at)) & set_bytes(1);
        code = first ? own : code | own;
      }
    }
    f(I, code);
    step_of<B, RAISED, I + 1>(block, f);
  }
}

template <int B, bool RAISED = false, class F>
RG_INLINE void each_step(const uint8_t *block, F &&f) {
  step_of<B, RAISED, 0>(block, f);
}

// One code into a block that is zero there: the inverse of the above. `place` = byte in the step.
inline void put_code(uint8_t *block, int bits, int step, int place, unsigned code) {
  const int steps = block_steps(bits);
  if (bits == 8) {
    block[place] = static_cast<uint8_t>(code);
    return;
  }
  if (bits == 3) {
    if (step < 6) {
      block[step / 2 * STEP + place] |= static_cast<uint8_t>(code << (step % 2 * 3));
    } else {
      block[(step - 6) * STEP + place] |= static_cast<uint8_t>((code & 3u) << 6);
      block[2 * STEP + place] |= static_cast<uint8_t>((code >> 2) << step);
    }
    return;
  }
  if (bits & 4) {
    block[step / 2 * STEP + place] |= static_cast<uint8_t>((code >> (bits & 3) & 15u) << (step % 2 * 4));
    block += steps / 2 * STEP;
  }
  if (bits & 2) {
    block[step / 4 * STEP + place] |= static_cast<uint8_t>((code >> (bits & 1) & 3u) << (step % 4 * 2));
    block += steps / 4 * STEP;
  }
  if (bits & 1) block[place] |= static_cast<uint8_t>((code & 1u) << step);
}

// The inverse: one code of a block.
inline unsigned get_code(const uint8_t *block, int bits, int step, int place) {
  const int steps = block_steps(bits);
  if (bits == 8) return block[place];
  if (bits == 3) {
    if (step < 6) return (block[step / 2 * STEP + place] >> (step % 2 * 3)) & 7u;
    return block[(step - 6) * STEP + place] >> 6 | (block[2 * STEP + place] >> step & 1u) << 2;
  }
  unsigned code = 0;
  if (bits & 4) code = (block[step / 2 * STEP + place] >> (step % 2 * 4) & 15u) << (bits & 3), block += steps / 2 * STEP;
  if (bits & 2) code |= (block[step / 4 * STEP + place] >> (step % 4 * 2) & 3u) << (bits & 1), block += steps / 4 * STEP;
  if (bits & 1) code |= block[place] >> step & 1u;
  return code;
}

constexpr int step_bytes(int kind) {
  return kind == RG_STEP_NONE ? 0 : kind == RG_STEP_F32 ? 4 : kind == RG_STEP_F16 || kind == RG_STEP_BF16 ? 2 : 1;
}

// Whether the bits of a matrix lie apart from each other (planes.h); its codes as kernels know them.
inline bool nested(const rg_matrix &m) { return m.value == RG_INT && m.bias; }
inline int kind_of(const rg_matrix &m) { return nested(m) ? NESTED + m.bits : m.bits; }
constexpr int FEWEST = 2;     // bits of a matrix in planes
constexpr int LONGEST = 256;  // inputs a group, up to which its sums of 8-bit products are exact as floats
// The greatest sizes: sums of a group of 8-bit products stay below 2^31, and bytes of a panel's group are an int.
constexpr int MOST_COLUMNS = 1 << 26, MOST_ROWS = 1 << 30, MOST_GROUP = 1 << 16;
constexpr int CUT_BITS = 12, CUTS = 4;  // of a matrix in runs: the groups at which each ends

// A matrix in runs (rg_matrix.stride below 0): its panels, and the groups before the end of each run, of the whole. A run that
// there is not is empty.
struct Runs {
  int64_t panels;
  int ends[CUTS];
  explicit Runs(int64_t stride) {
    uint64_t said = ~static_cast<uint64_t>(stride) + 1;
    for (int &end : ends) end = static_cast<int>(said & ((1 << CUT_BITS) - 1)), said >>= CUT_BITS;
    panels = static_cast<int64_t>(said);
  }
  bool rises() const { return ends[0] > 0 && ends[1] >= ends[0] && ends[2] >= ends[1] && ends[3] >= ends[2]; }
};

// Sizes of a matrix's panels. `record`: bytes from the steps of a group to the next's; `read`: bytes of a panel that a
// product reads. In planes nothing of a panel lies together but what is of one plane: `panel` is a panel's share of all, and
// what is called a panel is the steps of the fewest bits, from which all else is found. In runs, it is what is in the first.
struct Layout {
  const uint8_t *panels_at;
  int groups, padded, group, steps_bytes, zeros_bytes, codes_bytes, record;
  int ends[CUTS];  // groups before the end of each run, of the whole
  int whole;       // groups of a row of the whole
  int64_t all;     // panels of the whole
  size_t panel, read, hop;  // hop: from panel to panel
  size_t first = 0, pairs = 0, singles = 0, apart = 0;  // in planes: where they are; from a plane to the next
  int64_t panels;
  explicit Layout(const rg_matrix &m)
      : panels_at(m.panels),
        groups((m.columns + m.group - 1) / m.group),
        padded(groups * m.group),
        group(m.group),
        steps_bytes(PANEL * step_bytes(m.step)),
        zeros_bytes(m.zero ? PANEL * m.bits / 8 : 0),
        codes_bytes(PANEL * m.group * m.bits / 8),
        record(steps_bytes + zeros_bytes + codes_bytes),
        ends{groups, groups, groups, groups},
        whole(nested(m) ? m.bias : groups),
        all(0),
        panel(m.stride > 0 && !nested(m) ? static_cast<size_t>(m.stride) : static_cast<size_t>(record) * groups),
        read(static_cast<size_t>(record) * groups),
        hop(panel),
        panels((m.rows + PANEL - 1) / PANEL) {
    all = nested(m) && m.stride > 0 ? m.stride : panels;
    if (m.stride < 0 && m.value != RG_FULL) {
      const Runs runs(m.stride);
      all = runs.panels, whole = runs.ends[CUTS - 1];
      std::memcpy(ends, runs.ends, sizeof ends);
      panel = static_cast<size_t>(record) * whole;
      hop = static_cast<size_t>(record) * ends[0];
    }
    if (!nested(m)) return;
    const size_t all = static_cast<size_t>(this->all), steps = static_cast<size_t>(steps_bytes) * static_cast<size_t>(m.bias) * all;
    const size_t plane = static_cast<size_t>(PANEL / 8) * static_cast<size_t>(m.group) * static_cast<size_t>(m.bias) * all;
    record = steps_bytes;
    hop = static_cast<size_t>(steps_bytes) * static_cast<size_t>(m.stride < 0 ? ends[0] : m.bias);
    first = steps * static_cast<size_t>(m.bits - FEWEST);
    pairs = (steps * static_cast<size_t>(m.mantissa - FEWEST + 1) + 63) / 64 * 64;
    apart = plane + SKEW;
    singles = pairs + 2 * plane + SKEW;
    panel = (singles + apart * static_cast<size_t>(m.mantissa - FEWEST) + all - 1) / all;
    read = hop + plane * static_cast<size_t>(m.bits) / all;
  }
  // Where the run that a group lies in ends, in the whole; and where in this matrix.
  RG_INLINE int whole_end(int g) const { return g < ends[0] ? ends[0] : g < ends[1] ? ends[1] : g < ends[2] ? ends[2] : whole; }
  RG_INLINE int end_of(int g) const { return groups < whole_end(g) ? groups : whole_end(g); }
  // How many groups lie between the first of a panel and some other of it.
  RG_INLINE int64_t between(const uint8_t *of_panel, int g) const {
    if (g < ends[0]) return g;
    const int64_t number = (of_panel - panels_at) / static_cast<ptrdiff_t>(hop);
    const int begin = g < ends[1] ? ends[0] : g < ends[2] ? ends[1] : ends[2];
    return all * begin + number * (whole_end(g) - begin - ends[0]) + (g - begin);
  }
  RG_INLINE bool in_runs() const { return ends[0] < groups; }
  // Where the run that begins with some group lies in a panel.
  RG_INLINE const uint8_t *run_at(int64_t panel_number, int g) const { return panels_at + (all * g + panel_number * (whole_end(g) - g)) * record; }
  RG_INLINE const uint8_t *steps(const uint8_t *of_panel, int g) const { return of_panel + first + between(of_panel, g) * record; }
  // The codes of a group, of a matrix that is not in planes or (B >= NESTED) of one that is.
  template <int B>
  RG_INLINE auto codes(const uint8_t *of_panel, int g) const {
    if constexpr (B >= NESTED) {
      const size_t before = static_cast<size_t>((of_panel - panels_at) / record + between(of_panel, g));
      const size_t single = before * static_cast<size_t>(PANEL / 8 * group);
      return Planes{panels_at + pairs + 2 * single, panels_at + singles + single, apart};
    } else {
      return steps(of_panel, g) + steps_bytes + zeros_bytes;
    }
  }
};

// A matrix of codes that every kernel can read, if its memory is there.
inline bool sound(const rg_matrix &m) {
  if (m.rows < 1 || m.rows > MOST_ROWS || m.columns < 1 || m.columns > MOST_COLUMNS || m.bits < 1 || m.bits > 8) return false;
  if (m.group < 1 || m.group > MOST_GROUP || m.group % unit_of(m.bits) || m.zero < 0 || m.zero > 1) return false;
  if (m.step < RG_STEP_NONE || m.step > RG_STEP_E4M3 || m.value < RG_INT || (m.value > RG_FLOAT && m.value != RG_TRELLIS)) return false;
  if (m.offset < -256 || m.offset > 256) return false;
  if (m.stride < 0) {
    const Runs runs(m.stride);
    if (!runs.rises() || runs.ends[CUTS - 1] < (m.columns - 1) / m.group + 1 || runs.panels < (m.rows - 1) / PANEL + 1 || runs.panels > MOST_ROWS / PANEL) return false;
  }
  if (m.value == RG_TABLE && (m.bits > 4 || !m.table)) return false;
  if (m.value == RG_TRELLIS && !sound_trellis_matrix(m)) return false;
  if (m.value == RG_INT && (m.bias || m.mantissa)) {  // in planes
    if (m.bits < FEWEST || m.mantissa < m.bits || m.mantissa > 8 || m.step != RG_STEP_F16 || m.zero || m.group % PLANES_UNIT || m.group > LONGEST) return false;
    if (m.bias < 1 || m.bias > MOST_COLUMNS || Layout(m).groups > m.bias || static_cast<int64_t>(m.bias) * m.group > MOST_COLUMNS) return false;
    if (m.stride < 0) return Runs(m.stride).ends[CUTS - 1] == m.bias;
    return !m.stride || (m.stride >= Layout(m).panels && m.stride <= MOST_ROWS / PANEL);
  }
  if (m.value == RG_FLOAT && (m.bits < 2 || m.mantissa < 0 || m.mantissa >= m.bits || m.bias < -1000 || m.bias > 1000)) return false;
  return m.stride <= 0 || m.stride >= static_cast<int64_t>(Layout(m).record) * Layout(m).groups;
}

inline bool sound_dtype(int dtype) { return dtype >= RG_F32 && dtype <= RG_F16; }

// A matrix in full precision that a step can read.
inline bool sound_full(const rg_matrix &m) {
  if (m.value != RG_FULL || m.rows < 1 || m.rows > MOST_ROWS || m.columns < 1 || m.columns > MOST_COLUMNS || m.group != m.columns) return false;
  if (!sound_dtype(m.bits) || m.step != RG_STEP_NONE || m.zero || !m.panels) return false;
  const int64_t size = m.bits == RG_F32 ? 4 : 2;
  return !m.stride || m.stride >= m.columns * size || (m.stride <= -m.rows * size && m.stride % size == 0);
}

// The 16 steps of a group.
RG_INLINE Floats load_steps(const uint8_t *p, int kind) {
  switch (kind) {
    case RG_STEP_F16: return load_half(p);
    case RG_STEP_BF16: return load_bf16(p);
    case RG_STEP_F32: return load_floats(reinterpret_cast<const float *>(p));
    case RG_STEP_E8M0: return load_e8m0(p);
    case RG_STEP_E4M3: {  // exponent and mantissa as those of a float, 2^-120 of the value (never negative)
      const Ints bits = shifted_left(load_byte_ints(p), 20);
      return as_floats(bits) * set_floats(1.329227995784916e36f);
    }
    default: return set_floats(1.0f);
  }
}

// Where the 16 dense codes of a group's zero points lie, for shuffles that take two bytes into each 32-bit lane; of one or
// two bits all lie in one lane already.
struct ZeroPlaces {
  alignas(64) uint8_t bytes[9][64];
  alignas(64) int32_t shifts[9][PANEL];
  constexpr ZeroPlaces() : bytes{}, shifts{} {
    for (int bits = 1; bits < 8; ++bits)
      for (int r = 0; r < PANEL; ++r) {
        const int at = r * bits;
        bytes[bits][4 * r] = static_cast<uint8_t>(at / 8);
        bytes[bits][4 * r + 1] = static_cast<uint8_t>(at / 8 + 1);
        bytes[bits][4 * r + 2] = bytes[bits][4 * r + 3] = 0x80;  // a zero
        shifts[bits][r] = bits <= 2 ? at : at % 8;
      }
  }
};
alignas(64) constexpr ZeroPlaces ZERO_PLACES;

// The 16 zero points of a group: `bits` bits each, dense. Reads 16 bytes; codes follow.
RG_INLINE Floats load_zeros(const uint8_t *p, int bits) {
  if (bits == 8) return to_floats(load_byte_ints(p));
#if defined(RG_WIDE)
  const __m512i shifts = _mm512_load_si512(ZERO_PLACES.shifts[bits]);
  __m512i all;
  if (bits <= 2) {
    int32_t lane;
    std::memcpy(&lane, p, 4);
    all = _mm512_set1_epi32(lane);
  } else {
    all = _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
    all = _mm512_shuffle_epi8(all, _mm512_load_si512(ZERO_PLACES.bytes[bits]));
  }
  return to_floats(Ints{_mm512_and_si512(_mm512_srlv_epi32(all, shifts), _mm512_set1_epi32((1 << bits) - 1))});
#elif defined(__AVX2__)
  Ints zeros;
  for (int i = 0; i < PARTS; ++i) {
    const __m256i shifts = _mm256_load_si256(reinterpret_cast<const __m256i *>(ZERO_PLACES.shifts[bits]) + i);
    __m256i all;
    if (bits <= 2) {
      int32_t lane;
      std::memcpy(&lane, p, 4);
      all = _mm256_set1_epi32(lane);
    } else {
      all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p)));
      all = _mm256_shuffle_epi8(all, _mm256_load_si256(reinterpret_cast<const __m256i *>(ZERO_PLACES.bytes[bits]) + i));
    }
    zeros.v[i] = (NativeInts)_mm256_and_si256(_mm256_srlv_epi32(all, shifts), _mm256_set1_epi32((1 << bits) - 1));
  }
  return to_floats(zeros);
#else
  uint8_t spread[PANEL];
  uint64_t low = 0, high = 0;  // 8 codes are `bits` bytes
  std::memcpy(&low, p, static_cast<size_t>(bits));
  std::memcpy(&high, p + bits, static_cast<size_t>(bits));
  const uint64_t mask = (1u << bits) - 1u;
  for (int i = 0; i < 8; ++i) {
    spread[i] = static_cast<uint8_t>((low >> (i * bits)) & mask);
    spread[8 + i] = static_cast<uint8_t>((high >> (i * bits)) & mask);
  }
  return to_floats(load_byte_ints(spread));
#endif
}

}  // namespace
