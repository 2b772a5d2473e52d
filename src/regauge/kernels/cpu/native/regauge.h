// The plain C interface of the CPU kernels. Python opens the library with ctypes; nothing here knows torch or Python.
//
// A packed matrix is cut into panels of 16 output rows. A panel is one run of bytes, read once from front to back: for
// each group of inputs [16 steps][16 zero points, dense bits][codes]. Codes lie in steps of 64 bytes: 16 rows x 4
// inputs, row r in bytes 4r ... 4r+3, which is one operand of a 4-way byte dot product; planes of 4, 2 and 1 bits pack
// 2, 4 and 8 steps into 64 bytes. Planes come highest first: 5, 6 and 7 bits are their top 4, then the next 2 or 1, so
// that fewer bits of a matrix are its first planes (3 and 8 bits are one plane: codes.h). Rows are padded to 16, inputs
// to whole groups (codes and activations of 0).
// In runs (`stride` below 0) the groups of a row are cut into runs of so many, the last of what is left: first the first run
// of every panel, then the second of every panel. A matrix of its first runs then lies together.
// In planes (`bias` of RG_INT) a matrix can be read at fewer bits: steps of all groups for each level, 2 bits first, then the
// codes' top two bits, then plane by plane the others.
// w = step * (value(code) - zero) * row_scale.   Nothing here throws; a function that can refuse answers an rg_answer.
// What cannot be seen from here is the caller's to check: that memory is as long as the shapes say.
#pragma once
#include <stddef.h>
#include <stdint.h>

#if defined(__GNUC__)
#define RG_API __attribute__((visibility("default")))
#else
#define RG_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

enum rg_dtype { RG_F32 = 0, RG_BF16 = 1, RG_F16 = 2 };

// How a group's step is stored. NONE: there is only `row_scale`.
enum rg_step_kind { RG_STEP_NONE = 0, RG_STEP_F16 = 1, RG_STEP_BF16 = 2, RG_STEP_F32 = 3, RG_STEP_E8M0 = 4, RG_STEP_E4M3 = 5 };

// What a code stands for. INT: code - offset. TABLE: table[code] (at most 16 codes). FLOAT: sign, exponent, mantissa.
// FULL: no codes; `panels` are numbers of dtype `bits` (an rg_dtype), row by row. TRELLIS: codes of words, which lie otherwise
// (trellis_codes.h); `table` is 128 values and what makes whole numbers of them, `mantissa` the window, `bias` the plain bits.
enum rg_value_kind { RG_INT = 0, RG_TABLE = 1, RG_FLOAT = 2, RG_FULL = 3, RG_TRELLIS = 4 };

// How activations are rounded before they are multiplied: one step a group, 8 or 16 bits; or not at all (slow).
// RG_TOKEN + b: one step a token and b signed bits (2 ... 8), the rounding that the artifact asks for.
enum rg_activations { RG_INT8 = 0, RG_INT16 = 1, RG_FLOAT32 = 2, RG_TOKEN = 16 };

// NO_MEMORY: for what the threads work in; what was to be written may be written in part. UNSOUND: sizes that do not fit
// together, a kind that there is not, a product that this kind of matrix does not have. NO_ROW: a row that is not there.
// Of rg_step: UNREAD: a block that looks back only so far has packed parts. GONE: attention would read tokens that a
// store has let go. FULL_STORE: no room for the new tokens.
// Of rg_range, rg_feedback: ENDLESS: a number on the way is not finite; what was to be written means nothing.
enum rg_answer { RG_DONE = 0, RG_NO_MEMORY = 1, RG_UNSOUND = 2, RG_UNREAD = 3, RG_GONE = 4, RG_FULL_STORE = 5, RG_NO_ROW = 6, RG_ENDLESS = 7 };

