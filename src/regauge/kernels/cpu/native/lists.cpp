// The search of code words as the interface has it: what is sound, and which level runs.
#include "trellis_levels.h"

namespace {

bool sound(const rg_list *l) {
  if (!l || !l->rows || !l->sizes || (l->piece != 8 && l->piece != 4)) return false;
  const int width = 16 / l->piece, mask = (1 << width) - 1;
  if (l->count < 1 || l->count > 1 << 16 || l->kinds < 1 || l->kinds > (width == 2 ? 4 : 8)) return false;
  for (int i = 0; i < l->count; ++i)
    for (int c = 0; c < l->piece; ++c)
      if ((l->rows[i] >> (c * width) & mask) >= l->kinds) return false;
  return true;
}

}  // namespace

extern "C" {

int rg_lists_near(const rg_list *l, const float *z, const float *weight, int64_t pitch, int64_t words, float *values, int threads) {
  if (!sound(l) || words < 0 || (weight && pitch != 0 && pitch != 8) || (words && (!z || !values))) return RG_UNSOUND;
  return rg::trellises().lists(*l, z, weight, pitch, words, values, threads);
}
}
