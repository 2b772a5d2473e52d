// The decode step of small random transformers against plain loops in double. Matrices are full, so nothing is rounded;
// the kernels of packed ones have tests of their own.
#pragma once
#include <algorithm>
#include <deque>
#include <numeric>

namespace {

using Vector = std::vector<double>;

// A random transformer with one token to come, and what its parts are worth.
struct Network {
  std::deque<Exact<float>> kept;  // every array that the program points to
  std::vector<rg_block> blocks;
  std::vector<std::vector<rg_site>> experts;
  std::deque<Exact<uint8_t>> caches;
  rg_program program{};
  rg_call call{};
  std::vector<float> x, logits;
  std::vector<int32_t> positions, starts;
  const float *cosines[1], *sines[1];
  int batch = between(1, 3), hidden = 2 * between(3, 40), past = between(0, 40), capacity = past + between(1, 3);
  int dtype = between(RG_F32, RG_F16);
  std::string name;

  const float *floats(size_t count, float size) {
    kept.emplace_back(count, 0);
    for (size_t i = 0; i < count; ++i) kept.back().data[i] = static_cast<float>(between(-1000, 1000)) * 1e-3f * size;
    return kept.back().data;
  }
  rg_site site(int rows, int columns) {
    rg_site s{};
    s.matrix.panels = reinterpret_cast<const uint8_t *>(floats(static_cast<size_t>(rows) * columns, 1.5f / std::sqrt(static_cast<float>(columns))));
    s.matrix.rows = rows, s.matrix.columns = s.matrix.group = columns;
    s.matrix.bits = RG_F32, s.matrix.value = RG_FULL;
    s.activations = RG_INT16;  // of no account to a full matrix
    if (coin()) s.bias = floats(static_cast<size_t>(rows), 0.3f);
    return s;
  }
  rg_norm norm(int size, bool always) {
    rg_norm n{};
    n.size = size, n.eps = 1e-5f;
    n.kind = always ? between(RG_RMS, RG_LAYER) : coin() ? RG_NO_NORM : RG_RMS;
    if (coin()) n.gain = floats(static_cast<size_t>(size), 1.5f);
    if (coin()) n.bias = floats(static_cast<size_t>(size), 0.2f);
    return n;
  }
  void feed_forward(rg_block &b) {
    const int ffn = between(3, 70);
    const bool gated = coin();
    b.activation = between(RG_SILU, RG_QUICK_GELU);
    if (between(0, 2)) {
      if (gated) b.gate = site(ffn, hidden);
      b.up = site(ffn, hidden), b.down = site(hidden, ffn);
      return;
    }
    b.expert_count = between(2, 5), b.experts_used = between(1, b.expert_count), b.normalise = coin();
    b.router = site(b.expert_count, hidden);
    experts.emplace_back();
    for (int e = 0; e < b.expert_count; ++e)
      for (const rg_site &s : {gated ? site(ffn, hidden) : rg_site{}, site(ffn, hidden), site(hidden, ffn)}) {
        experts.back().push_back(s);
        experts.back().back().bias = nullptr;
      }
    b.experts = experts.back().data();
  }

