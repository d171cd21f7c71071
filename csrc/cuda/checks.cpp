// Checks of the arguments of csrc/cuda's launches, without CUDA. A check returns what is wrong, or null.
#include <cstdarg>
#include <cstdio>

#include "cuda/decode.h"

namespace gci {
namespace {

constexpr int64_t max_length = int64_t(1) << 31;  // of in, out and a cache: blocks have 32-bit numbers

// Printed into a buffer of this thread.
__attribute__((format(printf, 1, 2))) const char* message(const char* format, ...) {
  static thread_local char text[128];
  va_list values;
  va_start(values, format);
  vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return text;
}

const char* check_range(const char* name, int64_t value, int64_t least, int64_t most) {
  if (value >= least && value <= most) return nullptr;
  return message("%s must be %lld to %lld", name, (long long)(least), (long long)(most));
}

size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
bool usable(const void* p, DType dtype) { return p && aligned(p, size_of(dtype)); }

const char* check_dtypes(DType dtype, DType adapter) {
  if (dtype != DType::float32 && dtype != DType::bfloat16 && dtype != DType::float16)
    return "x must be float32, bfloat16 or float16";
  if (adapter != dtype && adapter != DType::float32) return "the adapter must be in the dtype of x or in float32";
  return nullptr;
}

const char* check_group(const DecodeArgs& a, const DecodeGroup& g, int columns, bool expanding) {
  if (const char* error = check_range("rank", g.rank, 1, max_decode_columns)) return error;
  if (const char* error = check_range("experts", g.experts, 0, max_experts)) return error;
  if (all_columns(g) > max_decode_columns)
    return message("an adapter has more than %d columns, router rows included", max_decode_columns);
  if (all_columns(g) > columns) return "columns must be at least those of every group";
  if (g.experts > 0 && (g.top_k < 1 || g.top_k > g.experts)) return "top_k must be 1 to experts";
  if (g.first < 0 || g.count < 1 || g.first > a.tokens - g.count) return "a group's tokens must be among the step's";
  if (expanding) return usable(g.B, a.adapter_dtype) ? nullptr : "B must be an aligned address";
  if (!usable(g.A, a.adapter_dtype)) return "A must be an aligned address";
  if (g.experts > 0 && !usable(g.router, a.adapter_dtype)) return "router must be an aligned address";
  return nullptr;
}

// Two groups that add onto one row of y would race.
const char* check_overlap(const DecodeArgs& a) {
  bool taken[max_decode_tokens] = {};
  for (int i = 0; i < a.num_groups; ++i)
    for (int t = a.groups[i].first; t < a.groups[i].first + a.groups[i].count; ++t) {
      if (taken[t]) return "a token is in two groups";
      taken[t] = true;
      for (int other = 0; other < a.tokens; ++other)
        if (taken[other] && other != t && a.rows[other] == a.rows[t]) return "two tokens name one row";
    }
  return nullptr;
}

const char* check_step(const DecodeArgs& a, const float* partial, int splits, int columns, bool expanding) {
  if (const char* error = check_dtypes(a.dtype, a.adapter_dtype)) return error;
  if (const char* error = check_range("tokens", a.tokens, 1, max_decode_tokens)) return error;
  if (const char* error = check_range("groups", a.num_groups, 1, max_decode_tokens)) return error;
  if (const char* error = check_range("splits", splits, 1, max_decode_splits)) return error;
  if (const char* error = check_range("columns", columns, 1, max_decode_columns)) return error;
  if (!usable(partial, DType::float32)) return "partial must be an aligned address";
  for (int t = 0; t < a.tokens; ++t)
    if (a.rows[t] < 0) return "rows must not be negative";
  for (int i = 0; i < a.num_groups; ++i)
    if (const char* error = check_group(a, a.groups[i], columns, expanding)) return error;
  return check_overlap(a);
}

const char* check_attention(const DecodeGroup& g, const AttendGroup& attend, DType adapter) {
  if (g.experts != 0) return "an adapter that attends must have no experts";
  if (!usable(attend.qkv, adapter)) return "qkv must be an aligned address";
  if (attend.heads < 1 || g.rank % attend.heads) return "heads must divide rank";
  if (g.rank / attend.heads > max_decode_head_size)
    return message("a head must have at most %d columns", max_decode_head_size);
  return nullptr;
}

// `used`: the most values that a group stores of a token.
const char* check_cache(const DecodeArgs& a, const AttendArgs& t, int64_t used) {
  if (const char* error = check_range("capacity", t.capacity, 1, max_length)) return error;
  if (!usable(t.kv, a.dtype)) return "kv must be an aligned address";
  if (!t.past || !aligned(t.past, sizeof *t.past)) return "past must be an aligned address";
  if (!aligned(t.segments, sizeof *t.segments)) return "segments must be an aligned address";
  if (t.ld_kv < used || t.ld_kv > max_length)
    return message("a row of kv must hold 2 * rank values of every group, and at most %lld", (long long)(max_length));
  if (a.tokens > 1 && t.stride_kv < (t.capacity - 1) * t.ld_kv + used) return "the sequences of kv must not overlap";
  return nullptr;
}

}  // namespace

int decode_splits(int tokens, int columns, int64_t in) {
  // Each block of decode_expand reads about 16 KiB at most.
  const int64_t affordable = 4096 / (int64_t(tokens < 1 ? 1 : tokens) * (columns < 1 ? 1 : columns));
  const int64_t units = (in + decode_slice_unit - 1) / decode_slice_unit;
  int64_t wanted = units < affordable ? units : affordable;
  wanted = wanted < 1 ? 1 : wanted > max_decode_splits ? max_decode_splits : wanted;
  const int64_t slice = (units + wanted - 1) / wanted;  // in units
  return slice > 0 ? int((units + slice - 1) / slice) : 1;
}

const char* check_decode_project(const DecodeArgs& a, const float* partial, int splits, int columns) {
  if (const char* error = check_step(a, partial, splits, columns, false)) return error;
  if (const char* error = check_range("in", a.in, 1, max_length)) return error;
  if (!usable(a.x, a.dtype)) return "x must be an aligned address";
  if (a.ld_x < a.in) return "the rows of x must not overlap";
  return nullptr;
}

const char* check_decode_expand(const DecodeArgs& a, const float* partial, int splits, int columns) {
  if (const char* error = check_step(a, partial, splits, columns, true)) return error;
  if (const char* error = check_range("out", a.out, 1, max_length)) return error;
  if (!usable(a.y, a.dtype)) return "y must be an aligned address";
  if (a.ld_y < a.out) return "the rows of y must not overlap";
  return nullptr;
}

const char* check_decode_attend(const DecodeArgs& a, const AttendArgs& t, const float* partial, int columns) {
  if (const char* error = check_decode_project(a, partial, 1, columns)) return error;
  int64_t used = 0;
  for (int i = 0; i < a.num_groups; ++i) {
    if (const char* error = check_attention(a.groups[i], t.groups[i], a.adapter_dtype)) return error;
    used = 2 * a.groups[i].rank > used ? 2 * a.groups[i].rank : used;
  }
  return check_cache(a, t, used);
}

}  // namespace gci
