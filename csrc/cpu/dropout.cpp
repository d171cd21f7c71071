// Dropout from a counter: nothing is stored, backward makes the same decisions again, in any order and on any device.
//
// Element [row, col] looks at word col % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the key (seed low, seed high)
// and the counter (col / 4, row low, row high, 0), and is kept where that word is at least p * 2^32.
#include "cpu/isa.h"

namespace gci::GCI_ISA {
namespace {

constexpr int batch = 16;  // counters advanced side by side, so that the rounds vectorise

// words[w][i] = word w of counter first + i.
inline void philox(uint32_t first, uint64_t row, uint64_t seed, uint32_t words[4][batch]) {
  uint32_t* c0 = words[0];
  uint32_t* c1 = words[1];
  uint32_t* c2 = words[2];
  uint32_t* c3 = words[3];
  for (int i = 0; i < batch; ++i) {
    c0[i] = first + i;
    c1[i] = uint32_t(row);
    c2[i] = uint32_t(row >> 32);
    c3[i] = 0;
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    for (int i = 0; i < batch; ++i) {
      uint64_t a = uint64_t(0xD2511F53u) * c0[i], b = uint64_t(0xCD9E8D57u) * c2[i];
      uint32_t left = uint32_t(b >> 32) ^ c1[i] ^ key0, right = uint32_t(a >> 32) ^ c3[i] ^ key1;
      c1[i] = uint32_t(b);
      c3[i] = uint32_t(a);
      c0[i] = left;
      c2[i] = right;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
}

template <typename T>
void run(const T* x, T* out, int64_t rows, int64_t cols, double p, uint64_t seed, bool accumulate, int threads) {
  typedef typename Accumulator<T>::type Acc;
  const uint32_t threshold = uint32_t(p * 4294967296.0);
  const Acc scale = Acc(1.0 / (1.0 - p));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t words[4][batch];
    for (int64_t start = 0; start < cols; start += 4 * batch) {
      philox(uint32_t(start / 4), uint64_t(row), seed, words);
      const int64_t count = min_of(4 * batch, cols - start);
      const T* in_row = x + row * cols + start;
      T* out_row = out + row * cols + start;
      for (int64_t i = 0; i < count; ++i) {
        Acc kept = words[i % 4][i / 4] >= threshold ? Acc(widen(in_row[i])) * scale : Acc(0);
        out_row[i] = narrow<T>(accumulate ? Acc(widen(out_row[i])) + kept : kept);
      }
    }
  }
}

}  // namespace

void dropout(const void* x, void* out, DType dtype, int64_t rows, int64_t cols, double p, uint64_t seed,
             bool accumulate, int threads) {
  if (dtype == DType::float64)
    return run(static_cast<const double*>(x), static_cast<double*>(out), rows, cols, p, seed, accumulate, threads);
  if (dtype == DType::float32)
    return run(static_cast<const float*>(x), static_cast<float*>(out), rows, cols, p, seed, accumulate, threads);
  run(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(out), rows, cols, p, seed, accumulate, threads);
}

}  // namespace gci::GCI_ISA
