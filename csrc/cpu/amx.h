// bfloat16 products with AMX: one instruction adds the product of 16 rows of 32 elements and 32 rows of 16 columns,
// interleaved as 16 pairs of rows, to a tile of 16x16 float32 sums.
#pragma once

#include "cpu/vector.h"

#if defined(__AMX_BF16__)
#include <immintrin.h>

namespace gci::GCI_ISA::amx {

constexpr int64_t side = 16, depth = 32;

struct alignas(64) Config {
  uint8_t palette, start_row, reserved[14];
  uint16_t row_bytes[16];
  uint8_t rows[16];
};

// The tile instructions do not tell the compiler which memory they read: what they read must be written before them.
inline void compiler_barrier() { __asm__ volatile("" ::: "memory"); }

// Configures this thread's tiles, each as 16 rows of 64 bytes. The destructor restores the previous configuration,
// which other libraries may keep from one call to the next.
class Tiles {
 public:
  Tiles() {
    Config ours = {};
    ours.palette = 1;
    for (int i = 0; i < 8; ++i) ours.row_bytes[i] = 64, ours.rows[i] = side;
    compiler_barrier();
    _tile_storeconfig(&before_);
    _tile_loadconfig(&ours);
  }
  ~Tiles() {
    compiler_barrier();
    if (before_.palette)
      _tile_loadconfig(&before_);
    else
      _tile_release();
  }
  Tiles(const Tiles&) = delete;

 private:
  Config before_ = {};
};

// The products of 16 * Rows rows of a, k elements each, with 16 * Columns columns of b, whose pairs of rows are b_row
// elements apart; put(row, vector, sums) receives them. Tiles 0 to 3 hold sums, 4 and 5 parts of a, 6 and 7 parts of b.
template <int Rows, int Columns, typename Put>
inline void block(const bfloat16* a, int64_t a_row, const bfloat16* b, int64_t b_row, int64_t k, const Put& put) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const auto step = [](const bfloat16* a, int64_t a_row, const bfloat16* b, int64_t b_row) {
    _tile_loadd(4, a, 2 * a_row);
    _tile_loadd(6, b, 2 * b_row);
    _tile_dpbf16ps(0, 4, 6);
    if (Columns > 1) {
      _tile_loadd(7, b + depth, 2 * b_row);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (Rows > 1) {
      _tile_loadd(5, a + side * a_row, 2 * a_row);
      _tile_dpbf16ps(2, 5, 6);
      if (Columns > 1) _tile_dpbf16ps(3, 5, 7);
    }
  };
  compiler_barrier();
  int64_t i = 0;
  for (; i + depth <= k; i += depth) step(a + i, a_row, b + i / 2 * b_row, b_row);
  if (i < k) {  // the rest, padded with zeros on both sides: the memory behind it may hold NaN
    alignas(64) bfloat16 a_rest[Rows * side][depth] = {}, b_rest[side][Columns * depth] = {};
    for (int64_t m = 0; m < Rows * side; ++m) memcpy(a_rest[m], a + m * a_row + i, (k - i) * sizeof(bfloat16));
    for (int64_t pair = 0; 2 * pair < k - i; ++pair)
      memcpy(b_rest[pair], b + (i / 2 + pair) * b_row, sizeof b_rest[pair]);
    compiler_barrier();
    step(a_rest[0], depth, b_rest[0], Columns * depth);
  }
  alignas(64) float sums[side][side];
  const auto take = [&](int64_t row, int vector) {
    for (int64_t m = 0; m < side; ++m) put(row + m, vector, _mm512_load_ps(sums[m]));
  };
  _tile_stored(0, sums, 64);
  take(0, 0);
  if (Columns > 1) {
    _tile_stored(1, sums, 64);
    take(0, 1);
  }
  if (Rows > 1) {
    _tile_stored(2, sums, 64);
    take(side, 0);
  }
  if (Rows > 1 && Columns > 1) {
    _tile_stored(3, sums, 64);
    take(side, 1);
  }
}

}  // namespace gci::GCI_ISA::amx
#endif
