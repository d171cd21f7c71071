// Python bindings of the CPU kernels: they take pointers, sizes and flags, and return nothing. Shapes, dtypes and
// devices are checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <tuple>
#include <vector>

#include "common/decode.h"
#include "common/limits.h"
#include "cpu/dispatch.h"
#include "cuda_bindings.h"
#include "decode_bindings.h"

namespace {

using gci::AttentionArgs;
using gci::DType;
using gci::GateArgs;
typedef uintptr_t Address;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

GateArgs gate_args(Address projected, int64_t ld, int projected_dtype, int dtype, int64_t tokens, int experts, int rank,
                   int top_k, double scaling) {
  return {at<const void>(projected), ld, DType(projected_dtype), DType(dtype), tokens, experts, rank, top_k, scaling};
}

typedef std::tuple<Address, int64_t, int64_t> Rows;    // address, stride of the batch, stride of a row
typedef std::tuple<int64_t, int64_t, int64_t> Extent;  // batch, time, keys
typedef std::tuple<int, int, int> Heads;               // heads, head_size, parts

gci::AttentionRows rows(const Rows& r) { return {at<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r)}; }

AttentionArgs attention_args(const Rows& q, const Rows& k, const Rows& v, Address segments, int dtype, const Extent& e,
                             const Heads& h) {
  return {rows(q),        rows(k),        rows(v),        at<const int32_t>(segments),
          DType(dtype),   std::get<0>(e), std::get<1>(e), std::get<2>(e),
          std::get<0>(h), std::get<1>(h), std::get<2>(h)};
}

