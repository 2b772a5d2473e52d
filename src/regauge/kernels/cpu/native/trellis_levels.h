// The levels of the trellis functions: each a source file, compiled for one kind of CPU.
#pragma once
#include "regauge.h"

namespace rg {

struct Trellises {
  int (*round)(const rg_trellis &, const float *, int64_t, int64_t, uint8_t *, float *, int);
  int (*feedback)(const rg_trellis &, const rg_trellis_sweep &, int);
};

extern const Trellises trellis_portable, trellis_avx2, trellis_avx512;

}  // namespace rg
