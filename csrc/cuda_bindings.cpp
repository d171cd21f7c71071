// Python bindings of csrc/cuda: functions that take a step, addresses, strides and a stream, return nothing, and raise
// on an error. Without CUDA they are missing, and cuda_build has the reason.
#include "cuda_bindings.h"

#include "cuda_build.h"  // written by the build: what was built, or why nothing was

#ifdef GCI_HAS_CUDA
#include <string>
#include <tuple>

#include "cuda/decode.h"
#include "decode_bindings.h"

namespace {

using gci::AttendArgs;
using gci::DecodeArgs;
using gci::DecodeStep;
typedef uintptr_t Address;

template <typename T>
T* at(Address address) {
  return reinterpret_cast<T*>(address);
}

// ValueError with what is wrong with the arguments, else RuntimeError with CUDA's name of the error.
void raise(int error, const char* invalid) {
  const std::string name = gci::cuda_error_name(error);
  if (invalid) throw std::invalid_argument(name + ": " + invalid);
  throw std::runtime_error(name + ": " + gci::cuda_error_text(error));
}

void project(const DecodeStep& step, Address x, int64_t ld_x, Address partial, int splits, int columns,
             Address stream) {
  DecodeArgs a = step.args;
  a.x = at<const void>(x), a.ld_x = ld_x;
  if (const int error = gci::decode_project(a, at<float>(partial), splits, columns, at<void>(stream)))
    raise(error, gci::check_decode_project(a, at<float>(partial), splits, columns));
}

void expand(const DecodeStep& step, Address y, int64_t ld_y, Address partial, int splits, int columns, Address stream) {
  DecodeArgs a = step.args;
  a.y = at<void>(y), a.ld_y = ld_y;
  if (const int error = gci::decode_expand(a, at<float>(partial), splits, columns, at<void>(stream)))
    raise(error, gci::check_decode_expand(a, at<float>(partial), splits, columns));
}

typedef std::tuple<Address, int64_t, int64_t, int64_t> Cache;  // address, strides of a sequence and a token, capacity
typedef std::tuple<Address, int64_t> Segments;                 // address or 0, stride of a sequence

void attend(const DecodeStep& step, Address x, int64_t ld_x, const Cache& kv, Address past, const Segments& segments,
            Address partial, int columns, Address stream) {
  DecodeArgs a = step.args;
  a.x = at<const void>(x), a.ld_x = ld_x;
  AttendArgs t = step.attend;
  t.kv = at<void>(std::get<0>(kv));
  t.stride_kv = std::get<1>(kv), t.ld_kv = std::get<2>(kv), t.capacity = std::get<3>(kv);
  t.past = at<const int32_t>(past);
  t.segments = at<const int32_t>(std::get<0>(segments)), t.ld_segments = std::get<1>(segments);
  if (const int error = gci::decode_attend(a, t, at<float>(partial), columns, at<void>(stream)))
    raise(error, gci::check_decode_attend(a, t, at<float>(partial), columns));
}

}  // namespace
#endif

void bind_cuda(pybind11::module_& module) {
  module.attr("cuda_build") = GCI_CUDA_BUILD;
#ifdef GCI_HAS_CUDA
  module.attr("has_cuda") = true;
  module.attr("cuda_compiler") = GCI_CUDA_COMPILER;
  module.attr("cuda_digest") = GCI_CUDA_DIGEST;
  module.def("decode_splits", &gci::decode_splits);
  module.def("cuda_project", &project);
  module.def("cuda_expand", &expand);
  module.def("cuda_attend", &attend);
#else
  module.attr("has_cuda") = false;
  module.attr("cuda_compiler") = "";
  module.attr("cuda_digest") = "";
#endif
}
