// Which level runs, and everything that is the same at every level.
#include <sys/mman.h>

#include <atomic>
#include <chrono>
#include <cstring>

#include "apart.h"
#include "codes.h"
#include "gram.h"
#include "kernels.h"
#include "pool.h"

namespace {

struct Level {
  const char *name;
  const rg::Kernels *kernels;
  bool (*here)();
};

bool always() { return true; }
#if defined(RG_ONLY)  // one level alone, which compiles sooner: see CMakeLists.txt
#define RG_NAME_OF(level) #level
#define RG_NAMED(level) RG_NAME_OF(level)
const Level LEVELS[] = {{RG_NAMED(RG_ONLY), &rg::RG_ONLY, always}};
#elif defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }
bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
}
bool has_vnni() { return has_avx512() && __builtin_cpu_supports("avx512vnni"); }
const Level LEVELS[] = {{"vnni", &rg::vnni, has_vnni}, {"avx512", &rg::avx512, has_avx512}, {"avx2", &rg::avx2, has_avx2}, {"portable", &rg::portable, always}};
#elif defined(__aarch64__)
const Level LEVELS[] = {{"neon", &rg::neon, always}, {"portable", &rg::portable, always}};
#else
const Level LEVELS[] = {{"portable", &rg::portable, always}};
#endif

std::atomic<const Level *> chosen{nullptr};

const Level &level() {
  const Level *now = chosen.load();
  if (now) return *now;
  for (const Level &one : LEVELS)
    if (one.here()) {
      chosen.store(&one);
      return one;
    }
  return LEVELS[0];
}

const rg::Kernels &kernels() { return *level().kernels; }

bool readable(const rg_matrix *m) { return m && sound(*m) && m->panels; }

bool rounds(int activations) {
  return (activations >= RG_INT8 && activations <= RG_FLOAT32) || (activations >= RG_TOKEN + 2 && activations <= RG_TOKEN + 8);
}

bool sound_grid(const rg_grid &g) {
  if (g.bits < 1 || g.bits > 8 || !(g.low < g.high) || (g.zero && g.kind != RG_INTEGERS)) return false;
  const int most = 1 << g.bits;
  switch (g.kind) {
    case RG_INTEGERS: return g.low >= -128 && g.low == static_cast<int>(g.low) && g.high == g.low + static_cast<float>(most - 1);
    case RG_FLOATS: return g.mantissa >= 0 && g.mantissa < g.bits && g.tiny > 0 && g.low == -g.high && g.high < 1e30f;
    case RG_LIST: return g.count >= 2 && g.count <= most && g.values && g.middles;
    default: return false;
  }
}

bool sound_ranger(const rg_ranger &r) {
  if (r.kind < RG_ABSMAX || r.kind > RG_SEARCH || r.step < RG_STEP_F16 || r.step > RG_STEP_E4M3) return false;
  if (r.kind == RG_SEARCH && (r.count < 1 || !r.shares)) return false;
  return (r.step != RG_STEP_E8M0 || r.top >= 1) && (r.step != RG_STEP_E4M3 || r.whole > 0);
}

// Huge pages, where the system has them.
void ask_for_huge_pages(void *memory, size_t bytes) {
#if defined(MADV_HUGEPAGE)
  madvise(memory, bytes, MADV_HUGEPAGE);
#else
  (void)memory, (void)bytes;
#endif
}

}  // namespace

