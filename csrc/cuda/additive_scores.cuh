// Additive scores of a tile of queries and source positions: v . tanh(q + k), tanh(q + k) = 1 - 2 r, r = 1 / (1 + e^(2q) e^(2k)).
//
// Exponentials are taken of rows as they are staged. With u = 1 / v and d = u + u e^(2q) e^(2k), reciprocals merge one after another:
//   n / p + 1 / d = (n d + p) / (p d),
// so a channel costs three operations however many merge, and a reciprocal is shared among them. A pair whose rows are so large that the
// product could overflow, or so small that 1 - 2r would lose their digits, is summed anew from tanh itself: by its own rows alone, so that
// no other position changes its bits.
#pragma once

#include "staging.cuh"
#include "visible.cuh"

namespace onepass::cuda {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kSources = 128, kColumns = 8;  // source positions of a tile, and of a thread: 16 apart, so that rows meet no bank twice

// How many channels share a reciprocal. From sm_100 on, two such sums go side by side; with 64 lanes to a processor, it is arithmetic that
// is short and not special functions.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
using Lane = Pair;
constexpr int kMerged = 4;
#elif defined(__CUDA_ARCH__) && __CUDA_ARCH__ == 800
using Lane = float;
constexpr int kMerged = 2;
#else
using Lane = float;
constexpr int kMerged = 4;
#endif
constexpr int kLanes = sizeof(Lane) / sizeof(float), kTogether = kMerged * kLanes;
constexpr float kBits = 122;           // of float32's 127, which a product of denominators may take: sums of such products take more
constexpr float kWidest = 20;          // |q| + |k| up to which exponentials are multiplied
constexpr float kBlank = 1.0f / 4096;  // what a channel whose v is 0 adds, at e^(2k) = 0

// A block's threads: 16 rows of 16, half a warp each. Thread (y, x) has R queries from R y on and positions x, x + 16, ...
__device__ __forceinline__ int thread_y() { return threadIdx.x / 16; }
__device__ __forceinline__ int thread_x() { return threadIdx.x % 16; }

// To copy, a warp takes 8 rows, and lanes of one chunk are neighbours.
__device__ __forceinline__ int copied_row() { return threadIdx.x / 32 * 8 + threadIdx.x % 8; }
__device__ __forceinline__ int copied_chunk() { return threadIdx.x % 32 / 8; }

// The same of all threads, combined in one order; `partial` has a number per warp and is free once all have met again.
template <class F>
__device__ __forceinline__ float combined(float x, float* partial, const F& combine) {
  for (int distance = 16; distance; distance /= 2) x = combine(x, __shfl_xor_sync(~0u, x, distance));
  if (threadIdx.x % 32 == 0) partial[threadIdx.x / 32] = x;
  __syncthreads();
  x = partial[0];
  for (int warp = 1; warp < kWarps; ++warp) x = combine(x, partial[warp]);
  __syncthreads();
  return x;
}

// v as the merged sums take it, once the block has met: scaled by a power of 2, so that the largest is between 1 and 2.
struct Weighting {
  float total, unscale, blanks;
  float limit;  // |q| + |k| up to which reciprocals merge
};

// For each kStep channels, of which the last are filled up with blanks: what e^(2q) e^(2k) and what 1 is multiplied by in a denominator.
struct Factors {
  float product[kStep<float>], term[kStep<float>];
};

template <class T>
__device__ __forceinline__ void weigh(const T* v, int A, Factors* factors, float* partial, Weighting& found) {
  constexpr int kBlock = kStep<float>;
  const int padded = (A + kBlock - 1) / kBlock * kBlock;
  const auto larger = [](float a, float b) { return fmaxf(a, b); };
  const auto sum = [](float a, float b) { return a + b; };
  float own = 0, largest = 0;
  for (int a = threadIdx.x; a < A; a += kThreads) {
    const float x = wide(v[a]);
    own += x;
    largest = fmaxf(largest, x == x ? fabsf(x) : INFINITY);
  }
  const float total = combined(own, partial, sum);
  largest = combined(largest, partial, larger);
  const int exponent = __float_as_int(largest) & 0x7F800000;
  const float scale = __int_as_float(0x7F000000 - exponent);
  own = 0;
  for (int a = threadIdx.x; a < padded; a += kThreads) {
    const float x = a < A ? wide(v[a]) * scale : 0.0f;
    factors[a / kBlock].product[a % kBlock] = x == 0 ? 0.0f : 1 / x;
    factors[a / kBlock].term[a % kBlock] = x == 0 ? 1 / kBlank : 1 / x;
    own += x == 0 ? 1.0f : 0.0f;
  }
  const float blanks = combined(own, partial, sum);
  own = 0;
  for (int group = threadIdx.x; group < padded / kMerged; group += kThreads) {
    const int first = group / kLanes * kTogether + group % kLanes;
    float bits = 0;
    for (int i = 0; i < kMerged; ++i) {
      const int a = first + i * kLanes;
      bits += log2f(fabsf(factors[a / kBlock].term[a % kBlock]));
    }
    own = fmaxf(own, bits);
  }
  const float most = combined(own, partial, larger), limit = fminf(((kBits - most) / kMerged - 1) / (2 * kLog2E), kWidest);
  const bool merges = A > kFewChannels && largest > 1e-30f && largest < 1e30f;
  if (threadIdx.x == 0) found = {total, __int_as_float(exponent), blanks, merges ? limit : -1.0f};
}

// Channels that are taken from shared memory at once.
constexpr int kTaken = kTogether < 4 ? 4 : kTogether;
struct alignas(kVector) Channels {
  Lane x[kTaken / kLanes];
};

__device__ __forceinline__ float quotient(float numerator, float denominator, float sum) {
  return fmaf(numerator, reciprocal(denominator), sum);
}
__device__ __forceinline__ float quotient(Pair numerator, Pair denominator, float sum) {
  return quotient(numerator.y, denominator.y, quotient(numerator.x, denominator.x, sum));
}

// sum + the 1 / d of the channels, d = term + q k.
__device__ __forceinline__ float add_reciprocals(float sum, const Channels& q, const Channels& k, const Channels& term) {
#pragma unroll
  for (int first = 0; first < kTaken / kLanes; first += kMerged) {
    Lane product = multiply_add(q.x[first], k.x[first], term.x[first]), numerator;
#pragma unroll
    for (int i = first + 1; i < first + kMerged; ++i) {
      const Lane next = multiply_add(q.x[i], k.x[i], term.x[i]);
      numerator = i == first + 1 ? product + next : multiply_add(numerator, next, product);
      product = product * next;
    }
    sum = quotient(numerator, product, sum);
  }
  return sum;
}

// Sums over channels of a tile of 16 R queries and kSources positions, a pair of which has bit kColumns i + j of a thread's words.
template <class T, int R>
struct ScoreTile {
  using W = Wide<T>;
  static constexpr int kQueries = 16 * R, kRows = kQueries + kSources;

