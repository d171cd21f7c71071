// Makes a decoding step from what Python knows of it.
#include "decode_bindings.h"

#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

namespace {

typedef uintptr_t Address;
typedef std::tuple<Address, Address, Address, int, int, int, double, int, int> Group;  // the fields of DecodeGroup
typedef std::tuple<Address, int, bool> Attention;                                      // the fields of AttendGroup
typedef std::tuple<Address, Address> Base;                                             // weight and bias, or 0

const void* at(Address address) { return reinterpret_cast<const void*>(address); }

gci::DecodeStep make_step(int dtype, int adapter_dtype, int64_t in, int64_t out, const std::vector<int>& rows,
                          const std::vector<Group>& groups, const std::vector<Attention>& attentions,
                          const Base& base) {
  if (rows.size() > gci::max_decode_tokens || groups.size() > gci::max_decode_tokens)
    throw std::invalid_argument("a decoding step takes at most " + std::to_string(gci::max_decode_tokens) +
                                " tokens and as many groups");
  if (!attentions.empty() && attentions.size() != groups.size())
    throw std::invalid_argument("attention must be given for every group or for none");
  gci::DecodeStep step = {};
  gci::DecodeArgs& a = step.args;
  a.dtype = gci::DType(dtype), a.adapter_dtype = gci::DType(adapter_dtype), a.in = in, a.out = out;
  a.tokens = int(rows.size()), a.num_groups = int(groups.size());
  for (size_t i = 0; i < rows.size(); ++i) a.rows[i] = rows[i];
  for (size_t i = 0; i < groups.size(); ++i) {
    const auto& [A, router, B, rank, experts, top_k, scaling, first, count] = groups[i];
    a.groups[i] = {at(A), at(router), at(B), rank, experts, top_k, float(scaling), first, count};
  }
  for (size_t i = 0; i < attentions.size(); ++i) {
    const auto& [qkv, heads, residual] = attentions[i];
    step.attend.groups[i] = {at(qkv), heads, residual};
  }
  step.base = {at(std::get<0>(base)), at(std::get<1>(base))};
  return step;
}

}  // namespace

void bind_decode_step(pybind11::module_& module) {
  namespace py = pybind11;
  // module_local: tests/cuda_on_cpu has the same class in a second module.
  py::class_<gci::DecodeStep>(module, "DecodeStep", py::module_local())
      .def(py::init(&make_step), py::arg("dtype"), py::arg("adapter_dtype"), py::arg("in_features"),
           py::arg("out_features"), py::arg("rows"), py::arg("groups"),
           py::arg("attentions") = std::vector<Attention>(), py::arg("base") = Base(0, 0));
}
