// float32 products with one small dimension: the adapter's rank. General libraries pack the large operand, which does
// not pay here; here the small operand stays in the cache and the large one is read once, in order.
//
// The columns of a product are processed in strips as wide as a tile. The operand with the columns is packed strip by
// strip, so that it stays in the L1 cache: unpacked, its rows are a page apart and evict one another.
#include <omp.h>

#include "cpu/vector.h"

namespace gci::GCI_ISA {
namespace {

constexpr int64_t strip = tile_vectors * lanes;
constexpr int64_t line = 16;  // floats in a cache line

// Rows of a tile that is `vectors` wide: enough independent sums to hide the latency of a multiply-add, and few enough
// to stay in registers. At most 8: rows of x may all map to the same set of the L1 cache, which is 8-way.
constexpr int rows_of(int vectors) { return lanes == 16 ? 8 : vectors == 3 ? 4 : vectors == 2 ? 6 : 8; }

// a[m, k] = data[m * stride_m + k * stride_k]: the operand of which one value at a time is broadcast.
struct Scalars {
  const float* data;
  int64_t stride_m, stride_k;
};

// Where sums go: data[m * ld + column], which they are added to or replace.
struct Sums {
  float* data;
  int64_t ld;
  bool accumulate;
};

// c[rows, columns] (+)= whole[rows, width]; c has only the first `columns` columns. Not inlined, like
// Prefetcher::rows_done: one copy for all tiles halves the time to compile this file.
__attribute__((noinline)) void add_part(const float* whole, int rows, int width, Sums c, int64_t columns) {
  for (int m = 0; m < rows; ++m)
    for (int64_t j = 0; j < columns; ++j) {
      float& target = c.data[m * c.ld + j];
      target = c.accumulate ? whole[m * width + j] + target : whole[m * width + j];
    }
}

// c[Rows, columns] (+)= sum over k of a[m, k] * b[k * ld_b + column], with accumulators in registers. They start at
// zero and c is added last: a long sum made of blocks has a smaller rounding error than one running sum. b has Vectors
// * lanes columns; with Copy they are also written to copy[k, Vectors * lanes].
template <int Rows, int Vectors, bool Copy>
inline void tile(Scalars a, const float* b, int64_t ld_b, Sums c, int64_t k, int64_t columns, float* copy = nullptr) {
  Vec sum[Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[m][j] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec operand[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      operand[j] = load(b + i * ld_b + j * lanes);
      if (Copy) store(copy + (i * Vectors + j) * lanes, operand[j]);
    }
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

template <typename Operand>
inline Operand at(Operand operand, int64_t offset) {
  operand.data += offset;
  return operand;
}

// Any number of rows, Vectors * lanes columns or up to lanes - 1 fewer. `before(count)` is called before each tile with
// its number of rows.
template <int Vectors, typename Before>
inline void rows_by_tiles(Scalars a, const float* b, int64_t ld_b, Sums c, int64_t rows, int64_t k, int64_t columns,
                          Before before) {
  constexpr int full = rows_of(Vectors), half = full / 2;
  int64_t m = 0;
  for (; m + full <= rows; m += full) {
    before(full);
    tile<full, Vectors, false>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
  }
  for (; m + half <= rows; m += half) {
    before(half);
    tile<half, Vectors, false>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
  }
  for (; m < rows; ++m) {
    before(1);
    tile<1, Vectors, false>(at(a, m * a.stride_m), b, ld_b, at(c, m * c.ld), k, columns);
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

// Prefetches y[rows, width] into the L2 cache, some lines with each call of `rows_done`: the pieces of its rows are too
// short for the hardware prefetcher, and all lines at once would stall the loads that follow.
struct Prefetcher {
  const float* y;
  int64_t ld, rows, per_row, share;
  int64_t row = 0, at = 0;

  // `all_rows`: the rows that rows_done will be told of in all.
  Prefetcher(const float* from, int64_t ld_y, int64_t some, int64_t width, int64_t all_rows)
      : y(from),
        ld(ld_y),
        rows(some),
        per_row((width + line - 1) / line),
        share((rows * per_row + all_rows - 1) / all_rows) {}

  __attribute__((noinline)) void rows_done(int64_t count) {
    for (int64_t i = 0; i < count * share && row < rows; ++i) {
      __builtin_prefetch(y + row * ld + at * line, 0, 2);
      if (++at == per_row) at = 0, ++row;
    }
  }
};

// This thread's part of `count` items, [first, end). Parts are multiples of `unit` and differ by at most one unit.
struct Share {
  int64_t first, end;
  Share(int64_t count, int64_t unit) {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num(), units = (count + unit - 1) / unit;
    first = min_of(count, units * me / team * unit);
    end = min_of(count, units * (me + 1) / team * unit);
  }
};

constexpr int64_t block_tokens = 64;  // tokens that use a strip before the next strip is processed
constexpr int64_t group = 4 * strip;  // columns of y that are prefetched together: longer pieces of its rows

// panel[rows, width] = from[i * stride_i + j * stride_j] for j < real, else 0; rows <= line. Where stride_i is 1, whole
// cache lines of `from` are read at once.
inline void pack(const float* from, int64_t stride_i, int64_t stride_j, float* panel, int64_t rows, int64_t width,
                 int64_t real) {
  if (real < width) memset(panel, 0, rows * width * sizeof(float));
  if (stride_i == 1 && rows == line) {
    for (int64_t j = 0; j < real; ++j)
#pragma GCC unroll 16
      for (int64_t i = 0; i < line; ++i) panel[i * width + j] = from[i + j * stride_j];
  } else {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < real; ++j) panel[i * width + j] = from[i * stride_i + j * stride_j];
  }
}

// The panel holds strip after strip, each [k, columns of the strip]; the last one may be narrower.
// A block of tokens is summed completely before the next one: each page of x then costs one TLB miss.
void project(const float* x, int64_t ld_x, const float* m, int64_t stride_i, int64_t stride_j, float* panel, float* out,
             int64_t ld_out, int64_t tokens, int64_t k, int64_t n, int threads) {
  const int64_t padded = (n + skinny_padding - 1) / skinny_padding * skinny_padding;
  constexpr int64_t depth = 2048 / lanes;  // rows of a strip of the panel: 24 KB stay in the L1 cache
  if (k == 0)
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * ld_out, 0, n * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    const Share rows(k, line), share(tokens, 8);
    for (int64_t column = 0; column < n; column += strip)
      for (int64_t i = rows.first; i < rows.end; i += line) {
        const int64_t width = min_of(strip, padded - column);
        pack(m + i * stride_i + column * stride_j, stride_i, stride_j, panel + column * k + i * width,
             min_of(line, rows.end - i), width, min_of(width, n - column));
      }
#pragma omp barrier
    for (int64_t t = share.first; t < share.end; t += block_tokens)
      for (int64_t start = 0; start < k; start += depth)
        for (int64_t column = 0; column < n; column += strip) {
          const int64_t width = min_of(strip, padded - column);
          multiply(Scalars{x + t * ld_x + start, ld_x, 1}, panel + column * k + start * width, width,
                   Sums{out + t * ld_out + column, ld_out, start > 0}, min_of(block_tokens, share.end - t),
                   min_of(depth, k - start), min_of(strip, n - column), [](int64_t) {});
        }
  }
}

// out[r, columns] (+)= u.T @ y[rows, columns], at most a strip of columns. The first tile reads y in place and, where
// more tiles follow, packs it for them.
template <typename Before>
inline void reduce_strip(Scalars u, const float* y, int64_t ld_y, Sums out, int64_t r, int64_t rows, int64_t columns,
                         Before before) {
  alignas(64) float packed[block_tokens * strip];
  constexpr int full = rows_of(tile_vectors);
  if (columns < strip) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < strip; ++j) packed[i * strip + j] = j < columns ? y[i * ld_y + j] : 0.0f;
    return multiply(u, packed, strip, out, r, rows, columns, before);
  }
  if (r <= full) return rows_by_tiles<tile_vectors>(u, y, ld_y, out, r, rows, strip, before);
  before(full);
  tile<full, tile_vectors, true>(u, y, ld_y, out, rows, strip, packed);
  rows_by_tiles<tile_vectors>(at(u, full * u.stride_m), packed, strip, at(out, full * out.ld), r - full, rows, strip,
                              before);
}

// Each thread has its own columns of y, so that results do not depend on the number of threads.
void reduce(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, int64_t tokens, int64_t r,
            int64_t n, int threads) {
  if (tokens == 0) memset(out, 0, r * n * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    const Share share(n, line);
    for (int64_t t = 0; t < tokens; t += block_tokens) {
      const int64_t rows = min_of(block_tokens, tokens - t), later = min_of(block_tokens, tokens - t - rows);
      for (int64_t start = share.first; start < share.end; start += group) {
        const int64_t width = min_of(group, share.end - start), rest = share.end - start - width;
        const float* here = y + t * ld_y + start;
        // The next columns, or the first columns of the next tokens.
        const int64_t all_rows = (width + strip - 1) / strip * r;
        Prefetcher next = rest > 0 ? Prefetcher(here + width, ld_y, rows, min_of(group, rest), all_rows)
                                   : Prefetcher(y + (t + rows) * ld_y + share.first, ld_y, later,
                                                min_of(group, share.end - share.first), all_rows);
        for (int64_t column = 0; column < width; column += strip)
          reduce_strip(Scalars{u + t * ld_u, 1, ld_u}, here + column, ld_y, Sums{out + start + column, n, t > 0}, r,
                       rows, min_of(strip, width - column), [&](int64_t count) { next.rows_done(count); });
      }
    }
  }
}

}  // namespace

[[gnu::cold]] void add_skinny(Kernels& table) {
  table.project = project;
  table.reduce = reduce;
}

}  // namespace gci::GCI_ISA
