#include "score_gradients.cuh"

#include <utility>

namespace onepass::cuda {

extern "C" {

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_f32_64(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<float, 8>(args);
}

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_f32_16(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<float, 2>(args);
}

__global__ void __launch_bounds__(kProductThreads, 2) score_gradients_f64_64(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<double, 8>(args);
}

__global__ void __launch_bounds__(kProductThreads, 2) score_gradients_f64_16(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<double, 2>(args);
}

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_bf16_64(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<__nv_bfloat16, 8>(args);
}

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_bf16_16(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<__nv_bfloat16, 2>(args);
}

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_f16_64(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<__half, 8>(args);
}

__global__ void __launch_bounds__(kProductThreads, 4) score_gradients_f16_16(const __grid_constant__ ScoreGradients args) {
  score_gradients::products<__half, 2>(args);
}

__global__ void __launch_bounds__(kSoftmaxThreads) score_gradients_softmax_f32(const __grid_constant__ ScoreGradients args) {
  score_gradients::softmax<float>(args);
}

__global__ void __launch_bounds__(kSoftmaxThreads) score_gradients_softmax_f64(const __grid_constant__ ScoreGradients args) {
  score_gradients::softmax<double>(args);
}

}  // extern "C"

cudaError_t launch(const ScoreGradients& args, const Launch& how, cudaStream_t stream) {
  using Kernel = void (*)(ScoreGradients);
  constexpr std::pair<const char*, Kernel> kernels[] = {
      {"score_gradients_f32_64", score_gradients_f32_64},
      {"score_gradients_f32_16", score_gradients_f32_16},
      {"score_gradients_f64_64", score_gradients_f64_64},
      {"score_gradients_f64_16", score_gradients_f64_16},
      {"score_gradients_bf16_64", score_gradients_bf16_64},
      {"score_gradients_bf16_16", score_gradients_bf16_16},
      {"score_gradients_f16_64", score_gradients_f16_64},
      {"score_gradients_f16_16", score_gradients_f16_16},
      {"score_gradients_softmax_f32", score_gradients_softmax_f32},
      {"score_gradients_softmax_f64", score_gradients_softmax_f64},
  };
  for (const auto& [name, kernel] : kernels) {
    if (how.kernel != name) continue;
    if (how.blocks > 0) kernel<<<static_cast<unsigned>(how.blocks), how.threads, how.shared, stream>>>(args);
    return cudaGetLastError();
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace onepass::cuda
