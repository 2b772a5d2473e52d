// The decode step of small random transformers against plain loops in double: every block of other sizes, several new
// tokens of a sequence, low-rank terms, taps that transform and round, stores of unequal lengths. Matrices are full, so
// the products round nothing; the kernels of packed ones have tests of their own.
#pragma once
#include <algorithm>
#include <deque>
#include <numeric>

namespace {

using Vector = std::vector<double>;
double tap_error = 0;  // of all tokens of steps whose taps round
int tap_tokens = 0;
double packed_error = 0;  // rows of packed matrices behind a tap that are off by more than rounding in floats
int packed_rows = 0;

// A random transformer with one token to come, and what its parts are worth.
struct Network {
  std::deque<Exact<float>> kept;  // every array that the program points to
  std::vector<rg_block> blocks;
  std::vector<std::vector<rg_site>> experts;
  std::deque<Exact<uint8_t>> caches;
  std::deque<std::vector<int32_t>> integers;
  std::deque<rg_low_rank> terms;
  rg_program program{};
  rg_call call{};
  std::vector<rg_store> stores;
  std::vector<float> x, logits;
  std::vector<int32_t> positions, starts, lengths;
  const float *cosines[1], *sines[1];
  int batch = between(1, 3), tokens = coin() ? 1 : between(2, 7), hidden = 2 * between(3, 40), past = between(0, 40);
  bool terms_here = coin(), taps_here = coin();
  std::string name;