typedef struct rg_matrix {
  const uint8_t *panels;
  const float *row_scale;  // a multiplier a row, `rows` padded to 16; or NULL
  const float *table;      // RG_TABLE: 2^bits values
  int32_t rows, columns;
  int32_t bits;            // 1 ... 8 a code
  int32_t group;           // inputs a group: at most 65536, a multiple of a block of codes (codes.h)
  int32_t step;            // rg_step_kind
  int32_t zero;            // 1: every group has zero points
  int32_t value;           // rg_value_kind
  int32_t offset;          // RG_INT: what is taken from a code; RG_TRELLIS: 128
  int32_t mantissa;        // RG_FLOAT: bits of mantissa; RG_INT in planes: bits that there are
  int32_t bias;            // RG_FLOAT: value = (1 + fraction) * 2^(exponent - bias); RG_INT: 0, or in planes the whole's groups
  int64_t stride;          // bytes from panel to panel, of RG_FULL from row to row; 0: as `columns` say. With it `rows` and
                           // `columns` may be the first ones of a larger matrix. Below 0: in up to four runs, of that
                           // matrix -(panels << 48 | groups of a row << 36 | groups before the end of the third run
                           // << 24 | of the second << 12 | of the first); of RG_FULL from column to column
} rg_matrix;

// ---- the machine -----------------------------------------------------------------------------------------------
RG_API int rg_abi(void), rg_has_planes(void);  // 1: a matrix may be in planes
RG_API int rg_has_cuts(void);                   // 1: and in runs
RG_API int rg_has_columns(void);                // 1: and one in full precision column by column
RG_API const char *rg_level(void);              // portable, avx2, avx512, vnni, neon
RG_API int rg_set_level(const char *name);      // 0; 1 unknown name; 2 this CPU lacks it
RG_API double rg_bandwidth(int threads, size_t bytes, double seconds);  // bytes a second, read once in order; <= 0: no memory

// ---- layout ----------------------------------------------------------------------------------------------------
RG_API size_t rg_panel_bytes(const rg_matrix *m);  // of one panel; 0: there is no such matrix
// codes (rows, columns) bytes; steps: (rows, groups) of the stored kind, in planes (levels, rows, groups); zeros (rows, groups) bytes or NULL.
RG_API int rg_pack(const rg_matrix *m, const uint8_t *codes, const void *steps, const uint8_t *zeros, uint8_t *panels, int threads);
RG_API int rg_unpack(const rg_matrix *m, uint8_t *codes, int threads);  // codes (rows, columns) again
// Decoded rows [start, stop) or, where `index` is given, rows index[start ... stop): out (stop - start, columns).
RG_API int rg_decode(const rg_matrix *m, int64_t start, int64_t stop, const int64_t *index, void *out, int dtype, int threads);

// ---- products --------------------------------------------------------------------------------------------------
// y (tokens, rows) = x (tokens, columns) W^T. Few tokens: weights are read once for at most 4 of them, 8 on AVX-512.
RG_API int rg_linear(const rg_matrix *m, const void *x, void *y, int64_t tokens, int dtype, int activations, int threads);
// Blocked, for many tokens: 8-bit activations. `token_steps`: NULL, or a ready step a token whose integers are in `x`
// (signed bytes) as the caller rounded them.
RG_API int rg_gemm(const rg_matrix *m, const void *x, const int8_t *xq, const float *token_steps, void *y, int64_t tokens, int dtype, int threads);
// Tokens that are codes already: value = step * (code - zero), `group` channels behind each other sharing both.
typedef struct rg_codes {
  const int8_t *codes;   // (tokens, columns)
  const float *steps;    // (tokens, columns / group); NULL: 1
  const int32_t *zeros;  // as steps, -128 ... 127; NULL: 0
  int32_t group;         // 0: all channels
  int32_t shared;        // 1: `zeros` is one row, of every token
} rg_codes;
// y (tokens, rows) of such tokens, for any number of them; sums of integers are exact. Unsound where a group of the matrix
// has more than one step of theirs.
RG_API int rg_coded(const rg_matrix *m, const rg_codes *codes, void *y, int64_t tokens, int dtype, int threads);
// Exact: y (tokens, rows) int32 = sum over columns of (code - offset) * x. Unsound where 32 bits could overflow.
RG_API int rg_integers(const rg_matrix *m, const int8_t *x, int32_t *y, int64_t tokens, int threads);
// out (columns, columns) float32 += x^T x of `tokens` rows of bfloat16, in blocks of 32 x 32 on and above the diagonal; the
// rest stays. RG_NO_MEMORY; RG_UNREAD: this CPU has no unit for it.
RG_API int rg_gram(const uint16_t *x, int64_t tokens, int64_t columns, float *out, int threads);
RG_API int rg_has_gram(void);

