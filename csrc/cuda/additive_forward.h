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
constexpr int kForwardNotes = 3 << 10;    // bytes that a block takes besides what it is launched with, rounded up
constexpr int64_t kForwardWidest = 8192;  // channels whose weights shared memory holds

// Bytes of shared memory for staged rows: of queries and keys, then, in the same place, of weights and 512 for each position's values.
constexpr int forward_staging(int queries, int value_rows) {
  const int scores = (queries + kForwardSources) * 80, context = queries * 80 + value_rows * 512;
  return 2 * (scores > context ? scores : context);
}

// Cycles of a scheduler for a warp's elements: FP32 and issue slots of 32 pairs and channels, with what staging adds in smaller tiles.
inline double forward_cycles(int queries, bool exact, const Device& device) {
  if (exact) return 100;
  const double staging = 0.55 * (64.0 / queries - 1);
  return (packs(device) ? 3.0 : device.capability == 80 ? 5.3 : 3.7) + staging;
}

// Of `queries` to a tile, or of as many as are fastest. There is no kernel, and no name of one, for more channels than kForwardWidest.
inline Launch additive_forward_launch(const Shape& shape, Dtype dtype, const Device& device, int queries = 0) {
  const bool exact = dtype == Dtype::f64;
  const Rates rate = rates(device);
  const double T = shape.T, S = shape.S, A = shape.A, D = shape.D, rows = shape.B * shape.H;
  const double bytes = rows * ((T + S) * (A + D) * size_of(dtype) + T * S * (exact ? 8 : 4));
  Launch best;
  if (shape.A > kForwardWidest) return best;
  for (const int tile : {64, 32, 16}) {
    if ((exact && tile != 16) || (queries != 0 && tile != queries)) continue;
    Launch launch;
    launch.kernel = std::string("additive_forward_") + symbol_of(dtype) + "_" + std::to_string(tile);
    launch.blocks = shape.B * shape.H * ceil_div(shape.T, tile);
    launch.threads = kForwardThreads;
    launch.shared = forward_staging(tile, exact ? 8 : 16) + (exact ? 0 : static_cast<int>((shape.A + 15) / 16 * 16 * 8));
    const int room = rate.shared / (launch.shared + kForwardNotes);
    launch.resident = room < kForwardResident ? room : kForwardResident;
    const double block = (forward_cycles(tile, exact, device) * A + 1.1 / rate.fp32 * D) * tile * S / 128;
    const int64_t busiest = ceil_div(launch.blocks, device.processors);
    const double computed = busiest * block / rate.clock, moved = bytes / rate.bandwidth;
    launch.seconds = computed > moved ? computed : moved;
    if (best.kernel.empty() || launch.seconds < best.seconds) best = launch;
  }
  return best;
}

}  // namespace onepass::cuda
