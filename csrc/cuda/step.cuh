// What a step's kernels are made of beside their sums: who has what, which positions are seen, what blocks leave for each other, and who
// comes last.
#pragma once

#include "step_sums.cuh"
#include "visible.cuh"

namespace onepass::cuda {

// A block's place: batch, head, the first of its queries and how many there are, its piece of the source.
struct Place {
  int W, b, h, split, splits, cluster, t, steps, first, rows;

  __device__ __forceinline__ Place(const Shape& shape, int splits, int cluster, int W)
      : W(W), splits(splits), cluster(kClusters ? cluster : 1) {
    const unsigned T = shape.T, S = shape.S, H = shape.H, groups = (T + W - 1) / W, part = (S + splits - 1) / splits;
    const unsigned group = blockIdx.x / splits, row = group / groups;
    split = blockIdx.x - group * splits;
    t = (group - row * groups) * W;
    b = row / H;
    h = row - b * H;
    steps = min(static_cast<int>(T) - t, W);
    first = min(split * part, S);
    rows = min(part, S - first);
  }

  __device__ __forceinline__ bool gathers() const { return kClusters && cluster > 1; }  // whether there are others in the cluster
  __device__ __forceinline__ bool apart() const { return splits > cluster; }            // whether there are other parts
  __device__ __forceinline__ int rank() const { return kClusters ? split % cluster : 0; }
  __device__ __forceinline__ int part() const { return kClusters ? split / cluster : split; }
  __device__ __forceinline__ int parts() const { return kClusters ? splits / cluster : splits; }

  // Which of the groups of queries it has, computed only where it is asked for.
  __device__ __forceinline__ int64_t group(const Shape& shape) const {
    return (b * shape.H + h) * ceil_div(shape.T, W) + t / W;
  }
};

// Of every position a bit for each query that sees it.
__device__ __forceinline__ void mark_seen(const Visibility& v, const Place& place, int64_t S, Window* windows, uint16_t* seen) {
  if (threadIdx.x < place.steps) windows[threadIdx.x] = window(v, place.b, place.t + threadIdx.x, S);
  __syncthreads();
#pragma unroll 1
  for (int row = threadIdx.x; row < place.rows; row += kStepThreads) {
    const int s = place.first + row;
    unsigned bits = 0;
#pragma unroll 4
    for (int t = 0; t < place.steps; ++t) {
      const bool shown = kept(v, place.b, place.h, place.t + t, s);  // whatever the window: no byte waits for another
      bits |= static_cast<unsigned>(windows[t].has(s) & shown) << t;
    }
    seen[row] = static_cast<uint16_t>(bits);
  }
}

// What the block's threads do with numbers i < count, each with several on the way at once: load(i) of all of these comes before use(i, x).
template <class Load, class Use>
__device__ __forceinline__ void some_at_once(int count, const Load& load, const Use& use) {
  constexpr int kAtOnce = 4;
#pragma unroll 1
  for (int first = threadIdx.x; first < count; first += kAtOnce * kStepThreads) {
    decltype(load(0)) x[kAtOnce];
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (const int i = first + k * kStepThreads; i < count) x[k] = load(i);
#pragma unroll
    for (int k = 0; k < kAtOnce; ++k)
      if (const int i = first + k * kStepThreads; i < count) use(i, x[k]);
  }
}

// What threads hold of query `threadIdx.x % W`, combined in one fixed order for all of them.
template <class R, class F>
__device__ __forceinline__ R over_threads(R x, int W, R* exchange, F combine) {
#pragma unroll 1
  for (int distance = 16; distance >= W; distance /= 2) x = combine(x, __shfl_xor_sync(~0u, x, distance));
  __syncthreads();
  if (threadIdx.x % 32 < W) exchange[threadIdx.x / 32 * kMostQueries + threadIdx.x % 32] = x;
  __syncthreads();
  x = exchange[threadIdx.x % W];
#pragma unroll
  for (int warp = 1; warp < kStepWarps; ++warp) x = combine(x, exchange[warp * kMostQueries + threadIdx.x % W]);
  return x;
}

template <class R>
__device__ __forceinline__ R larger(R x, R y) {
  return x > y ? x : y;
}

template <class R>
__device__ __forceinline__ R plus(R x, R y) {
  return x + y;
}

// What parts leave of each query: a row of numbers and two more, each by [parts, B, H, T].
template <class R>
struct Parts {
  R *rows, *pairs;
  int64_t padded, first, count;  // of a row; of this block's queries; of all queries

  __device__ Parts(void* data, const Shape& shape, int64_t padded, const Place& place)
      : rows(static_cast<R*>(data)), padded(padded), first((static_cast<int64_t>(place.b) * shape.H + place.h) * shape.T + place.t),
        count(shape.B * shape.H * shape.T) {
    pairs = rows + place.parts() * count * padded;
  }

  __device__ __forceinline__ R* row(int part, int t) const { return rows + (part * count + first + t) * padded; }
  __device__ __forceinline__ R* pair(int part, int t) const { return pairs + (part * count + first + t) * 2; }
};

// What a block leaves of each query for its cluster, in shared memory: a row of numbers and four more.
template <class R>
struct Left {
  R* rows;
  int64_t padded;

  __device__ __forceinline__ Left(void* data, int64_t padded) : rows(static_cast<R*>(data)), padded(padded) {}
  __device__ __forceinline__ R* row(int t) const { return rows + t * (padded + kMore); }
  __device__ __forceinline__ R* more(int t) const { return row(t) + padded; }
};

// Whether this block is the last of so many to come here; what all of them wrote before may be read then. The counter is zero again.
__device__ __forceinline__ bool comes_last(unsigned* counter, int blocks) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicInc(counter, blocks - 1) == blocks - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

}  // namespace onepass::cuda

// The list of a direction's kernels, as kernel_table.cuh takes it: of both families, for one query and for four at a time; of queries T
// over a memory K. `each` is what step_resident takes.
#define ONEPASS_STEPS_OF_WIDTH(MAKE, direction, each, name, T, K, Q) \
  MAKE(additive_step_##direction##_##name##_##Q, (kStepThreads, step_resident(Q, each, sizeof(K))), step_##direction<T, K, Q, true>) \
  MAKE(multiplicative_step_##direction##_##name##_##Q, (kStepThreads, step_resident(Q, each, sizeof(K))), step_##direction<T, K, Q, false>)
#define ONEPASS_STEPS_OF(MAKE, direction, each, name, T, K) \
  ONEPASS_STEPS_OF_WIDTH(MAKE, direction, each, name, T, K, 1) ONEPASS_STEPS_OF_WIDTH(MAKE, direction, each, name, T, K, 4)
#define ONEPASS_STEPS(MAKE, direction, each) \
  ONEPASS_STEPS_OF(MAKE, direction, each, f32, float, float) ONEPASS_STEPS_OF(MAKE, direction, each, f32_over_bf16, float, __nv_bfloat16) \
  ONEPASS_STEPS_OF(MAKE, direction, each, bf16, __nv_bfloat16, __nv_bfloat16) ONEPASS_STEPS_OF(MAKE, direction, each, f16, __half, __half) \
  ONEPASS_STEPS_OF(MAKE, direction, each, f64, double, double)
