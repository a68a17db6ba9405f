#include "kernel_table.cuh"
#include "step_forward.cuh"

#define KERNELS_OF_WIDTH(MAKE, name, T, Q) \
  MAKE(additive_step_forward_##name##_##Q, (kStepThreads, step_resident(Q, 1, sizeof(T))), step_forward<T, Q, true>) \
  MAKE(multiplicative_step_forward_##name##_##Q, (kStepThreads, step_resident(Q, 1, sizeof(T))), step_forward<T, Q, false>)
#define KERNELS_OF(MAKE, name, T) KERNELS_OF_WIDTH(MAKE, name, T, 1) KERNELS_OF_WIDTH(MAKE, name, T, 4)
#define KERNELS(MAKE) \
  KERNELS_OF(MAKE, f32, float) KERNELS_OF(MAKE, bf16, __nv_bfloat16) KERNELS_OF(MAKE, f16, __half) KERNELS_OF(MAKE, f64, double)

ONEPASS_KERNELS_OF(StepForward, KERNELS)
