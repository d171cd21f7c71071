// Launching a kernel by its grid, threads and shared memory.
#pragma once

#include <cstddef>

namespace gci {

struct LaunchShape {
  unsigned x, y, z;  // the grid
  int threads;
  size_t shared;  // bytes of dynamic shared memory
  bool overlaps;  // the kernel calls wait_for_previous, so it may start while the one before it runs
};

int launch(const void* kernel, const LaunchShape&, void* stream, void** arguments);

template <typename... P>
int launch(void (*kernel)(P...), const LaunchShape& shape, void* stream, P... arguments) {
  void* addresses[] = {static_cast<void*>(&arguments)...};
  return launch(reinterpret_cast<const void*>(kernel), shape, stream, addresses);
}

}  // namespace gci