  Network() {
    const int turning = coin(), kv_heads = between(1, 3), head_dim = 2 * between(1, 20), rotary = turning ? 2 * between(1, head_dim / 2) : 0;
    experts.reserve(3);  // blocks point into it
    const int count = between(1, 3), rows = past + 4;
    for (int i = 0; i < count; ++i) {
      rg_block b{};
      b.attn_norm = norm(hidden, true), b.mlp_norm = norm(hidden, true);
      b.q_norm = norm(head_dim, false), b.k_norm = norm(head_dim, false);
      b.attn_post = norm(hidden, false), b.mlp_post = norm(hidden, false);
      b.kv_heads = kv_heads, b.heads = kv_heads * between(1, 5), b.head_dim = head_dim;
      b.rotary = rotary, b.interleaved = coin(), b.parallel = coin(), b.window = coin() ? between(1, 30) : 0;
      b.scale = 1.0f / std::sqrt(static_cast<float>(head_dim)), b.softcap = coin() ? 5.0f : 0.0f;
      b.q = site(b.heads * head_dim, hidden), b.k = site(kv_heads * head_dim, hidden), b.v = site(kv_heads * head_dim, hidden);
      b.o = site(hidden, b.heads * head_dim);
      feed_forward(b);
      for (void **at : {&b.keys, &b.values}) {
        const Numbers stored(static_cast<size_t>(batch) * kv_heads * capacity * head_dim, dtype);
        caches.emplace_back(stored.values.size() * (dtype == RG_F32 ? 4 : 2), 0);
        std::memcpy(caches.back().data, stored.stored.data, stored.values.size() * (dtype == RG_F32 ? 4 : 2));
        *at = caches.back().data;
      }
      blocks.push_back(b);
    }
    program.blocks = blocks.data(), program.block_count = count, program.hidden = hidden, program.rope_count = turning;
    program.norm = norm(hidden, true), program.head = site(between(1, 90), hidden), program.head_softcap = coin() ? 3.0f : 0.0f;
    const float *embedded = floats(static_cast<size_t>(batch) * hidden, 1.0f);
    x.assign(embedded, embedded + static_cast<size_t>(batch) * hidden);
    logits.assign(static_cast<size_t>(batch) * program.head.matrix.rows, NAN);
    for (int t = 0; t < batch; ++t) positions.push_back(between(0, rows - 1)), starts.push_back(between(0, past));
    cosines[0] = floats(static_cast<size_t>(rows) * (rotary / 2) + 1, 1.0f), sines[0] = floats(static_cast<size_t>(rows) * (rotary / 2) + 1, 1.0f);
    call = {x.data(), logits.data(), positions.data(), starts.data(), cosines, sines, batch, past, capacity, dtype};
    name = std::to_string(count) + " blocks of " + std::to_string(hidden) + ", " + std::to_string(past) + " cached, batch " + std::to_string(batch) + ", heads of " + std::to_string(head_dim);
  }

  static Vector product(const rg_site &s, const Vector &in) {
    const float *w = reinterpret_cast<const float *>(s.matrix.panels);
    Vector out(static_cast<size_t>(s.matrix.rows));
    for (size_t r = 0; r < out.size(); ++r) {
      out[r] = s.bias ? s.bias[r] : 0;
      for (size_t i = 0; i < in.size(); ++i) out[r] += static_cast<double>(w[r * in.size() + i]) * in[i];
    }
    return out;
  }
  static Vector normed(const rg_norm &n, Vector v) {
    if (n.kind == RG_NO_NORM) return v;
    const double size = static_cast<double>(v.size()), mean = n.kind == RG_LAYER ? std::accumulate(v.begin(), v.end(), 0.0) / size : 0;
    double square = 0;
    for (const double number : v) square += (number - mean) * (number - mean);
    for (size_t i = 0; i < v.size(); ++i) v[i] = (v[i] - mean) / std::sqrt(square / size + n.eps) * (n.gain ? n.gain[i] : 1) + (n.bias ? n.bias[i] : 0);
    return v;
  }
  static double activated(double a, int kind) {
    const double tanh = std::tanh(0.7978845608028654 * (a + 0.044715 * a * a * a));
    switch (kind) {
      case RG_GELU: return 0.5 * a * (1 + std::erf(a / std::sqrt(2.0)));
      case RG_GELU_TANH: return 0.5 * a * (1 + tanh);
      case RG_RELU: return std::fmax(a, 0);
      case RG_RELU2: return a > 0 ? a * a : 0;
      case RG_QUICK_GELU: return a / (1 + std::exp(-1.702 * a));
      default: return a / (1 + std::exp(-a));
    }
  }
  static double capped(double a, double cap) { return cap > 0 ? cap * std::tanh(a / cap) : a; }
  static void add(Vector &to, const Vector &what, double by = 1) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += by * what[i];
  }

