// One decoding step on a GPU (common/decode.h), in two launches after the base product's.
//
// No function allocates, synchronises or copies, so that all of it may be captured in a CUDA graph; run it once before
// the capture, because a kernel's first launch loads its code. Every launch returns a cudaError_t as int, 0 for
// success. It returns cudaErrorInvalidValue, without calling CUDA, where the check_... function beside it says what is
// wrong with its arguments; that text, null where nothing is wrong, is valid until the thread's next check.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/decode.h"

namespace gci {

constexpr int invalid_argument = 1;  // cudaErrorInvalidValue; this header needs no CUDA
constexpr int max_decode_splits = 32;
constexpr int decode_slice_unit = 256;  // elements of x: a warp reads so many at once in 16-bit formats

// The number of partial sums that the product with A is split into: every multiprocessor reads a part of A, and the
// second half reads the sums of every part. A pure function of the sizes, so that results do not depend on the GPU.
int decode_splits(int tokens, int columns, int64_t in);

// partial[split, token, column] = x @ [A; router].T over the split's part of `in`; float32 [splits, tokens, columns].
// `columns` is at least all_columns of each group; the rest of a group's row is not written.
int decode_project(const DecodeArgs&, float* partial, int splits, int columns, void* stream);
const char* check_decode_project(const DecodeArgs&, const float* partial, int splits, int columns);

// y += scaling * mix(sum of partial over the splits) @ B.T. On its stream it must directly follow the launch that
// writes `partial` (decode_project, or decode_attend with splits = 1): it starts while that runs, and waits only for
// it.
int decode_expand(const DecodeArgs&, const float* partial, int splits, int columns, void* stream);
const char* check_decode_expand(const DecodeArgs&, const float* partial, int splits, int columns);

// partial[token] = u of the token's group, float32 [tokens, columns], as decode_project writes it with one split. Where
// *past is negative or not below capacity, nothing is written into the cache and u is NaN.
int decode_attend(const DecodeArgs&, const AttendArgs&, float* partial, int columns, void* stream);
const char* check_decode_attend(const DecodeArgs&, const AttendArgs&, const float* partial, int columns);

const char* cuda_error_name(int error);
const char* cuda_error_text(int error);

}  // namespace gci
