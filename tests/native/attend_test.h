// Attention over packed parts and a window against plain loops in double: every number of bits, both axes, groups that
// integers multiply and those that they do not, heads of unequal lengths, padding, multipliers of tokens.
#pragma once
#include <algorithm>
#include <cmath>

namespace {

// Where a code lies in a run of pieces of 64 bytes: `piece` of the run, `place` in it (kernels/blocks.py says so too).
void put(uint8_t *run, int bits, int piece, int place, unsigned code) {
  const auto set = [&](int at, int shift, unsigned part) { run[at * 64 + place] = static_cast<uint8_t>(run[at * 64 + place] | part << shift); };
  if (bits == 3) {
    if (piece < 6) return set(piece / 2, piece % 2 * 3, code);
    set(piece - 6, 6, code & 3);
    return set(2, piece, code >> 2);
  }
  int before = 0;
  for (int plane = 8; plane; plane /= 2) {
    if (!(bits & plane)) continue;
    set(before + piece * plane / 8, piece * plane % 8, code >> (bits & (plane - 1)) & ((1u << plane) - 1));
    before += unit_of(bits) / 4 * plane / 8;
  }
}

int divisor(int number) {
  int found;
  do found = coin() ? number : between(1, number);
  while (number % found);
  return found;
}

// A float of 16 bits of about 2^power, and its value.
uint16_t number_of(int dtype, int power, double &value) {
  const uint16_t code = static_cast<uint16_t>(dtype == RG_F16 ? (15 + power) << 10 | between(0, 1023) : (127 + power) << 7 | between(0, 127));
  value = dtype == RG_F16 ? half(code) : brain(code);
  return code;
}

// Keys or values of a part: heads of so many tokens, with the last one's memory ending where it should.
struct PackedSide {
  rg_blocks b{};
  const int tokens, channels;
  const bool values;
  std::vector<int64_t> offsets;
  std::vector<float> rows;
  std::unique_ptr<Exact<uint8_t>> memory;
  std::vector<std::vector<double>> decoded;  // of each head: (its tokens, channels), multiplied by `rows`
  double allowed = 1e-5;                     // of the greatest value

  PackedSide(bool of_values, int block_tokens, int d, const std::vector<int32_t> &lengths, int bits) : tokens(block_tokens), channels(d), values(of_values) {
    b.bits = bits;
    b.axis = coin() ? RG_TIME : RG_CHANNELS;
    b.group = divisor(b.axis == RG_TIME ? tokens : d);
    b.dtype = bits == 16 ? between(RG_F32, RG_F16) : between(RG_BF16, RG_F16);
    b.value = bits == 8 && between(0, 2) == 0 ? RG_FLOAT : RG_INT;
    b.low = bits != 16 && b.value == RG_INT && coin();
    b.offset = bits == 16 || b.value == RG_FLOAT || b.low ? 0 : between(0, 1 << bits);
    if (bits != 16) allowed = b.value == RG_FLOAT ? 1e-4 : bits <= 2 ? 8e-2 : bits <= 4 ? 3e-2 : 2e-3;
    const int number = bits == 16 ? number_size() : 0, unit = bits == 16 ? 1 : unit_of(bits);
    const int wide = (d + 15) / 16 * 16, lanes = values ? wide : tokens, deep = ((values ? tokens : d) + unit - 1) / unit * unit;
    const int groups = b.axis == RG_TIME ? tokens / b.group : d / b.group, side = b.axis == RG_TIME ? wide : tokens;
    const size_t step_bytes = static_cast<size_t>(groups) * side * 2, codes_at = step_bytes * (b.low ? 2 : 1);
    const size_t block = bits == 16 ? static_cast<size_t>(tokens) * d * number : codes_at + static_cast<size_t>(lanes) * deep * bits / 8;
    size_t all = 0, count = 0;
    for (const int32_t length : lengths) {
      offsets.push_back(static_cast<int64_t>(all));
      all += static_cast<size_t>(length / tokens) * block;
      count += static_cast<size_t>(length);
    }
    memory.reset(new Exact<uint8_t>(all, 0));
    for (size_t i = 0; i < all; ++i) memory->data[i] = 0;
    b.blocks = memory->data, b.offsets = offsets.data();
    const bool multiplied = coin();
    for (size_t i = 0; i < count && multiplied; ++i) rows.push_back(static_cast<float>(between(500, 1500)) * 1e-3f);
    b.rows = rows.empty() ? nullptr : rows.data();
    size_t row = 0;
    for (size_t h = 0; h < lengths.size(); ++h) {
      std::vector<double> own(static_cast<size_t>(lengths[h]) * d);
      for (int n = 0; n < lengths[h] / tokens; ++n) {
        uint8_t *at = memory->data + offsets[h] + static_cast<size_t>(n) * block;
        double *to = own.data() + static_cast<size_t>(n) * tokens * d;
        if (bits == 16) draw_rows(at, to);
        else draw_block(at, to, groups, side, step_bytes, codes_at, deep / unit);
      }
      for (size_t i = 0; i < own.size() && multiplied; ++i) own[i] *= rows[row + i / static_cast<size_t>(d)];
      row += static_cast<size_t>(lengths[h]);
      decoded.push_back(own);
    }
  }

