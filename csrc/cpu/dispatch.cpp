// Chooses the instruction set of the CPU kernels, once: the best one that this processor has, or the one that the
// environment variable GCI_CPU_ISA names.
//
// build_cpu.py lists the instruction sets and the kernel sources that are compiled for each. Kernels that were not
// compiled for a set are those of the set before it.
#include "cpu/dispatch.h"

#include <cstdlib>
#include <iterator>
#include <stdexcept>
#include <string>

#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "cpu_build.h"  // GCI_INSTRUCTION_SETS, written by the build

namespace gci {

// csrc/cpu/NAME.cpp defines add_NAME in the namespace of every instruction set that it is compiled for.
#define GCI_SOURCES(set, supported, sources) sources
#define GCI_DECLARE(set, name) \
  namespace set {              \
  void add_##name(Kernels&);   \
  }
GCI_INSTRUCTION_SETS(GCI_SOURCES, , GCI_DECLARE)

namespace {

// Whether the operating system lets this process use a feature of the processor: Linux grants the tiles of AMX only to
// a process that asks for them.
[[maybe_unused]] bool permitted(const std::string& feature) {
  if (feature != "amx-tile") return true;
#if defined(SYS_arch_prctl)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

struct InstructionSet {
  const char* name;
  bool (*supported)();    // here, where the sets before it are
  void (*add)(Kernels&);  // puts its own kernels in the place of those of the sets before it
};

#define GCI_HAS(feature) (__builtin_cpu_supports(feature) && permitted(feature))
#define GCI_ADD(set, name) set::add_##name(table);
#define GCI_SET(set, supported, sources) {#set, [] { return supported; }, [](Kernels& table) { sources }},
constexpr InstructionSet sets[] = {GCI_INSTRUCTION_SETS(GCI_SET, GCI_HAS, GCI_ADD)};

bool supported(size_t set) {
  for (size_t i = 0; i <= set; ++i)
    if (!sets[i].supported()) return false;
  return true;
}

Kernels choose() {
  const char* variable = std::getenv("GCI_CPU_ISA");
  const std::string wanted = variable ? variable : "";
  for (size_t set = std::size(sets); set-- > 0;) {
    if ((!wanted.empty() && wanted != sets[set].name) || !supported(set)) continue;
    Kernels table = {};
    for (size_t i = 0; i <= set; ++i) sets[i].add(table);
    table.isa = sets[set].name;
    return table;
  }
  std::string allowed;
  for (size_t set = 0; set < std::size(sets) && supported(set); ++set)
    allowed += std::string(set ? ", " : "") + sets[set].name;
  throw std::runtime_error("GCI_CPU_ISA=" + wanted +
                           ": this build or processor has no such instruction set; allowed: " + allowed);
}

}  // namespace

const Kernels& kernels() {
  static const Kernels table = choose();
  return table;
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : sets) names.push_back(set.name);
  return names;
}

}  // namespace gci
