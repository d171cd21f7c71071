// float32 products with one small side: the adapter's rank. General libraries spend their packing on a side that has
// nothing to pack; here the small operand stays in cache and the large one is read once, in order.
//
// The columns of a product are worked on in strips as wide as a tile. The operand with the columns lies packed, strip by
// strip, so that a tile reads it line after line from the first-level cache: in place its rows are a page apart.
#include <omp.h>

#include "cpu/isa.h"

namespace gci::GCI_ISA {
namespace {

constexpr int64_t strip = tile_vectors * lanes;

// Rows of a tile that is `vectors` wide: enough independent sums to hide the latency of a multiply-add, and few enough to
// stay in registers. At most 8: rows of x may all fall into one set of the first-level cache, which has 8 places or more.
constexpr int rows_of(int vectors) { return lanes == 16 ? 8 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8; }

// a[m, k] = data[m * stride_m + k * stride_k]: the operand that gives one number at a time.
struct Scalars {
  const float* data;
  int64_t stride_m, stride_k;
};

// Where sums go: data[m * ld + column], added to what is there or in its place.
struct Sums {
  float* data;
  int64_t ld;
  bool accumulate;
};

// c[Rows, columns] (+)= sum over k of a[m, k] * b[k * ld_b + column], accumulators in registers. They start at zero and
// c is added last: a long sum made of blocks rounds less than one running sum. b has Vectors * lanes columns.
template <int Rows, int Vectors>
inline void tile(Scalars a, const float* b, int64_t ld_b, Sums c, int64_t k, int64_t columns) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[m][j] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec operand[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) operand[j] = load(b + i * ld_b + j * lanes);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const float scalar = a.data[m * a.stride_m + i * a.stride_k];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[m][j] += scalar * operand[j];
    }
  }
  const int64_t last = columns - (Vectors - 1) * lanes;  // columns of the last vector that exist in c
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* target = c.data + m * c.ld + j * lanes;
      if (j == Vectors - 1 && last < lanes)
        store_part(target, c.accumulate ? sum[m][j] + load_part(target, last) : sum[m][j], last);
      else
        store(target, c.accumulate ? sum[m][j] + load(target) : sum[m][j]);
    }
}

// Any number of rows, Vectors * lanes columns or up to lanes - 1 fewer. `before(count)` is called before each tile, with
// the number of its rows.
template <int Vectors, typename Before>
inline void rows_by_tiles(Scalars a, const float* b, int64_t ld_b, Sums c, int64_t rows, int64_t k, int64_t columns,
                          Before before) {
  constexpr int full = rows_of(Vectors), half = full / 2;
  const auto at = [](auto operand, int64_t offset) { return operand.data += offset, operand; };
  int64_t m = 0;
  for (; m + full <= rows; m += full) {
    before(full);
    tile<full, Vectors>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
  }
  for (; m + half <= rows; m += half) {
    before(half);
    tile<half, Vectors>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
  }
  for (; m < rows; ++m) {
    before(1);
    tile<1, Vectors>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
  }
}

// Any number of rows, at most a strip of columns.
template <typename Before>
inline void multiply(Scalars a, const float* b, int64_t ld_b, Sums c, int64_t rows, int64_t k, int64_t columns,
                     Before before) {
  static_assert(tile_vectors == 3);
  if (columns > 2 * lanes) return rows_by_tiles<3>(a, b, ld_b, c, rows, k, columns, before);
  if (columns > lanes) return rows_by_tiles<2>(a, b, ld_b, c, rows, k, columns, before);
  rows_by_tiles<1>(a, b, ld_b, c, rows, k, columns, before);
}

inline int64_t padded_width(int64_t n) { return (n + skinny_padding - 1) / skinny_padding * skinny_padding; }

// Fetches y[rows, width] into the second-level cache, some of its lines with each call of `rows_done`: strips of rows are
// too short for the processor to foresee, and all lines at once would be waited for.
struct Ahead {
  const float* y;
  int64_t ld, rows, per_row, share;
  int64_t row = 0, line = 0;

  // `all_rows`: of how many rows_done will be told.
  Ahead(const float* from, int64_t ld_y, int64_t some, int64_t width, int64_t all_rows)
      : y(from), ld(ld_y), rows(some), per_row((width + 15) / 16), share((rows * per_row + all_rows - 1) / all_rows) {}

  void rows_done(int64_t count) {
    for (int64_t i = 0; i < count * share && row < rows; ++i) {
      __builtin_prefetch(y + row * ld + line * 16, 0, 2);
      if (++line == per_row) line = 0, ++row;
    }
  }
};

