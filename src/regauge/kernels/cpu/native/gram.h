// XtX of rows in bfloat16, where the CPU has a unit for it.
#pragma once
#include <cstdint>

namespace rg {

bool amx_here();
// out (columns, columns), float32, row-major: blocks of 32 x 32 on and above the diagonal take up the sum over `tokens` rows.
int gram_amx(const uint16_t *x, int64_t tokens, int64_t columns, float *out, int threads);

}  // namespace rg
