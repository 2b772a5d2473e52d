// A matrix whose bits lie apart, read at each number of bits, against the same codes packed by themselves: the same bytes.
#pragma once

namespace {

void check_planes() {
  rg_matrix whole{};
  const int top = between(3, 8);
  whole.rows = between(1, 70), whole.columns = between(1, 300), whole.group = 32 * between(1, 8);
  whole.step = RG_STEP_F16, whole.value = RG_INT, whole.bits = whole.mantissa = top, whole.offset = 1 << (top - 1);
  const int groups = whole.bias = (whole.columns + whole.group - 1) / whole.group;
  const size_t entries = static_cast<size_t>(whole.rows) * groups;
  std::vector<uint8_t> codes(static_cast<size_t>(whole.rows) * whole.columns), found(codes.size());
  std::vector<uint16_t> steps(entries * static_cast<size_t>(top - 1));
  for (uint8_t &code : codes) code = static_cast<uint8_t>(between(0, (1 << top) - 1));
  for (uint16_t &step : steps) step = static_cast<uint16_t>(between(1, 12 << 10));
  const int panels = (whole.rows + 15) / 16;
  whole.stride = some_runs(whole.rows, groups);
  const Exact<uint8_t> memory(rg_panel_bytes(&whole) * static_cast<size_t>(panels), static_cast<size_t>(between(0, 63)));
  whole.panels = memory.data;
  const std::string shape = std::to_string(whole.rows) + "x" + std::to_string(whole.columns) + " group " + std::to_string(whole.group) + " of " + std::to_string(top) + " bits";
  expect(rg_pack(&whole, codes.data(), steps.data(), nullptr, memory.data, between(1, 3)) == 0, "planes are packed", shape);
  const bool part = coin();
  const int rows = part ? between(1, whole.rows) : whole.rows, columns = part ? between(1, whole.columns) : whole.columns;
  const int64_t tokens = between(1, 9);
  const Numbers x(static_cast<size_t>(tokens * columns), RG_F32);
  for (int bits = 2; bits <= top; ++bits) {
    rg_matrix level = whole, alone{};
    level.bits = bits, level.offset = 1 << (bits - 1), level.rows = rows, level.columns = columns, level.stride = whole.stride ? whole.stride : part ? panels : 0;
    alone.rows = rows, alone.columns = columns, alone.group = whole.group, alone.bits = bits, alone.step = whole.step, alone.offset = level.offset;
    const int own = (columns + whole.group - 1) / whole.group;
    std::vector<uint8_t> fewer;
    std::vector<uint16_t> few;
    for (int r = 0; r < rows; ++r) {
      for (int i = 0; i < columns; ++i) fewer.push_back(static_cast<uint8_t>(codes[static_cast<size_t>(r) * whole.columns + i] >> (top - bits)));
      for (int g = 0; g < own; ++g) few.push_back(steps[static_cast<size_t>(bits - 2) * entries + static_cast<size_t>(r * groups + g)]);
    }
    std::vector<uint8_t> bytes(rg_panel_bytes(&alone) * static_cast<size_t>((rows + 15) / 16));
    alone.panels = bytes.data();
    rg_pack(&alone, fewer.data(), few.data(), nullptr, bytes.data(), 1);
    const std::string name = shape + " at " + std::to_string(bits) + (part ? ", a part" : "") + (whole.stride ? ", in runs" : "");
    found.assign(fewer.size(), 0);
    expect(rg_unpack(&level, found.data(), 2) == 0 && found == fewer, "codes of a level", name);
    const size_t count = static_cast<size_t>(tokens * rows);
    std::vector<float> one(count), other(count), some(fewer.size()), more(fewer.size());
    for (const int activations : {int(RG_INT8), int(RG_INT16), int(RG_FLOAT32), RG_TOKEN + 8}) {
      const int done = rg_linear(&level, x.stored.data, one.data(), tokens, RG_F32, activations, between(1, 3));
      rg_linear(&alone, x.stored.data, other.data(), tokens, RG_F32, activations, 1);
      expect(done == 0 && one == other, "product of a level", name + ", activations " + std::to_string(activations));
    }
    expect(rg_gemm(&level, x.stored.data, nullptr, nullptr, one.data(), tokens, RG_F32, between(1, 3)) == 0, "blocked product of a level", name);
    rg_gemm(&alone, x.stored.data, nullptr, nullptr, other.data(), tokens, RG_F32, 1);
    expect(one == other, "blocked product of a level", name);
    expect(rg_decode(&level, 0, rows, nullptr, some.data(), RG_F32, 2) == 0 && rg_decode(&alone, 0, rows, nullptr, more.data(), RG_F32, 1) == 0 && some == more, "weights of a level", name);
    const std::vector<int8_t> z(static_cast<size_t>(tokens * columns), 3);
    std::vector<int32_t> sums(count), wanted(count);
    expect(rg_integers(&level, z.data(), sums.data(), tokens, 2) == 0 && rg_integers(&alone, z.data(), wanted.data(), tokens, 1) == 0 && sums == wanted, "sums of a level", name);
  }
  for (int what = 0; what < 8; ++what) {
    rg_matrix m = whole;
    if (what == 0) m.bits = 1;
    if (what == 1) m.mantissa = top - 1;
    if (what == 2) m.mantissa = 9;
    if (what == 3) m.bias = groups - 1;
    if (what == 4) m.step = RG_STEP_F32;
    if (what == 5) m.group += 16;
    if (what == 6) m.group = 288, m.bias = m.columns;
    if (what == 7) m.stride = panels == 1 ? -1 : panels - 1;
    expect(rg_panel_bytes(&m) == 0, "planes that there are not are refused", shape + ": " + std::to_string(what));
  }
}

}  // namespace
