// What a launch is made of, decided and checked without CUDA. An objection is null where nothing is wrong.
#include "cuda/decode.h"

namespace gci {
namespace {

constexpr int64_t max_length = int64_t(1) << 31;  // of in, out and a cache: blocks are numbered in 32 bits

size_t size_of(DType dtype) { return dtype == DType::float32 ? 4 : 2; }
bool aligned(const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; }
bool usable(const void* p, DType dtype) { return p && aligned(p, size_of(dtype)); }

const char* dtypes_objection(DType dtype, DType adapter) {
  if (dtype != DType::float32 && dtype != DType::bfloat16 && dtype != DType::float16)
    return "x must be float32, bfloat16 or float16";
  if (adapter != dtype && adapter != DType::float32) return "the adapter must be in the dtype of x or in float32";
  return nullptr;
}

const char* group_objection(const DecodeArgs& a, const DecodeGroup& g, int columns, bool expanding) {
  if (g.rank < 1 || g.rank > decode_max_columns) return "rank must be 1 to 512";
  if (g.experts < 0 || g.experts > decode_max_columns) return "experts must be 0 to 512";
  if (decode_columns(g) > decode_max_columns) return "an adapter has more than 512 columns, router rows included";
  if (decode_columns(g) > columns) return "columns must be at least those of every group";
  if (g.experts > 0 && (g.top_k < 1 || g.top_k > g.experts)) return "top_k must be 1 to experts";
  if (g.first < 0 || g.count < 1 || g.first > a.tokens - g.count) return "a group's tokens must be among the step's";
  if (expanding) return usable(g.B, a.adapter_dtype) ? nullptr : "B must be an aligned address";
  if (!usable(g.A, a.adapter_dtype)) return "A must be an aligned address";
  if (g.experts > 0 && !usable(g.router, a.adapter_dtype)) return "router must be an aligned address";
  return nullptr;
}

// Two groups that add onto one row of y would race.
const char* overlap_objection(const DecodeArgs& a) {
  bool taken[decode_max_tokens] = {};
  for (int i = 0; i < a.num_groups; ++i)
    for (int t = a.groups[i].first; t < a.groups[i].first + a.groups[i].count; ++t) {
      if (taken[t]) return "a token is in two groups";
      taken[t] = true;
      for (int other = 0; other < a.tokens; ++other)
        if (taken[other] && other != t && a.rows[other] == a.rows[t]) return "two tokens name one row";
    }
  return nullptr;
}

const char* step_objection(const DecodeArgs& a, const float* partial, int splits, int columns, bool expanding) {
  if (const char* objection = dtypes_objection(a.dtype, a.adapter_dtype)) return objection;
  if (a.tokens < 1 || a.tokens > decode_max_tokens) return "tokens must be 1 to 16";
  if (a.num_groups < 1 || a.num_groups > decode_max_tokens) return "groups must be 1 to 16";
  if (splits < 1 || splits > decode_max_splits) return "splits must be 1 to 32";
  if (columns < 1 || columns > decode_max_columns) return "columns must be 1 to 512";
  if (!usable(partial, DType::float32)) return "partial must be an aligned address";
  for (int t = 0; t < a.tokens; ++t)
    if (a.rows[t] < 0) return "rows must not be negative";
  for (int i = 0; i < a.num_groups; ++i)
    if (const char* objection = group_objection(a, a.groups[i], columns, expanding)) return objection;
  return overlap_objection(a);
}

const char* attention_objection(const DecodeGroup& g, const AttendGroup& attend, DType adapter) {
  if (g.experts != 0) return "an adapter that attends must have no experts";
  if (!usable(attend.qkv, adapter)) return "qkv must be an aligned address";
  if (attend.heads < 1 || g.rank % attend.heads) return "heads must divide rank";
  if (g.rank / attend.heads > decode_max_head) return "a head must have at most 128 columns";
  return nullptr;
}

// `used`: the most that a group keeps of a token.
const char* cache_objection(const DecodeArgs& a, const AttendArgs& t, int64_t used) {
  if (t.capacity < 1 || t.capacity > max_length) return "capacity must be 1 to 2^31";
  if (!usable(t.kv, a.dtype)) return "kv must be an aligned address";
  if (!t.past || !aligned(t.past, sizeof *t.past)) return "past must be an aligned address";
  if (!aligned(t.segments, sizeof *t.segments)) return "segments must be an aligned address";
  if (t.ld_kv < used || t.ld_kv > max_length)
    return "a row of kv must hold 2 * rank values of every group, and at most 2^31";
  if (a.tokens > 1 && t.stride_kv < (t.capacity - 1) * t.ld_kv + used) return "the sequences of kv must not overlap";
  return nullptr;
}

}  // namespace

int decode_splits(int tokens, int columns, int64_t in) {
  // What each block of decode_expand reads stays near 16 KiB.
  const int64_t affordable = 4096 / (int64_t(tokens < 1 ? 1 : tokens) * (columns < 1 ? 1 : columns));
  const int64_t units = (in + decode_slice_unit - 1) / decode_slice_unit;
  int64_t wanted = units < affordable ? units : affordable;
  wanted = wanted < 1 ? 1 : wanted > decode_max_splits ? decode_max_splits : wanted;
  const int64_t slice = (units + wanted - 1) / wanted;  // in units
  return slice > 0 ? int((units + slice - 1) / slice) : 1;
}

const char* decode_project_objection(const DecodeArgs& a, const float* partial, int splits, int columns) {
  if (const char* objection = step_objection(a, partial, splits, columns, false)) return objection;
  if (a.in < 1 || a.in > max_length) return "in must be 1 to 2^31";
  if (!usable(a.x, a.dtype)) return "x must be an aligned address";
  if (a.ld_x < a.in) return "the rows of x must not overlap";
  return nullptr;
}

const char* decode_expand_objection(const DecodeArgs& a, const float* partial, int splits, int columns) {
  if (const char* objection = step_objection(a, partial, splits, columns, true)) return objection;
  if (a.out < 1 || a.out > max_length) return "out must be 1 to 2^31";
  if (!usable(a.y, a.dtype)) return "y must be an aligned address";
  if (a.ld_y < a.out) return "the rows of y must not overlap";
  return nullptr;
}

const char* decode_attend_objection(const DecodeArgs& a, const AttendArgs& t, const float* partial, int columns) {
  if (const char* objection = decode_project_objection(a, partial, 1, columns)) return objection;
  int64_t used = 0;
  for (int i = 0; i < a.num_groups; ++i) {
    if (const char* objection = attention_objection(a.groups[i], t.groups[i], a.adapter_dtype)) return objection;
    used = 2 * a.groups[i].rank > used ? 2 * a.groups[i].rank : used;
  }
  return cache_objection(a, t, used);
}

}  // namespace gci