  char* staging;  // two tiles of kRows rows
  const Factors* factors;
  float* sizes;  // [kRows] of |q| and |k|, as the merged sums found them
  const T* v;
  int A;
  bool pieces;
  const T *query, *keys[2];  // the rows that this thread copies; of queries, if there are as many

  __device__ __forceinline__ char* place(int buffer, int row) const {
    return staging + (buffer * kRows + row) * kPitch + copied_chunk() * kVector;
  }

  __device__ __forceinline__ bool copies_query() const { return kQueries >= 64 || copied_row() < kQueries; }

  __device__ __forceinline__ void stage(int a, int buffer) const {
    a += copied_chunk() * kChunk<T>;
    const int count = A - a, at = count > 0 ? a : 0;
    if (copies_query()) copy<kChunk<T>>(place(buffer, copied_row()), query + at, count, pieces);
#pragma unroll
    for (int i = 0; i < 2; ++i) copy<kChunk<T>>(place(buffer, kQueries + 64 * i + copied_row()), keys[i] + at, count, pieces);
  }

  // The thread's own chunks as the sums take them: widened, or e^(2x) times the factor.
  template <bool Merge>
  __device__ __forceinline__ void prepare(char* at, const float* multipliers, float& size) const {
    WideChunk<T> chunk = widened<T>(*reinterpret_cast<const Chunk<T, kChunk<T>>*>(at));
    if constexpr (Merge) {
#pragma unroll
      for (int i = 0; i < kChunk<T>; ++i) {
        size = fmaxf(size, fabsf(chunk.x[i]));
        chunk.x[i] = exponential<2>(chunk.x[i]);
        if (multipliers != nullptr) chunk.x[i] *= multipliers[i];
      }
    }
    *reinterpret_cast<WideChunk<T>*>(at) = chunk;
  }

