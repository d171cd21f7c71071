// The products of skinny.cpp for bfloat16 operands and float32 sums, with the processor's dot product of pairs
// (AVX512_BF16) and, for enough rows, its tiles (AMX). Compiled for these two instruction sets only: on others the
// table's entries are null, and plans name other implementations.
//
// A "pair" is two neighbours along the summed dimension in one 32-bit word. Two neighbours in a row of the first
// operand are a pair in memory. The second operand is packed into pairs if it is small; if it is large, its rows are
// interleaved two by two, block by block.
#include <immintrin.h>
#include <omp.h>

#include "cpu/amx.h"
#include "cpu/vector.h"

namespace gci::GCI_ISA {

namespace {

inline bfloat16 as_bfloat16(float v) { return narrow<bfloat16>(v); }
inline bfloat16 as_bfloat16(bfloat16 v) { return v; }

// out[0 .. count) = the pairs (first[j], second[j]).
template <typename T>
inline void interleave(const T* first, const T* second, bfloat16* out, int64_t count) {
  for (int64_t j = 0; j < count; ++j) {
    out[2 * j] = as_bfloat16(first[j]);
    out[2 * j + 1] = as_bfloat16(second[j]);
  }
}

// panel[i / 2, j] = the pair (source[i, j], source[i + 1, j]), zeros beyond k and n; rows padded to skinny_padding.
template <typename T>
void pack(const T* source, int64_t stride_i, int64_t stride_j, bfloat16* panel, int64_t k, int64_t n) {
  const int64_t padded = (n + skinny_padding - 1) / skinny_padding * skinny_padding, pairs = k / 2;
  memset(panel, 0, (k + 1) / 2 * padded * 2 * sizeof(bfloat16));
  if (stride_j == 1) {
    for (int64_t i = 0; i < pairs; ++i)
      interleave(source + 2 * i * stride_i, source + (2 * i + 1) * stride_i, panel + i * padded * 2, n);
  } else {
    constexpr int64_t strip = 16;  // pairs of a column written together: whole cache lines of the source are then read
    for (int64_t start = 0; start < pairs; start += strip)
      for (int64_t j = 0; j < n; ++j)
        for (int64_t i = start; i < min_of(pairs, start + strip); ++i) {
          panel[(i * padded + j) * 2] = as_bfloat16(source[2 * i * stride_i + j * stride_j]);
          panel[(i * padded + j) * 2 + 1] = as_bfloat16(source[(2 * i + 1) * stride_i + j * stride_j]);
        }
  }
  if (k % 2)
    for (int64_t j = 0; j < n; ++j)
      panel[(pairs * padded + j) * 2] = as_bfloat16(source[(k - 1) * stride_i + j * stride_j]);
}

void pack_pairs(const void* source, DType dtype, int64_t stride_i, int64_t stride_j, void* panel, int64_t k,
                int64_t n) {
  bfloat16* out = static_cast<bfloat16*>(panel);
  if (dtype == DType::float32) return pack(static_cast<const float*>(source), stride_i, stride_j, out, k, n);
  pack(static_cast<const bfloat16*>(source), stride_i, stride_j, out, k, n);
}

constexpr int64_t width = 16, tile_columns = tile_vectors * width;

inline __mmask16 mask_for(int64_t columns) {
  return columns >= width ? __mmask16(0xffff) : columns <= 0 ? __mmask16(0) : __mmask16((1u << columns) - 1);
}

inline __m512bh broadcast_pair(const bfloat16* p) {
  int32_t pair;
  __builtin_memcpy(&pair, p, sizeof pair);
  return (__m512bh)_mm512_set1_epi32(pair);
}
inline __m512bh broadcast_single(const bfloat16* p) { return (__m512bh)_mm512_set1_epi32(p->bits); }

inline __m512 widen_lanes(__m256i v) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16)); }

// Operand b as pairs; an odd last row is paired with zeros.
struct Pairs {
  const bfloat16* data;
  int64_t row;  // elements from one pair of rows to the next
  __m512bh at(int64_t i, int j) const { return (__m512bh)_mm512_loadu_si512(data + i * row + j * width * 2); }
};

// How a finished tile of sums is stored.
struct ToFloat {
  float* data;
  int64_t row;
  bool accumulate;
  void put(int64_t m, int j, __mmask16 mask, __m512 sum) const {
    float* p = data + m * row + j * width;
    _mm512_mask_storeu_ps(p, mask, accumulate ? _mm512_add_ps(_mm512_maskz_loadu_ps(mask, p), sum) : sum);
  }
};
struct AddToBfloat16 {
  bfloat16* data;
  int64_t row;
  void put(int64_t m, int j, __mmask16 mask, __m512 sum) const {
    bfloat16* p = data + m * row + j * width;
    const __m512 total = _mm512_add_ps(widen_lanes(_mm256_maskz_loadu_epi16(mask, p)), sum);
    _mm256_mask_storeu_epi16(p, mask, (__m256i)_mm512_cvtneps_pbh(total));
  }
};

