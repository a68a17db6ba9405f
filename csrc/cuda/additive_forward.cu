// The kernels of the additive forward pass, by dtype and queries of a tile.
#include "additive_forward.cuh"

#define ONEPASS_KERNEL(NAME, T, R)                                                                      \
  extern "C" __global__ void __launch_bounds__(onepass::cuda::kThreads, 2)                              \
      additive_forward_##NAME(const __grid_constant__ onepass::cuda::AdditiveForward arguments) {       \
    onepass::cuda::additive_forward<T, R>(arguments);                                                   \
  }

ONEPASS_KERNEL(f32_64, float, 4)
ONEPASS_KERNEL(f32_32, float, 2)
ONEPASS_KERNEL(f32_16, float, 1)
ONEPASS_KERNEL(bf16_64, __nv_bfloat16, 4)
ONEPASS_KERNEL(bf16_32, __nv_bfloat16, 2)
ONEPASS_KERNEL(bf16_16, __nv_bfloat16, 1)
ONEPASS_KERNEL(f16_64, __half, 4)
ONEPASS_KERNEL(f16_32, __half, 2)
ONEPASS_KERNEL(f16_16, __half, 1)
ONEPASS_KERNEL(f64_16, double, 1)
