// A decoding step as Python holds it: made once for some adapters and tokens, then run with the addresses of each call.
#pragma once

#include <pybind11/pybind11.h>

#include "common/decode.h"

namespace gci {

struct DecodeStep {
  DecodeArgs args;    // without x, y and their strides
  AttendArgs attend;  // without what is kept and how long it is
  bool attends;       // whether the first half is ALoRA's
  DecodeBase base;    // a CPU's
};

}  // namespace gci

void bind_decode_step(pybind11::module_& module);