// ---- rounding --------------------------------------------------------------------------------------------------
// Which numbers codes stand for. INTEGERS: low ... high, ties to even, code = value - low. FLOATS: sign, exponent and
// `mantissa` bits, ties to even. LIST: `count` values in rising order, a tie to the lesser, code = place.
enum rg_grid_kind { RG_INTEGERS = 0, RG_FLOATS = 1, RG_LIST = 2 };

typedef struct rg_grid {
  const float *values, *middles;  // LIST: `count` values, and what lies half way between neighbours
  int32_t kind, bits;
  int32_t zero;                   // INTEGERS: every group has a zero point
  int32_t mantissa, count;
  float low, high, tiny;          // least and greatest value; FLOATS: the least normal one
} rg_grid;

// ABSMAX: [-a, a] over the whole grid. MINMAX: the range, widened to hold 0. SEARCH: of these two, the shrinks by `shares`
// (the first of which is 1) and the least-squares step for the best of them, that with the least squared error.
enum rg_range_kind { RG_ABSMAX = 0, RG_MINMAX = 1, RG_SEARCH = 2 };

// How the step of a group is found and stored. `step`: an rg_step_kind but NONE. E8M0: `top` is the grid's greatest value
// over the power of two below it; one more is taken where that would round past the grid, but not if `strict`. E4M3: in
// units of 1 / `whole`.
typedef struct rg_ranger {
  const float *shares;
  double top;
  int32_t kind, count, step, strict;
  float whole;
} rg_ranger;

// Steps and zero points (NULL where the grid has none) of groups (groups, size) of numbers; weight: NULL, or how much the
// error of each counts in a search.
RG_API int rg_range(const rg_grid *grid, const rg_ranger *ranger, const void *x, int dtype, const float *weight, int64_t groups, int64_t size, float *scale, float *zero, int threads);

// Rounding with error feedback: column j rounds w_j + sum over i < j of (w_i - v_i) F_ij, v what column i became. F is upper
// triangular with a diagonal of 1 (neither the diagonal nor what lies below is read). Groups whose steps are not known are
// fitted when their first column is reached, to what all their columns would be were they free.
typedef struct rg_sweep {
  const float *w, *feedback;  // (rows, columns), (columns, columns)
  const int32_t *group_of;    // of each column where steps are known; NULL: columns / groups to each
  const rg_ranger *ranger;    // NULL: steps are known
  float *scale, *zero;        // (rows, groups), read or written
  uint8_t *codes;             // (rows, columns), written
  int64_t rows, columns, groups;
  rg_grid grid;
} rg_sweep;

RG_API int rg_feedback(const rg_sweep *sweep, int threads);

// A trellis (trellis.h): `fresh` bits of each of the `run` codes of a word make one circular string, `window` bits of which
// choose a value with the weight's own `plain` bits: table[plain << window | window bits], 2^(window + plain) entries.
typedef struct rg_trellis {
  const float *table;
  int32_t window, fresh, plain, run;
} rg_trellis;

// The nearest path of every word of z (rows, columns), in steps: its codes and, where asked for, its values.
RG_API int rg_trellis_round(const rg_trellis *t, const float *z, int64_t rows, int64_t columns, uint8_t *codes, float *values, int threads);

// Error feedback over `columns` columns of whole words: w becomes its errors w - v. `targets` is what each column would round
// given the errors of all before these; F of these columns, from row to row `pitch`, and on its diagonal how much each
// column's error counts. Errors of `part` columns are made good by the rest of their word.
typedef struct rg_trellis_sweep {
  float *w;
  const float *targets, *feedback, *scale;  // (rows, columns); (columns, columns); steps (rows, groups)
  uint8_t *codes;
  int64_t rows, columns, groups, part;
  int64_t w_pitch, pitch, codes_pitch;      // from row to row
} rg_trellis_sweep;

RG_API int rg_trellis_feedback(const rg_trellis *t, const rg_trellis_sweep *sweep, int threads);

