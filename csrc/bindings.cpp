// Python bindings: pointers, sizes and flags in, nothing out. Shapes, dtypes and devices are checked by the caller.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <tuple>
#include <vector>

#include "common/decode.h"
#include "common/kernels.h"
#include "cuda_bindings.h"

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

typedef std::tuple<Address, int64_t, int64_t> Rows;      // address, stride of the batch, stride of a row
typedef std::tuple<int64_t, int64_t, int64_t> Extent;    // batch, time, keys
typedef std::tuple<int, int, int> Heads;                 // heads, head_size, parts

gci::AttentionRows rows(const Rows& r) { return {at<const void>(std::get<0>(r)), std::get<1>(r), std::get<2>(r)}; }

AttentionArgs attention_args(const Rows& q, const Rows& k, const Rows& v, Address segments, int dtype, const Extent& e,
                             const Heads& h) {
  return {rows(q), rows(k), rows(v), at<const int32_t>(segments), DType(dtype), std::get<0>(e), std::get<1>(e),
          std::get<2>(e), std::get<0>(h), std::get<1>(h), std::get<2>(h)};
}

// A decoding step of one adapter, made once; what differs from call to call is x and y.
typedef std::tuple<Address, Address, Address, int, int, int, double, int, int> Group;  // the fields of DecodeGroup

gci::DecodeArgs decode_args(int dtype, int adapter_dtype, int64_t in, int64_t out, const std::vector<int>& rows,
                            const std::vector<Group>& groups) {
  gci::DecodeArgs a = {};
  if (rows.size() > gci::decode_max_tokens || groups.size() > gci::decode_max_tokens)
    throw std::invalid_argument("a decoding step takes at most 16 tokens and as many groups");
  a.dtype = DType(dtype), a.adapter_dtype = DType(adapter_dtype), a.in = in, a.out = out;
  a.tokens = int(rows.size()), a.num_groups = int(groups.size());
  for (size_t i = 0; i < rows.size(); ++i) a.rows[i] = rows[i];
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto& [A, router, B, rank, experts, top_k, scaling, first, count] = groups[i];
    a.groups[i] = {at<const void>(A), at<const void>(router), at<const void>(B), rank,  experts, top_k,
                   float(scaling),    first,                  count};
  }
  return a;
}

}  // namespace

PYBIND11_MODULE(_native, module) {
  namespace py = pybind11;
  using gci::kernels;
  const auto nogil = py::call_guard<py::gil_scoped_release>();

  module.doc() = "CPU kernels of gci_kernels. Addresses are data_ptr()s; see csrc/common/kernels.h.";
  module.attr("skinny_padding") = gci::skinny_padding;
  module.def("isa", [] { return kernels().isa; });

  module.def(
      "gate_forward",
      [](Address projected, int64_t ld, int projected_dtype, int dtype, int64_t tokens, int experts, int rank, int top_k,
         double scaling, Address u, Address gates, int threads) {
        kernels().gate_forward(
            gate_args(projected, ld, projected_dtype, dtype, tokens, experts, rank, top_k, scaling), at<void>(u),
            at<void>(gates), threads);
      },
      nogil);
  module.def(
      "gate_backward",
      [](Address projected, int64_t ld, int projected_dtype, int dtype, int64_t tokens, int experts, int rank, int top_k,
         double scaling, Address du, Address dgates, Address u, Address dprojected, int threads) {
        kernels().gate_backward(
            gate_args(projected, ld, projected_dtype, dtype, tokens, experts, rank, top_k, scaling), at<const void>(du),
            at<const void>(dgates), at<void>(u), at<void>(dprojected), threads);
      },
      nogil);
  module.attr("attention_block_keys") = gci::attention_block_keys;
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
      [](Address x, int64_t ld_x, Address panel, Address out, int64_t ld_out, int64_t tokens, int64_t k, int64_t n,
         int threads) {
        kernels().project(at<const float>(x), ld_x, at<const float>(panel), at<float>(out), ld_out, tokens, k, n,
                          threads);
      },
      nogil);
  module.def(
      "pack_panel",
      [](Address source, int64_t stride_i, int64_t stride_j, Address panel, int64_t k, int64_t n) {
        kernels().pack_panel(at<const float>(source), stride_i, stride_j, at<float>(panel), k, n);
      },
      nogil);
  module.def(
      "reduce",
      [](Address u, int64_t ld_u, Address y, int64_t ld_y, Address out, Address partial, int64_t tokens, int64_t r,
         int64_t n, int threads) {
        kernels().reduce(at<const float>(u), ld_u, at<const float>(y), ld_y, at<float>(out), at<float>(partial), tokens,
                         r, n, threads);
      },
      nogil);
  module.def(
      "pack_pairs",
      [](Address source, int dtype, int64_t stride_i, int64_t stride_j, Address panel, int64_t k, int64_t n) {
        kernels().pack_pairs(at<const void>(source), DType(dtype), stride_i, stride_j, at<void>(panel), k, n);
      },
      nogil);
  module.attr("decode_max_tokens") = gci::decode_max_tokens;
  module.attr("decode_max_columns") = gci::decode_max_columns;
  py::class_<gci::DecodeArgs>(module, "DecodeStep")
      .def(py::init(&decode_args))
      .def(
          "__call__",
          [](gci::DecodeArgs& step, Address x, int64_t ld_x, Address y, int64_t ld_y, Address workspace, int threads) {
            gci::DecodeArgs a = step;
            a.x = at<const void>(x), a.ld_x = ld_x, a.y = at<void>(y), a.ld_y = ld_y;
            kernels().decode(a, nullptr, at<float>(workspace), threads);
          },
          nogil)
      .def(
          // ALoRA's: attend to a cache of which `past` tokens are filled, then add to y. u: [batch, rank] floats.
          "attend",
          [](gci::DecodeArgs& step, Address x, int64_t ld_x, Address y, int64_t ld_y, Address qkv, int heads,
             bool residual, const std::tuple<Address, int64_t, int64_t>& kv, int past,
             const std::tuple<Address, int64_t>& segments, Address u, Address workspace, int threads) {
            gci::DecodeArgs a = step;
            a.x = at<const void>(x), a.ld_x = ld_x, a.y = at<void>(y), a.ld_y = ld_y;
            const gci::DecodeGroup& g = a.groups[0];
            const int32_t filled = past;
            kernels().attend({a.x, ld_x, g.A, at<const void>(qkv), a.dtype, a.adapter_dtype, a.in, a.tokens, g.rank,
                              heads, residual, at<void>(std::get<0>(kv)), std::get<1>(kv), std::get<2>(kv), &filled,
                              at<const int32_t>(std::get<0>(segments)), std::get<1>(segments), at<float>(u)},
                             at<float>(workspace), threads);
            kernels().decode(a, at<const float>(u), nullptr, threads);
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
      [](Address u_pairs, Address y, int64_t ld_y, Address out, Address partial, int64_t tokens, int64_t r, int64_t n,
         int threads) {
        kernels().reduce_bf16(at<const void>(u_pairs), at<const void>(y), ld_y, at<float>(out), at<float>(partial),
                              tokens, r, n, threads);
      },
      nogil);
  bind_cuda(module);
}