  __device__ __forceinline__ void add_merged(int buffer, const float* terms, W (&sums)[R][kColumns]) const {
    const char* queries = staging + (buffer * kRows + R * thread_y()) * kPitch;
    const char* positions = staging + (buffer * kRows + kQueries + thread_x()) * kPitch;
#pragma unroll 1
    for (int a = 0; a < kStep<T>; a += kTaken) {
      const auto taken = [a](const void* row) { return *reinterpret_cast<const Channels*>(static_cast<const float*>(row) + a); };
      const Channels term = taken(terms);
      Channels q[R];
#pragma unroll
      for (int i = 0; i < R; ++i) q[i] = taken(queries + i * kPitch);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const Channels k = taken(positions + 16 * j * kPitch);
#pragma unroll
        for (int i = 0; i < R; ++i) sums[i][j] = add_reciprocals(sums[i][j], q[i], k, term);
      }
    }
  }

  __device__ __forceinline__ void add_tangents(int buffer, int a, unsigned wanted, W (&sums)[R][kColumns]) const {
    const char* queries = staging + (buffer * kRows + R * thread_y()) * kPitch;
    const char* positions = staging + (buffer * kRows + kQueries + thread_x()) * kPitch;
    const int count = wanted == 0 ? 0 : min(kStep<T>, A - a);
#pragma unroll 1
    for (int c = 0; c < count; ++c) {
      const W weight = wide(v[a + c]);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const W k = reinterpret_cast<const W*>(positions + 16 * j * kPitch)[c];
#pragma unroll
        for (int i = 0; i < R; ++i) {
          const W q = reinterpret_cast<const W*>(queries + i * kPitch)[c];
          if (wanted >> (kColumns * i + j) & 1) sums[i][j] += weight * hyperbolic_tangent(q + k);
        }
      }
    }
  }

  // All channels, staged while those before are summed. With Merge of all pairs, leaving their rows' sizes, else of those wanted.
  template <bool Merge>
  __device__ __forceinline__ void add(unsigned wanted, W (&sums)[R][kColumns]) const {
    float size[3] = {};
    if (A > 0) stage(0, 0);
#pragma unroll 1
    for (int a = 0, buffer = 0; a < A; a += kStep<T>, buffer ^= 1) {
      arrived();
      const float* multipliers = Merge ? factors[a / kStep<T>].product + copied_chunk() * kChunk<T> : nullptr;
      if (copies_query()) prepare<Merge>(place(buffer, copied_row()), nullptr, size[0]);
#pragma unroll
      for (int i = 0; i < 2; ++i) prepare<Merge>(place(buffer, kQueries + 64 * i + copied_row()), multipliers, size[1 + i]);
      __syncthreads();
      if (a + kStep<T> < A) stage(a + kStep<T>, buffer ^ 1);
      if constexpr (Merge) {
        add_merged(buffer, factors[a / kStep<T>].term, sums);
      } else {
        add_tangents(buffer, a, wanted, sums);
      }
    }
    if constexpr (Merge) {
#pragma unroll
      for (int i = 0; i < 3; ++i) {
        for (int distance = 8; distance < 32; distance *= 2) size[i] = fmaxf(size[i], __shfl_xor_sync(~0u, size[i], distance));
      }
      if (copied_chunk() == 0) {
        if (copies_query()) sizes[copied_row()] = size[0];
        for (int i = 0; i < 2; ++i) sizes[kQueries + 64 * i + copied_row()] = size[1 + i];
      }
    }
  }

  // Scores of the pairs seen; what others hold is not said.
  __device__ __forceinline__ void scores(const Weighting& weighting, unsigned seen, W (&sums)[R][kColumns]) const {
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) sums[i][j] = 0;
    }
    unsigned direct = seen;
    if constexpr (sizeof(W) == 4) {
      if (weighting.limit >= kSmall) {
        add<true>(0, sums);
        __syncthreads();
        direct = 0;
#pragma unroll
        for (int i = 0; i < R; ++i) {
#pragma unroll
          for (int j = 0; j < kColumns; ++j) {
            const float size = sizes[R * thread_y() + i] + sizes[kQueries + thread_x() + 16 * j];
            const bool merges = size >= kSmall && size <= weighting.limit;
            if (!merges) direct |= seen & 1u << (kColumns * i + j);
            sums[i][j] = merges ? fmaf(sums[i][j] - weighting.blanks * kBlank, -2 * weighting.unscale, weighting.total) : 0.0f;
          }
        }
      }
    }
    if (__syncthreads_or(direct)) add<false>(direct, sums);
  }
};

}  // namespace onepass::cuda
