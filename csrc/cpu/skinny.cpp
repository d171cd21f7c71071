// float32 products with one small side: the adapter's rank. General libraries spend their packing on a side that has
// nothing to pack; here the small operand stays in cache and the large one is read once, in order.
#include <omp.h>

#include "cpu/isa.h"

namespace gci::GCI_ISA {
namespace {

constexpr int tile_columns = tile_vectors * lanes;

// c[rows, columns] (+)= sum over k of a[m * stride_m + k * stride_k] * b[k * ld_b + column], accumulators in registers.
// They start at zero and c is added last: a long sum made of blocks rounds less than one running sum.
// Part: the last vector holds fewer than `lanes` columns of memory that exists; `columns` says how many in all.
template <int Rows, int Vectors, bool Part>
inline void tile(const float* a, int64_t stride_m, int64_t stride_k, const float* b, int64_t ld_b, float* c,
                 int64_t ld_c, int64_t k, bool accumulate, int64_t columns) {
  Vec sum[Rows][Vectors];
  const int64_t last = columns - (Vectors - 1) * lanes;
  auto fetch = [&](const float* p, int j) {
    return Part && j == Vectors - 1 ? load_part(p + j * lanes, last) : load(p + j * lanes);
  };
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) sum[m][j] = Vec{};
  for (int64_t i = 0; i < k; ++i) {
    Vec operand[Vectors];
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) operand[j] = fetch(b + i * ld_b, j);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const float scalar = a[m * stride_m + i * stride_k];
#pragma GCC unroll 4
      for (int j = 0; j < Vectors; ++j) sum[m][j] += scalar * operand[j];
    }
  }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 4
    for (int j = 0; j < Vectors; ++j) {
      float* target = c + m * ld_c + j * lanes;
      if (accumulate) sum[m][j] += fetch(c + m * ld_c, j);
      if (Part && j == Vectors - 1)
        store_part(target, sum[m][j], last);
      else
        store(target, sum[m][j]);
    }
}

template <int Rows, int Vectors>
inline void tile_or_part(const float* a, int64_t stride_m, int64_t stride_k, const float* b, int64_t ld_b, float* c,
                         int64_t ld_c, int64_t k, bool accumulate, int64_t columns) {
  if (columns == Vectors * lanes)
    tile<Rows, Vectors, false>(a, stride_m, stride_k, b, ld_b, c, ld_c, k, accumulate, columns);
  else
    tile<Rows, Vectors, true>(a, stride_m, stride_k, b, ld_b, c, ld_c, k, accumulate, columns);
}

template <int Rows>
inline void row_block(const float* a, int64_t stride_m, int64_t stride_k, const float* b, int64_t ld_b, float* c,
                      int64_t ld_c, int64_t k, bool accumulate, int64_t columns) {
  if (columns > 2 * lanes)
    tile_or_part<Rows, 3>(a, stride_m, stride_k, b, ld_b, c, ld_c, k, accumulate, columns);
  else if (columns > lanes)
    tile_or_part<Rows, 2>(a, stride_m, stride_k, b, ld_b, c, ld_c, k, accumulate, columns);
  else
    tile_or_part<Rows, 1>(a, stride_m, stride_k, b, ld_b, c, ld_c, k, accumulate, columns);
}

// Any number of rows, at most tile_columns columns.
inline void column_block(const float* a, int64_t stride_m, int64_t stride_k, const float* b, int64_t ld_b, float* c,
                         int64_t ld_c, int64_t rows, int64_t k, bool accumulate, int64_t columns) {
  int64_t m = 0;
  for (; m + tile_rows <= rows; m += tile_rows)
    row_block<tile_rows>(a + m * stride_m, stride_m, stride_k, b, ld_b, c + m * ld_c, ld_c, k, accumulate, columns);
  for (; m + 2 <= rows; m += 2)
    row_block<2>(a + m * stride_m, stride_m, stride_k, b, ld_b, c + m * ld_c, ld_c, k, accumulate, columns);
  for (; m < rows; ++m)
    row_block<1>(a + m * stride_m, stride_m, stride_k, b, ld_b, c + m * ld_c, ld_c, k, accumulate, columns);
}

}  // namespace

void pack_panel(const float* source, int64_t stride_i, int64_t stride_j, float* panel, int64_t k, int64_t n) {
  const int64_t padded = (n + skinny_padding - 1) / skinny_padding * skinny_padding;
  constexpr int64_t strip = 16;  // rows of the panel written together: a transposing pack then reads whole lines
  for (int64_t start = 0; start < k; start += strip) {
    const int64_t rows = min_of(strip, k - start);
    for (int64_t j = 0; j < padded; ++j)
      for (int64_t i = start; i < start + rows; ++i)
        panel[i * padded + j] = j < n ? source[i * stride_i + j * stride_j] : 0.0f;
  }
}

void project(const float* x, int64_t ld_x, const float* panel, float* out, int64_t ld_out, int64_t tokens, int64_t k,
             int64_t n, int threads) {
  const int64_t padded = (n + skinny_padding - 1) / skinny_padding * skinny_padding;
  constexpr int64_t depth = 512;  // rows of the panel that stay in the second-level cache
  const int64_t blocks = (tokens + tile_rows - 1) / tile_rows;
  if (k == 0)
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * ld_out, 0, n * sizeof(float));
#pragma omp parallel num_threads(threads)
  for (int64_t start = 0; start < k; start += depth) {
    const int64_t length = min_of(depth, k - start);
#pragma omp for schedule(static) nowait
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t t = block * tile_rows, rows = min_of(tile_rows, tokens - t);
      for (int64_t column = 0; column < n; column += tile_columns)
        column_block(x + t * ld_x + start, ld_x, 1, panel + start * padded + column, padded,
                     out + t * ld_out + column, ld_out, rows, length, start > 0, min_of(tile_columns, n - column));
    }
  }
}

// Each thread sums its share of the tokens into a partial of its own, the first one into out; the partials are added in thread order, so the
// same inputs and the same number of threads give the same bits.
void reduce(const float* u, int64_t ld_u, const float* y, int64_t ld_y, float* out, float* partial, int64_t tokens,
            int64_t r, int64_t n, int threads) {
  constexpr int64_t block_rows = 64;  // tokens whose y stays in the second-level cache while all rows of u use it
#pragma omp parallel num_threads(threads)
  {
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = tokens * me / team, end = tokens * (me + 1) / team;
    float* mine = me ? partial + (me - 1) * r * n : out;
    if (first == end) memset(mine, 0, r * n * sizeof(float));
    for (int64_t t = first; t < end; t += block_rows) {
      const int64_t rows = min_of(block_rows, end - t);
      for (int64_t column = 0; column < n; column += tile_columns)
        column_block(u + t * ld_u, 1, ld_u, y + t * ld_y + column, ld_y, mine + column, n, r, rows, t > first,
                     min_of(tile_columns, n - column));
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r * n; ++i)
      for (int64_t other = 0; other < team - 1; ++other) out[i] += partial[other * r * n + i];
  }
}

}  // namespace gci::GCI_ISA
