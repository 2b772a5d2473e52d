// XtX of rows in bfloat16, by the tile unit (AMX). Compiled for it alone: nothing here runs before `amx_here` says so.
//
// The rows are packed twice, DEPTH at a time, in tiles of 1 KiB: 16 channels x 32 tokens for the left side, 16 pairs of tokens
// x 16 channels for the right; seen as words of two tokens the one is the other turned. The sum over DEPTH tokens of a
// block of 32 x 32 stays in four tiles, float32; each such sum is then added to the result. Only blocks on and above
// the diagonal are computed.
// Moves, of I channels: I^2 / BLOCK * DEPTH * 2 bytes from the second-level cache and 4 I^2 of sums, every DEPTH tokens.
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "gram.h"
#include "pool.h"

namespace {

constexpr int TILE = 16;             // channels of a tile
constexpr int PAIR = 32;             // tokens of a tile
constexpr int DEPTH = 1024;          // tokens packed at a time
constexpr int BLOCK = 128;           // channels of a block: both sides of one are 512 KiB
constexpr int WORDS = TILE * TILE;   // 32-bit words of a tile
constexpr int STEPS = DEPTH / PAIR;

struct alignas(64) Config {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};
};

void configure() {
  Config config;
  for (int i = 0; i < 8; ++i) config.bytes[i] = 64, config.rows[i] = TILE;
  __asm__ volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  _tile_loadconfig(&config);
}

// 32 tokens x 16 channels as pairs of tokens (right), and turned (left). Missing tokens and channels are 0.
void pack_tile(const uint16_t *x, int64_t columns, int64_t tokens, int64_t channel, uint32_t *left, uint32_t *right) {
  const int64_t width = columns - channel < TILE ? columns - channel : TILE;
  const __mmask16 mask = static_cast<__mmask16>((1u << width) - 1);
  for (int k = 0; k < TILE; ++k) {
    const uint16_t *row = x + 2 * k * columns + channel;
    const __m256i zero = _mm256_setzero_si256();
    const __m256i low = 2 * k < tokens ? _mm256_maskz_loadu_epi16(mask, row) : zero;
    const __m256i high = 2 * k + 1 < tokens ? _mm256_maskz_loadu_epi16(mask, row + columns) : zero;
    const __m512i words = _mm512_or_si512(_mm512_cvtepu16_epi32(low), _mm512_slli_epi32(_mm512_cvtepu16_epi32(high), 16));
    _mm512_store_si512(right + k * TILE, words);
  }
  const __m512i by = _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(TILE));
  for (int c = 0; c < TILE; ++c) _mm512_store_si512(left + c * TILE, _mm512_i32gather_epi32(by, right + c, 4));
}

void add(float *to, int64_t stride, const float *from, int64_t rows, int64_t columns) {
  const __mmask16 mask = static_cast<__mmask16>((1u << (columns < TILE ? columns : TILE)) - 1);
  for (int r = 0; r < TILE && r < rows; ++r, to += stride, from += TILE)
    _mm512_mask_storeu_ps(to, mask, _mm512_add_ps(_mm512_maskz_loadu_ps(mask, to), _mm512_load_ps(from)));
}

// Two by two tiles over all packed tokens, added to the result where it has such channels.
void corner(const uint32_t *left, const uint32_t *right, float *out, int64_t columns, int64_t i, int64_t j) {
  const uint32_t *a0 = left + i / TILE * STEPS * WORDS, *a1 = a0 + STEPS * WORDS;
  const uint32_t *b0 = right + j / TILE * STEPS * WORDS, *b1 = b0 + STEPS * WORDS;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int s = 0; s < STEPS; ++s, a0 += WORDS, a1 += WORDS, b0 += WORDS, b1 += WORDS) {
    _tile_loadd(4, a0, 64);
    _tile_loadd(6, b0, 64);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b1, 64);
    _tile_dpbf16ps(1, 4, 7);
    _tile_loadd(5, a1, 64);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[4][WORDS];
  _tile_stored(0, sums[0], 64);
  _tile_stored(1, sums[1], 64);
  _tile_stored(2, sums[2], 64);
  _tile_stored(3, sums[3], 64);
  for (int t = 0; t < 4; ++t) {
    const int64_t row = i + t / 2 * TILE, column = j + t % 2 * TILE;
    if (row < columns && column < columns) add(out + row * columns + column, columns, sums[t], columns - row, columns - column);
  }
}

}  // namespace

namespace rg {

bool amx_here() {
  static const bool here = [] {
    unsigned a, b, c, d;
    __asm__ volatile("cpuid" : "=a"(a), "=b"(b), "=c"(c), "=d"(d) : "a"(7), "c"(0));
    constexpr unsigned BF16 = 1u << 22, TILES = 1u << 24;
    constexpr int REQUEST = 0x1023, TILE_DATA = 18;  // arch_prctl: the kernel saves tiles only of processes that ask
    return (d & BF16) && (d & TILES) && syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  }();
  return here;
}

int gram_amx(const uint16_t *x, int64_t tokens, int64_t columns, float *out, int threads) {
  const int64_t tiles = (columns + 2 * TILE - 1) / (2 * TILE) * 2, blocks = (columns + BLOCK - 1) / BLOCK;
  const size_t bytes = static_cast<size_t>(tiles) * STEPS * WORDS * sizeof(uint32_t);
  uint32_t *const left = static_cast<uint32_t *>(std::aligned_alloc(64, bytes));
  uint32_t *const right = static_cast<uint32_t *>(std::aligned_alloc(64, bytes));
  if (!left || !right) {
    std::free(left), std::free(right);
    return 1;
  }
  for (int64_t first = 0; first < tokens; first += DEPTH) {
    const int64_t some = tokens - first < DEPTH ? tokens - first : DEPTH;
    Share packing, products;
    parallel(threads, [&](int thread, Team &team) {
      int64_t start, stop;
      while (packing.take(thread, team.threads, tiles, 4, start, stop))
        for (int64_t t = start; t < stop; ++t)
          for (int s = 0; s < STEPS; ++s) {
            const int64_t at = (t * STEPS + s) * WORDS, token = int64_t{s} * PAIR, have = some - token;
            if (have <= 0 || t * TILE >= columns) {
              std::memset(left + at, 0, WORDS * 4), std::memset(right + at, 0, WORDS * 4);
              continue;
            }
            pack_tile(x + (first + token) * columns, columns, have, t * TILE, left + at, right + at);
          }
      team.barrier();
      configure();
      while (products.take(thread, team.threads, blocks * blocks, 1, start, stop)) {
        const int64_t row = start / blocks * BLOCK, column = start % blocks * BLOCK;
        if (column < row) continue;
        for (int64_t i = row; i < row + BLOCK && i < columns; i += 2 * TILE)
          for (int64_t j = column; j < column + BLOCK && j < columns; j += 2 * TILE)
            if (j >= i) corner(left, right, out, columns, i, j);
      }
      _tile_release();
    });
  }
  std::free(left), std::free(right);
  return 0;
}

}  // namespace rg
