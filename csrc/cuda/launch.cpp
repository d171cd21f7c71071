// All calls of the CUDA runtime: launches, and the names of errors.
#include "cuda/launch.h"

#include <cuda_runtime_api.h>

#include <atomic>

#include "cuda/decode.h"

namespace gci {
namespace {

constexpr int cached_devices = 64;

// Whether the kernel's code for the current device waits for the kernel before it (griddepcontrol, from sm_90 on). This
// is a property of the code, not of the device, which may run code that was compiled for an older one.
int can_overlap(const void* kernel, bool* answer) {
  static std::atomic<int> known[cached_devices];  // 0: not asked, 1: no, 2: yes
  int device;
  if (const cudaError_t error = cudaGetDevice(&device)) return error;
  int state = device < cached_devices ? known[device].load(std::memory_order_relaxed) : 0;
  if (state == 0) {
    int major;
    cudaFuncAttributes attributes;
    if (const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device))
      return error;
    if (const cudaError_t error = cudaFuncGetAttributes(&attributes, kernel)) return error;
    state = major >= 9 && attributes.ptxVersion >= 90 ? 2 : 1;
    if (device < cached_devices) known[device].store(state, std::memory_order_relaxed);
  }
  *answer = state == 2;
  return cudaSuccess;
}

}  // namespace

int launch(const void* kernel, const LaunchShape& shape, void* stream, void** arguments) {
  cudaLaunchAttribute overlap;
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  bool overlaps = false;
  if (shape.overlaps)
    if (const int error = can_overlap(kernel, &overlaps)) return error;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(shape.x, shape.y, shape.z);
  config.blockDim = dim3(shape.threads);
  config.dynamicSmemBytes = shape.shared;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = overlaps ? 1 : 0;
  return cudaLaunchKernelExC(&config, kernel, arguments);
}

const char* cuda_error_name(int error) { return cudaGetErrorName(cudaError_t(error)); }
const char* cuda_error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace gci
