// Rounding with error feedback and the search for steps, against double: each code must be the nearest to what its column
// had to round, given the errors that the codes before it really made; each step no worse than any that was not taken.
#pragma once

namespace {

struct Rounding {
  std::vector<float> values, middles, shares;
  rg_grid g{};
  rg_ranger r{};
  std::string name;

  Rounding() {
    g.bits = between(2, 8);
    g.kind = between(RG_INTEGERS, RG_LIST);
    if (g.kind == RG_INTEGERS) {
      g.zero = coin();
      g.low = g.zero ? 0.0f : -std::ldexp(1.0f, g.bits - 1);
      g.high = g.low + static_cast<float>((1 << g.bits) - 1);
    } else if (g.kind == RG_FLOATS) {
      g.bits = between(4, 6), g.mantissa = between(1, g.bits - 3), g.tiny = 1.0f;
      const int exponents = g.bits - 1 - g.mantissa;
      g.high = static_cast<float>(small_float((1u << (g.bits - 1)) - 1, exponents, g.mantissa, 1));
      g.low = -g.high;
    } else {
      g.count = between(2, 1 << g.bits);
      for (int i = 0; i < g.count; ++i) values.push_back((values.empty() ? -1.0f : values.back()) + 0.01f * static_cast<float>(between(1, 30)));
      values.back() = std::fmax(values.back(), 0.5f);
      for (int i = 0; i + 1 < g.count; ++i) middles.push_back((values[static_cast<size_t>(i)] + values[static_cast<size_t>(i) + 1]) / 2);
      g.low = values.front(), g.high = values.back(), g.values = values.data(), g.middles = middles.data();
    }
    r.kind = between(RG_ABSMAX, RG_SEARCH);
    r.step = between(RG_STEP_F16, RG_STEP_E4M3);
    r.top = 1.5, r.strict = coin(), r.whole = 100.0f;
    for (int i = 0; i < 8; ++i) shares.push_back(1.0f - 0.08f * static_cast<float>(i));
    r.shares = shares.data(), r.count = static_cast<int>(shares.size());
    name = "kind " + std::to_string(g.kind) + " bits " + std::to_string(g.bits) + " range " + std::to_string(r.kind) + " step " + std::to_string(r.step);
  }

