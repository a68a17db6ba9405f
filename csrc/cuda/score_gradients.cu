#include "kernel_table.cuh"
#include "score_gradients.cuh"

#define KERNELS_OF(MAKE, name, T, blocks) \
  MAKE(score_gradients_##name##_64, (kProductThreads, blocks), score_gradients::products<T, 8>) \
  MAKE(score_gradients_##name##_16, (kProductThreads, blocks), score_gradients::products<T, 2>)
#define KERNELS(MAKE) \
  KERNELS_OF(MAKE, f32, float, 4) \
  KERNELS_OF(MAKE, bf16, __nv_bfloat16, 4) \
  KERNELS_OF(MAKE, f16, __half, 4) \
  KERNELS_OF(MAKE, f64, double, 2) \
  MAKE(score_gradients_softmax_f32, (kSoftmaxThreads), score_gradients::softmax<float>) \
  MAKE(score_gradients_softmax_f64, (kSoftmaxThreads), score_gradients::softmax<double>)

ONEPASS_KERNELS_OF(ScoreGradients, KERNELS)