// A list of code words (lists.h): `count` rows of `piece` magnitudes, 8 or 4, each row a number of 16 bits that are the places
// of its magnitudes among `kinds` sizes, the first weight's lowest. EVEN: of eight weights an even number is negative.
typedef struct rg_list {
  const uint16_t *rows;
  const float *sizes;
  int32_t count, kinds, piece, even;
} rg_list;

// The nearest words of z (words, 8), their values: each square counted by `weight` ((words, 8) with a pitch of 8, one row of
// 8 for all with a pitch of 0, or NULL). What is no number counts as 0.
RG_API int rg_lists_near(const rg_list *l, const float *z, const float *weight, int64_t pitch, int64_t words, float *values, int threads);

// ---- decode steps of a whole transformer -------------------------------------------------------------------------
enum rg_norm_kind { RG_NO_NORM = 0, RG_RMS = 1, RG_LAYER = 2 };
enum rg_activation { RG_SILU = 0, RG_GELU = 1, RG_GELU_TANH = 2, RG_RELU = 3, RG_RELU2 = 4, RG_QUICK_GELU = 5 };

typedef struct rg_norm {
  const float *gain, *bias;  // `size` floats each, or NULL
  int32_t kind, size;
  float eps;
} rg_norm;

// HADAMARD: normalised, of Sylvester's order, on each run of `size` channels, a power of two. KRONECKER: x (left (x) right).
enum rg_transform { RG_IDENTITY = 0, RG_HADAMARD = 1, RG_KRONECKER = 2 };
// PLAIN: not rounded but as the sites' products need it. DYNAMIC: each step from the values themselves. STATIC: ready steps.
enum rg_tap_format { RG_PLAIN = 0, RG_DYNAMIC = 1, RG_STATIC = 2 };

// How an activation is read by all the sites that read it: times `diagonal`, then the transform, then rounded.
typedef struct rg_tap {
  const float *diagonal;      // a multiplier a channel, or NULL
  const float *left, *right;  // KRONECKER: (size, size) and (channels / size, channels / size), float32
  const float *steps, *zeros; // STATIC: of every `group` channels; NULL: `step` and `zero` are all channels'
  int32_t transform, size;
  int32_t format, bits;       // codes of 2 ... 8 bits
  int32_t group;              // channels that share a step; 0: all of a token
  int32_t asymmetric;         // codes 0 ... 2^bits - 1 and a zero point, instead of signed ones
  int32_t value;              // RG_INT; RG_FLOAT: a code is a small float, up to `top`, the least normal one `tiny`
  int32_t mantissa;           // of RG_FLOAT
  float step, zero;           // STATIC: value = step * (code - zero). DYNAMIC: a step below 1 is the share of the range
  float top, tiny;            // of RG_FLOAT
} rg_tap;

// What is added to a site's product: left (right x), two matrices of kind RG_FULL, (rows, rank) and (rank, columns). `left`
// lies in panels: of each 16 rows (the last filled up with zeros) `rank` runs of 16 numbers.
typedef struct rg_low_rank {
  rg_matrix left, right;
} rg_low_rank;

// A matrix with its bias. rows 0: there is none.
typedef struct rg_site {
  rg_matrix matrix;
  const float *bias;
  const rg_low_rank *low_rank;  // or NULL
  int32_t activations;          // how the product carries what the tap leaves unrounded
  int32_t unrounded;            // 1: this site reads its tap before the rounding
} rg_site;

typedef struct rg_block {
  rg_norm attn_norm, q_norm, k_norm, attn_post, mlp_norm, mlp_post;  // q_norm, k_norm: of one head
  rg_tap attn_in, attn_mixed, mlp_in, mlp_hidden;                    // read by q k v; o; gate up (experts' too); down
  rg_site q, k, v, o, gate, up, down, router;  // gate: only of gated units; router: only where there are experts
  const rg_site *experts;                      // gate, up, down of each
  int32_t expert_count, experts_used, normalise;  // normalise: weights of the experts used sum to 1
  int32_t heads, kv_heads, head_dim;
  int32_t rotary, interleaved, rope;  // channels that turn; pairs 2i, 2i + 1 instead of i, i + rotary / 2; which table
  int32_t parallel;                   // attention and feed-forward read the same residual
  int32_t activation;
  int32_t window;                     // 0, or how many tokens attention looks back, itself included
  float scale, softcap;               // of scores; softcap 0: none
} rg_block;

