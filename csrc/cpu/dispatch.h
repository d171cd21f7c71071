// The CPU kernels that this process uses, and the instruction sets that there are.
#pragma once

#include <string>
#include <vector>

#include "common/kernels.h"

namespace gci {

// Those of the best instruction set that this processor has, or of the one that GCI_CPU_ISA names; std::runtime_error
// where it has no such set.
const Kernels& kernels();

// Those of this build, each including those before it.
std::vector<std::string> instruction_sets();

}  // namespace gci
