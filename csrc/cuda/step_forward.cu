#include "kernel_table.cuh"
#include "step_forward.cuh"

#define KERNELS(MAKE) ONEPASS_STEPS(MAKE, forward, 1)

ONEPASS_KERNELS_OF(StepForward, KERNELS)

namespace onepass::cuda {

// The capability whose code the current device runs: of a PTX that it translates, that of the PTX.
cudaError_t compiled_for(int* capability) {
  cudaFuncAttributes attributes{};
  const cudaError_t found = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(&additive_step_forward_f32_1));
  *capability = attributes.ptxVersion;
  return found;
}

}  // namespace onepass::cuda
