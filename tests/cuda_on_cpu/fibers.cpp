// Runs a kernel's blocks on a CPU. Between barriers the threads of a block run in an order drawn anew each time, so
// that a missing barrier changes results; shared memory holds NaN at first; a barrier that not all threads reach is an
// error.
#include <pybind11/pybind11.h>
#include <setjmp.h>
#include <ucontext.h>

#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/instructions.cuh"
#include "cuda/launch.h"
#include "cuda_bindings.h"
#include "decode_bindings.h"

Index threadIdx, blockIdx;

namespace {

constexpr size_t stack_bytes = 256 << 10;

// A context is entered once; from then on jumps lead in and out, which need no system call.
struct Fiber {
  ucontext_t context;
  jmp_buf saved;
  std::unique_ptr<char[]> stack{new char[stack_bytes]};
  bool started, finished;
  int waits_for;  // 0: nothing, 1: its warp, 2: its block
  float given;    // in a shuffle
};

std::vector<Fiber> fibers;
std::vector<float> shared_memory;
std::mt19937 draws;
jmp_buf scheduler;
const std::function<void()>* body;
unsigned current;
bool waited, broken;

void wait_at(int barrier) {
  Fiber& own = fibers[current];
  own.waits_for = barrier;
  if (!_setjmp(own.saved)) _longjmp(scheduler, 1);
}

void enter() {
  (*body)();
  fibers[current].finished = true;
  _longjmp(scheduler, 1);
}

// Until the fiber waits or has finished.
void resume(unsigned i) {
  current = threadIdx.x = i;
  if (_setjmp(scheduler)) return;
  if (fibers[i].started) _longjmp(fibers[i].saved, 1);
  fibers[i].started = true;
  setcontext(&fibers[i].context);
}

// Whether all of fibers [first, last) stand at this barrier, or have left the kernel.
bool complete(size_t first, size_t last, int barrier) {
  for (size_t i = first; i < last; ++i)
    if (!fibers[i].finished && fibers[i].waits_for != barrier) return false;
  return true;
}

void release(size_t first, size_t last, int barrier) {
  if (!complete(first, last, barrier)) return;
  for (size_t i = first; i < last; ++i) fibers[i].waits_for = 0;
}

void run_block(int threads) {
  std::fill(shared_memory.begin(), shared_memory.end(), NAN);
  fibers.resize(threads);
  for (Fiber& fiber : fibers) {
    getcontext(&fiber.context);
    fiber.context.uc_stack = {fiber.stack.get(), 0, stack_bytes};
    fiber.started = fiber.finished = false;
    fiber.waits_for = 0;
    makecontext(&fiber.context, enter, 0);
  }
  std::vector<unsigned> ready;
  while (true) {
    ready.clear();
    for (int i = 0; i < threads; ++i)
      if (!fibers[i].finished && !fibers[i].waits_for) ready.push_back(i);
    if (ready.empty()) break;
    std::shuffle(ready.begin(), ready.end(), draws);
    for (unsigned i : ready) resume(i);
    for (int first = 0; first < threads; first += 32) release(first, first + 32, 1);
    release(0, threads, 2);
  }
  for (const Fiber& fiber : fibers) broken |= !fiber.finished;
}

}  // namespace

void __syncthreads() { wait_at(2); }
void __syncwarp() { wait_at(1); }
float __shfl_xor_sync(unsigned, float value, int offset) {
  const unsigned self = current;
  fibers[self].given = value;
  wait_at(1);
  const float result = fibers[self ^ offset].given;
  wait_at(1);
  return result;
}

namespace gci {

float widen(float16 v) {
  _Float16 half;
  std::memcpy(&half, &v, sizeof half);
  return float(half);
}
template <>
bfloat16 narrow<bfloat16>(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, sizeof bits);
  return {uint16_t(v != v ? 0x7fff : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}
template <>
float16 narrow<float16>(float v) {
  const _Float16 half = _Float16(v);
  float16 result;
  std::memcpy(&result, &half, sizeof half);
  return result;
}

void let_next_start() {}
void wait_for_previous() { waited = true; }
float* dynamic_shared() { return shared_memory.data(); }

int run_grid(const LaunchShape& shape, const std::function<void()>& kernel) {
  body = &kernel;
  shared_memory.assign(shape.shared / sizeof(float) + 4, NAN);
  waited = broken = false;
  for (blockIdx.z = 0; blockIdx.z < shape.z; ++blockIdx.z)
    for (blockIdx.y = 0; blockIdx.y < shape.y; ++blockIdx.y)
      for (blockIdx.x = 0; blockIdx.x < shape.x; ++blockIdx.x) run_block(shape.threads);
  return broken ? 1000 : waited != shape.overlaps ? 1001 : 0;
}

const char* cuda_error_name(int error) {
  return error == 1000   ? "a barrier was not reached"
         : error == 1001 ? "waiting is not as declared"
                         : "cudaErrorInvalidValue";
}
const char* cuda_error_text(int) { return "on a CPU"; }

}  // namespace gci

PYBIND11_MODULE(cuda_on_cpu, module) {
  bind_decode_step(module);
  bind_cuda(module);
  module.def("seed", [](unsigned seed) { draws.seed(seed); });
}
