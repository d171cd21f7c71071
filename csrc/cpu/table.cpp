// Each instruction set's table of its kernels.
#include "common/decode.h"
#include "cpu/isa.h"

namespace gci::GCI_ISA {

void gate_forward(const GateArgs&, void*, void*, int);
void gate_backward(const GateArgs&, const void*, const void*, void*, void*, int);
void attention_forward(const AttentionArgs&, void*, void*, void*, int);
void attention_backward(const AttentionArgs&, const AttentionRows&, const AttentionRows&, const void*, void*, void*,
                        void*, void*, int);
void dropout(const void*, void*, DType, int64_t, int64_t, double, uint64_t, int);
void project(const float*, int64_t, const float*, int64_t, int64_t, float*, float*, int64_t, int64_t, int64_t, int64_t,
             int);
void reduce(const float*, int64_t, const float*, int64_t, float*, int64_t, int64_t, int64_t, int);
void pack_pairs(const void*, DType, int64_t, int64_t, void*, int64_t, int64_t);
void decode(const DecodeArgs&, const AttendArgs*, const DecodeBase&, float*, int);
#if defined(__AVX512BF16__)
void project_bf16(const void*, int64_t, const void*, float*, int64_t, int64_t, int64_t, int64_t, int);
void expand_bf16(const void*, int64_t, const void*, void*, int64_t, int64_t, int64_t, int64_t, int);
void reduce_bf16(const void*, int64_t, const void*, int64_t, float*, float*, int64_t, int64_t, int64_t, int);
#else
constexpr decltype(Kernels::project_bf16) project_bf16 = nullptr;
constexpr decltype(Kernels::expand_bf16) expand_bf16 = nullptr;
constexpr decltype(Kernels::reduce_bf16) reduce_bf16 = nullptr;
#endif

#define GCI_NAME(isa) #isa
#define GCI_STRING(isa) GCI_NAME(isa)
extern const Kernels table = {
    GCI_STRING(GCI_ISA), gate_forward,  gate_backward, attention_forward, attention_backward,
    dropout,             project,       reduce,        pack_pairs,        project_bf16,
    expand_bf16,         reduce_bf16,   decode};

}  // namespace gci::GCI_ISA
