// Backward of additive scores: what the kernels take, and how they are launched.
#pragma once

#include <algorithm>

#include "launch.h"

namespace onepass::cuda {

// A warp has 64 channels, two of each lane, and 8 positions of the source; queries come 16 at a time.
constexpr int kBackwardChannels = 64, kBackwardPositions = 8, kBackwardQueries = 16, kBackwardSumThreads = 256;

// How the work is cut: into `splits` parts of so many positions by `query_splits` parts of so many queries.
struct BackwardParts {
  int splits = 1, query_splits = 1, positions = 0, queries = 0;
};

// From the gradients of scores [B, H, T, S], in what the dtype is computed in and not read where hidden, those of the query [B, H, T, A],
// which may be absent, keys [B, H, S, A] and v [H, A].
// Parts are scratch, as BackwardLaunch says, in what the dtype is computed in: of queries' [splits, B, H, T, A], unless absent, where the
// source is split, of keys' [query_splits, B, H, S, A] where queries are, and always of v's, [query_splits, splits, B, H, A].
struct AdditiveBackward {
  Shape shape;
  Tensor query, keys, v, grad_scores;
  Visibility visibility;
  Tensor grad_query, grad_keys, grad_v;
  void *query_parts = nullptr, *key_parts = nullptr, *v_parts = nullptr;
  BackwardParts parts;
};

// Two launches: the gradients, or parts of them, then sums of the parts.
struct BackwardLaunch {
  Launch gradients, sums;
  BackwardParts parts;
  int64_t query_parts = 0, key_parts = 0, v_parts = 0;  // numbers in the scratch
};

// The launches for parts of so many warps and queries.
inline BackwardLaunch backward_launch(const Shape& shape, Dtype dtype, const Device& device, int warps, int64_t queries) {
  // Clocks of a warp's element, staging and sums included: an sm_80 takes two for most instructions.
  const double slots = device.capability == 80 ? 16 : packs(device) ? 6.5 : 9.5;
  constexpr double kOverhead = 3e-6;
  const Rates rate = rates(device);
  const int64_t rows = shape.B * shape.H, across = ceil_div(shape.A, kBackwardChannels);
  BackwardLaunch found;
  BackwardParts& parts = found.parts;
  parts.positions = warps * kBackwardPositions;
  parts.queries = static_cast<int>(queries);
  parts.splits = static_cast<int>(std::max<int64_t>(1, ceil_div(shape.S, parts.positions)));
  parts.query_splits = static_cast<int>(std::max<int64_t>(1, ceil_div(shape.T, queries)));
  if (parts.splits > 1) found.query_parts = parts.splits * rows * shape.T * shape.A;
  if (parts.query_splits > 1) found.key_parts = parts.query_splits * rows * shape.S * shape.A;
  found.v_parts = int64_t{parts.splits} * parts.query_splits * rows * shape.A;

  Launch& gradients = found.gradients;
  gradients.kernel = std::string("additive_backward_") + symbol_of(dtype);
  gradients.splits = parts.splits;
  gradients.blocks = rows * across * parts.splits * parts.query_splits;
  gradients.threads = 32 * warps;
  const int numbers = kBackwardQueries * (kBackwardChannels + 2 * gradients.threads + parts.positions) + 4 * gradients.threads;
  gradients.shared = (dtype == Dtype::f64 ? 8 : 4) * numbers + 16;
  gradients.resident = std::max(1, std::min(rate.shared / (gradients.shared + 1024), (dtype == Dtype::f64 ? 8 : 16) / warps));
  found.sums.kernel = std::string("additive_backward_sums_") + symbol_of(dtype);
  found.sums.threads = kBackwardSumThreads;
  found.sums.blocks = ceil_div(shape.H * shape.A, 32);
  if (parts.splits > 1) found.sums.blocks += ceil_div(rows * shape.T * shape.A, kBackwardSumThreads);
  if (parts.query_splits > 1) found.sums.blocks += ceil_div(rows * shape.S * shape.A, kBackwardSumThreads);

  const auto real = [](int64_t number) { return static_cast<double>(number); };
  const double held = std::min<double>(gradients.resident, real(ceil_div(gradients.blocks, device.processors)));
  const double issued = 128 * std::min(1.0, held * warps / 8);  // four instructions of 32 lanes a clock, from 8 warps on
  const double block = slots * parts.positions * kBackwardChannels * real(queries);
  const double issue = real(ceil_div(gradients.blocks, device.processors)) * block / issued / rate.clock;
  const double parts_bytes = 4.0 * real(found.query_parts + found.key_parts);
  const double bytes = 4.0 * real(rows * (2 * (shape.T + shape.S) * shape.A + shape.T * shape.S * across)) + parts_bytes;
  gradients.seconds = std::max(issue, bytes / rate.bandwidth);
  if (parts_bytes > 0) found.sums.seconds = kOverhead + parts_bytes / rate.bandwidth;
  return found;
}

// The parts that are predicted to take least time, none smaller than it takes to give every processor 16 warps.
inline BackwardLaunch fastest_backward_launch(const Shape& shape, Dtype dtype, const Device& device) {
  const int64_t most = dtype == Dtype::f64 ? 8 : 16, fewest = std::max<int64_t>(1, ceil_div(shape.S, most * kBackwardPositions));
  const int64_t all_queries = std::max<int64_t>(1, ceil_div(shape.T, kBackwardQueries));  // tiles of them
  BackwardLaunch best;
  const auto seconds = [](const BackwardLaunch& launch) { return launch.gradients.seconds + launch.sums.seconds; };
  for (int64_t splits = fewest, warps = 0; warps != 1; splits *= 2) {
    warps = std::max<int64_t>(1, ceil_div(ceil_div(shape.S, splits), kBackwardPositions));
    bool filled = false;
    for (int64_t queries = all_queries, last = 0; !filled && queries != last; last = queries, queries = ceil_div(queries, 2)) {
      const BackwardLaunch launch = backward_launch(shape, dtype, device, static_cast<int>(warps), queries * kBackwardQueries);
      if (best.parts.positions == 0 || seconds(launch) < seconds(best)) best = launch;
      filled = launch.gradients.blocks * warps >= 16 * device.processors;
      if (filled && queries == all_queries) return best;
    }
  }
  return best;
}

// Without the query's gradient the work is cut as with it, so that the others keep their bits.
inline BackwardLaunch additive_backward_launch(const Shape& shape, Dtype dtype, const Device& device, bool of_query = true) {
  BackwardLaunch found = fastest_backward_launch(shape, dtype, device);
  if (!of_query && found.parts.splits > 1) {
    found.sums.blocks -= ceil_div(shape.B * shape.H * shape.T * shape.A, kBackwardSumThreads);
    found.query_parts = 0;
  }
  return found;
}

}  // namespace onepass::cuda
