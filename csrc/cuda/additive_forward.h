// Additive attention, forward: what the kernel takes and how it is launched.
#pragma once

#include "launch.h"

namespace onepass::cuda {

// Without a context scores alone are asked for: in weights, in the query's dtype, minus infinity where hidden. Else weights have the dtype
// that they are computed in.
struct AdditiveForward {
  Shape shape;
  Tensor query, keys, values, v;
  Visibility visibility;
  Tensor context, weights;
};

// A block has 16 queries for each row of a thread's, and 128 source positions at a time.
constexpr int kForwardThreads = 256, kForwardSources = 128;
constexpr int64_t kForwardWidest = 8192;  // channels whose weights shared memory holds

// Bytes of shared memory for staged rows: of queries and keys, then, in the same place, of weights and 1 KB for each position's values.
constexpr int forward_staging(int queries, int value_rows) {
  const int scores = (queries + kForwardSources) * 80, context = queries * 80 + value_rows * 1024;
  return 2 * (scores > context ? scores : context);
}

inline Launch additive_forward_launch(const Shape& shape, Dtype dtype, const Device& device) {
  const bool exact = dtype == Dtype::f64;
  const double issue = device.capability >= 100 ? 2.2 : 3.4;  // issue slots per element of the largest tile
  Launch best;
  for (const int rows : {4, 2, 1}) {
    if (exact && rows > 1) continue;
    const int queries = 16 * rows;
    Launch launch;
    const char* names[] = {"f32", "f64", "bf16", "f16"};
    launch.kernel = std::string("additive_forward_") + names[static_cast<int>(dtype)] + "_" + std::to_string(queries);
    launch.blocks = shape.B * shape.H * ((shape.T + queries - 1) / queries);
    launch.threads = kForwardThreads;
    launch.shared = forward_staging(queries, exact ? 8 : 16) + (exact ? 0 : static_cast<int>(8 * ((shape.A + 15) / 16 * 16)));
    launch.resident = 2;
    const double slots = exact ? 100 : issue + 0.7 * (4.0 / rows - 1) / 3;
    const double block = slots * queries * static_cast<double>(shape.S) * static_cast<double>(shape.A) / 32 / 4;  // clocks
    const int64_t waves = (launch.blocks + device.processors - 1) / device.processors;
    launch.seconds = waves * block / 1.8e9;
    if (best.threads == 0 || launch.seconds < best.seconds) best = launch;
  }
  return shape.A > kForwardWidest ? Launch{} : best;
}

}  // namespace onepass::cuda