// sums[m, j] over k steps of a[m, :] and b. An odd last step has no second half.
template <int Rows, int Vectors, typename Out>
inline void tile(const bfloat16* a, int64_t stride_m, const Pairs& b, const Out& out, int64_t m0, int64_t k,
                 int64_t columns) {
  __m512 sums[Rows][Vectors];
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) sums[m][j] = _mm512_setzero_ps();
  for (int64_t i = 0; i < k / 2; ++i) {
    __m512bh operand[Vectors];
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) operand[j] = b.at(i, j);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; ++m) {
      const __m512bh pair = broadcast_pair(a + (m0 + m) * stride_m + 2 * i);
#pragma GCC unroll 3
      for (int j = 0; j < Vectors; ++j) sums[m][j] = _mm512_dpbf16_ps(sums[m][j], pair, operand[j]);
    }
  }
  if (k % 2)
    for (int m = 0; m < Rows; ++m) {
      const __m512bh single = broadcast_single(a + (m0 + m) * stride_m + k - 1);
      for (int j = 0; j < Vectors; ++j) sums[m][j] = _mm512_dpbf16_ps(sums[m][j], single, b.at(k / 2, j));
    }
#pragma GCC unroll 8
  for (int m = 0; m < Rows; ++m)
#pragma GCC unroll 3
    for (int j = 0; j < Vectors; ++j) out.put(m0 + m, j, mask_for(columns - j * width), sums[m][j]);
}

#if defined(__AMX_BF16__)
using amx::Tiles;
// Rows of x that share the panel; tokens whose y is summed before the sums are stored. Both are even.
constexpr int64_t project_rows = 2 * amx::side, reduce_rows = 256;

// Rows from 0 on, 32 or 16 at a time while there are 16; returns the first row that is left.
template <typename Out>
inline int64_t rows_in_tiles(const bfloat16* a, int64_t stride_m, const Pairs& b, const Out& out, int64_t rows,
                             int64_t k, int64_t columns) {
  int64_t m = 0;
  for (int64_t some; (some = min_of(rows - m, 2 * amx::side)) >= amx::side; m += some / amx::side * amx::side) {
    const bool two = some == 2 * amx::side;
    for (int j = 0; j * width < columns; j += 2) {
      const bfloat16 *from = a + m * stride_m, *panel = b.data + j * width * 2;
      const auto put = [&](int64_t row, int vector, __m512 sums) {
        out.put(m + row, j + vector, mask_for(columns - (j + vector) * width), sums);
      };
      const bool pair = columns > (j + 1) * width;
      if (two && pair)
        amx::block<2, 2>(from, stride_m, panel, b.row, k, put);
      else if (two)
        amx::block<2, 1>(from, stride_m, panel, b.row, k, put);
      else if (pair)
        amx::block<1, 2>(from, stride_m, panel, b.row, k, put);
      else
        amx::block<1, 1>(from, stride_m, panel, b.row, k, put);
    }
  }
  return m;
}
#else
struct Tiles {};
constexpr int64_t project_rows = tile_rows, reduce_rows = 64;
#endif

// The rows from m on.
template <int Vectors, typename Out>
inline void rows_of(const bfloat16* a, int64_t stride_m, const Pairs& b, const Out& out, int64_t m, int64_t rows,
                    int64_t k, int64_t columns) {
  for (; m + tile_rows <= rows; m += tile_rows) tile<tile_rows, Vectors>(a, stride_m, b, out, m, k, columns);
  for (; m + 2 <= rows; m += 2) tile<2, Vectors>(a, stride_m, b, out, m, k, columns);
  for (; m < rows; ++m) tile<1, Vectors>(a, stride_m, b, out, m, k, columns);
}

// Any number of rows, at most tile_columns columns.
template <typename Out>
inline void column_block(const bfloat16* a, int64_t stride_m, const Pairs& b, const Out& out, int64_t rows, int64_t k,
                         int64_t columns) {
  int64_t m = 0;
#if defined(__AMX_BF16__)
  m = rows_in_tiles(a, stride_m, b, out, rows, k, columns);
#endif
  if (columns > 2 * width) return rows_of<3>(a, stride_m, b, out, m, rows, k, columns);
  if (columns > width) return rows_of<2>(a, stride_m, b, out, m, rows, k, columns);
  rows_of<1>(a, stride_m, b, out, m, rows, k, columns);
}

