// float32 products with one small side: the adapter's rank. General libraries spend their packing on a side that has
// nothing to pack; here the small operand stays in cache and the large one is read once, in order.
//
// The columns of a product are worked on in strips as wide as a tile. The operand with the columns lies packed, strip by
// strip: a tile reads it line after line from the first-level cache. In place its rows are a page apart.
#include <omp.h>

#include "cpu/isa.h"

namespace gci::GCI_ISA {
namespace {

constexpr int64_t strip = tile_vectors * lanes;
constexpr int64_t line = 16;  // floats of a line of the cache

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

// c[rows, columns] (+)= whole[rows, width], of which only these columns exist in c. One copy for all tiles, as of the other
// noinline functions: it spares compiling time.
__attribute__((noinline)) void add_part(const float* whole, int rows, int width, Sums c, int64_t columns) {
  for (int m = 0; m < rows; ++m)
    for (int64_t j = 0; j < columns; ++j) {
      float& target = c.data[m * c.ld + j];
      target = c.accumulate ? whole[m * width + j] + target : whole[m * width + j];
    }
}

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
  if (columns < Vectors * lanes) {
    alignas(64) float whole[Rows * Vectors * lanes];
    for (int m = 0; m < Rows; ++m)
      for (int j = 0; j < Vectors; ++j) store(whole + (m * Vectors + j) * lanes, sum[m][j]);
    return add_part(whole, Rows, Vectors * lanes, c, columns);
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* target = c.data + m * c.ld + j * lanes;
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
  int64_t row = 0, at = 0;

  // `all_rows`: of how many rows_done will be told.
  Ahead(const float* from, int64_t ld_y, int64_t some, int64_t width, int64_t all_rows)
      : y(from), ld(ld_y), rows(some), per_row((width + line - 1) / line), share((rows * per_row + all_rows - 1) / all_rows) {}

  __attribute__((noinline)) void rows_done(int64_t count) {
    for (int64_t i = 0; i < count * share && row < rows; ++i) {
      __builtin_prefetch(y + row * ld + at * line, 0, 2);
      if (++at == per_row) at = 0, ++row;
    }
  }
};

// This thread's part of `count` things: from, and to. Parts are multiples of `unit` and differ by one unit at most.
struct Share {
  int64_t first, end;
  Share(int64_t count, int64_t unit) {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), units = (count + unit - 1) / unit;
    first = min_of(count, units * me / team * unit);
    end = min_of(count, units * (me + 1) / team * unit);
  }
};

constexpr int64_t block_tokens = 64;  // tokens whose y is packed, and then used by all rows of u
constexpr int64_t group = 4 * strip;  // columns of y that are packed together: longer pieces of its rows

// packed[width / strip, block_tokens, strip] = y[rows, width], zeros beyond width.
__attribute__((noinline)) void pack_strips(const float* y, int64_t ld_y, int64_t rows, int64_t width, float* packed) {
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

inline void turn_line(const float* from, float* to, int64_t step) {
#pragma GCC unroll 16
  for (int64_t i = 0; i < line; ++i) to[i * step] = from[i];
}

}  // namespace

// Strip after strip, each [k, columns of the strip]; the last one may be narrower.
void pack_panel(const float* source, int64_t stride_i, int64_t stride_j, float* panel, int64_t k, int64_t n) {
  const int64_t padded = padded_width(n);
  for (int64_t column = 0; column < padded; column += strip) {
    const int64_t width = min_of(strip, padded - column), real = min_of(width, n - column);
    const float* from = source + column * stride_j;
    float* to = panel + column * k;
    if (real < width) memset(to, 0, k * width * sizeof(float));
    for (int64_t start = 0; start < k; start += line) {
      if (stride_i == 1 && start + line <= k)
        for (int64_t j = 0; j < real; ++j) turn_line(from + start + j * stride_j, to + start * width + j, width);
      else
        for (int64_t i = start; i < min_of(start + line, k); ++i)
          for (int64_t j = 0; j < real; ++j) to[i * width + j] = from[i * stride_i + j * stride_j];
    }
  }
}

// A block of tokens goes through the whole sum before the next one: each page of x is then looked up once.
void project(const float* x, int64_t ld_x, const float* panel, float* out, int64_t ld_out, int64_t tokens, int64_t k,
             int64_t n, int threads) {
  const int64_t padded = padded_width(n);
  constexpr int64_t depth = 2048 / lanes;  // rows of a strip of the panel: 24 KB stay in the first-level cache
  if (k == 0)
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * ld_out, 0, n * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    const Share share(tokens, 8);
    for (int64_t t = share.first; t < share.end; t += block_tokens)
      for (int64_t start = 0; start < k; start += depth)
        for (int64_t column = 0; column < n; column += strip) {
          const int64_t ld = min_of(strip, padded - column);
          multiply(Scalars{x + t * ld_x + start, ld_x, 1}, panel + column * k + start * ld, ld,
                   Sums{out + t * ld_out + column, ld_out, start > 0}, min_of(block_tokens, share.end - t),
                   min_of(depth, k - start), min_of(strip, n - column), [](int64_t) {});
        }
  }
}

// Each thread has some of y's columns to itself, so that the bits do not depend on how many threads there are.
void reduce(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, int64_t tokens, int64_t r, int64_t n,
            int threads) {
  if (tokens == 0) memset(out, 0, r * n * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    const Share share(n, line);
    alignas(64) float packed[block_tokens * group];
    for (int64_t t = 0; t < tokens; t += block_tokens) {
      const int64_t rows = min_of(block_tokens, tokens - t), later = min_of(block_tokens, tokens - t - rows);
      for (int64_t start = share.first; start < share.end; start += group) {
        const int64_t width = min_of(group, share.end - start), rest = share.end - start - width;
        const float* here = y + t * ld_y + start;
        pack_strips(here, ld_y, rows, width, packed);
        // What is packed next: the columns beside these, or the first ones of the next tokens.
        const int64_t calls = (width + strip - 1) / strip * r;
        Ahead ahead = rest > 0 ? Ahead(here + width, ld_y, rows, min_of(group, rest), calls)
                               : Ahead(y + (t + rows) * ld_y + share.first, ld_y, later,
                                       min_of(group, share.end - share.first), calls);
        for (int64_t column = 0; column < width; column += strip)
          multiply(Scalars{u + t * ld_u, 1, ld_u}, packed + column * block_tokens, strip,
                   Sums{out + start + column, n, t > 0}, r, rows, min_of(strip, width - column),
                   [&](int64_t count) { ahead.rows_done(count); });
      }
    }
  }
}

}  // namespace gci::GCI_ISA
