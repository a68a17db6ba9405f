// The kernels of the additive forward pass, by dtype and queries of a tile.
#include "additive_forward.cuh"

#define ONEPASS_KERNELS(KERNEL)                                                                       \
  KERNEL(f32, float, 64) KERNEL(f32, float, 32) KERNEL(f32, float, 16)                                \
  KERNEL(bf16, __nv_bfloat16, 64) KERNEL(bf16, __nv_bfloat16, 32) KERNEL(bf16, __nv_bfloat16, 16)     \
  KERNEL(f16, __half, 64) KERNEL(f16, __half, 32) KERNEL(f16, __half, 16)                             \
  KERNEL(f64, double, 16)

#define ONEPASS_DEFINED(DTYPE, T, QUERIES)                                                                       \
  extern "C" __global__ void __launch_bounds__(onepass::cuda::kForwardThreads, onepass::cuda::kForwardResident)  \
      additive_forward_##DTYPE##_##QUERIES(const __grid_constant__ onepass::cuda::AdditiveForward arguments) {   \
    onepass::cuda::additive_forward<T, QUERIES / 16>(arguments);                                                 \
  }
ONEPASS_KERNELS(ONEPASS_DEFINED)

namespace onepass::cuda {

cudaError_t launch(const AdditiveForward& arguments, const Launch& launch, cudaStream_t stream) {
#define ONEPASS_NAMED(DTYPE, T, QUERIES) {"additive_forward_" #DTYPE "_" #QUERIES, additive_forward_##DTYPE##_##QUERIES},
  static constexpr struct {
    const char* name;
    void (*kernel)(AdditiveForward);
  } kKernels[] = {ONEPASS_KERNELS(ONEPASS_NAMED)};
  if (launch.blocks == 0) return cudaSuccess;
  for (const auto& [name, kernel] : kKernels) {
    if (launch.kernel != name) continue;
    if (launch.shared > 48 << 10) {
      const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
      if (error != cudaSuccess) return error;
    }
    kernel<<<static_cast<unsigned>(launch.blocks), launch.threads, launch.shared, stream>>>(arguments);
    return cudaGetLastError();
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace onepass::cuda
