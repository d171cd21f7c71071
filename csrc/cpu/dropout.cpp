// Dropout with a counter-based generator: the mask is not stored, backward recomputes it, on any device and in any
// order.
//
// Element [row, col] looks at word col % 4 of Philox4x32-10 (Salmon et al., SC 2011) with the key (seed low, seed high)
// and the counter (col / 4, row low, row high, 0), and is kept where that word is at least p * 2^32.
#if defined(__SSE2__)
#include <immintrin.h>
#endif

#include "cpu/vector.h"

static_assert(__BYTE_ORDER__ == __ORDER_LITTLE_ENDIAN__, "two 32-bit words are stored as one 64-bit value");

namespace gci::GCI_ISA {
namespace {

constexpr int batch = 16;  // counters advanced side by side
constexpr int wide_lanes = lanes / 2, groups = batch / wide_lanes;
typedef uint64_t Wide __attribute__((vector_size(wide_lanes * sizeof(uint64_t))));

// The 64-bit products of the low halves, lane by lane. The high halves are ignored.
inline Wide multiply_low(Wide a, uint32_t factor) {
  const Wide b = Wide{} + factor;
#if defined(__AVX512F__)
  return Wide(_mm512_mul_epu32(__m512i(a), __m512i(b)));
#elif defined(__AVX2__)
  return Wide(_mm256_mul_epu32(__m256i(a), __m256i(b)));
#elif defined(__SSE2__)
  return Wide(_mm_mul_epu32(__m128i(a), __m128i(b)));
#else
  return (a & 0xffffffffu) * b;
#endif
}

// words[4 * i + w] = word w of counter first + i. Each 32-bit word has a 64-bit lane: a round is then two multiplies,
// two shifts and four xors, without shuffles.
inline void philox(uint32_t first, uint64_t row, uint64_t seed, uint32_t* words) {
  Wide c0[groups], c1[groups], c2[groups], c3[groups];
  for (int g = 0; g < groups; ++g) {
    for (int i = 0; i < wide_lanes; ++i) c0[g][i] = first + uint32_t(g * wide_lanes + i);
    c1[g] = Wide{} + uint32_t(row);
    c2[g] = Wide{} + uint32_t(row >> 32);
    c3[g] = Wide{};
  }
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  for (int round = 0; round < 10; ++round) {
#pragma GCC unroll 8
    for (int g = 0; g < groups; ++g) {
      const Wide a = multiply_low(c0[g], 0xD2511F53u), b = multiply_low(c2[g], 0xCD9E8D57u);
      c0[g] = (b >> 32) ^ c1[g] ^ key0;
      c2[g] = (a >> 32) ^ c3[g] ^ key1;
      c1[g] = b;
      c3[g] = a;
    }
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  // Words 0 and 1, and words 2 and 3 of each counter: the compiler vectorises their interleaving.
  uint64_t low[batch], high[batch];
  for (int g = 0; g < groups; ++g) {
    const Wide first_pair = (c0[g] & 0xffffffffu) | (c1[g] << 32), second_pair = (c2[g] & 0xffffffffu) | (c3[g] << 32);
    __builtin_memcpy(low + g * wide_lanes, &first_pair, sizeof first_pair);
    __builtin_memcpy(high + g * wide_lanes, &second_pair, sizeof second_pair);
  }
  for (int i = 0; i < batch; ++i) {
    __builtin_memcpy(words + 4 * i, low + i, sizeof low[i]);
    __builtin_memcpy(words + 4 * i + 2, high + i, sizeof high[i]);
  }
}

template <typename T, typename Acc>
inline void apply(const T* x, T* out, const uint32_t* words, uint32_t threshold, Acc scale, int64_t count) {
  for (int64_t i = 0; i < count; ++i) out[i] = narrow<T>(words[i] >= threshold ? Acc(widen(x[i])) * scale : Acc(0));
}

template <typename T>
void run(const void* x, void* out, int64_t rows, int64_t cols, double p, uint64_t seed, int threads) {
  typedef typename Accumulator<T>::type Acc;
  const uint32_t threshold = uint32_t(p * 4294967296.0);
  const Acc scale = Acc(1.0 / (1.0 - p));
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t row = 0; row < rows; ++row) {
    uint32_t words[4 * batch];
    const T* from = static_cast<const T*>(x) + row * cols;
    T* to = static_cast<T*>(out) + row * cols;
    int64_t start = 0;
    for (; start + 4 * batch <= cols; start += 4 * batch) {
      philox(uint32_t(start / 4), uint64_t(row), seed, words);
      apply<T, Acc>(from + start, to + start, words, threshold, scale, 4 * batch);
    }
    if (start < cols) {
      philox(uint32_t(start / 4), uint64_t(row), seed, words);
      apply<T, Acc>(from + start, to + start, words, threshold, scale, cols - start);
    }
  }
}

void dropout(const void* x, void* out, DType dtype, int64_t rows, int64_t cols, double p, uint64_t seed, int threads) {
  if (dtype == DType::float64) return run<double>(x, out, rows, cols, p, seed, threads);
  if (dtype == DType::float32) return run<float>(x, out, rows, cols, p, seed, threads);
  run<bfloat16>(x, out, rows, cols, p, seed, threads);
}

}  // namespace

[[gnu::cold]] void add_dropout(Kernels& table) { table.dropout = dropout; }

}  // namespace gci::GCI_ISA
