// Python bindings of csrc/cuda: addresses, sizes and a stream in, nothing out; an error raises. Without CUDA only the
// reason is bound.
#include "cuda_bindings.h"

#include "cuda_build.h"  // written by the build: GCI_CUDA_BUILD, what was built or why nothing was

#ifdef GCI_HAS_CUDA
#include <pybind11/stl.h>

#include <string>
#include <tuple>
#include <vector>

#include "cuda/decode.h"

namespace {

using gci::AttendArgs;
using gci::DecodeArgs;
using gci::DType;
typedef uintptr_t Address;

typedef std::tuple<Address, Address, Address, int, int, int, float, int, int> Group;  // the order of DecodeGroup
typedef std::tuple<int, int> DTypes;                                                 // of x and y, of the adapter
typedef std::tuple<Address, int64_t, int64_t> Rows;                                  // address, stride, row length

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// What exceeds the arrays is counted, and so refused by the launch, but not copied.
DecodeArgs decode_args(const DTypes& dtypes, const std::vector<int>& rows, const std::vector<Group>& groups) {
  DecodeArgs a = {};
  a.dtype = DType(std::get<0>(dtypes));
  a.adapter_dtype = DType(std::get<1>(dtypes));
  a.tokens = int(rows.size());
  a.num_groups = int(groups.size());
  for (size_t t = 0; t < rows.size() && t < gci::decode_max_tokens; ++t) a.rows[t] = rows[t];
  for (size_t i = 0; i < groups.size() && i < gci::decode_max_tokens; ++i) {
    const auto& [A, router, B, rank, experts, top_k, scaling, first, count] = groups[i];
    a.groups[i] = {at<const void>(A), at<const void>(router), at<const void>(B), rank, experts, top_k, scaling, first,
                   count};
  }
  return a;
}

// ValueError with the objection, RuntimeError with CUDA's name of the error; nothing for success.
void raise_on(int error, const char* objection) {
  const std::string name = error ? gci::cuda_error_name(error) : "";
  if (objection) throw std::invalid_argument(name + ": " + objection);
  if (error) throw std::runtime_error(name + ": " + gci::cuda_error_text(error));
}

void project(DTypes dtypes, Rows x, const std::vector<int>& rows, const std::vector<Group>& groups, Address partial,
             int splits, int columns, Address stream) {
  DecodeArgs a = decode_args(dtypes, rows, groups);
  a.x = at<const void>(std::get<0>(x));
  a.ld_x = std::get<1>(x);
  a.in = std::get<2>(x);
  raise_on(gci::decode_project(a, at<float>(partial), splits, columns, at<void>(stream)),
           gci::decode_project_objection(a, at<float>(partial), splits, columns));
}

void expand(DTypes dtypes, Rows y, const std::vector<int>& rows, const std::vector<Group>& groups, Address partial,
            int splits, int columns, Address stream) {
  DecodeArgs a = decode_args(dtypes, rows, groups);
  a.y = at<void>(std::get<0>(y));
  a.ld_y = std::get<1>(y);
  a.out = std::get<2>(y);
  raise_on(gci::decode_expand(a, at<float>(partial), splits, columns, at<void>(stream)),
           gci::decode_expand_objection(a, at<float>(partial), splits, columns));
}

typedef std::tuple<Address, int64_t, int64_t> Cache;  // address, stride of a sequence, capacity
typedef std::tuple<Address, int64_t> Segments;        // address or 0, stride of a sequence

void attend(DTypes dtypes, Rows x, int64_t batch, Address A, Address qkv, int rank, int heads, bool residual, Cache kv,
            Address past, Segments segments, Address u, Address stream) {
  const AttendArgs a = {at<const void>(std::get<0>(x)), std::get<1>(x), at<const void>(A), at<const void>(qkv),
                        DType(std::get<0>(dtypes)), DType(std::get<1>(dtypes)), std::get<2>(x), batch, rank, heads,
                        residual, at<void>(std::get<0>(kv)), std::get<1>(kv), std::get<2>(kv), at<const int32_t>(past),
                        at<const int32_t>(std::get<0>(segments)), std::get<1>(segments), at<float>(u)};
  raise_on(gci::decode_attend(a, at<void>(stream)), gci::decode_attend_objection(a));
}

}  // namespace
#endif

void bind_cuda(pybind11::module_& module) {
  module.attr("cuda_build") = GCI_CUDA_BUILD;
#ifdef GCI_HAS_CUDA
  module.attr("has_cuda") = true;
  module.attr("decode_max_tokens") = gci::decode_max_tokens;
  module.attr("decode_max_columns") = gci::decode_max_columns;
  module.def("decode_splits", &gci::decode_splits);
  module.def("decode_project", &project);
  module.def("decode_expand", &expand);
  module.def("decode_attend", &attend);
#else
  module.attr("has_cuda") = false;
#endif
}