  // Heads of q or k after their norm and rotation, times `by`.
  Vector turned(const rg_block &b, const rg_norm &n, Vector all, int t, double by) const {
    const size_t d = static_cast<size_t>(b.head_dim), half = static_cast<size_t>(b.rotary / 2);
    for (size_t at = 0; at < all.size(); at += d) {
      Vector head = normed(n, Vector(all.begin() + static_cast<long>(at), all.begin() + static_cast<long>(at + d)));
      for (size_t i = 0; i < half; ++i) {
        const size_t first = b.interleaved ? 2 * i : i, second = b.interleaved ? 2 * i + 1 : i + half, row = static_cast<size_t>(positions[static_cast<size_t>(t)]) * half + i;
        const double p = head[first], q = head[second], c = cosines[0][row], s = sines[0][row];
        head[first] = p * c - q * s, head[second] = q * c + p * s;
      }
      for (size_t i = 0; i < d; ++i) all[at + i] = head[i] * by;
    }
    return all;
  }
  // Attention over the cache as it is after the step, whose last entry is first held against `k` and `v`.
  Vector attended(const rg_block &b, const Vector &q, const Vector &k, const Vector &v, int t) const {
    const int d = b.head_dim, group = b.heads / b.kv_heads;
    int from = starts[static_cast<size_t>(t)];
    if (b.window && past + 1 - b.window > from) from = past + 1 - b.window;
    Vector out(static_cast<size_t>(b.heads) * d);
    const auto cached = [&](const void *cache, int h, int token, int i) {
      return read(static_cast<const uint8_t *>(cache), ((static_cast<size_t>(t) * b.kv_heads + h) * capacity + token) * d + i, dtype);
    };
    for (int h = 0; h < b.kv_heads; ++h)
      for (int i = 0; i < d; ++i) {
        const size_t at = static_cast<size_t>(h) * d + i;
        const bool good = near(cached(b.keys, h, past, i), k[at], 10 * std::fabs(k[at]) + 10, dtype) && near(cached(b.values, h, past, i), v[at], 10 * std::fabs(v[at]) + 10, dtype);
        expect(good, "what the step caches", name);
      }
    for (int head = 0; head < b.heads; ++head) {
      Vector weight;
      double top = -1e300, all = 0;
      for (int token = from; token <= past; ++token) {
        double score = 0;
        for (int i = 0; i < d; ++i) score += q[static_cast<size_t>(head) * d + i] * cached(b.keys, head / group, token, i);
        weight.push_back(capped(score, b.softcap));
        top = std::fmax(top, weight.back());
      }
      for (double &w : weight) all += w = std::exp(w - top);
      for (int token = from; token <= past; ++token)
        for (int i = 0; i < d; ++i) out[static_cast<size_t>(head) * d + i] += weight[static_cast<size_t>(token - from)] / all * cached(b.values, head / group, token, i);
    }
    return out;
  }
  static Vector unit(const rg_site &gate, const rg_site &up, const rg_site &down, int activation, const Vector &in) {
    Vector hidden = product(up, in);
    const Vector opened = gate.matrix.rows ? product(gate, in) : hidden;
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = activated(opened[i], activation) * (gate.matrix.rows ? hidden[i] : 1);
    return product(down, hidden);
  }
  Vector fed_forward(const rg_block &b, const Vector &in) const {
    if (!b.expert_count) return unit(b.gate, b.up, b.down, b.activation, in);
    Vector weight = product(b.router, in), out(static_cast<size_t>(hidden));
    const double top = *std::max_element(weight.begin(), weight.end());
    double all = 0, used = 0;
    for (double &w : weight) all += w = std::exp(w - top);
    std::vector<size_t> order(weight.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t p, size_t q) { return weight[p] > weight[q]; });
    order.resize(static_cast<size_t>(b.experts_used));
    for (const size_t e : order) used += weight[e] / all;
    for (const size_t e : order) add(out, unit(b.experts[3 * e], b.experts[3 * e + 1], b.experts[3 * e + 2], b.activation, in), weight[e] / all / (b.normalise ? used : 1));
    return out;
  }
  Vector expected(int t) const {
    Vector y(x.begin() + static_cast<long>(t) * hidden, x.begin() + static_cast<long>(t + 1) * hidden);
    for (const rg_block &b : blocks) {
      const Vector in = normed(b.attn_norm, y), before = y;
      const Vector q = turned(b, b.q_norm, product(b.q, in), t, b.scale), k = turned(b, b.k_norm, product(b.k, in), t, 1);
      add(y, normed(b.attn_post, product(b.o, attended(b, q, k, product(b.v, in), t))));
      add(y, normed(b.mlp_post, fed_forward(b, normed(b.mlp_norm, b.parallel ? before : y))));
    }
    Vector out = product(program.head, normed(program.norm, y));
    for (double &logit : out) logit = capped(logit, program.head_softcap);
    return out;
  }
};

void check_step() {
  Network n;
  expect(rg_step(&n.program, &n.call, between(1, 3)) == 0, "step refused", n.name);
  for (int t = 0; t < n.batch; ++t) {
    const Vector want = n.expected(t);
    double worst = 0;
    for (size_t r = 0; r < want.size(); ++r) worst = std::fmax(worst, std::fabs(n.logits[static_cast<size_t>(t) * want.size() + r] - want[r]) / (1 + std::fabs(want[r])));
    expect(worst < 1e-3, "step", n.name + ": off by " + shown(worst));
  }
  n.call.past = n.capacity;
  expect(rg_step(&n.program, &n.call, 1) == 2, "a cache without room is refused", n.name);
}

}  // namespace