// A step takes some microseconds, so that every calling thread keeps its workspace.
void run_step(const gci::DecodeStep& step, Address x, int64_t ld_x, Address y, int64_t ld_y,
              const gci::AttendArgs* attend, int threads) {
  static thread_local std::vector<float> workspace;
  gci::DecodeArgs a = step.args;
  a.x = at<const void>(x), a.ld_x = ld_x, a.y = at<void>(y), a.ld_y = ld_y;
  const size_t floats = size_t(gci::decode_floats(a, attend));
  if (workspace.size() < floats) workspace.resize(floats);
  gci::kernels().decode(a, attend, step.base, workspace.data(), threads);
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  namespace py = pybind11;
  using gci::kernels;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  module.doc() = "CPU kernels of gci_kernels. Addresses are data_ptr()s; see csrc/common/kernels.h.";
  module.def("isa", [] { return kernels().isa; });
  module.attr("isas") = py::tuple(py::cast(gci::instruction_sets()));
  py::dict limits, dtype_codes;
#define GCI_EXPORT(name, value) limits[#name] = value;
  GCI_LIMITS(GCI_EXPORT)
#undef GCI_EXPORT
  module.attr("limits") = limits;
  dtype_codes["float32"] = int(DType::float32);
  dtype_codes["bfloat16"] = int(DType::bfloat16);
  dtype_codes["float64"] = int(DType::float64);
  dtype_codes["float16"] = int(DType::float16);
  module.attr("dtype_codes") = dtype_codes;
  module.attr("skinny_padding") = gci::skinny_padding;
  module.attr("attention_block_keys") = gci::attention_block_keys;
  module.attr("attention_block_queries") = gci::attention_block_queries;

  module.def(
      "gate_forward",
      [](Address projected, int64_t ld, int projected_dtype, int dtype, int64_t tokens, int experts, int rank,
         int top_k, double scaling, Address u, Address gates, int threads) {
        kernels().gate_forward(gate_args(projected, ld, projected_dtype, dtype, tokens, experts, rank, top_k, scaling),
                               at<void>(u), at<void>(gates), threads);
      },
      nogil);
  module.def(
      "gate_backward",
      [](Address projected, int64_t ld, int projected_dtype, int dtype, int64_t tokens, int experts, int rank,
         int top_k, double scaling, Address du, Address dgates, Address u, Address dprojected, int threads) {
        kernels().gate_backward(gate_args(projected, ld, projected_dtype, dtype, tokens, experts, rank, top_k, scaling),
                                at<const void>(du), at<const void>(dgates), at<void>(u), at<void>(dprojected), threads);
      },
      nogil);
  module.def(
      "attention_forward",
      [](Rows q, Rows k, Rows v, Address segments, int dtype, Extent extent, Heads heads, Address o, Address lse,
         Address workspace, int threads) {
        kernels().attention_forward(attention_args(q, k, v, segments, dtype, extent, heads), at<void>(o), at<void>(lse),
                                    at<void>(workspace), threads);
      },
      nogil);
  module.def(
      "attention_backward",
      [](Rows q, Rows k, Rows v, Address segments, int dtype, Extent extent, Heads heads, Rows o, Rows d_o, Address lse,
         Address dq, Address dk, Address dv, Address workspace, int threads) {
        kernels().attention_backward(attention_args(q, k, v, segments, dtype, extent, heads), rows(o), rows(d_o),
                                     at<const void>(lse), at<void>(dq), at<void>(dk), at<void>(dv), at<void>(workspace),
                                     threads);
      },
      nogil);
  module.def(
      "dropout",
      [](Address x, Address out, int dtype, int64_t rows, int64_t cols, double p, uint64_t seed, int threads) {
        kernels().dropout(at<const void>(x), at<void>(out), DType(dtype), rows, cols, p, seed, threads);
      },
      nogil);
  module.def(
      "project",
      [](Address x, int64_t ld_x, Address m, int64_t stride_i, int64_t stride_j, Address panel, Address out,
         int64_t ld_out, int64_t tokens, int64_t k, int64_t n, int threads) {
        kernels().project(at<const float>(x), ld_x, at<const float>(m), stride_i, stride_j, at<float>(panel),
                          at<float>(out), ld_out, tokens, k, n, threads);
      },
      nogil);
  module.def(
      "reduce",
      [](Address u, int64_t ld_u, Address y, int64_t ld_y, Address out, int64_t tokens, int64_t r, int64_t n,
         int threads) {
        kernels().reduce(at<const float>(u), ld_u, at<const float>(y), ld_y, at<float>(out), tokens, r, n, threads);
      },
      nogil);
  module.def(
      "pack_pairs",
      [](Address source, int dtype, int64_t stride_i, int64_t stride_j, Address panel, int64_t k, int64_t n) {
        kernels().pack_pairs(at<const void>(source), DType(dtype), stride_i, stride_j, at<void>(panel), k, n);
      },
      nogil);
  bind_decode_step(module);
  module.def(
      "decode",
      [](const gci::DecodeStep& step, Address x, int64_t ld_x, Address y, int64_t ld_y, int threads) {
        run_step(step, x, ld_x, y, ld_y, nullptr, threads);
      },
      nogil);
  module.def(
      // ALoRA's step: kv [sequences, capacity, any] holds `past` tokens before it and past + 1 after it.
      "decode_attend",
      [](const gci::DecodeStep& step, Address x, int64_t ld_x, Address y, int64_t ld_y, Address kv, int64_t stride_kv,
         int64_t ld_kv, int64_t capacity, int past, Address segments, int64_t ld_segments, int threads) {
        gci::AttendArgs attend = step.attend;
        const int32_t held = past;
        attend.kv = at<void>(kv), attend.stride_kv = stride_kv, attend.ld_kv = ld_kv, attend.capacity = capacity;
        attend.past = &held, attend.segments = at<const int32_t>(segments), attend.ld_segments = ld_segments;
        run_step(step, x, ld_x, y, ld_y, &attend, threads);
      },
      nogil);
  module.def("has_bf16_products", [] { return kernels().project_bf16 != nullptr; });
  module.def(
      "project_bf16",
      [](Address x, int64_t ld_x, Address panel, Address out, int64_t ld_out, int64_t tokens, int64_t k, int64_t n,
         int threads) {
        kernels().project_bf16(at<const void>(x), ld_x, at<const void>(panel), at<float>(out), ld_out, tokens, k, n,
                               threads);
      },
      nogil);
  module.def(
      "expand_bf16",
      [](Address u, int64_t ld_u, Address panel, Address y, int64_t ld_y, int64_t tokens, int64_t r, int64_t n,
         int threads) {
        kernels().expand_bf16(at<const void>(u), ld_u, at<const void>(panel), at<void>(y), ld_y, tokens, r, n, threads);
      },
      nogil);
  module.def(
      "reduce_bf16",
      [](Address u_transposed, int64_t ld_u, Address y, int64_t ld_y, Address out, Address partial, int64_t tokens,
         int64_t r, int64_t n, int threads) {
        kernels().reduce_bf16(at<const void>(u_transposed), ld_u, at<const void>(y), ld_y, at<float>(out),
                              at<float>(partial), tokens, r, n, threads);
      },
      nogil);
  bind_cuda(module);
}
