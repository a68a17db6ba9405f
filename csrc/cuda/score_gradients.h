// Gradients of scores and of values: what the kernels take, and how they are launched.
#pragma once

#include <algorithm>

#include "launch.h"

namespace onepass::cuda {

// A block computes 64 columns of a product, and 64 rows of them or 16; a warp has a row of the softmax.
constexpr int kProductColumns = 64, kProductThreads = 128, kSoftmaxThreads = 256;

// With p = grad_context . values + grad_weights, either of which may be absent, and 0 where hidden: grad_scores [B, H, T, S] =
// weights (p - sum_s weights p), and grad_values [B, H, S, D] = sum_t weights grad_context, both 0 where nothing is visible. Weights,
// grad_weights and grad_scores have what the dtype is computed in. `inner` is scratch of that: each tile's part of the sum.
struct ScoreGradients {
  Shape shape;
  Tensor weights, values, grad_context, grad_weights;
  Visibility visibility;
  Tensor grad_scores, grad_values;
  void* inner = nullptr;  // [tiles of 64 positions, B, H, T]
};

// Two launches: the products p, in grad_scores, and grad_values; then the softmax.
struct ScoreGradientsLaunch {
  Launch products, softmax;
  int64_t inner = 0;  // numbers in the scratch
};

inline ScoreGradientsLaunch score_gradients_launch(const Shape& shape, Dtype dtype, const Device& device) {
  constexpr double kSlots = 2;  // issue slots of a multiply-add, staging included
  const Rates rate = rates(device);
  const int64_t heads = shape.B * shape.H, across = ceil_div(shape.S, kProductColumns);
  const int queries = shape.T > 16 ? 64 : 16;
  ScoreGradientsLaunch found;
  found.inner = across * heads * shape.T;
  found.products.kernel = std::string("score_gradients_") + symbol_of(dtype) + "_" + std::to_string(queries);
  found.products.threads = kProductThreads;
  found.products.blocks = heads * across * (ceil_div(shape.T, queries) + ceil_div(shape.D, kProductColumns));
  found.products.resident = dtype == Dtype::f64 ? 2 : 4;
  found.softmax.kernel = std::string("score_gradients_softmax_") + (dtype == Dtype::f64 ? "f64" : "f32");
  found.softmax.threads = kSoftmaxThreads;
  found.softmax.blocks = shape.S > 0 ? ceil_div(heads * shape.T, kSoftmaxThreads / 32) : 0;
  found.softmax.resident = 4;

  const double issued = 128 * rate.clock * std::min<double>(device.processors, std::max<int64_t>(1, found.products.blocks));
  const double scores = static_cast<double>(heads * shape.T * shape.S);
  const double products = kSlots * scores * static_cast<double>(shape.D) * 2 / issued;
  const double bytes = static_cast<double>(heads * (shape.T + 2 * shape.S) * shape.D) * size_of(dtype) + 8 * scores;
  found.products.seconds = std::max(products, bytes / rate.bandwidth);
  found.softmax.seconds = 12 * scores / rate.bandwidth;
  return found;
}

}  // namespace onepass::cuda
