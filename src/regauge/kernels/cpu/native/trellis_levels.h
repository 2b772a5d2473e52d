// The levels of the functions of words, trellises and lists: each a source file, compiled for one kind of CPU. The other
// kernels call those of trellises a panel at a time.
#pragma once
#include "regauge.h"

namespace rg {

// A token as it was rounded: four bytes a word, and of each group their sums and their step.
struct TrellisInput {
  const int32_t *high, *low;  // `low` only with 16 bits
  const int32_t *sum_high, *sum_low;
  const float *step;
};

struct Trellises {
  int (*round)(const rg_trellis &, const float *, int64_t, int64_t, uint8_t *, float *, int);
  int (*feedback)(const rg_trellis &, const rg_trellis_sweep &, int);
  // 16 rows of a panel for 1 ... 4 tokens, without the rows' multipliers: out (count, 16).
  void (*product)(const rg_matrix &, const uint8_t *, const TrellisInput *, int, bool, float *);
  void (*floats)(const rg_matrix &, const uint8_t *, const float *const *, int, float *);
  // Values of a group, 128 more than the table's whole numbers, in steps of 16 rows x 4 inputs.
  void (*spread)(const rg_matrix &, const uint8_t *, int, uint8_t *);
  // Words of a list (lists.h).
  int (*lists)(const rg_list &, const float *, const float *, int64_t, int64_t, float *, int);
};

extern const Trellises trellis_portable, trellis_avx2, trellis_avx512, trellis_vbmi;
const Trellises &trellises();  // those that run

}  // namespace rg
