// A decoding step's backward: what the query gets, and the gradients of scores; the memory's own gradients are left to all steps together.
#pragma once

#include "step.h"

namespace onepass::cuda {

struct StepBackward {
  Shape shape;
  Tensor query, keys, values, v;
  double scale = 1;  // of multiplicative scores
  Visibility visibility;
  Tensor weights, grad_context, grad_weights;  // weights and their gradient as they accumulate; either gradient may be absent
  Tensor grad_query, grad_scores;              // grad_scores as they accumulate, times the scale
  void* parts = nullptr;                       // step_backward_parts bytes, 16-byte aligned, where the launch has several parts
  unsigned* counters = nullptr;                // blocks / splits of them, zero before the launch and after it
  int splits = 1, cluster = 1;                 // of the launch
};

inline Launch step_backward_launch(const Shape& shape, const StepDtypes& dtypes, bool additive, const Device& device) {
  const bool one = shape.T <= 1;
  const double row = one ? 5.5 : 9, column = additive ? (one ? 24 : 48) : one ? 8 : 17;
  const StepWork work{additive ? "additive_step_backward" : "multiplicative_step_backward", 2, false, shape.D, shape.A, row, column};
  return step_launch(shape, dtypes, work, device);
}

inline int64_t step_backward_parts(const Shape& shape, Dtype dtype, const Launch& launch) {
  const int64_t parts = launch.splits / launch.cluster;
  return parts == 1 ? 0 : shape.B * shape.H * shape.T * parts * (2 * step_padded(shape.A) + 2) * wide_size(size_of(dtype));
}

}  // namespace onepass::cuda
