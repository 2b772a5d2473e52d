// How big the step of a group is, of sixteen groups at once, a lane each. The candidates of a search and its choice are
// those of regauge.formats.rangers.Search: a later candidate wins only where its error is less.
#pragma once
#include <cstdlib>

#include "pool.h"
#include "values.h"

namespace {

constexpr int BAND = 64;  // rows, or groups, that one thread works on at a time

// Memory of `count` numbers, or none; vectors in it are aligned.
template <class T>
struct Room {
  T *data;
  explicit Room(int64_t count) {
    const size_t bytes = (static_cast<size_t>(count) * sizeof(T) + 63) / 64 * 64;
    data = static_cast<T *>(std::aligned_alloc(64, bytes ? bytes : 64));
  }
  ~Room() { std::free(data); }
  Room(const Room &) = delete;
  Room &operator=(const Room &) = delete;
};

struct Found {
  Floats scale, zero;
};

// Number k of lane l lies at x[k * BAND + l]; `weight` likewise, or NULL.
template <int KIND>
struct Ranges {
  const rg_grid &g;
  const rg_ranger &r;
  const float *x, *weight;
  int64_t size;

  Found even(Floats raw) const { return {stored(r, raw), set_floats(static_cast<float>((static_cast<int>(g.high - g.low) + 1) / 2))}; }

  Found uneven(Floats low, Floats high) const {
    if (!g.zero) return {stored(r, maximum(low / set_floats(g.low), high / set_floats(g.high))), zero_floats()};
    const Floats width = set_floats(g.high - g.low), bottom = set_floats(g.low), top = set_floats(g.high);
    const Floats scale = stored(r, high / width - low / width);
    const Floats zero = minimum(maximum(bottom - low / scale, bottom), top);
    return {scale, to_floats(rounded(zero))};
  }

  // what(k, x, value less its zero point), in runs of 32 after each of which done() adds up: sums of many stay exact.
  template <class What, class Done>
  RG_INLINE void each(const Found &f, What &&what, Done &&done) const {
    for (int64_t start = 0; start < size; start += 32) {
      const int64_t stop = start + 32 < size ? start + 32 : size;
      for (int64_t k = start; k < stop; ++k) {
        const Floats number = load_floats(x + k * BAND);
        Ints code;
        Floats z = number / f.scale;
        if (KIND == RG_INTEGERS && g.zero) z = snapped<KIND>(g, z + f.zero, code) - f.zero;
        else z = snapped<KIND>(g, z, code);
        what(k, number, z);
      }
      done();
    }
  }

  Floats error(const Found &f) const {
    Floats all = zero_floats(), some = zero_floats();
    const Floats less = zero_floats() - f.scale;
    each(f, [&](int64_t k, Floats number, Floats z) __attribute__((always_inline)) {
      const Floats miss = fma(z, less, number);
      some = weight ? fma(miss * miss, load_floats(weight + k * BAND), some) : fma(miss, miss, some);
    }, [&]() __attribute__((always_inline)) { all = all + some, some = zero_floats(); });
    return all;
  }

  // The step with the least error for the codes that f gives.
  Floats least_squares(const Found &f) const {
    Floats above = zero_floats(), below = above, a = above, b = above;
    each(f, [&](int64_t k, Floats number, Floats z) __attribute__((always_inline)) {
      const Floats counted = weight ? z * load_floats(weight + k * BAND) : z;
      a = fma(counted, number, a), b = fma(counted, z, b);
    }, [&]() __attribute__((always_inline)) { above = above + a, below = below + b, a = b = zero_floats(); });
    const Floats none = zero_floats(), raw = if_less(none, below, if_less(none, above, above / below, f.scale), f.scale);
    return if_less(none, raw, minimum(raw, set_floats(0x1.fffffep127f)), set_floats(1.0f));
  }

