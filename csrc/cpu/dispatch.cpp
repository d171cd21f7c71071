// Chooses the kernel table once, by what the processor offers.
#include <cstdlib>
#include <stdexcept>
#include <string>

#if defined(GCI_HAS_AMX) && defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "common/kernels.h"

namespace gci {

namespace baseline {
extern const Kernels table;
}
#ifdef GCI_HAS_AVX2
namespace avx2 {
extern const Kernels table;
}
namespace avx512 {
extern const Kernels table;
}
namespace avx512bf16 {
extern const Kernels table;
}
#endif
#ifdef GCI_HAS_AMX
namespace amx {
extern const Kernels table;
}
#endif

namespace {

#ifdef GCI_HAS_AMX
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
  if (has_avx512bf16 && (wanted.empty() || wanted == "amx") && has_amx()) return amx::table;
#endif
  if (has_avx512bf16 && (wanted.empty() || wanted == "avx512bf16")) return avx512bf16::table;
  if (has_avx512 && (wanted.empty() || wanted == "avx512")) return avx512::table;
  if (has_avx2 && (wanted.empty() || wanted == "avx2")) return avx2::table;
#endif
  if (wanted.empty() || wanted == "baseline") return baseline::table;
  throw std::runtime_error("GCI_CPU_ISA=" + wanted + ": this build or processor has no such instruction set; allowed: " +
                           "baseline, and on x86-64 avx2, avx512, avx512bf16 and amx where the processor has them");
}

}  // namespace

const Kernels& kernels() {
  static const Kernels& table = choose();
  return table;
}

}  // namespace gci
