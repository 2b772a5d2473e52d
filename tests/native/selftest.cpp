// The kernels and the decode step against plain loops in double, over random shapes, groups, kinds of steps and values,
// at every dispatch level of the CPU that runs it. Needs no Python, so that it also runs under an emulator and under sanitisers.
//   selftest [CASES [SEED]]     exit status 0: every result agreed
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "regauge.h"

namespace {

uint64_t state;
uint64_t draw() {  // splitmix64
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}
int between(int low, int high) { return low + static_cast<int>(draw() % static_cast<uint64_t>(high - low + 1)); }
bool coin() { return draw() & 1; }

// A float of `exponent` and `mantissa` bits: sign, exponent, mantissa from the top; no infinities.
double small_float(unsigned code, int exponent, int mantissa, int bias) {
  const unsigned part = code & ((1u << mantissa) - 1), power = code >> mantissa & ((1u << exponent) - 1);
  const double fraction = std::ldexp(part, -mantissa);
  const double size = power ? std::ldexp(1 + fraction, static_cast<int>(power) - bias) : std::ldexp(fraction, 1 - bias);
  return code >> (exponent + mantissa) & 1 ? -size : size;
}
double half(uint16_t code) { return small_float(code, 5, 10, 15); }
double brain(uint16_t code) { return small_float(code, 8, 7, 127); }

// Memory that ends where it should, so that a sanitiser sees a read past it; and that starts anywhere.
template <class T>
struct Exact {
  std::unique_ptr<uint8_t[]> memory;
  T *data;
  Exact(size_t count, size_t odd) : memory(new uint8_t[count * sizeof(T) + odd * sizeof(T)]()), data(reinterpret_cast<T *>(memory.get()) + odd) {}
};

// Inputs in the smallest block of codes: a narrowest plane of 1, 2, 4 or 8 bits fills 64 bytes.
int unit_of(int bits) { return bits & 1 ? 32 : bits & 2 ? 16 : bits & 4 ? 8 : 4; }

int failures = 0;
std::string shown(double number) {
  char text[32];
  std::snprintf(text, sizeof text, "%.9g", number);
  return text;
}
void expect(bool good, const char *what, const std::string &where) {
  if (good) return;
  if (++failures <= 20) std::printf("  wrong: %s: %s\n", what, where.c_str());
}

// `rg_matrix.stride` of a matrix in up to four runs of any length, or 0.
int64_t some_runs(int rows, int groups) {
  const int64_t panels = (rows + 15) / 16;
  int ends[3];
  for (int &end : ends) end = between(1, groups);
  std::sort(ends, ends + 3);
  const int64_t said = panels << 48 | static_cast<int64_t>(groups) << 36 | static_cast<int64_t>(ends[2]) << 24 | ends[1] << 12 | ends[0];
  return coin() ? 0 : -said;
}

struct Case {
  rg_matrix m{};
  std::vector<uint8_t> codes, zeros;  // (rows, columns), (rows, groups)
  std::vector<uint8_t> steps;         // (rows, groups), as stored
  std::vector<double> step_values;
  std::vector<float> table, row_scale;
  std::unique_ptr<Exact<uint8_t>> panels;
  int groups = 0;
  std::string name;

  double value(unsigned code) const {
    if (m.value == RG_TABLE) return table[code];
    if (m.value == RG_FLOAT) return small_float(code, m.bits - 1 - m.mantissa, m.mantissa, m.bias);
    return static_cast<int>(code) - m.offset;
  }
  double zero(int row, int column) const { return m.zero ? zeros[static_cast<size_t>(row * groups + column / m.group)] : 0; }
  double scale(int row, int column) const {
    const double step = m.step == RG_STEP_NONE ? 1 : step_values[static_cast<size_t>(row * groups + column / m.group)];
    return step * (m.row_scale ? row_scale[static_cast<size_t>(row)] : 1);
  }
  unsigned code(int row, int column) const { return codes[static_cast<size_t>(row) * m.columns + column]; }
  double weight(int row, int column) const { return (value(code(row, column)) - zero(row, column)) * scale(row, column); }
  // What rounding errors are relative to: the zero point is taken off after the sum.
  double size(int row, int column) const {
    double most = std::fabs(value(code(row, column)));
    for (const float entry : table) most = std::fmax(most, std::fabs(entry));  // a table is rounded to parts of its greatest
    return (most + zero(row, column)) * scale(row, column);
  }

