// A decoding step's forward: context and weights of few queries, additive (where there is v) or multiplicative.
#pragma once

#include "step.h"

namespace onepass::cuda {

struct StepForward {
  Shape shape;
  Tensor query, keys, values, v;
  double scale = 1;
  Visibility visibility;
  Tensor context, weights;       // weights as they accumulate: float64 or float32
  void* parts = nullptr;         // step_forward_parts bytes, 16-byte aligned, where the launch has several parts
  unsigned* counters = nullptr;  // blocks / splits of them, zero before the launch and after it
  int splits = 1, cluster = 1;   // of the launch
};

inline Launch step_forward_launch(const Shape& shape, const StepDtypes& dtypes, bool additive, const Device& device) {
  const bool one = shape.T <= 1;
  const double row = additive ? (one ? 20 : 34) : one ? 5.5 : 9, column = one ? 7 : 12.5;
  const StepWork work{additive ? "additive_step_forward" : "multiplicative_step_forward", 1, additive, shape.A, shape.D, row, column};
  return step_launch(shape, dtypes, work, device);
}

inline int64_t step_forward_parts(const Shape& shape, Dtype dtype, const Launch& launch) {
  const int64_t parts = launch.splits / launch.cluster;
  return parts == 1 ? 0 : shape.B * shape.H * shape.T * parts * (step_padded(shape.D) + 2) * wide_size(size_of(dtype));
}

}  // namespace onepass::cuda
