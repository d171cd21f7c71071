// The kernel table of each instruction set, and which one this processor takes; chosen once.
//
// An instruction set has its own kernels only where they gain by it (setup.py lists them); the others are those of the
// set below it, which its namespace uses.
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <type_traits>

#if defined(GCI_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/decode.h"
#include "common/kernels.h"

namespace gci {

#define GCI_DECLARE(name) std::remove_pointer_t<decltype(Kernels::name)> name;
#define GCI_DECLARE_FLOAT_KERNELS \
  GCI_DECLARE(gate_forward)       \
  GCI_DECLARE(gate_backward)      \
  GCI_DECLARE(attention_forward)  \
  GCI_DECLARE(attention_backward) \
  GCI_DECLARE(dropout)            \
  GCI_DECLARE(project)            \
  GCI_DECLARE(reduce)
#define GCI_DECLARE_BF16_KERNELS \
  GCI_DECLARE(pack_pairs)        \
  GCI_DECLARE(project_bf16)      \
  GCI_DECLARE(expand_bf16)       \
  GCI_DECLARE(reduce_bf16)

namespace baseline {
GCI_DECLARE_FLOAT_KERNELS
GCI_DECLARE(decode)
constexpr decltype(Kernels::pack_pairs) pack_pairs = nullptr;
constexpr decltype(Kernels::project_bf16) project_bf16 = nullptr;
constexpr decltype(Kernels::expand_bf16) expand_bf16 = nullptr;
constexpr decltype(Kernels::reduce_bf16) reduce_bf16 = nullptr;
}  // namespace baseline
#ifdef GCI_HAS_AVX2
namespace avx2 {
using namespace baseline;
GCI_DECLARE_FLOAT_KERNELS
GCI_DECLARE(decode)
}  // namespace avx2
namespace avx512 {
using namespace avx2;
GCI_DECLARE_FLOAT_KERNELS
GCI_DECLARE(decode)
}  // namespace avx512
namespace avx512bf16 {
using namespace avx512;
GCI_DECLARE(decode)
GCI_DECLARE_BF16_KERNELS
}  // namespace avx512bf16
#endif
#ifdef GCI_HAS_AMX
namespace amx {
using namespace avx512bf16;
GCI_DECLARE_BF16_KERNELS
}  // namespace amx
#endif

namespace {

#define GCI_TABLE(isa)                                      \
  constexpr Kernels isa##_table = {#isa,                    \
                                   isa::gate_forward,       \
                                   isa::gate_backward,      \
                                   isa::attention_forward,  \
                                   isa::attention_backward, \
                                   isa::dropout,            \
                                   isa::project,            \
                                   isa::reduce,             \
                                   isa::pack_pairs,         \
                                   isa::project_bf16,       \
                                   isa::expand_bf16,        \
                                   isa::reduce_bf16,        \
                                   isa::decode};

GCI_TABLE(baseline)
#ifdef GCI_HAS_AVX2
GCI_TABLE(avx2)
GCI_TABLE(avx512)
GCI_TABLE(avx512bf16)
#endif
#ifdef GCI_HAS_AMX
GCI_TABLE(amx)

// Linux keeps the tiles from a process until it asks for them.
bool has_amx() {
#ifdef __linux__
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16") &&
         syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}
#endif

const Kernels& choose() {
  const char* name = std::getenv("GCI_CPU_ISA");
  const std::string wanted = name ? name : "";
#ifdef GCI_HAS_AVX2
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  const bool has_avx512bf16 = has_avx512 && __builtin_cpu_supports("avx512bf16");
#ifdef GCI_HAS_AMX
  if (has_avx512bf16 && (wanted.empty() || wanted == "amx") && has_amx()) return amx_table;
#endif
  if (has_avx512bf16 && (wanted.empty() || wanted == "avx512bf16")) return avx512bf16_table;
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512_table;
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return avx2_table;
#endif
  if (wanted.empty() || wanted == "baseline") return baseline_table;
  throw std::runtime_error("GCI_CPU_ISA=" + wanted +
                           ": this build or processor has no such instruction set; allowed: " +
                           "baseline, and on x86-64 avx2, avx512, avx512bf16 and amx where the processor has them");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace gci