typedef struct rg_program {
  const rg_block *blocks;
  rg_norm norm;
  rg_tap head_in;
  rg_site head;
  int32_t block_count, hidden, rope_count;
  float head_softcap;
} rg_program;

// Keys or values of older tokens: blocks of bytes, those of a head behind each other. A block: [steps][lows][codes].
// value = step * code + low, or step * (code - offset). axis TIME: a step a channel for `group` tokens, channels padded to
// 16; CHANNELS: a step a token for `group` channels, those of one group of channels behind each other. Codes lie in pieces of
// 64 bytes, packed as a matrix's are: of keys 16 tokens x 4 channels, of values 16 channels x 4 tokens, both padded. 16 bits:
// a row of floats a token instead.
enum rg_axis { RG_TIME = 0, RG_CHANNELS = 1 };

typedef struct rg_blocks {
  const uint8_t *blocks;
  const int64_t *offsets;  // bytes to the first block of each (sequence, head)
  const float *rows;       // a multiplier a token, or NULL
  int32_t bits;            // 1 ... 8, or 16
  int32_t axis, group, low, offset;
  int32_t dtype;           // rg_dtype: of steps F16 or BF16
  int32_t value;           // RG_INT; or RG_FLOAT: a code of 8 bits is a float8 (e4m3fn)
} rg_blocks;

// Older tokens of every sequence and key-value head; every new token attends to all of them that count.
typedef struct rg_part {
  rg_blocks keys, values;
  const int32_t *lengths;      // tokens of each (sequence, head): whole blocks
  const int32_t *firsts;       // the first that counts of each; NULL: all do
  const int64_t *row_offsets;  // numbers to the first multiplier of each; NULL where there are none
  int32_t tokens;              // of a block, a multiple of 16
} rg_part;

// What one block keeps of the past: for every sequence and key-value head some packed parts, then a window of recent tokens
// in full precision, one row a token.
typedef struct rg_store {
  void *keys, *values;        // the window: (batch, kv_heads, room, head_dim)
  const int32_t *lengths;     // rows held of each (sequence, head); NULL: tokens seen less `origin`
  const int32_t *firsts;      // first row that counts of each (sequence, head); NULL: as rg_call.starts say
  const rg_part *parts;
  int32_t part_count;
  int32_t keys_dtype, values_dtype;
  int32_t room, origin;       // rows; tokens seen that the window holds no more: row 0 is token `origin`
  int32_t turned;             // 1: keys lie turned by a Hadamard matrix of the head's size, a power of two; 2: values; 3: both
} rg_store;

typedef struct rg_call {
  const float *x;            // (batch * tokens, hidden) embedded tokens, sequence by sequence
  float *logits;             // (batch * tokens, rows of head); of `last`: (batch, rows of head)
  const int32_t *positions;  // of each new token: the row of the tables
  const int32_t *starts;     // first token seen of each sequence that counts
  const float *const *cosines, *const *sines;  // rope_count tables (positions, rotary / 2)
  const rg_store *stores;    // of each block
  const int32_t *lengths;    // tokens seen by each block before these; the new ones are written after them
  int32_t batch, tokens;     // sequences, and new tokens of each: together at most 64
  int32_t last;              // 1: logits of the last new token of each sequence alone
} rg_call;

RG_API int rg_step(const rg_program *program, const rg_call *call, int threads);

// Attention of one layer over a store that holds the new tokens already, as its last rows. q and out: (batch, tokens, heads,
// head_dim) of `dtype`; of a store that is turned, q comes turned, and out is.
typedef struct rg_attention {
  const void *q;
  void *out;
  const rg_store *store;
  const int32_t *starts;  // as rg_call.starts
  int32_t batch, tokens, heads, kv_heads, head_dim, dtype;
  int32_t rows;           // held, where the store has no `lengths`
  int32_t window;         // 0, or how many tokens attention looks back, itself included
  int32_t all;            // 1: each new token sees those after it too
  float scale, softcap;
} rg_attention;

RG_API int rg_attend(const rg_attention *attention, int threads);

#ifdef __cplusplus
}
#endif
