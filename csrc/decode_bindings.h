// A decoding step as Python holds it: made once for some adapters and tokens, run with the addresses of each call.
#pragma once

#include <pybind11/pybind11.h>

#include "common/decode.h"

namespace gci {

struct DecodeStep {
  DecodeArgs args;    // without x, y and their strides
  AttendArgs attend;  // without the cache and its length
  DecodeBase base;    // used on a CPU only
};

}  // namespace gci

void bind_decode_step(pybind11::module_& module);
