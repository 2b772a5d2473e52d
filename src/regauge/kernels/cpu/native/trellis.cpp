// The trellis functions of the interface: what is sound, and which level runs. They are compiled apart from the other kernels,
// which know nothing of them.
#include "trellis_levels.h"

namespace {

constexpr int64_t MOST = int64_t{1} << 20;  // columns: a tile of 16 rows of them is 64 MiB

bool sound(const rg_trellis *t) { return t && t->table && t->run >= 4 && t->run <= 64 && t->run % 4 == 0; }

}  // namespace

namespace rg {

const Trellises &trellises() {
#if defined(__x86_64__)
  const char *level = rg_level();  // the caller may have asked for less than there is
  if (level[0] == 'v') return __builtin_cpu_supports("avx512vbmi") ? trellis_vbmi : trellis_avx512;
  if (level[0] == 'a') return level[3] == '5' ? trellis_avx512 : trellis_avx2;
#endif
  return trellis_portable;
}

}  // namespace rg

extern "C" {

int rg_trellis_round(const rg_trellis *t, const float *z, int64_t rows, int64_t columns, uint8_t *codes, float *values, int threads) {
  if (!sound(t) || rows < 0 || columns < 1 || columns > MOST || columns % t->run || (rows && (!z || !codes))) return RG_UNSOUND;
  return rg::trellises().round(*t, z, rows, columns, codes, values, threads);
}

int rg_trellis_feedback(const rg_trellis *t, const rg_trellis_sweep *s, int threads) {
  if (!sound(t) || !s || s->rows < 0 || s->columns < 1 || s->columns > MOST || s->columns % t->run) return RG_UNSOUND;
  if (s->groups < 1 || s->columns % s->groups || s->columns / s->groups % t->run || s->part < 1 || s->part > t->run) return RG_UNSOUND;
  if (s->w_pitch < s->columns || s->pitch < s->columns || s->codes_pitch < s->columns) return RG_UNSOUND;
  if (s->rows && (!s->w || !s->targets || !s->feedback || !s->scale || !s->codes)) return RG_UNSOUND;
  return rg::trellises().feedback(*t, *s, threads);
}
}
