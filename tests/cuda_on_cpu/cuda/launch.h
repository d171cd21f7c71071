// In place of csrc/cuda/launch.h: every block of the grid, one after another, by fibers on this thread.
#pragma once

#include <cstddef>
#include <functional>

namespace gci {

struct LaunchShape {
  unsigned x, y, z;
  int threads;
  size_t shared;
  bool overlaps;
};

int run_grid(const LaunchShape&, const std::function<void()>& kernel);

template <typename... P>
int launch(void (*kernel)(P...), const LaunchShape& shape, void*, P... arguments) {
  return run_grid(shape, [&] { kernel(arguments...); });
}

}  // namespace gci