extern "C" {

int rg_abi(void) { return 8; }
int rg_has_planes(void) { return 1; }
int rg_has_cuts(void) { return 1; }
int rg_has_columns(void) { return 1; }
const char *rg_level(void) { return level().name; }

int rg_set_level(const char *name) {
  for (const Level &one : LEVELS) {
    if (std::strcmp(one.name, name) != 0) continue;
    if (!one.here()) return 2;
    chosen.store(&one);
    return 0;
  }
  const char *const all[] = {"vnni", "avx512", "avx2", "portable", "neon"};
  for (const char *other : all)
    if (std::strcmp(other, name) == 0) return 2;
  return 1;
}

double rg_bandwidth(int threads, size_t bytes, double seconds) {
  const size_t huge = size_t{2} << 20;
  bytes = bytes / huge * huge;
  if (bytes == 0) return 0;
  void *raw = mmap(nullptr, bytes + huge, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (raw == MAP_FAILED) return 0;
  uint8_t *memory = reinterpret_cast<uint8_t *>((reinterpret_cast<uintptr_t>(raw) + huge - 1) & ~(huge - 1));
  ask_for_huge_pages(memory, bytes);
  std::memset(memory, 1, bytes);
  using Clock = std::chrono::steady_clock;
  double best = 0;
  std::atomic<uint64_t> sink{0};
  const auto begin = Clock::now();
  do {
    rg::Share share;
    const auto start = Clock::now();
    rg::parallel(threads, [&](int thread, rg::Team &team) {
      int64_t from, to;
      uint64_t sum = 0;
      while (share.take(thread, team.threads, static_cast<int64_t>(bytes >> 12), 64, from, to)) sum += kernels().read(memory + (from << 12), static_cast<size_t>(to - from) << 12);
      sink += sum;
    });
    const double rate = static_cast<double>(bytes) / std::chrono::duration<double>(Clock::now() - start).count();
    best = rate > best ? rate : best;
  } while (std::chrono::duration<double>(Clock::now() - begin).count() < seconds);
  munmap(raw, bytes + huge);
  return best;
}

size_t rg_panel_bytes(const rg_matrix *m) { return m && sound(*m) ? Layout(*m).panel : 0; }

int rg_pack(const rg_matrix *given, const uint8_t *codes, const void *steps, const uint8_t *zeros, uint8_t *panels, int threads) {
  if (!given || !sound(*given) || !codes || !panels || (given->zero && !zeros) || (given->step != RG_STEP_NONE && !steps)) return RG_UNSOUND;
  rg_matrix own = *given;
  own.panels = panels;
  const rg_matrix *m = &own;
  const Layout l(own);
  if (m->stride && (m->stride > 0 || l.all != l.panels || l.whole != l.groups)) return RG_UNSOUND;
  if (nested(*m)) return m->bits == m->mantissa && m->bias == l.groups ? pack_planes(*m, codes, static_cast<const uint8_t *>(steps), panels, threads) : RG_UNSOUND;
  const int size = step_bytes(m->step);
  rg::Share share;
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    int64_t start, stop;
    while (share.take(thread, team.threads, l.panels, 1, start, stop)) {
      for (int g = 0; g < l.groups; ++g) {
        uint8_t *at = panels + (l.steps(panels + l.hop * static_cast<size_t>(start), g) - panels);
        std::memset(at, 0, static_cast<size_t>(l.record));
        for (int r = 0; r < PANEL; ++r) {
          const int64_t row = start * PANEL + r;
          if (row >= m->rows) break;
          const size_t entry = static_cast<size_t>(row) * l.groups + g;
          if (size) std::memcpy(at + r * size, static_cast<const uint8_t *>(steps) + entry * size, static_cast<size_t>(size));
          for (int bit = 0; m->zero && bit < m->bits; ++bit)
            if (zeros[entry] >> bit & 1) at[l.steps_bytes + (r * m->bits + bit) / 8] |= static_cast<uint8_t>(1 << ((r * m->bits + bit) % 8));
          const uint8_t *from = codes + static_cast<size_t>(row) * m->columns + static_cast<size_t>(g) * m->group;
          const int left = m->columns - g * m->group, count = left < m->group ? left : m->group;
          const int unit = unit_of(m->bits);
          uint8_t *block = at + l.steps_bytes + l.zeros_bytes;
          if (m->value == RG_TRELLIS) {
            const TrellisKind kind(*m);
            for (int i = 0; i < count; ++i) put_trellis(kind, block, r, i, from[i]);
            continue;
          }
          for (int i = 0; i < count; ++i)
            put_code(block + i / unit * block_bytes(m->bits), m->bits, i % unit / 4, r * 4 + i % 4, from[i]);
        }
      }
    }
  });
  return 0;
}

int rg_unpack(const rg_matrix *m, uint8_t *codes, int threads) {
  if (!readable(m) || !codes) return RG_UNSOUND;
  const Layout l(*m);
  rg::Share share;
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    int64_t start, stop;
    while (share.take(thread, team.threads, m->rows, 1, start, stop)) {
      const int r = static_cast<int>(start % PANEL), unit = unit_of(m->bits);
      const uint8_t *panel = m->panels + l.hop * static_cast<size_t>(start / PANEL);
      for (int g = 0; g < l.groups; ++g) {
        const uint8_t *at = l.steps(panel, g);
        const int left = m->columns - g * m->group, count = left < m->group ? left : m->group;
        if (nested(*m)) {
          const Planes planes = l.codes<NESTED>(panel, g);
          uint8_t *out = codes + static_cast<size_t>(start) * m->columns + static_cast<size_t>(g) * m->group;
          for (int i = 0; i < count; ++i) out[i] = static_cast<uint8_t>(get_planes(planes, m->bits, i, r));
          continue;
        }
        for (int i = 0; i < count; ++i) {
          const uint8_t *group = at + l.steps_bytes + l.zeros_bytes, *block = group + i / unit * block_bytes(m->bits);
          const unsigned code = m->value == RG_TRELLIS ? get_trellis(TrellisKind(*m), group, r, i) : get_code(block, m->bits, i % unit / 4, r * 4 + i % 4);
          codes[static_cast<size_t>(start) * m->columns + static_cast<size_t>(g) * m->group + i] = static_cast<uint8_t>(code);
        }
      }
    }
  });
  return 0;
}