  double value(unsigned code) const {
    if (g.kind == RG_INTEGERS) return static_cast<double>(code) + g.low;
    if (g.kind == RG_LIST) return code < static_cast<unsigned>(g.count) ? values[code] : NAN;
    return small_float(code, g.bits - 1 - g.mantissa, g.mantissa, 1);
  }
  double nearest(double z) const {  // how far the nearest value is
    double least = INFINITY;
    for (unsigned code = 0; code < 1u << g.bits; ++code) {
      const double far = std::fabs(value(code) - z);
      if (far < least) least = far;
    }
    return least;
  }
  // The squared error of a group under a step; of `size` numbers, so many apart.
  double error(const float *x, int size, double scale, double zero) const {
    double sum = 0;
    for (int i = 0; i < size; ++i) {
      const double far = nearest(x[i] / scale + zero) * scale;
      sum += far * far;
    }
    return sum;
  }
};

void check_feedback() {
  Rounding d;
  const int rows = between(1, 80), groups = between(1, 4), span = between(1, 5) == 1 ? between(129, 200) : between(1, 40), columns = groups * span;
  const bool fitted = coin();
  Exact<float> w(static_cast<size_t>(rows) * columns, 0), f(static_cast<size_t>(columns) * columns, 0);
  for (int i = 0; i < rows * columns; ++i) w.data[i] = static_cast<float>(between(-10000, 10000)) * 1e-5f;
  for (int i = 0; i < columns; ++i)  // below the diagonal nothing may be read
    for (int j = 0; j < columns; ++j) f.data[i * columns + j] = j < i ? NAN : j == i ? 1.0f : static_cast<float>(between(-100, 100)) * 3e-3f;
  Exact<float> scale(static_cast<size_t>(rows) * groups, 0), zero(static_cast<size_t>(rows) * groups, 0);
  std::vector<int32_t> group_of;
  for (int j = 0; j < columns; ++j) group_of.push_back(between(0, groups - 1));
  for (int i = 0; i < rows * groups; ++i) scale.data[i] = static_cast<float>(between(1, 100)) * 1e-3f, zero.data[i] = static_cast<float>(between(0, (1 << d.g.bits) - 1));
  Exact<uint8_t> codes(static_cast<size_t>(rows) * columns, static_cast<size_t>(between(0, 3)));
  rg_sweep s{};
  s.w = w.data, s.feedback = f.data, s.group_of = fitted || coin() ? nullptr : group_of.data(), s.ranger = fitted ? &d.r : nullptr;
  s.scale = scale.data, s.zero = d.g.zero ? zero.data : nullptr, s.codes = codes.data;
  s.rows = rows, s.columns = columns, s.groups = groups, s.grid = d.g;
  const std::string name = d.name + (fitted ? " fitted " : " known ") + std::to_string(rows) + "x" + std::to_string(columns);
  expect(rg_feedback(&s, between(1, 3)) == RG_DONE, "feedback refused", name);
  for (int row = 0; row < rows; ++row) {
    std::vector<double> owed(static_cast<size_t>(columns), 0.0), size(owed);
    for (int j = 0; j < columns; ++j) {
      const int at = row * groups + (s.group_of ? group_of[static_cast<size_t>(j)] : j / span);
      const double step = scale.data[at], middle = d.g.zero ? zero.data[at] : 0, weight = w.data[row * columns + j];
      const double z = (weight + owed[static_cast<size_t>(j)]) / step + middle, got = d.value(codes.data[row * columns + j]);
      const double allowed = 1e-5 * (std::fabs(z) + size[static_cast<size_t>(j)] / step + 1);
      if (!(step > 0) || !(std::fabs(got - z) <= d.nearest(z) + allowed))
        return expect(false, "feedback", name + " row " + std::to_string(row) + " column " + std::to_string(j) + ": " + shown(got) + " for " + shown(z));
      const double error = weight - (got - middle) * step;
      for (int k = j + 1; k < columns; ++k) {
        const double more = error * f.data[j * columns + k];
        owed[static_cast<size_t>(k)] += more, size[static_cast<size_t>(k)] += std::fabs(more);
      }
    }
  }
  w.data[between(0, rows * columns - 1)] = coin() ? NAN : INFINITY;
  expect(rg_feedback(&s, between(1, 3)) == RG_ENDLESS, "what is not finite is told", name);
  s.groups = columns + 1;
  expect(rg_feedback(&s, 1) == RG_UNSOUND && rg_feedback(nullptr, 1) == RG_UNSOUND, "unsound sweeps are refused", name);
}

void check_ranges() {
  Rounding d;
  const int groups = between(1, 80), size = between(1, 80);
  Exact<float> x(static_cast<size_t>(groups) * size, 0), scale(static_cast<size_t>(groups), 0), zero(static_cast<size_t>(groups), 0), plain(static_cast<size_t>(groups), 0), middle(static_cast<size_t>(groups), 0);
  for (int i = 0; i < groups * size; ++i) x.data[i] = static_cast<float>(between(-10000, 10000)) * (between(0, 20) ? 1e-5f : 5e-5f);
  expect(rg_range(&d.g, &d.r, x.data, RG_F32, nullptr, groups, size, scale.data, zero.data, between(1, 3)) == RG_DONE, "range refused", d.name);
  for (int i = 0; i < groups; ++i) expect(scale.data[i] > 0 && std::isfinite(scale.data[i]) && zero.data[i] >= 0 && zero.data[i] <= 255, "a step and a zero point", d.name);
  const bool searched = d.r.kind == RG_SEARCH;
  for (const int kind : {RG_ABSMAX, RG_MINMAX}) {
    d.r.kind = kind;
    expect(rg_range(&d.g, &d.r, x.data, RG_F32, nullptr, groups, size, plain.data, middle.data, 1) == RG_DONE, "range refused", d.name);
    for (int i = 0; searched && i < groups; ++i) {
      const float *own = x.data + i * size;
      const double ours = d.error(own, size, scale.data[i], d.g.zero ? zero.data[i] : 0), theirs = d.error(own, size, plain.data[i], d.g.zero ? middle.data[i] : 0);
      expect(ours <= theirs * (1 + 1e-3) + 1e-12, "a search is no worse", d.name + ": " + shown(ours) + ", not " + shown(theirs));
    }
  }
  d.g.bits = 9;
  expect(rg_range(&d.g, &d.r, x.data, RG_F32, nullptr, groups, size, scale.data, zero.data, 1) == RG_UNSOUND, "an unsound grid is refused", d.name);
}

}  // namespace