  const float *floats(size_t count, float size) {
    kept.emplace_back(count, 0);
    for (size_t i = 0; i < count; ++i) kept.back().data[i] = static_cast<float>(between(-1000, 1000)) * 1e-3f * size;
    return kept.back().data;
  }
  // Sometimes the first columns of a wider one.
  rg_matrix matrix(int rows, int columns) {
    const int stored = coin() ? columns : columns + between(1, 9);
    rg_matrix m{};
    m.panels = reinterpret_cast<const uint8_t *>(floats(static_cast<size_t>(rows) * stored, 1.5f / std::sqrt(static_cast<float>(columns))));
    m.rows = rows, m.columns = m.group = columns;
    m.bits = RG_F32, m.value = RG_FULL;
    m.stride = stored == columns ? 0 : 4 * stored;
    return m;
  }
  rg_site site(int rows, int columns) {
    rg_site s{};
    s.matrix = matrix(rows, columns);
    s.activations = RG_INT16;  // of no account to a full matrix
    if (coin()) s.bias = floats(static_cast<size_t>(rows), 0.3f);
    if (terms_here && coin()) {
      const int rank = between(1, 40);
      terms.push_back({matrix((rows + 15) / 16 * 16, rank), matrix(rank, columns)});
      terms.back().left.rows = rows, terms.back().left.stride = 0;  // in panels: any numbers are some term's
      s.low_rank = &terms.back();
    }
    s.unrounded = between(0, 3) == 0;
    return s;
  }
  rg_tap tap(int columns) {
    rg_tap t{};
    if (!taps_here || between(0, 3) == 0) return t;
    if (coin()) t.diagonal = floats(static_cast<size_t>(columns), 1.5f);
    t.transform = between(RG_IDENTITY, RG_KRONECKER);
    t.size = columns % 4 == 0 ? 4 : columns % 2 == 0 ? 2 : 1;
    if (t.transform == RG_HADAMARD) while (columns % (2 * t.size) == 0 && coin()) t.size *= 2;
    if (t.transform == RG_KRONECKER) {
      t.left = floats(static_cast<size_t>(t.size) * t.size, 0.7f);
      t.right = floats(static_cast<size_t>(columns / t.size) * (columns / t.size), 1.5f / std::sqrt(static_cast<float>(columns / t.size)));
    }
    t.format = between(RG_PLAIN, RG_STATIC);
    t.bits = between(5, 8), t.asymmetric = coin(), t.group = coin() ? 0 : between(1, columns);
    t.step = t.format == RG_DYNAMIC ? 0.01f * static_cast<float>(between(50, 100)) : static_cast<float>(between(3, 40)) * 1.0371e-3f, t.zero = t.asymmetric ? static_cast<float>(between(0, (1 << t.bits) - 1)) : 0.0f;
    if (t.format == RG_STATIC && t.group && coin()) {
      while (columns % t.group) --t.group;
      const size_t groups = static_cast<size_t>(columns / t.group);
      kept.emplace_back(groups, 0);
      float *steps = kept.back().data;
      kept.emplace_back(groups, 0);
      float *zeros = kept.back().data;
      for (size_t g = 0; g < groups; ++g) steps[g] = static_cast<float>(between(3, 40)) * 1.0371e-3f, zeros[g] = static_cast<float>(between(0, (1 << t.bits) - 1));
      t.steps = steps, t.zeros = t.asymmetric ? zeros : nullptr;
    }
    return t;
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

  // A store with some tokens let go where the window allows it, and sometimes heads of unequal lengths.
  void keep(const rg_block &b) {
    rg_store s{};
    const int seen = coin() ? past : between(0, 40), heads = batch * b.kv_heads;
    lengths.push_back(seen);
    s.keys_dtype = between(RG_F32, RG_F16), s.values_dtype = between(RG_F32, RG_F16);
    if (b.window && seen + 1 > b.window && coin()) s.origin = between(0, seen + 1 - b.window);
    int most = seen - s.origin;
    if (between(0, 3) == 0) {
      integers.emplace_back();
      for (int i = 0; i < heads; ++i) integers.back().push_back(between(0, 30)), most = std::max(most, integers.back().back());
      s.lengths = integers.back().data();
      integers.emplace_back();
      for (int i = 0; i < heads; ++i) integers.back().push_back(between(0, s.lengths[i]));
      s.firsts = integers.back().data();
    }
    s.room = most + tokens + between(0, 2);
    for (const bool values : {false, true}) {
      const int dtype = values ? s.values_dtype : s.keys_dtype;
      const Numbers stored(static_cast<size_t>(heads) * s.room * b.head_dim, dtype);
      caches.emplace_back(stored.values.size() * (dtype == RG_F32 ? 4 : 2), 0);
      std::memcpy(caches.back().data, stored.stored.data, stored.values.size() * (dtype == RG_F32 ? 4 : 2));
      (values ? s.values : s.keys) = caches.back().data;
    }
    stores.push_back(s);
  }

  Network() {
    const int turning = coin(), rows = past + 12, least = 2 * between(1, 5), rotary = turning ? least : 0;
    experts.reserve(3);  // blocks point into it
    const int count = between(1, 3);
    for (int i = 0; i < count; ++i) {
      rg_block b{};
      const int kv_heads = between(1, 3), head_dim = coin() ? 16 : 2 * between(least / 2, 20);
      b.attn_norm = norm(hidden, true), b.mlp_norm = norm(hidden, true);
      b.q_norm = norm(head_dim, false), b.k_norm = norm(head_dim, false);
      b.attn_post = norm(hidden, false), b.mlp_post = norm(hidden, false);
      b.kv_heads = kv_heads, b.heads = kv_heads * between(1, 5), b.head_dim = head_dim;
      b.rotary = rotary, b.interleaved = coin(), b.parallel = coin(), b.window = coin() ? between(1, 30) : 0;
      b.scale = 1.0f / std::sqrt(static_cast<float>(head_dim)), b.softcap = coin() ? 5.0f : 0.0f;
      b.q = site(b.heads * head_dim, hidden), b.k = site(kv_heads * head_dim, hidden), b.v = site(kv_heads * head_dim, hidden);
      b.o = site(hidden, b.heads * head_dim);
      feed_forward(b);
      const int ffn = b.expert_count ? b.experts[1].matrix.rows : b.up.matrix.rows;
      b.attn_in = tap(hidden), b.attn_mixed = tap(b.heads * head_dim), b.mlp_in = tap(hidden), b.mlp_hidden = tap(ffn);
      keep(b);
      blocks.push_back(b);
    }
    program.blocks = blocks.data(), program.block_count = count, program.hidden = hidden, program.rope_count = turning;
    program.norm = norm(hidden, true), program.head = site(between(1, 90), hidden), program.head_softcap = coin() ? 3.0f : 0.0f;
    program.head_in = tap(hidden);
    const size_t all = static_cast<size_t>(batch) * tokens;
    const float *embedded = floats(all * hidden, 1.0f);
    x.assign(embedded, embedded + all * hidden);
    logits.assign(all * program.head.matrix.rows, NAN);
    const int shortest = *std::min_element(lengths.begin(), lengths.end());
    int gone = 0;
    for (const rg_store &s : stores) gone = std::max(gone, s.origin);
    for (int t = 0; t < batch; ++t) starts.push_back(shortest <= gone ? 0 : between(0, shortest));
    for (size_t n = 0; n < all; ++n) positions.push_back(between(0, rows - 1));
    cosines[0] = floats(static_cast<size_t>(rows) * (rotary / 2) + 1, 1.0f), sines[0] = floats(static_cast<size_t>(rows) * (rotary / 2) + 1, 1.0f);
    call = {x.data(), logits.data(), positions.data(), starts.data(), cosines, sines, stores.data(), lengths.data(), batch, tokens, 0};
    name = std::to_string(count) + " blocks of " + std::to_string(hidden) + ", " + std::to_string(past) + " cached, batch " + std::to_string(batch) + " by " + std::to_string(tokens) +
           (terms_here ? ", terms" : "") + (taps_here ? ", taps" : "");
  }

  // What a tap gives its sites: before the rounding, and after it.
  static std::pair<Vector, Vector> read_by(const rg_tap &t, Vector v) {
    const size_t n = v.size(), size = static_cast<size_t>(t.size);
    for (size_t i = 0; t.diagonal && i < n; ++i) v[i] *= t.diagonal[i];
    Vector moved(n);
    for (size_t to = 0; to < n; ++to)
      for (size_t from = 0; from < n; ++from) {
        double entry = from == to;
        if (t.transform == RG_HADAMARD) {
          size_t shared = from % size & to % size, odd = 0;
          for (; shared; shared >>= 1) odd ^= shared & 1;
          entry = from / size == to / size ? (odd ? -1 : 1) / std::sqrt(static_cast<double>(size)) : 0;
        }
        if (t.transform == RG_KRONECKER) {
          const size_t width = n / size;
          entry = static_cast<double>(t.left[from / width * size + to / width]) * t.right[from % width * width + to % width];
        }
        moved[to] += v[from] * entry;
      }
    Vector coded = moved;
    const size_t span = t.group && (t.format == RG_DYNAMIC || t.steps) ? static_cast<size_t>(t.group) : n;
    const double low = t.asymmetric ? 0 : -std::ldexp(1.0, t.bits - 1), high = low + std::ldexp(1.0, t.bits) - 1;
    for (size_t begin = 0; t.format != RG_PLAIN && begin < n; begin += span) {
      const size_t end = std::min(begin + span, n);
      double least = 0, most = 0, step = t.steps ? t.steps[begin / span] : t.step, zero = t.steps ? (t.zeros ? t.zeros[begin / span] : 0) : t.zero;
      for (size_t i = begin; i < end; ++i) least = std::min(least, moved[i]), most = std::max(most, moved[i]);
      if (t.format == RG_DYNAMIC) {
        const float share = t.step > 0 && t.step < 1 ? t.step : 1.0f;  // of the range; codes saturate beyond
        least = static_cast<float>(least) * share, most = static_cast<float>(most) * share;
        const float reach = static_cast<float>(std::max(most, -least)), width = static_cast<float>(most) - static_cast<float>(least);
        step = std::max(t.asymmetric ? width / static_cast<float>(high - low) : reach / static_cast<float>((high - low) / 2), 1.2930e-26f);
        zero = t.asymmetric ? std::min(std::max<double>(std::nearbyint(static_cast<float>(low) - static_cast<float>(least) / static_cast<float>(step)), low), high) : 0;
      }
      // In floats, as the greatest input of a group lies on the edge between two codes.
      const float narrow = static_cast<float>(step);
      for (size_t i = begin; i < end; ++i)
        coded[i] = (std::min(std::max<double>(std::nearbyint(static_cast<float>(moved[i]) / narrow + static_cast<float>(zero)), low), high) - zero) * step;
    }
    return {moved, coded};
  }
  static Vector times(const rg_matrix &m, const Vector &in) {
    Vector out(static_cast<size_t>(m.rows));
    for (size_t r = 0; r < out.size(); ++r) {
      const float *row = reinterpret_cast<const float *>(m.panels + r * static_cast<size_t>(m.stride ? m.stride : 4 * m.columns));
      for (size_t i = 0; i < in.size(); ++i) out[r] += static_cast<double>(row[i]) * in[i];
    }
    return out;
  }
  // As `times`, of a matrix that lies in panels of sixteen rows.
  static Vector times_across(const rg_matrix &m, const Vector &in) {
    Vector out(static_cast<size_t>(m.rows));
    const float *numbers = reinterpret_cast<const float *>(m.panels);
    for (size_t r = 0; r < out.size(); ++r)
      for (size_t i = 0; i < in.size(); ++i) out[r] += static_cast<double>(numbers[(r / 16 * in.size() + i) * 16 + r % 16]) * in[i];
    return out;
  }
  static Vector product(const rg_site &s, const std::pair<Vector, Vector> &read) {
    const Vector &in = s.unrounded ? read.first : read.second;
    Vector out = times(s.matrix, in);
    if (s.low_rank) add(out, times_across(s.low_rank->left, times(s.low_rank->right, in)));
    for (size_t r = 0; r < out.size(); ++r) out[r] += s.bias ? s.bias[r] : 0;
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
  Vector turned(const rg_block &b, const rg_norm &n, Vector all, size_t t, double by) const {
    const size_t d = static_cast<size_t>(b.head_dim), half = static_cast<size_t>(b.rotary / 2);
    for (size_t at = 0; at < all.size(); at += d) {
      Vector head = normed(n, Vector(all.begin() + static_cast<long>(at), all.begin() + static_cast<long>(at + d)));
      for (size_t i = 0; i < half; ++i) {
        const size_t first = b.interleaved ? 2 * i : i, second = b.interleaved ? 2 * i + 1 : i + half, row = static_cast<size_t>(positions[t]) * half + i;
        const double p = head[first], q = head[second], c = cosines[0][row], s = sines[0][row];
        head[first] = p * c - q * s, head[second] = q * c + p * s;
      }
      for (size_t i = 0; i < d; ++i) all[at + i] = head[i] * by;
    }
    return all;
  }
  // Attention of new token j of sequence t over the store as it is after the step, whose row of it is first held against
  // `k` and `v`.
  Vector attended(size_t block, const Vector &q, const Vector &k, const Vector &v, int t, int j) const {
    const rg_block &b = blocks[block];
    const rg_store &s = stores[block];
    const int d = b.head_dim, group = b.heads / b.kv_heads;
    Vector out(static_cast<size_t>(b.heads) * d);
    const auto cached = [&](bool values, int h, int row, int i) {
      return read(static_cast<const uint8_t *>(values ? s.values : s.keys), ((static_cast<size_t>(t) * b.kv_heads + h) * s.room + row) * d + i, values ? s.values_dtype : s.keys_dtype);
    };
    for (int h = 0; h < b.kv_heads; ++h) {
      const int at = t * b.kv_heads + h, own = (s.lengths ? s.lengths[at] : lengths[block] - s.origin) + j;
      int from = s.firsts ? s.firsts[at] : std::max(0, starts[static_cast<size_t>(t)] - s.origin);
      if (b.window) from = std::max(from, own + 1 - b.window);
      for (int i = 0; i < d; ++i) {
        const size_t c = static_cast<size_t>(h) * d + i;
        // Loose where a tap rounds: one code of an input may have gone the other way.
        const double size = taps_here ? 1e5 : 10 * std::fabs(k[c]) + 10, other = taps_here ? 1e5 : 10 * std::fabs(v[c]) + 10;
        expect(near(cached(false, h, own, i), k[c], size, s.keys_dtype) && near(cached(true, h, own, i), v[c], other, s.values_dtype), "what the step caches", name);
      }
      for (int head = h * group; head < (h + 1) * group; ++head) {
        Vector weight;
        double top = -1e300, all = 0;
        for (int row = from; row <= own; ++row) {
          double score = 0;
          for (int i = 0; i < d; ++i) score += q[static_cast<size_t>(head) * d + i] * cached(false, h, row, i);
          weight.push_back(capped(score, b.softcap));
          top = std::fmax(top, weight.back());
        }
        for (double &w : weight) all += w = std::exp(w - top);
        for (int row = from; row <= own; ++row)
          for (int i = 0; i < d; ++i) out[static_cast<size_t>(head) * d + i] += weight[static_cast<size_t>(row - from)] / all * cached(true, h, row, i);
      }
    }
    return out;
  }
  static Vector unit(const rg_block &b, const rg_site &gate, const rg_site &up, const rg_site &down, const std::pair<Vector, Vector> &in) {
    Vector hidden = product(up, in);
    const Vector opened = gate.matrix.rows ? product(gate, in) : hidden;
    for (size_t i = 0; i < hidden.size(); ++i) hidden[i] = activated(opened[i], b.activation) * (gate.matrix.rows ? hidden[i] : 1);
    return product(down, read_by(b.mlp_hidden, hidden));
  }
  Vector fed_forward(const rg_block &b, const Vector &given) const {
    const std::pair<Vector, Vector> in = read_by(b.mlp_in, given);
    if (!b.expert_count) return unit(b, b.gate, b.up, b.down, in);
    Vector weight = product(b.router, in), out(static_cast<size_t>(hidden));
    const double top = *std::max_element(weight.begin(), weight.end());
    double all = 0, used = 0;
    for (double &w : weight) all += w = std::exp(w - top);
    std::vector<size_t> order(weight.size());
    std::iota(order.begin(), order.end(), size_t{0});
    std::sort(order.begin(), order.end(), [&](size_t p, size_t q) { return weight[p] > weight[q]; });
    order.resize(static_cast<size_t>(b.experts_used));
    for (const size_t e : order) used += weight[e] / all;
    for (const size_t e : order) add(out, unit(b, b.experts[3 * e], b.experts[3 * e + 1], b.experts[3 * e + 2], in), weight[e] / all / (b.normalise ? used : 1));
    return out;
  }
  Vector expected(int t, int j) const {
    const size_t n = static_cast<size_t>(t) * tokens + j;
    Vector y(x.begin() + static_cast<long>(n) * hidden, x.begin() + static_cast<long>(n + 1) * hidden);
    for (size_t block = 0; block < blocks.size(); ++block) {
      const rg_block &b = blocks[block];
      const Vector before = y;
      const std::pair<Vector, Vector> in = read_by(b.attn_in, normed(b.attn_norm, y));
      const Vector q = turned(b, b.q_norm, product(b.q, in), n, b.scale), k = turned(b, b.k_norm, product(b.k, in), n, 1);
      add(y, normed(b.attn_post, product(b.o, read_by(b.attn_mixed, attended(block, q, k, product(b.v, in), t, j)))));
      add(y, normed(b.mlp_post, fed_forward(b, normed(b.mlp_norm, b.parallel ? before : y))));
    }
    Vector out = product(program.head, read_by(program.head_in, normed(program.norm, y)));
    for (double &logit : out) logit = capped(logit, program.head_softcap);
    return out;
  }
  double off(const float *got, const Vector &want) const {
    double error = 0, size = 0;
    for (size_t r = 0; r < want.size(); ++r) error += (got[r] - want[r]) * (got[r] - want[r]), size += want[r] * want[r];
    return std::sqrt(error) / (1e-3 * std::sqrt(static_cast<double>(want.size())) + std::sqrt(size));
  }
};

void check_step() {
  Network n;
  const size_t rows = static_cast<size_t>(n.program.head.matrix.rows);
  const int answer = rg_step(&n.program, &n.call, between(1, 3));
  if (answer) return expect(false, "step refused", n.name + ": " + std::to_string(answer));
  // An input on the edge between two codes of a tap may go either way, which a few blocks of random weights make larger.
  const double allowed = n.taps_here ? 0.3 : 1e-3;
  for (int t = 0; t < n.batch; ++t)
    for (int j = 0; j < n.tokens; ++j) {
      const double off = n.off(n.logits.data() + (static_cast<size_t>(t) * n.tokens + j) * rows, n.expected(t, j));
      expect(off < allowed, "step", n.name + ": off by " + shown(off));
      tap_error += n.taps_here ? off : 0, tap_tokens += n.taps_here;
    }
  const std::vector<float> all = n.logits;
  n.call.last = 1;
  expect(rg_step(&n.program, &n.call, between(1, 3)) == 0, "step refused", n.name);
  for (int t = 0; t < n.batch; ++t)
    for (size_t r = 0; r < rows; ++r) {
      const float one = n.logits[static_cast<size_t>(t) * rows + r], other = all[(static_cast<size_t>(t + 1) * n.tokens - 1) * rows + r];
      expect(std::fabs(one - other) <= 1e-4f * (1 + std::fabs(other)), "the last token's logits alone", n.name);
    }
  rg_store &s = n.stores[0];
  const rg_store kept = s;
  s.room = 0;
  expect(rg_step(&n.program, &n.call, 1) == RG_FULL_STORE, "a store without room is refused", n.name);
  s = kept;
  s.part_count = 1;
  expect(rg_step(&n.program, &n.call, 1) == RG_UNSOUND, "a part without memory is refused", n.name);
  s = kept;
  s.lengths = s.firsts = nullptr;
  s.origin = n.blocks[0].window ? std::max(1, n.lengths[0] + 2 - n.blocks[0].window) : 1;
  for (int32_t &start : n.starts) start = 0;
  expect(rg_step(&n.program, &n.call, 1) == RG_GONE, "tokens that are gone are refused", n.name);
}

// A packed matrix that reads a tap: a program of nothing but a head.
void check_tap(const Case &c) {
  const int tokens = between(1, 6), columns = c.m.columns;
  rg_tap tap{};
  tap.format = between(RG_PLAIN, RG_STATIC), tap.bits = between(2, 8), tap.asymmetric = coin();
  tap.group = between(0, 2) == 0 ? 0 : coin() ? c.m.group * between(1, 3) : between(1, columns);
  tap.step = tap.format == RG_DYNAMIC ? 0.01f * static_cast<float>(between(50, 100)) : static_cast<float>(between(3, 40)) * 1.0371e-3f, tap.zero = tap.asymmetric ? static_cast<float>(between(0, (1 << tap.bits) - 1)) : 0.0f;
  rg_program program{};
  program.hidden = columns, program.head.matrix = c.m, program.head_in = tap;
  program.head.activations = coin() ? RG_FLOAT32 : RG_INT16;
  const Numbers x(static_cast<size_t>(tokens) * columns, RG_F32);
  Exact<float> y(static_cast<size_t>(tokens) * c.m.rows, 0);
  const std::vector<int32_t> nothing(static_cast<size_t>(tokens), 0);
  rg_call call{};
  call.x = reinterpret_cast<const float *>(x.stored.data), call.logits = y.data, call.batch = tokens, call.tokens = 1;
  call.positions = call.starts = nothing.data();
  program.norm.size = columns;
  expect(rg_step(&program, &call, between(1, 3)) == 0, "a head alone is refused", c.name);
  int wrong = 0;
  for (int t = 0; t < tokens; ++t) {
    double worst = 0;
    const Vector own(x.values.begin() + static_cast<long>(t) * columns, x.values.begin() + static_cast<long>(t + 1) * columns);
    const Vector in = Network::read_by(tap, own).second;
    for (int r = 0; r < c.m.rows; ++r) {
      double want = 0, size = 0, step = 0;
      for (int i = 0; i < columns; ++i) want += c.weight(r, i) * in[static_cast<size_t>(i)], size += c.size(r, i) * std::fabs(in[static_cast<size_t>(i)]), step = std::fmax(step, c.size(r, i));
      // 16 bits carry what no codes do; and one code in a while goes the other way, which is told by all cases together.
      const double off = std::fabs(y.data[static_cast<size_t>(t) * c.m.rows + r] - want) / (size + 1e-30);
      expect(off < 0.3, "a tap before a packed matrix", c.name);
      packed_error += off > 3e-5 ? 1 : 0, packed_rows += 1;
      worst = std::fmax(worst, off);
    }
    wrong += worst > 3e-5;
  }
  expect(tokens < 3 || wrong < tokens, "a tap before a packed matrix, every token", c.name);
}

}  // namespace
