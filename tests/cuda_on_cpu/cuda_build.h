#define GCI_CUDA_BUILD "on a CPU"
#define GCI_HAS_CUDA 1
