// One decoding step on a GPU: what common/decode.h describes, in two launches behind the base product's.
//
// Nothing here allocates, waits or copies, so that all of it may be captured in a CUDA graph; run it once before the
// capture, as any kernel's first launch loads its code. Every launch returns a cudaError_t as int, 0 being success, and
// cudaErrorInvalidValue, before any call of CUDA, where the function `..._objection` beside it says what is wrong.
#pragma once

#include <cstddef>
#include <cstdint>

#include "common/decode.h"

namespace gci {

constexpr int invalid_argument = 1;  // cudaErrorInvalidValue; this header needs no CUDA
constexpr int decode_max_splits = 32;
constexpr int decode_max_head = 128;    // columns of a head
constexpr int decode_slice_unit = 256;  // in elements of x: what a warp reads at once in 16 bits

// Of a group: the values of one token between A and B, router's logits included.
constexpr int64_t decode_columns(const DecodeGroup& g) {
  return int64_t(g.rank) * (g.experts > 0 ? g.experts : 1) + g.experts;
}

// Into how many sums the product with A is split: every multiprocessor reads a part of A, and all that follows must
// read every part's sums. A pure function of the sizes, so that the result does not depend on the GPU.
int decode_splits(int tokens, int columns, int64_t in);

// partial[split, token, column] = x @ [A; router].T over the split's part of `in`; float32 [splits, tokens, columns].
// `columns` is at least those of each group; what lies behind a group's own is not written.
int decode_project(const DecodeArgs&, float* partial, int splits, int columns, void* stream);
const char* decode_project_objection(const DecodeArgs&, const float* partial, int splits, int columns);

// y += scaling * mix(sum of partial over the splits) @ B.T. It must directly follow the launch that writes `partial`
// (decode_project, or decode_attend with splits = 1) on its stream: it starts while that runs and waits for it alone.
int decode_expand(const DecodeArgs&, const float* partial, int splits, int columns, void* stream);
const char* decode_expand_objection(const DecodeArgs&, const float* partial, int splits, int columns);

// partial[token] = u of the token's group, float32 [tokens, columns], as decode_project writes it with one split. Where
// *past is negative or not below capacity, nothing is written into the cache and u is NaN.
int decode_attend(const DecodeArgs&, const AttendArgs&, float* partial, int columns, void* stream);
const char* decode_attend_objection(const DecodeArgs&, const AttendArgs&, const float* partial, int columns);

const char* cuda_error_name(int error);
const char* cuda_error_text(int error);

}  // namespace gci