  void draw_steps() {
    static const int BYTES[] = {0, 2, 2, 4, 1, 1};
    const size_t count = static_cast<size_t>(m.rows) * groups, bytes = static_cast<size_t>(BYTES[m.step]);
    steps.resize(count * bytes);
    for (size_t i = 0; i < count && bytes; ++i) {
      uint32_t code = 0;
      double step = 0;
      if (m.step == RG_STEP_F16) code = static_cast<uint32_t>(between(1, 12 << 10)), step = half(static_cast<uint16_t>(code));
      if (m.step == RG_STEP_BF16) code = static_cast<uint32_t>(between(110 << 7, 128 << 7)), step = brain(static_cast<uint16_t>(code));
      if (m.step == RG_STEP_E8M0) code = static_cast<uint32_t>(between(110, 130)), step = std::ldexp(1.0, static_cast<int>(code) - 127);
      if (m.step == RG_STEP_E4M3) code = static_cast<uint32_t>(between(0, 0x7e)), step = small_float(code, 4, 3, 7);
      if (m.step == RG_STEP_F32) {
        const float number = static_cast<float>(between(1, 1 << 20)) * 1e-6f;
        std::memcpy(&code, &number, 4);
        step = number;
      }
      std::memcpy(&steps[i * bytes], &code, bytes);  // lowest bytes first
      step_values.push_back(step);
    }
  }

