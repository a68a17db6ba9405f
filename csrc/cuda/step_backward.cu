#include "kernel_table.cuh"
#include "step_backward.cuh"

#define ONEPASS_KERNELS(_)                            \
  _(f32, float, 1) _(f32, float, 4)                   \
  _(bf16, __nv_bfloat16, 1) _(bf16, __nv_bfloat16, 4) \
  _(f16, __half, 1) _(f16, __half, 4)                 \
  _(f64, double, 1) _(f64, double, 4)

#define ONEPASS_DEFINE(name, T, Q)                                                           \
  extern "C" __global__ void __launch_bounds__(kStepThreads, step_resident(Q, 2, sizeof(T))) \
      additive_step_backward_##name##_##Q(const __grid_constant__ StepBackward args) {       \
    step_backward<T, Q, true>(args);                                                         \
  }                                                                                          \
  extern "C" __global__ void __launch_bounds__(kStepThreads, step_resident(Q, 2, sizeof(T))) \
      multiplicative_step_backward_##name##_##Q(const __grid_constant__ StepBackward args) { \
    step_backward<T, Q, false>(args);                                                        \
  }
#define ONEPASS_LIST(name, T, Q) \
  ONEPASS_KERNEL(additive_step_backward_##name##_##Q), ONEPASS_KERNEL(multiplicative_step_backward_##name##_##Q),

namespace onepass::cuda {

ONEPASS_KERNELS(ONEPASS_DEFINE)

cudaError_t launch(const StepBackward& args, const Launch& launch, cudaStream_t stream) {
  static const NamedKernel kernels[] = {ONEPASS_KERNELS(ONEPASS_LIST)};
  return launch_named(kernels, args, launch, stream);
}

}  // namespace onepass::cuda