  int number_size() const { return b.dtype == RG_F32 ? 4 : 2; }
  void draw_rows(uint8_t *at, double *to) const {
    const Numbers drawn(static_cast<size_t>(tokens) * channels, b.dtype);
    std::memcpy(at, drawn.stored.data, static_cast<size_t>(tokens) * channels * number_size());
    std::copy(drawn.values.begin(), drawn.values.end(), to);
  }
  void draw_block(uint8_t *at, double *to, int groups, int side, size_t step_bytes, size_t codes_at, int runs) const {
    std::vector<double> steps(static_cast<size_t>(groups) * side), lows(steps.size());
    for (size_t i = 0; i < steps.size(); ++i) {
      const uint16_t step = number_of(b.dtype, between(0, 1) - (b.value == RG_FLOAT ? 7 : b.bits), steps[i]);
      std::memcpy(at + 2 * i, &step, 2);
      if (!b.low) continue;
      uint16_t low = number_of(b.dtype, -1, lows[i]);
      if (coin()) low |= 0x8000, lows[i] = -lows[i];
      std::memcpy(at + step_bytes + 2 * i, &low, 2);
    }
    const int unit = unit_of(b.bits);
    for (int t = 0; t < tokens; ++t)
      for (int c = 0; c < channels; ++c) {
        const int lane = values ? c : t, deep = values ? t : c;
        unsigned code = static_cast<unsigned>(between(0, (1 << b.bits) - 1));
        if (b.value == RG_FLOAT && (code & 127) == 127) code ^= 1;  // no number
        put(at + codes_at + (static_cast<size_t>(lane / 16) * runs + deep / unit) * static_cast<size_t>(unit / 4 * 64 * b.bits / 8), b.bits, deep % unit / 4, lane % 16 * 4 + deep % 4, code);
        const size_t own = b.axis == RG_TIME ? static_cast<size_t>(t / b.group) * side + c : static_cast<size_t>(c / b.group) * side + t;
        const double number = b.value == RG_FLOAT ? small_float(code, 4, 3, 7) : static_cast<double>(code) - b.offset;
        to[t * channels + c] = number * steps[own] + lows[own];
      }
  }
};

// One part of a store.
struct PackedPart {
  std::vector<int32_t> lengths, firsts;
  std::vector<int64_t> row_offsets;
  const int tokens;
  std::unique_ptr<PackedSide> keys, values;
  PackedPart(size_t heads, int d, int bits) : tokens(16 * between(1, 5)) {
    int64_t rows = 0;
    for (size_t h = 0; h < heads; ++h) {
      lengths.push_back(tokens * between(0, 320 / tokens));
      firsts.push_back(between(0, lengths.back()));
      row_offsets.push_back(rows);
      rows += lengths.back();
    }
    keys.reset(new PackedSide(false, tokens, d, lengths, bits));
    values.reset(new PackedSide(true, tokens, d, lengths, between(0, 3) ? bits : 1 + bits % 8));
    if (coin()) firsts.clear();
  }
  rg_part part() const {
    rg_part p{};
    p.keys = keys->b, p.values = values->b, p.lengths = lengths.data(), p.firsts = firsts.empty() ? nullptr : firsts.data();
    p.row_offsets = row_offsets.data(), p.tokens = tokens;
    return p;
  }
};

// What a query finds: scores of everything that it sees, then the values by their softmax.
struct Found {
  std::vector<double> scores;
  std::vector<const double *> values;
  double greatest = 0;
  void see(const double *q, const double *key, const double *value, int d, double scale, double softcap) {
    double score = 0;
    for (int i = 0; i < d; ++i) score += q[i] * key[i] * scale;
    scores.push_back(softcap > 0 ? softcap * std::tanh(score / softcap) : score);
    values.push_back(value);
    for (int i = 0; i < d; ++i) greatest = std::max(greatest, std::fabs(value[i]));
  }
  double mixed(int i) const {
    double top = -1e300, all = 0, sum = 0;
    for (const double s : scores) top = std::max(top, s);
    for (size_t t = 0; t < scores.size(); ++t) all += std::exp(scores[t] - top), sum += std::exp(scores[t] - top) * values[t][i];
    return sum / all;
  }
};

void check_attention(int bits) {
  const int batch = between(1, 2), kv_heads = between(1, 3), group = between(1, 6), tokens = coin() ? 1 : between(1, 20), d = coin() ? 16 * between(1, 5) : between(1, 90);
  const int room = tokens + between(0, 40), heads = group * kv_heads;
  const size_t all = static_cast<size_t>(batch) * kv_heads;
  std::vector<PackedPart> held;
  for (int n = between(1, 2); n; --n) held.emplace_back(all, d, between(0, 7) ? bits : 16);
  std::vector<rg_part> parts;
  for (const PackedPart &one : held) parts.push_back(one.part());
  const int dtypes[] = {between(RG_F32, RG_F16), between(RG_F32, RG_F16)};
  const Numbers keys(all * room * d, dtypes[0]), values(all * room * d, dtypes[1]), q(static_cast<size_t>(batch) * tokens * heads * d, RG_F32);
  Exact<float> out(q.values.size(), 0);
  const std::vector<int32_t> starts(static_cast<size_t>(batch), 0);
  rg_store s{};
  s.keys = keys.stored.data, s.values = values.stored.data, s.keys_dtype = dtypes[0], s.values_dtype = dtypes[1];
  s.parts = parts.data(), s.part_count = static_cast<int32_t>(parts.size()), s.room = room, s.origin = 7;
  rg_attention a{};
  a.q = q.stored.data, a.out = out.data, a.store = &s, a.starts = starts.data(), a.batch = batch, a.tokens = tokens, a.heads = heads, a.kv_heads = kv_heads;
  a.head_dim = d, a.dtype = RG_F32, a.rows = between(tokens, room), a.all = coin(), a.scale = 1.0f / std::sqrt(static_cast<float>(d)), a.softcap = coin() ? 0.0f : 4.0f;
  std::string name = "heads of " + std::to_string(d) + ", " + std::to_string(group) + " queries, " + std::to_string(tokens) + " tokens";
  for (const PackedPart &one : held)
    for (const PackedSide *side : {one.keys.get(), one.values.get()})
      name += "; " + std::to_string(side->b.bits) + " bits in blocks of " + std::to_string(one.tokens) + ", groups of " + std::to_string(side->b.group) + (side->b.axis == RG_TIME ? " tokens" : " channels");
  const int answer = rg_attend(&a, between(1, 3));
  if (answer) return expect(false, "attention refused", name + ": " + std::to_string(answer));
  double allowed = 1e-5;
  for (const PackedPart &one : held) allowed = std::max(allowed, std::max(one.keys->allowed, one.values->allowed));
  for (int t = 0; t < batch * tokens; ++t)
    for (int r = 0; r < heads; ++r) {
      const size_t index = static_cast<size_t>(t / tokens) * kv_heads + r / group, row = (static_cast<size_t>(t) * heads + r) * d;
      Found found;
      for (const PackedPart &one : held)
        for (int k = one.firsts.empty() ? 0 : one.firsts[index]; k < one.lengths[index]; ++k)
          found.see(&q.values[row], &one.keys->decoded[index][static_cast<size_t>(k) * d], &one.values->decoded[index][static_cast<size_t>(k) * d], d, a.scale, a.softcap);
      for (int k = 0; k < (a.all ? a.rows : a.rows - tokens + t % tokens + 1); ++k)
        found.see(&q.values[row], &keys.values[(index * room + k) * d], &values.values[(index * room + k) * d], d, a.scale, a.softcap);
      for (int i = 0; i < d; ++i) {
        const double off = std::fabs(out.data[row + i] - found.mixed(i));
        if (!(off <= allowed * (found.greatest + 1e-3))) return expect(false, "attention over packed parts", name + ": off by " + shown(off) + " of " + shown(found.greatest));
      }
    }
  rg_part &p = parts[0];
  const rg_part kept = p;
  p.tokens = 17;
  expect(rg_attend(&a, 1) == RG_UNSOUND, "a block of 17 tokens is refused", name);
  p = kept, p.keys.bits = 9;
  expect(rg_attend(&a, 1) == RG_UNSOUND, "keys of nine bits are refused", name);
  p = kept, p.values.blocks = nullptr;
  expect(rg_attend(&a, 1) == RG_UNSOUND, "values without memory are refused", name);
}

}  // namespace
