// The parts of gradients added up, each in its order.
#pragma once

#include "additive_backward.h"
#include "arithmetic.cuh"

namespace onepass::cuda::backward {

// A number of dq or of dk from each part, into the row and channel that it belongs to.
template <class T>
__device__ __forceinline__ void add_parts(const AdditiveBackward& args, const Tensor& result, const void* parts, int count,
                                          int64_t rows, int64_t at) {
  using R = Wide<T>;
  const int64_t A = args.shape.A, H = args.shape.H, numbers = args.shape.B * H * rows * A;
  if (at >= numbers) return;
  R sum = 0;
  for (int part = 0; part < count; ++part) sum += static_cast<const R*>(parts)[part * numbers + at];
  const int64_t row = at / A, head = row / rows;
  reinterpret_cast<T*>(result.at(head / H, head % H, row % rows))[at % A] = narrow<T>(sum);
}

// 32 numbers of dv: each of 8 warps adds up every eighth part, and the first of them what all have.
template <class T>
__device__ __forceinline__ void add_v_parts(const AdditiveBackward& args, int64_t first) {
  using R = Wide<T>;
  __shared__ R sums[8][32];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t A = args.shape.A, numbers = args.shape.H * A, at = first + lane;
  const int64_t count = args.shape.B * args.parts.splits * args.parts.query_splits;
  R sum = 0;
  for (int64_t part = warp; part < count && at < numbers; part += 8) sum += static_cast<const R*>(args.v_parts)[part * numbers + at];
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || at >= numbers) return;
  for (int other = 1; other < 8; ++other) sum += sums[other][lane];
  reinterpret_cast<T*>(args.grad_v.at(0, at / A, 0))[at % A] = narrow<T>(sum);
}

template <class T>
__device__ __forceinline__ void sums(const AdditiveBackward& args) {
  const Shape& shape = args.shape;
  const int64_t numbers = shape.B * shape.H * shape.A;
  const int64_t of_queries = args.query_parts != nullptr ? ceil_div(numbers * shape.T, kBackwardSumThreads) : 0;
  const int64_t of_keys = args.parts.query_splits > 1 ? ceil_div(numbers * shape.S, kBackwardSumThreads) : 0;
  int64_t block = blockIdx.x;
  if (block < of_queries) {
    add_parts<T>(args, args.grad_query, args.query_parts, args.parts.splits, shape.T, block * kBackwardSumThreads + threadIdx.x);
  } else if ((block -= of_queries) < of_keys) {
    add_parts<T>(args, args.grad_keys, args.key_parts, args.parts.query_splits, shape.S, block * kBackwardSumThreads + threadIdx.x);
  } else {
    add_v_parts<T>(args, (block - of_keys) * 32);
  }
}

}  // namespace onepass::cuda::backward