  explicit Case(int bits) {
    m.bits = bits;
    m.rows = between(1, 70);
    m.columns = between(1, 260);
    const int unit = unit_of(bits), kind = between(0, 9);
    m.group = coin() ? 32 * between(1, 4) : unit * between(1, 5);
    if (between(0, 4) == 0) m.group = (m.columns + unit - 1) / unit * unit;  // one group: a channel
    groups = (m.columns + m.group - 1) / m.group;
    m.step = between(RG_STEP_NONE, RG_STEP_E4M3);
    m.value = kind < 2 && bits <= 4 ? RG_TABLE : kind < 4 && bits >= 4 ? RG_FLOAT : RG_INT;
    m.zero = m.value == RG_INT && coin();
    m.offset = m.value == RG_INT && !m.zero ? between(0, (1 << bits) - 1) : 0;
    if (m.value == RG_FLOAT) m.mantissa = between(1, bits - 2 < 4 ? bits - 2 : 4), m.bias = between(0, 7);
    const bool halves = coin();
    for (int c = 0; m.value == RG_TABLE && c < 1 << bits; ++c)
      table.push_back(halves ? static_cast<float>(between(-12, 12)) / 2 : static_cast<float>(between(-100000, 100000)) * 1e-5f);
    if (coin()) {
      row_scale.assign(static_cast<size_t>(m.rows + 15) / 16 * 16, 0.0f);
      for (int r = 0; r < m.rows; ++r) row_scale[static_cast<size_t>(r)] = static_cast<float>(between(1, 3000)) * 1e-3f;
    }
    m.table = table.empty() ? nullptr : table.data();
    m.row_scale = row_scale.empty() ? nullptr : row_scale.data();
    for (int i = 0; i < m.rows * m.columns; ++i) codes.push_back(static_cast<uint8_t>(between(0, (1 << bits) - 1)));
    for (int i = 0; m.zero && i < m.rows * groups; ++i) zeros.push_back(static_cast<uint8_t>(between(0, (1 << bits) - 1)));
    draw_steps();
    m.stride = some_runs(m.rows, groups);
    panels.reset(new Exact<uint8_t>(rg_panel_bytes(&m) * static_cast<size_t>((m.rows + 15) / 16), static_cast<size_t>(between(0, 63))));
    m.panels = panels->data;
    name = std::to_string(m.rows) + "x" + std::to_string(m.columns) + " bits " + std::to_string(bits) + " group " + std::to_string(m.group) +
           " step " + std::to_string(m.step) + " value " + std::to_string(m.value) + (m.zero ? " zero" : "") + (m.row_scale ? " row_scale" : "") + (m.stride ? " in runs" : "");
    const int done = rg_pack(&m, codes.data(), steps.empty() ? nullptr : steps.data(), zeros.empty() ? nullptr : zeros.data(), panels->data, between(1, 3));
    expect(done == 0, "pack refused", name);
  }
};

// Numbers of a dtype, with their values.
struct Numbers {
  Exact<uint8_t> stored;
  std::vector<double> values;
  Numbers(size_t count, int dtype) : stored(count * (dtype == RG_F32 ? 4 : 2), 0) {
    for (size_t i = 0; i < count; ++i) {
      const float number = static_cast<float>(between(-100000, 100000)) * 2e-5f;
      uint32_t code;
      std::memcpy(&code, &number, 4);
      if (dtype == RG_F32) values.push_back(number);
      if (dtype == RG_BF16) code >>= 16, values.push_back(brain(static_cast<uint16_t>(code)));
      if (dtype == RG_F16) code = static_cast<uint32_t>(between(0, 15 << 10)) | (coin() ? 0x8000u : 0u), values.push_back(half(static_cast<uint16_t>(code)));
      const size_t bytes = dtype == RG_F32 ? 4 : 2;
      std::memcpy(stored.data + i * bytes, &code, bytes);
    }
  }
};

double read(const uint8_t *p, size_t i, int dtype) {
  uint32_t code = 0;
  std::memcpy(&code, p + i * (dtype == RG_F32 ? 4 : 2), dtype == RG_F32 ? 4 : 2);
  float number;
  std::memcpy(&number, &code, 4);
  return dtype == RG_F32 ? number : dtype == RG_BF16 ? brain(static_cast<uint16_t>(code)) : half(static_cast<uint16_t>(code));
}

bool near(double got, double want, double size, int dtype) {
  const double rounding = dtype == RG_F32 ? 1e-7 : dtype == RG_BF16 ? 1.0 / 256 : 1.0 / 2048;
  if (dtype == RG_F16 && std::fabs(want) > 65000) return true;  // above half's range
  return std::fabs(got - want) <= 1e-5 * size + rounding * std::fabs(want) + (dtype == RG_F16 ? 6e-8 : 1e-30);
}

// Activations as the kernel rounds them: one step a group, of 127 or 32639 of the group's largest.
std::vector<double> rounded(const std::vector<double> &x, const rg_matrix &m, int activations) {
  std::vector<double> out = x;
  if (activations == RG_FLOAT32) return out;
  const float top = activations == RG_INT8 ? 127.0f : 32639.0f;
  for (size_t row = 0; row < x.size(); row += static_cast<size_t>(m.columns))
    for (int begin = 0; begin < m.columns; begin += m.group) {
      const int end = begin + m.group < m.columns ? begin + m.group : m.columns;
      float reach = 0;
      for (int i = begin; i < end; ++i) reach = std::fmax(reach, static_cast<float>(std::fabs(x[row + i])));
      for (int i = begin; i < end; ++i)
        out[row + i] = reach > 0 ? std::nearbyint(static_cast<float>(x[row + i]) * (top / reach)) * static_cast<double>(reach) / top : 0;
    }
  return out;
}

void check_product(const Case &c, const std::vector<double> &x, const uint8_t *y, int64_t tokens, int dtype, const std::string &what) {
  for (int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < c.m.rows; ++r) {
      double want = 0, size = 0;
      for (int i = 0; i < c.m.columns; ++i) {
        const double number = x[static_cast<size_t>(t * c.m.columns + i)];
        want += c.weight(r, i) * number;
        size += c.size(r, i) * std::fabs(number);
      }
      const double got = read(y, static_cast<size_t>(t * c.m.rows + r), dtype);
      if (near(got, want, size * (c.m.value == RG_TABLE ? 4 : 1), dtype)) continue;
      return expect(false, what.c_str(), c.name + " token " + std::to_string(t) + " row " + std::to_string(r) + ": " + shown(got) + ", not " + shown(want) + ", dtype " + std::to_string(dtype));
    }
}

void check_decode(const Case &c) {
  const rg_matrix &m = c.m;
  const int dtype = between(RG_F32, RG_F16), start = between(0, m.rows - 1), stop = between(start, m.rows);
  std::vector<int64_t> index;
  for (int i = 0; i < stop; ++i) index.push_back(between(0, m.rows - 1));
  for (const bool indexed : {false, true}) {
    Exact<uint8_t> out(static_cast<size_t>(stop - start) * m.columns * (dtype == RG_F32 ? 4 : 2), 0);
    expect(rg_decode(&m, start, stop, indexed ? index.data() : nullptr, out.data, dtype, between(1, 3)) == 0, "decode refused", c.name);
    bool good = true;
    for (int i = start; i < stop; ++i)
      for (int k = 0; k < m.columns; ++k) {
        const int row = indexed ? static_cast<int>(index[static_cast<size_t>(i)]) : i;
        good &= near(read(out.data, static_cast<size_t>(i - start) * m.columns + k, dtype), c.weight(row, k), c.size(row, k), dtype);
      }
    expect(good, indexed ? "decode by index" : "decode", c.name);
  }
  index.assign(1, m.rows);
  float one[1];
  expect(rg_decode(&m, 0, 1, index.data(), one, RG_F32, 1) != 0, "a row past the end is refused", c.name);
}

void check_integers(const Case &c) {
  const int64_t tokens = between(1, 6);
  Exact<int8_t> x(static_cast<size_t>(tokens) * c.m.columns, static_cast<size_t>(between(0, 3)));
  Exact<int32_t> y(static_cast<size_t>(tokens) * c.m.rows, 0);
  for (int64_t i = 0; i < tokens * c.m.columns; ++i) x.data[i] = static_cast<int8_t>(between(-128, 127));
  const int done = rg_integers(&c.m, x.data, y.data, tokens, between(1, 3));
  expect((done == 0) == (c.m.value == RG_INT), "integers: done, or refused", c.name);
  for (int64_t t = 0; done == 0 && t < tokens; ++t)
    for (int r = 0; r < c.m.rows; ++r) {
      int64_t want = 0;
      for (int i = 0; i < c.m.columns; ++i) want += (static_cast<int64_t>(c.code(r, i)) - c.m.offset) * x.data[t * c.m.columns + i];
      expect(y.data[t * c.m.rows + r] == want, "integers", c.name);
    }
}

void check(const Case &c) {
  Exact<uint8_t> back(c.codes.size(), 0);
  expect(rg_unpack(&c.m, back.data, between(1, 3)) == 0 && std::memcmp(back.data, c.codes.data(), c.codes.size()) == 0, "unpack", c.name);
  check_decode(c);
  check_integers(c);
  const int dtype = between(RG_F32, RG_F16);
  const size_t number = dtype == RG_F32 ? 4 : 2;
  for (const int activations : {RG_INT8, RG_INT16, RG_FLOAT32}) {
    const int64_t tokens = between(1, 9);
    const Numbers x(static_cast<size_t>(tokens) * c.m.columns, dtype);
    Exact<uint8_t> y(static_cast<size_t>(tokens) * c.m.rows * number, 0);
    expect(rg_linear(&c.m, x.stored.data, y.data, tokens, dtype, activations, between(1, 3)) == 0, "linear refused", c.name);
    check_product(c, rounded(x.values, c.m, c.m.value == RG_FLOAT ? RG_FLOAT32 : activations), y.data, tokens, dtype, "linear, activations " + std::to_string(activations));
  }
  const int64_t tokens = between(1, 40);
  const Numbers x(static_cast<size_t>(tokens) * c.m.columns, dtype);
  Exact<uint8_t> y(static_cast<size_t>(tokens) * c.m.rows * number, 0);
  if (rg_gemm(&c.m, x.stored.data, nullptr, nullptr, y.data, tokens, dtype, between(1, 3)) == 0)
    check_product(c, rounded(x.values, c.m, RG_INT8), y.data, tokens, dtype, "gemm");
  else expect(c.m.value != RG_INT, "gemm refused", c.name);
  std::vector<double> values;
  Exact<int8_t> ready(static_cast<size_t>(tokens) * c.m.columns, 0);
  Exact<float> steps(static_cast<size_t>(tokens), 0);
  for (int64_t t = 0; t < tokens; ++t) {
    steps.data[t] = static_cast<float>(between(1, 1000)) * 1e-4f;
    for (int i = 0; i < c.m.columns; ++i) {
      const int whole = between(-127, 127);
      ready.data[t * c.m.columns + i] = static_cast<int8_t>(whole);
      values.push_back(whole * static_cast<double>(steps.data[t]));
    }
  }
  if (rg_gemm(&c.m, nullptr, ready.data, steps.data, y.data, tokens, dtype, between(1, 3)) == 0)
    check_product(c, values, y.data, tokens, dtype, "gemm of ready integers");
  else expect(c.m.value != RG_INT, "gemm of ready integers refused", c.name);
}

// The first rows and inputs of a matrix, where its panels lie.
void check_prefix(Case &c) {
  const rg_matrix whole = c.m;
  if (!whole.stride) c.m.stride = static_cast<int64_t>(rg_panel_bytes(&whole));
  c.m.rows = between(1, whole.rows), c.m.columns = between(1, whole.columns);
  const int64_t tokens = between(1, 5);
  const Numbers x(static_cast<size_t>(tokens) * c.m.columns, RG_F32);
  Exact<uint8_t> y(static_cast<size_t>(tokens) * c.m.rows * 4, 0), one(static_cast<size_t>(c.m.columns) * 4, 0);
  expect(rg_linear(&c.m, x.stored.data, y.data, tokens, RG_F32, RG_FLOAT32, between(1, 3)) == 0, "prefix refused", c.name);
  // Codes and steps are counted in whole rows, which the first columns of are fewer.
  std::vector<double> wide(static_cast<size_t>(tokens) * whole.columns, 0.0);
  for (int64_t t = 0; t < tokens; ++t)
    for (int i = 0; i < c.m.columns; ++i) wide[static_cast<size_t>(t * whole.columns + i)] = x.values[static_cast<size_t>(t * c.m.columns + i)];
  Exact<uint8_t> padded(static_cast<size_t>(tokens) * whole.rows * 4, 0);
  for (int64_t t = 0; t < tokens; ++t) std::memcpy(padded.data + t * whole.rows * 4, y.data + t * c.m.rows * 4, static_cast<size_t>(c.m.rows) * 4);
  const int rows = c.m.rows, columns = c.m.columns;
  expect(rg_decode(&c.m, rows - 1, rows, nullptr, one.data, RG_F32, 1) == 0, "decode of a prefix refused", c.name);
  c.m = whole;
  for (int i = 0; i < columns; ++i) expect(near(read(one.data, static_cast<size_t>(i), RG_F32), c.weight(rows - 1, i), c.size(rows - 1, i), RG_F32), "decode of a prefix", c.name);
  for (int64_t t = 0; t < tokens; ++t)
    for (int r = 0; r < rows; ++r) {
      double want = 0, size = 0;
      for (int i = 0; i < columns; ++i) want += c.weight(r, i) * wide[static_cast<size_t>(t * whole.columns + i)], size += c.size(r, i) * std::fabs(wide[static_cast<size_t>(t * whole.columns + i)]);
      expect(near(read(padded.data, static_cast<size_t>(t * whole.rows + r), RG_F32), want, size * (c.m.value == RG_TABLE ? 4 : 1), RG_F32), "product of a prefix", c.name);
    }
  rg_matrix short_stride = whole;
  short_stride.stride = static_cast<int64_t>(rg_panel_bytes(&whole)) - 1;
  expect(rg_panel_bytes(&short_stride) == 0, "panels that overlap are refused", c.name);
}

// A matrix in runs, and one that is not: the same bits, of its first rows and inputs too.
void check_runs(const Case &c) {
  if (!c.m.stride) return;
  rg_matrix plain = c.m, runs = c.m;
  plain.stride = 0;
  const size_t panels = static_cast<size_t>(c.m.rows + 15) / 16;
  const Exact<uint8_t> memory(rg_panel_bytes(&plain) * panels, 0);
  expect(rg_panel_bytes(&runs) == rg_panel_bytes(&plain), "runs take no memory", c.name);
  plain.panels = memory.data;
  expect(rg_pack(&plain, c.codes.data(), c.steps.empty() ? nullptr : c.steps.data(), c.zeros.empty() ? nullptr : c.zeros.data(), memory.data, 1) == 0, "packed again", c.name);
  if (coin()) {
    plain.stride = static_cast<int64_t>(rg_panel_bytes(&plain));
    plain.rows = runs.rows = between(1, c.m.rows), plain.columns = runs.columns = between(1, c.m.columns);
  }
  const int64_t tokens = between(1, 10);
  const Numbers x(static_cast<size_t>(tokens * plain.columns), RG_F32);
  const size_t count = static_cast<size_t>(tokens * plain.rows), all = static_cast<size_t>(plain.rows) * static_cast<size_t>(plain.columns);
  std::vector<float> one(count), other(count), some(all), more(all);
  for (const int activations : {int(RG_INT8), int(RG_INT16), int(RG_FLOAT32), RG_TOKEN + 8}) {
    expect(rg_linear(&runs, x.stored.data, one.data(), tokens, RG_F32, activations, between(1, 3)) == 0, "product in runs refused", c.name);
    rg_linear(&plain, x.stored.data, other.data(), tokens, RG_F32, activations, between(1, 3));
    expect(one == other, "product in runs", c.name + ", activations " + std::to_string(activations));
  }
  const int done = rg_gemm(&runs, x.stored.data, nullptr, nullptr, one.data(), tokens, RG_F32, between(1, 3));
  expect(done == rg_gemm(&plain, x.stored.data, nullptr, nullptr, other.data(), tokens, RG_F32, 1) && (done || one == other), "blocked product in runs", c.name);
  rg_decode(&runs, 0, runs.rows, nullptr, some.data(), RG_F32, 2), rg_decode(&plain, 0, plain.rows, nullptr, more.data(), RG_F32, 1);
  expect(some == more, "weights in runs", c.name);
  std::vector<uint8_t> found(all), wanted(all);
  expect(rg_unpack(&runs, found.data(), 2) == 0 && rg_unpack(&plain, wanted.data(), 1) == 0 && found == wanted, "codes in runs", c.name);
}

void check_refusals() {
  for (int what = 0; what < 14; ++what) {
    Case c(5);
    if (what == 0) c.m.rows = 0;
    if (what == 1) c.m.columns = -1;
    if (what == 2) c.m.bits = 9;
    if (what == 3) c.m.group += 1;
    if (what == 4) c.m.value = RG_TABLE;  // of 5 bits
    if (what == 5) c.m.value = RG_FULL;   // which only a step reads
    if (what == 6) c.m.value = 7;
    if (what == 7) c.m.step = 6;
    if (what == 8) c.m.group = 1 << 20;
    if (what == 9) c.m.columns = INT32_MAX;
    if (what == 10) c.m.rows = INT32_MAX;
    if (what == 11) c.m.offset = INT32_MIN;
    if (what == 12) c.m.zero = 2;
    if (what == 13) c.m.value = RG_FLOAT, c.m.mantissa = 5;
    float x[260] = {}, y[70];
    const std::string name = std::to_string(what);
    expect(rg_panel_bytes(&c.m) == 0 && rg_linear(&c.m, x, y, 1, RG_F32, RG_INT8, 1) == RG_UNSOUND, "unsound matrix is refused", name);
    expect(rg_gemm(&c.m, x, nullptr, nullptr, y, 1, RG_F32, 1) == RG_UNSOUND && rg_decode(&c.m, 0, 1, nullptr, y, RG_F32, 1) == RG_UNSOUND, "and by the others", name);
  }
  Case c(4);
  float x[260] = {}, y[70];
  expect(rg_linear(&c.m, x, y, 1, 3, RG_INT8, 1) == RG_UNSOUND && rg_linear(&c.m, x, y, 1, RG_F32, 3, 1) == RG_UNSOUND, "an unknown dtype and an unknown rounding", c.name);
  expect(rg_linear(&c.m, x, y, -1, RG_F32, RG_INT8, 1) == RG_UNSOUND && rg_linear(&c.m, x, y, 1, RG_F32, RG_TOKEN + 9, 1) == RG_UNSOUND, "less than no tokens, and nine bits", c.name);
  expect(rg_decode(&c.m, -1, 1, nullptr, y, RG_F32, 1) == RG_NO_ROW, "a row before the first", c.name);
  expect(rg_linear(&c.m, x, y, 1, RG_F32, RG_INT8, 0) == RG_DONE && rg_linear(&c.m, x, y, 1, RG_F32, RG_INT8, -7) == RG_DONE, "no threads are one", c.name);
}

// Several callers at once, of which one has the pool and the others run alone: the same numbers as one caller alone.
void check_callers() {
  rg_matrix m{};
  const int rows = 512, columns = 1024, tokens = 3;
  m.rows = rows, m.columns = columns, m.bits = 4, m.group = 64, m.value = RG_INT, m.offset = 8;
  std::vector<uint8_t> codes(static_cast<size_t>(rows) * columns), panels(rg_panel_bytes(&m) * (rows / 16));
  for (uint8_t &code : codes) code = static_cast<uint8_t>(draw() & 15);
  m.panels = panels.data();
  expect(rg_pack(&m, codes.data(), nullptr, nullptr, panels.data(), 2) == 0, "pack refused", "callers");
  std::vector<float> x(static_cast<size_t>(tokens) * columns);
  for (float &number : x) number = static_cast<float>(between(-1000, 1000)) * 1e-3f;
  std::vector<float> wanted(static_cast<size_t>(tokens) * rows);
  rg_linear(&m, x.data(), wanted.data(), tokens, RG_F32, RG_INT16, 1);
  std::vector<std::thread> callers;
  std::atomic<int> wrong{0};
  for (int n = 0; n < 4; ++n)
    callers.emplace_back([&, n] {
      std::vector<float> y(wanted.size()), blocked(wanted.size()), rows_of(static_cast<size_t>(rows) * columns);
      for (int i = 0; i < 20; ++i) {
        wrong += rg_linear(&m, x.data(), y.data(), tokens, RG_F32, RG_INT16, 1 + (n + i) % 4) != 0 || y != wanted;
        wrong += rg_gemm(&m, x.data(), nullptr, nullptr, blocked.data(), tokens, RG_F32, 1 + (n + i) % 4) != 0;
        wrong += rg_decode(&m, 0, rows, nullptr, rows_of.data(), RG_F32, 1 + (n + i) % 4) != 0;
      }
    });
  for (std::thread &caller : callers) caller.join();
  expect(wrong == 0, "several callers at once", std::to_string(wrong.load()));
}

}  // namespace

