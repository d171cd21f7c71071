// Adds csrc/cuda to the extension, or the reason why it was not built.
#pragma once

#include <pybind11/pybind11.h>

void bind_cuda(pybind11::module_&);