  Found operator()() const {
    Floats low = zero_floats(), high = low;
    for (int64_t k = 0; k < size; ++k) {
      const Floats number = load_floats(x + k * BAND);
      low = minimum(low, number), high = maximum(high, number);
    }
    const Floats raw = maximum(zero_floats() - low, high) / set_floats((g.high - g.low) / 2);
    if (r.kind == RG_MINMAX) return uneven(low, high);
    Found best = even(raw);
    if (r.kind == RG_ABSMAX) return best;
    Floats least = error(best);
    const auto better = [&](const Found &now) {
      const Floats other = error(now);
      best.scale = if_less(other, least, now.scale, best.scale);
      best.zero = if_less(other, least, now.zero, best.zero);
      least = if_less(other, least, other, least);
    };
    for (int i = 0; i < r.count; ++i) {
      const Floats share = set_floats(r.shares[i]);
      better(i && !g.zero ? even(raw * share) : uneven(low * share, high * share));
    }
    better({stored(r, least_squares(best)), best.zero});
    return best;
  }
};

// out[k * BAND + r] = x[r * stride + k], 0 for the lanes past `rows`. Whether all are finite.
template <class Read>
inline bool turned_in(Read &&read, int64_t rows, int64_t stride, int64_t size, float *out) {
  uint32_t endless = 0;
  for (int64_t begin = 0; begin < size; begin += 16) {
    const int64_t end = begin + 16 < size ? begin + 16 : size;
    for (int64_t r = 0; r < BAND; ++r)
      for (int64_t k = begin; k < end; ++k) {
        const float number = r < rows ? read(r * stride + k) : 0.0f;
        uint32_t bits;
        std::memcpy(&bits, &number, 4);
        endless |= (bits & 0x7f800000u) == 0x7f800000u;
        out[k * BAND + r] = number;
      }
  }
  return !endless;
}

inline bool turned_in(const void *x, int dtype, int64_t first, int64_t rows, int64_t stride, int64_t size, float *out) {
  const float *floats = static_cast<const float *>(x);
  const uint16_t *words = static_cast<const uint16_t *>(x);
  if (dtype == RG_F32) return turned_in([=](int64_t i) { return floats[first + i]; }, rows, stride, size, out);
  if (dtype == RG_BF16) return turned_in([=](int64_t i) { return bf16_to_float(words[first + i]); }, rows, stride, size, out);
  return turned_in([=](int64_t i) { return half_to_float(words[first + i]); }, rows, stride, size, out);
}

// answer(thread's room, first row, rows) for every tile, an rg_answer; the worst that any gave.
template <class Make, class Do>
inline int each_tile(int64_t rows, int64_t tile, int threads, Make &&make, Do &&answer) {
  rg::Share share;
  std::atomic<int> worst{RG_DONE};
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    int64_t start, stop;
    auto room = make();
    while (share.take(thread, team.threads, (rows + tile - 1) / tile, 1, start, stop)) {
      const int64_t first = start * tile, left = rows - first;
      const int now = room.whole() ? answer(room, first, left < tile ? left : tile) : RG_NO_MEMORY;
      int before = worst.load();
      while (now != RG_DONE && before != RG_NO_MEMORY && !worst.compare_exchange_weak(before, now)) {
      }
    }
  });
  return worst.load();
}

template <int KIND>
inline int range_of(const rg_grid &g, const rg_ranger &r, const void *x, int dtype, const float *weight, int64_t groups, int64_t size, float *scale, float *zero, int threads) {
  struct Work {
    Room<float> x, weight;
    Work(int64_t count, int64_t weights) : x(count), weight(weights) {}
    bool whole() const { return x.data && weight.data; }
  };
  return each_tile(groups, BAND, threads, [&] { return Work(size * BAND, weight ? size * BAND : 1); }, [&](Work &room, int64_t first, int64_t count) -> int {
    bool finite = turned_in(x, dtype, first * size, count, size, size, room.x.data);
    if (weight) finite &= turned_in(weight, RG_F32, first * size, count, size, size, room.weight.data);
    if (!finite) return RG_ENDLESS;
    float scales[PANEL], zeros[PANEL];
    for (int64_t lane = 0; lane < count; lane += PANEL) {
      const Found found = Ranges<KIND>{g, r, room.x.data + lane, weight ? room.weight.data + lane : nullptr, size}();
      store_floats(scales, found.scale), store_floats(zeros, found.zero);
      const size_t some = static_cast<size_t>(count - lane < PANEL ? count - lane : PANEL);
      std::memcpy(scale + first + lane, scales, some * 4);
      if (g.zero) std::memcpy(zero + first + lane, zeros, some * 4);
    }
    return RG_DONE;
  });
}

inline int range(const rg_grid &g, const rg_ranger &r, const void *x, int dtype, const float *weight, int64_t groups, int64_t size, float *scale, float *zero, int threads) {
  if (g.kind == RG_INTEGERS) return range_of<RG_INTEGERS>(g, r, x, dtype, weight, groups, size, scale, zero, threads);
  if (g.kind == RG_FLOATS) return range_of<RG_FLOATS>(g, r, x, dtype, weight, groups, size, scale, zero, threads);
  return range_of<RG_LIST>(g, r, x, dtype, weight, groups, size, scale, zero, threads);
}

}  // namespace
