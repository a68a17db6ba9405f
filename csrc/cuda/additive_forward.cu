#include "additive_forward.cuh"
#include "kernel_table.cuh"

#define ONE(MAKE, name, T, queries) \
  MAKE(additive_forward_##name##_##queries, (kForwardThreads, kForwardResident), additive_forward<T, queries / 16>)
#define KERNELS_OF(MAKE, name, T) ONE(MAKE, name, T, 64) ONE(MAKE, name, T, 32) ONE(MAKE, name, T, 16)
#define KERNELS(MAKE) \
  KERNELS_OF(MAKE, f32, float) KERNELS_OF(MAKE, bf16, __nv_bfloat16) KERNELS_OF(MAKE, f16, __half) ONE(MAKE, f64, double, 16)

ONEPASS_KERNELS_OF(AdditiveForward, KERNELS)
