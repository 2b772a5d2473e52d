// A matrix in planes, put together and taken apart a code at a time.
#pragma once
#include "codes.h"
#include "pool.h"

namespace {

// Panels in planes: `steps` is a row-major matrix of float16 for each level, fewest bits first.
inline int pack_planes(rg_matrix m, const uint8_t *codes, const uint8_t *steps, uint8_t *panels, int threads) {
  m.panels = panels;
  const Layout l(m);
  const int top = m.mantissa, size = step_bytes(m.step);
  const size_t entries = static_cast<size_t>(m.rows) * static_cast<size_t>(l.groups), level_bytes = static_cast<size_t>(l.steps_bytes) * static_cast<size_t>(l.groups) * static_cast<size_t>(l.panels);
  std::memset(panels, 0, l.panel * static_cast<size_t>(l.panels));
  rg::Share share;
  rg::parallel(threads, [&](int thread, rg::Team &team) {
    int64_t start, stop;
    while (share.take(thread, team.threads, l.panels, 1, start, stop)) {
      uint8_t *panel = panels + l.hop * static_cast<size_t>(start);
      for (int r = 0; r < PANEL && start * PANEL + r < m.rows; ++r) {
        const size_t row = static_cast<size_t>(start * PANEL + r);
        for (int g = 0; g < l.groups; ++g) {
          for (int level = 0; level <= top - FEWEST; ++level)
            std::memcpy(panel + static_cast<size_t>(level) * level_bytes + static_cast<size_t>(l.between(panel, g) * l.steps_bytes + r * size),
                        steps + (static_cast<size_t>(level) * entries + row * static_cast<size_t>(l.groups) + static_cast<size_t>(g)) * static_cast<size_t>(size), static_cast<size_t>(size));
          const Planes planes = l.codes<NESTED>(panel, g);
          const uint8_t *from = codes + row * static_cast<size_t>(m.columns) + static_cast<size_t>(g) * static_cast<size_t>(m.group);
          const int left = m.columns - g * m.group, count = left < m.group ? left : m.group;
          for (int i = 0; i < count; ++i) {
            const int step = i % PLANES_UNIT / 4, place = r * 4 + i % 4;
            const unsigned code = from[i];
            uint8_t *pair = panels + (planes.first - panels) + (i / PLANES_UNIT * PAIR + step % 2 * STEP + place);
            *pair = static_cast<uint8_t>(*pair | (code >> (top - 2) & 3u) << (step / 2 * 2));
            for (int bit = top - 3; bit >= 0; --bit) {
              uint8_t *plane = panels + (planes.next - panels) + l.apart * static_cast<size_t>(top - 3 - bit) + (i / PLANES_UNIT * STEP + place);
              *plane = static_cast<uint8_t>(*plane | (code >> bit & 1u) << step);
            }
          }
        }
      }
    }
  });
  return RG_DONE;
}

// One code of a group in planes.
inline unsigned get_planes(const Planes &planes, int bits, int i, int row) {
  const int step = i % PLANES_UNIT / 4, place = row * 4 + i % 4;
  unsigned code = planes.first[i / PLANES_UNIT * PAIR + step % 2 * STEP + place] >> (step / 2 * 2) & 3u;
  for (int plane = 0; plane < bits - 2; ++plane)
    code = code << 1 | (planes.next[planes.apart * static_cast<size_t>(plane) + static_cast<size_t>(i / PLANES_UNIT * STEP + place)] >> step & 1u);
  return code;
}

}  // namespace