constexpr int64_t block_tokens = 64;  // tokens whose y is packed, and then used by all rows of u
constexpr int64_t group = 4 * strip;  // columns of y that are packed together: longer pieces of its rows

// packed[width / strip, block_tokens, strip] = y[rows, width], zeros beyond width.
inline void pack_strips(const float* y, int64_t ld_y, int64_t rows, int64_t width, float* packed) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* row = y + i * ld_y;
    int64_t column = 0;
    for (; column + strip <= width; column += strip)
#pragma GCC unroll 4
      for (int j = 0; j < tile_vectors; ++j)
        store(packed + column * block_tokens + i * strip + j * lanes, load(row + column + j * lanes));
    if (column < width)
      for (int64_t j = 0; j < strip; ++j)
        packed[column * block_tokens + i * strip + j] = column + j < width ? row[column + j] : 0.0f;
  }
}

}  // namespace

// Strip after strip, each [k, columns of the strip]; the last one may be narrower.
void pack_panel(const float* source, int64_t stride_i, int64_t stride_j, float* panel, int64_t k, int64_t n) {
  const int64_t padded = padded_width(n);
  constexpr int64_t rows_together = 16;  // a transposing pack then reads whole lines
  for (int64_t column = 0; column < padded; column += strip) {
    const int64_t width = min_of(strip, padded - column);
    float* to = panel + column * k;
    for (int64_t start = 0; start < k; start += rows_together)
      for (int64_t j = 0; j < width; ++j)
        for (int64_t i = start; i < min_of(start + rows_together, k); ++i)
          to[i * width + j] = column + j < n ? source[i * stride_i + (column + j) * stride_j] : 0.0f;
  }
}

// A block of tokens goes through the whole sum before the next one: each page of x is then looked up once.
void project(const float* x, int64_t ld_x, const float* panel, float* out, int64_t ld_out, int64_t tokens, int64_t k,
             int64_t n, int threads) {
  const int64_t padded = padded_width(n);
  constexpr int64_t depth = 2048 / lanes;  // rows of a strip of the panel: 24 KB stay in the first-level cache
  const int64_t blocks = (tokens + block_tokens - 1) / block_tokens;
  if (k == 0)
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * ld_out, 0, n * sizeof(float));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t t = block * block_tokens, rows = min_of(block_tokens, tokens - t);
    for (int64_t start = 0; start < k; start += depth)
      for (int64_t column = 0; column < n; column += strip) {
        const int64_t ld = min_of(strip, padded - column);
        multiply(Scalars{x + t * ld_x + start, ld_x, 1}, panel + column * k + start * ld, ld,
                 Sums{out + t * ld_out + column, ld_out, start > 0}, rows, min_of(depth, k - start),
                 min_of(strip, n - column), [](int64_t) {});
      }
  }
}

// Each thread sums its share of the tokens into a partial of its own, the first one into out; the partials are added in
// thread order, so the same inputs and the same number of threads give the same bits.
void reduce(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, float* partial, int64_t tokens,
            int64_t r, int64_t n, int threads) {
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = tokens * me / team, end = tokens * (me + 1) / team;
    float* mine = me ? partial + (me - 1) * r * n : out;
    if (first == end) memset(mine, 0, r * n * sizeof(float));
    alignas(64) float packed[block_tokens * group];
    for (int64_t t = first; t < end; t += block_tokens) {
      const int64_t rows = min_of(block_tokens, end - t), later = min_of(block_tokens, end - t - rows);
      for (int64_t start = 0; start < n; start += group) {
        const int64_t width = min_of(group, n - start), strips = (width + strip - 1) / strip;
        const float* here = y + t * ld_y + start;
        pack_strips(here, ld_y, rows, width, packed);
        // What is packed next: the columns beside these, or the first ones of the next tokens.
        Ahead ahead = start + width < n ? Ahead(here + width, ld_y, rows, min_of(group, n - start - width), strips * r)
                                        : Ahead(y + (t + rows) * ld_y, ld_y, later, min_of(group, n), strips * r);
        for (int64_t column = 0; column < width; column += strip)
          multiply(Scalars{u + t * ld_u, 1, ld_u}, packed + column * block_tokens, strip,
                   Sums{mine + start + column, n, t > first}, r, rows, min_of(strip, width - column),
                   [&](int64_t count) { ahead.rows_done(count); });
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r * n; ++i)
      for (int64_t other = 0; other < team - 1; ++other) out[i] += partial[other * r * n + i];
  }
}

}  // namespace gci::GCI_ISA
