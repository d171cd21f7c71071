#define GCI_CUDA_BUILD "on a CPU"
#define GCI_HAS_CUDA 1
#define GCI_CUDA_COMPILER "g++"
#define GCI_CUDA_DIGEST "on a CPU"