#include "attend_test.h"
#include "planes_test.h"
#include "step_test.h"
#include "sweep_test.h"

namespace {

void check_all(int bits) {
  Case c(bits);
  check(c);
  check_runs(c);
  check_prefix(c);
  check_tap(c);
  check_step();
  check_attention(bits);
  check_planes();
  check_feedback();
  check_ranges();
}

}  // namespace

int main(int argc, char **argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 200;
  const char *best = rg_level();
  for (const char *level : {"portable", "avx2", "avx512", "vnni", "bf16", "neon"}) {
    if (rg_set_level(level) != 0) continue;
    expect(std::strcmp(rg_level(), level) == 0, "the level that was set", level);
    state = argc > 2 ? static_cast<uint64_t>(std::atoll(argv[2])) : 1;
    const int before = failures;
    check_refusals();
    check_callers();
    for (int i = 0; i < cases; ++i) check_all(1 + i % 8);
    // One token in a hundred may see a code go the other way; all of them would be a mistake.
    expect(tap_error < 0.01 * tap_tokens, "taps, all steps together", shown(tap_error / (tap_tokens ? tap_tokens : 1)));
    expect(packed_error < 0.02 * packed_rows, "taps before packed matrices, all together", shown(packed_error / packed_rows));
    tap_error = tap_tokens = 0, packed_error = packed_rows = 0;
    std::printf("%s: %d cases, %d wrong\n", level, cases, failures - before);
  }
  std::printf("best level here: %s\n", best);
  return failures != 0;
}
