// One dispatch level: everything that is compiled once for each kind of CPU, as a table of functions.
#pragma once
#include "regauge.h"

namespace rg {

constexpr int64_t MOST_COLUMNS = int64_t{1} << 20;  // of what is rounded: a tile of 64 rows of them is 256 MiB

struct Kernels {
  int (*linear)(const rg_matrix *, const void *, void *, int64_t, int, int, int);
  int (*gemm)(const rg_matrix *, const void *, const rg_codes *, void *, int64_t, int, int);
  int (*coded)(const rg_matrix *, const rg_codes *, void *, int64_t, int, int);
  int (*decode)(const rg_matrix *, int64_t, int64_t, const int64_t *, void *, int, int);
  int (*integers)(const rg_matrix *, const int8_t *, int32_t *, int64_t, int);
  int (*step)(const rg_program *, const rg_call *, int);
  int (*attend)(const rg_attention *, int);
  int (*range)(const rg_grid &, const rg_ranger &, const void *, int, const float *, int64_t, int64_t, float *, float *, int);
  int (*feedback)(const rg_sweep &, int);
  uint64_t (*read)(const uint8_t *, size_t);
};

extern const Kernels portable, avx2, avx512, vnni, neon;

}  // namespace rg