// buffer[i / 2, j] = pairs of rows of y; columns beyond `columns` and the partner of an odd last row are zeros.
inline void interleave_block(const bfloat16* y, int64_t ld_y, bfloat16* buffer, int64_t rows, int64_t columns) {
  __mmask16 masks[tile_vectors];
  for (int j = 0; j < tile_vectors; ++j) masks[j] = mask_for(columns - j * width);
  for (int64_t i = 0; i < rows; i += 2)
    for (int j = 0; j < tile_vectors; ++j) {
      const bfloat16* p = y + i * ld_y + j * width;
      const __mmask16 second = i + 1 < rows ? masks[j] : __mmask16(0);
      const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(masks[j], p));
      const __m512i high = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, p + ld_y));
      _mm512_storeu_si512(buffer + i * tile_columns + j * width * 2, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

inline int64_t padded_width(int64_t n) { return (n + skinny_padding - 1) / skinny_padding * skinny_padding; }

void project_bf16(const void* x_in, int64_t ld_x, const void* panel_in, float* out, int64_t ld_out, int64_t tokens,
                  int64_t k, int64_t n, int threads) {
  const bfloat16 *x = static_cast<const bfloat16*>(x_in), *panel = static_cast<const bfloat16*>(panel_in);
  const int64_t row = 2 * padded_width(n), blocks = (tokens + project_rows - 1) / project_rows;
  constexpr int64_t depth = 1024;  // even; rows of the panel that stay in the L2 cache
  if (k == 0)
    for (int64_t t = 0; t < tokens; ++t) memset(out + t * ld_out, 0, n * sizeof(float));
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Tiles tiles;
    for (int64_t start = 0; start < k; start += depth) {
      const int64_t length = min_of(depth, k - start);
#pragma omp for schedule(static) nowait
      for (int64_t block = 0; block < blocks; ++block) {
        const int64_t t = block * project_rows, rows = min_of(project_rows, tokens - t);
        for (int64_t column = 0; column < n; column += tile_columns)
          column_block(x + t * ld_x + start, ld_x, Pairs{panel + start / 2 * row + column * 2, row},
                       ToFloat{out + t * ld_out + column, ld_out, start > 0}, rows, length,
                       min_of(tile_columns, n - column));
      }
    }
  }
}

void expand_bf16(const void* u_in, int64_t ld_u, const void* panel_in, void* y_in, int64_t ld_y, int64_t tokens,
                 int64_t r, int64_t n, int threads) {
  const bfloat16 *u = static_cast<const bfloat16*>(u_in), *panel = static_cast<const bfloat16*>(panel_in);
  bfloat16* y = static_cast<bfloat16*>(y_in);
  constexpr int64_t block_rows = 64;  // their u stays in the L1 cache while the panel comes from the L2 cache
  const int64_t row = 2 * padded_width(n), blocks = (tokens + block_rows - 1) / block_rows;
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Tiles tiles;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const int64_t t = block * block_rows, rows = min_of(block_rows, tokens - t);
      for (int64_t column = 0; column < n; column += tile_columns)
        column_block(u + t * ld_u, ld_u, Pairs{panel + column * 2, row}, AddToBfloat16{y + t * ld_y + column, ld_y},
                     rows, r, min_of(tile_columns, n - column));
    }
  }
}

// As reduce in skinny.cpp; u comes transposed, so that two tokens are neighbours.
void reduce_bf16(const void* u_in, int64_t ld_u, const void* y_in, int64_t ld_y, float* out, float* partial,
                 int64_t tokens, int64_t r, int64_t n, int threads) {
  const bfloat16 *u = static_cast<const bfloat16*>(u_in), *y = static_cast<const bfloat16*>(y_in);
  const int64_t blocks = (tokens + reduce_rows - 1) / reduce_rows;
#pragma omp parallel num_threads(threads)
  {
    [[maybe_unused]] const Tiles tiles;
    const int64_t team = omp_get_num_threads(), me = omp_get_thread_num();
    const int64_t first = blocks * me / team, end = blocks * (me + 1) / team;
    float* mine = me ? partial + (me - 1) * r * n : out;
    if (first == end) memset(mine, 0, r * n * sizeof(float));
    alignas(64) bfloat16 buffer[reduce_rows * tile_columns] = {};
    for (int64_t block = first; block < end; ++block) {
      const int64_t t = block * reduce_rows, rows = min_of(reduce_rows, tokens - t);
      for (int64_t column = 0; column < n; column += tile_columns) {
        const int64_t columns = min_of(tile_columns, n - column);
        interleave_block(y + t * ld_y + column, ld_y, buffer, rows, columns);
        column_block(u + t, ld_u, Pairs{buffer, 2 * tile_columns}, ToFloat{mine + column, n, block > first}, r, rows,
                     columns);
      }
    }
#pragma omp barrier
#pragma omp for schedule(static)
    for (int64_t i = 0; i < r * n; ++i)
      for (int64_t other = 0; other < team - 1; ++other) out[i] += partial[other * r * n + i];
  }
}

static_assert(tile_vectors == 3, "column_block names three vectors");

}  // namespace

[[gnu::cold]] void add_skinny_bf16(Kernels& table) {
  table.pack_pairs = pack_pairs;
  table.project_bf16 = project_bf16;
  table.expand_bf16 = expand_bf16;
  table.reduce_bf16 = reduce_bf16;
}

}  // namespace gci::GCI_ISA
