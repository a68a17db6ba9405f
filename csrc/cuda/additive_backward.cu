#include "additive_backward.cuh"
#include "additive_backward_sums.cuh"
#include "kernel_table.cuh"

#define KERNELS_OF(MAKE, name, T, bounds) \
  MAKE(additive_backward_##name, bounds, backward::gradients<T>) \
  MAKE(additive_backward_sums_##name, (kBackwardSumThreads), backward::sums<T>)
#define KERNELS(MAKE) \
  KERNELS_OF(MAKE, f32, float, (512)) \
  KERNELS_OF(MAKE, bf16, __nv_bfloat16, (512)) \
  KERNELS_OF(MAKE, f16, __half, (512)) \
  KERNELS_OF(MAKE, f64, double, (256, 1))

ONEPASS_KERNELS_OF(AdditiveBackward, KERNELS)
