#include "additive_backward.cuh"
#include "additive_backward_sums.cuh"

namespace onepass::cuda {

extern "C" {

__global__ void __launch_bounds__(512) additive_backward_f32(const __grid_constant__ AdditiveBackward args) {
  backward::gradients<float>(args);
}

__global__ void __launch_bounds__(256, 1) additive_backward_f64(const __grid_constant__ AdditiveBackward args) {
  backward::gradients<double>(args);
}

__global__ void __launch_bounds__(512) additive_backward_bf16(const __grid_constant__ AdditiveBackward args) {
  backward::gradients<__nv_bfloat16>(args);
}

__global__ void __launch_bounds__(512) additive_backward_f16(const __grid_constant__ AdditiveBackward args) {
  backward::gradients<__half>(args);
}

__global__ void __launch_bounds__(kBackwardSumThreads) additive_backward_sums_f32(const __grid_constant__ AdditiveBackward args) {
  backward::sums<float>(args);
}

__global__ void __launch_bounds__(kBackwardSumThreads) additive_backward_sums_f64(const __grid_constant__ AdditiveBackward args) {
  backward::sums<double>(args);
}

__global__ void __launch_bounds__(kBackwardSumThreads) additive_backward_sums_bf16(const __grid_constant__ AdditiveBackward args) {
  backward::sums<__nv_bfloat16>(args);
}

__global__ void __launch_bounds__(kBackwardSumThreads) additive_backward_sums_f16(const __grid_constant__ AdditiveBackward args) {
  backward::sums<__half>(args);
}

}  // extern "C"

cudaError_t launch(const AdditiveBackward& args, const Launch& how, cudaStream_t stream) {
  using Kernel = void (*)(AdditiveBackward);
  constexpr std::pair<const char*, Kernel> kernels[] = {
      {"additive_backward_f32", additive_backward_f32},           {"additive_backward_f64", additive_backward_f64},
      {"additive_backward_bf16", additive_backward_bf16},         {"additive_backward_f16", additive_backward_f16},
      {"additive_backward_sums_f32", additive_backward_sums_f32}, {"additive_backward_sums_f64", additive_backward_sums_f64},
      {"additive_backward_sums_bf16", additive_backward_sums_bf16}, {"additive_backward_sums_f16", additive_backward_sums_f16},
  };
  for (const auto& [name, kernel] : kernels) {
    if (how.kernel != name) continue;
    if (how.blocks == 0) return cudaSuccess;
    if (how.shared > 48 * 1024) {
      const auto code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, how.shared);
      if (code != cudaSuccess) return code;
    }
    kernel<<<static_cast<unsigned>(how.blocks), how.threads, how.shared, stream>>>(args);
    return cudaGetLastError();
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace onepass::cuda
