// The kernels of the additive forward pass, by dtype and queries of a tile.
#include "additive_forward.cuh"

#define ONEPASS_KERNEL(DTYPE, T, QUERIES)                                                                            \
  extern "C" __global__ void __launch_bounds__(onepass::cuda::kThreads, onepass::cuda::kForwardResident)           \
      additive_forward_##DTYPE##_##QUERIES(const __grid_constant__ onepass::cuda::AdditiveForward arguments) {      \
    onepass::cuda::additive_forward<T, QUERIES / 16>(arguments);                                                     \
  }

ONEPASS_KERNEL(f32, float, 64)
ONEPASS_KERNEL(f32, float, 16)
ONEPASS_KERNEL(bf16, __nv_bfloat16, 64)
ONEPASS_KERNEL(bf16, __nv_bfloat16, 16)
ONEPASS_KERNEL(f16, __half, 64)
ONEPASS_KERNEL(f16, __half, 16)
ONEPASS_KERNEL(f64, double, 16)
