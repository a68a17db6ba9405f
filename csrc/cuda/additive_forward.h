// Additive attention, forward: what the kernel takes and how it is launched.
#pragma once

#include "launch.h"

namespace onepass::cuda {

// With a null context (one of no columns must have an address all the same) scores alone are asked for: in weights, in the query's dtype,
// minus infinity where hidden. Else weights have the dtype that they are computed in.
struct AdditiveForward {
  Shape shape;
  Tensor query, keys, values, v;
  Visibility visibility;
  Tensor context, weights;
};

// A block has 128 source positions at a time.
constexpr int kForwardThreads = 256, kForwardSources = 128, kForwardResident = 2;
constexpr int64_t kForwardWidest = 8192;  // channels whose weights shared memory holds

// Bytes of shared memory for staged rows: of queries and keys, then, in the same place, of weights and 512 for each position's values.
constexpr int forward_staging(int queries, int value_rows) {
  const int scores = (queries + kForwardSources) * 80, context = queries * 80 + value_rows * 512;
  return 2 * (scores > context ? scores : context);
}

// `queries` of a tile, or as many as are fastest.
inline Launch additive_forward_launch(const Shape& shape, Dtype dtype, const Device& device, int queries = 0) {
  static constexpr const char* kNames[] = {"f32", "f64", "bf16", "f16"};
  const bool exact = dtype == Dtype::f64;
  Launch best;
  for (const int tile : {64, 16}) {
    if ((exact && tile != 16) || (queries != 0 && tile != queries)) continue;
    Launch launch;
    launch.kernel = std::string("additive_forward_") + kNames[static_cast<int>(dtype)] + "_" + std::to_string(tile);
    launch.blocks = shape.A > kForwardWidest ? 0 : shape.B * shape.H * ((shape.T + tile - 1) / tile);
    launch.threads = kForwardThreads;
    launch.shared = forward_staging(tile, exact ? 8 : 16) + (exact ? 0 : static_cast<int>(8 * ((shape.A + 15) / 16 * 16)));
    launch.resident = kForwardResident;
    const double slots = exact ? 100 : (device.capability >= 100 ? 2.2 : 3.4) + 0.3 * (64.0 / tile - 1);
    const double block = slots * tile * static_cast<double>(shape.S) * static_cast<double>(shape.A) / 32 / 4;  // clocks
    launch.seconds = (launch.blocks + device.processors - 1) / device.processors * block / 1.8e9;
    if (best.threads == 0 || launch.seconds < best.seconds) best = launch;
  }
  return best;
}

}  // namespace onepass::cuda