int rg_decode(const rg_matrix *m, int64_t start, int64_t stop, const int64_t *index, void *out, int dtype, int threads) {
  if (!readable(m) || (stop > start && !out) || !sound_dtype(dtype)) return RG_UNSOUND;
  if (start < 0 || (!index && stop > m->rows)) return RG_NO_ROW;
  for (int64_t i = start; index && i < stop; ++i)
    if (index[i] < 0 || index[i] >= m->rows) return RG_NO_ROW;
  return kernels().decode(m, start, stop, index, out, dtype, threads);
}

int rg_linear(const rg_matrix *m, const void *x, void *y, int64_t tokens, int dtype, int activations, int threads) {
  if (!readable(m) || tokens < 0 || (tokens && (!x || !y)) || !sound_dtype(dtype) || !rounds(activations)) return RG_UNSOUND;
  return kernels().linear(m, x, y, tokens, dtype, activations, threads);
}

int rg_gemm(const rg_matrix *m, const void *x, const int8_t *xq, const float *token_steps, void *y, int64_t tokens, int dtype, int threads) {
  if (!readable(m) || tokens < 0 || (tokens && ((!x && !xq) || !y)) || !sound_dtype(dtype)) return RG_UNSOUND;
  const rg_codes codes{xq, token_steps, nullptr, 0, 0};
  return kernels().gemm(m, x, xq ? &codes : nullptr, y, tokens, dtype, threads);
}

int rg_coded(const rg_matrix *m, const rg_codes *codes, void *y, int64_t tokens, int dtype, int threads) {
  if (!readable(m) || !codes || tokens < 0 || (tokens && (!codes->codes || !y)) || !sound_dtype(dtype)) return RG_UNSOUND;
  if (codes->group < 0 || (codes->group && (m->columns % codes->group || codes->group % m->group))) return RG_UNSOUND;
  const int64_t entries = (codes->shared ? 1 : tokens) * (codes->group ? m->columns / codes->group : 1);
  for (int64_t i = 0; codes->zeros && i < entries; ++i)
    if (codes->zeros[i] < -128 || codes->zeros[i] > 127) return RG_UNSOUND;
  return kernels().coded(m, codes, y, tokens, dtype, threads);
}

int rg_integers(const rg_matrix *m, const int8_t *x, int32_t *y, int64_t tokens, int threads) {
  if (!readable(m) || tokens < 0 || (tokens && (!x || !y))) return RG_UNSOUND;
  return kernels().integers(m, x, y, tokens, threads);
}

#if defined(__x86_64__) && defined(__linux__) && !defined(RG_ONLY)
int rg_has_gram(void) { return rg::amx_here(); }
int rg_gram(const uint16_t *x, int64_t tokens, int64_t columns, float *out, int threads) {
  if (tokens < 0 || columns < 1 || !out || (tokens && !x)) return RG_UNSOUND;
  return rg::amx_here() ? rg::gram_amx(x, tokens, columns, out, threads) : RG_UNREAD;
}
#else
int rg_has_gram(void) { return 0; }
int rg_gram(const uint16_t *, int64_t, int64_t, float *, int) { return RG_UNREAD; }
#endif

int rg_range(const rg_grid *grid, const rg_ranger *ranger, const void *x, int dtype, const float *weight, int64_t groups, int64_t size, float *scale, float *zero, int threads) {
  if (!grid || !ranger || !sound_grid(*grid) || !sound_ranger(*ranger) || !sound_dtype(dtype)) return RG_UNSOUND;
  if (groups < 0 || size < 1 || size > rg::MOST_COLUMNS || (groups && (!x || !scale)) || (groups && grid->zero && !zero)) return RG_UNSOUND;
  return kernels().range(*grid, *ranger, x, dtype, weight, groups, size, scale, zero, threads);
}

int rg_feedback(const rg_sweep *s, int threads) {
  if (!s || !sound_grid(s->grid) || (s->ranger && (!sound_ranger(*s->ranger) || s->group_of))) return RG_UNSOUND;
  if (s->rows < 0 || s->columns < 1 || s->columns > rg::MOST_COLUMNS || s->groups < 1 || s->groups > s->columns) return RG_UNSOUND;
  if (!s->group_of && s->columns % s->groups) return RG_UNSOUND;
  if (s->rows && (!s->w || !s->feedback || !s->scale || !s->codes || (s->grid.zero && !s->zero))) return RG_UNSOUND;
  for (int64_t j = 0; s->group_of && j < s->columns; ++j)
    if (s->group_of[j] < 0 || s->group_of[j] >= s->groups) return RG_UNSOUND;
  return kernels().feedback(*s, threads);
}

int rg_attend(const rg_attention *attention, int threads) { return attention ? kernels().attend(attention, threads) : RG_UNSOUND; }
int rg_step(const rg_program *program, const rg_call *call, int threads) { return program && call ? kernels().step(program, call, threads) : RG_UNSOUND; }
}
