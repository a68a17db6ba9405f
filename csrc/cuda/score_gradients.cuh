// Gradients of scores and of values: products in tiles of registers over tiles in shared memory, then the gradient of the softmax.
#pragma once

#include "arithmetic.cuh"
#include "score_gradients.h"
#include "visible.cuh"

namespace onepass::cuda::score_gradients {

constexpr int kDepth = 16;                    // terms of the sums that are staged at a time
constexpr int kPitch = kProductColumns + 4;   // of a staged row: rows meet other banks, and whole vectors
constexpr int kAcross = kProductColumns / 4;  // threads across a product, of four columns each
constexpr unsigned kEveryLane = 0xffffffffu;

// Both factors of a product, terms by rows and terms by columns.
template <class R>
struct Tiles {
  R rows[kDepth][kPitch], columns[kDepth][kPitch];
};

template <class R, int N>
__device__ __forceinline__ void load(const R* from, R (&to)[N]) {
  if constexpr (sizeof(R) == 4 && N % 4 == 0) {
#pragma unroll
    for (int i = 0; i < N; i += 4) {
      const float4 four = *reinterpret_cast<const float4*>(from + i);
      to[i] = four.x, to[i + 1] = four.y, to[i + 2] = four.z, to[i + 3] = four.w;
    }
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) to[i] = from[i];
  }
}

// sums += rows columns over `terms` terms, of 8 N rows: thread (y, x) has rows [N y, N y + N) and columns [4 x, 4 x + 4). Row(row, term)
// and column(column, term) give the factors. ByTerm says that terms lie next to each other in memory, else rows and columns do.
template <bool ByTerm, class R, int N, class Row, class Column>
__device__ __forceinline__ void multiply(Tiles<R>& tiles, int terms, const Row& row, const Column& column, R (&sums)[N][4]) {
  const int y = threadIdx.x / kAcross * N, x = threadIdx.x % kAcross * 4;
  for (int first = 0; first < terms; first += kDepth) {
    const auto stage = [&](R(&to)[kDepth][kPitch], int size, const auto& factor) {
#pragma unroll
      for (int i = threadIdx.x; i < size * kDepth; i += kProductThreads) {
        const int term = ByTerm ? i % kDepth : i / size, place = ByTerm ? i / kDepth : i % size;
        to[term][place] = first + term < terms ? factor(place, first + term) : R(0);
      }
    };
    __syncthreads();
    stage(tiles.rows, 8 * N, row);
    stage(tiles.columns, kProductColumns, column);
    __syncthreads();
#pragma unroll 4
    for (int term = 0; term < kDepth; ++term) {
      R a[N], b[4];
      load(&tiles.rows[term][y], a);
      load(&tiles.columns[term][x], b);
#pragma unroll
      for (int i = 0; i < N; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) sums[i][j] += a[i] * b[j];
    }
  }
}

template <class T>
__device__ __forceinline__ const T* row_of(const Tensor& x, int64_t b, int64_t h, int64_t row) {
  return reinterpret_cast<const T*>(x.at(b, h, row));
}

// Rows from one on.
template <class T>
struct Rows {
  const T* first;
  int64_t stride;

  __device__ Rows(const Tensor& x, int64_t b, int64_t h, int64_t row) : first(row_of<T>(x, b, h, row)), stride(x.row) {}
  __device__ __forceinline__ Wide<T> operator()(int row, int column) const { return wide(first[row * stride + column]); }
};

// p of 8 N queries and 64 positions, and its part of the sum over the source.
template <class T, int N>
__device__ __forceinline__ void weight_gradients(const ScoreGradients& args, Tiles<Wide<T>>& tiles, int64_t b, int64_t h, int t0, int s0) {
  using R = Wide<T>;
  const int T_ = static_cast<int>(args.shape.T), S = static_cast<int>(args.shape.S);
  const int y = t0 + threadIdx.x / kAcross * N, x = s0 + threadIdx.x % kAcross * 4;
  unsigned sees = 0;  // a bit for each query and position
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (y + i >= T_) break;
    const Window seen = window(args.visibility, b, y + i, S);
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (seen.has(x + j) && kept(args.visibility, b, h, y + i, x + j)) sees |= 1u << (4 * i + j);
  }
  R sums[N][4] = {};
  if (__syncthreads_or(sees != 0) && args.grad_context.data != nullptr) {
    const Rows<T> gradients(args.grad_context, b, h, t0), values(args.values, b, h, s0);
    const auto row = [&](int t, int d) { return t0 + t < T_ ? gradients(t, d) : R(0); };
    const auto column = [&](int s, int d) { return s0 + s < S ? values(s, d) : R(0); };
    multiply<true>(tiles, static_cast<int>(args.shape.D), row, column, sums);
  }
  const int64_t tile = s0 / kProductColumns, at = ((tile * args.shape.B + b) * args.shape.H + h) * T_;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    R inner = 0;
    if (y + i < T_) {
      const R* weights = row_of<R>(args.weights, b, h, y + i);
      const R* more = args.grad_weights.data == nullptr ? nullptr : row_of<R>(args.grad_weights, b, h, y + i);
      R* out = reinterpret_cast<R*>(args.grad_scores.at(b, h, y + i));
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        if (x + j >= S) break;
        const bool visible = sees >> (4 * i + j) & 1;
        const R p = visible ? sums[i][j] + (more == nullptr ? R(0) : more[x + j]) : R(0);
        if (visible) inner += weights[x + j] * p;
        out[x + j] = p;
      }
    }
#pragma unroll
    for (int distance = kAcross / 2; distance > 0; distance /= 2) inner += __shfl_xor_sync(kEveryLane, inner, distance);
    if (threadIdx.x % kAcross == 0 && y + i < T_) static_cast<R*>(args.inner)[at + y + i] = inner;
  }
}

// Gradients of 64 values' 64 columns.
template <class T>
__device__ __forceinline__ void value_gradients(const ScoreGradients& args, Tiles<Wide<T>>& tiles, int64_t b, int64_t h, int s0, int d0) {
  using R = Wide<T>;
  __shared__ bool seen[kProductThreads];
  const int S = static_cast<int>(args.shape.S), D = static_cast<int>(args.shape.D), y = threadIdx.x / kAcross * 8;
  const Rows<R> weights(args.weights, b, h, 0);
  const Rows<T> gradients(args.grad_context, b, h, 0);
  bool any = false;  // whether a query sees the position that this thread stages
  R sums[8][4] = {};
  const auto row = [&](int s, int t) {
    if (!window(args.visibility, b, t, S).has(s0 + s) || !kept(args.visibility, b, h, t, s0 + s)) return R(0);
    any = true;
    return weights(t, s0 + s);
  };
  const auto column = [&](int d, int t) { return d0 + d < D ? gradients(t, d0 + d) : R(0); };
  if (args.grad_context.data != nullptr) multiply<false>(tiles, static_cast<int>(args.shape.T), row, column, sums);
  seen[threadIdx.x] = any;
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    if (s0 + y + i >= S) break;
    const bool visible = seen[y + i] || seen[y + i + kProductColumns];
    T* out = reinterpret_cast<T*>(args.grad_values.at(b, h, s0 + y + i));
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const int d = d0 + threadIdx.x % kAcross * 4 + j;
      if (d < D) out[d] = narrow<T>(visible ? sums[i][j] : R(0));
    }
  }
}

template <class T, int N>
__device__ __forceinline__ void products(const ScoreGradients& args) {
  __shared__ __align__(16) Tiles<Wide<T>> tiles;
  const int64_t across = ceil_div(args.shape.S, kProductColumns), of_queries = ceil_div(args.shape.T, 8 * N);
  const int64_t of_values = ceil_div(args.shape.D, kProductColumns), each = of_queries + of_values;
  const int64_t tile = blockIdx.x % each, s0 = blockIdx.x / each % across * kProductColumns, row = blockIdx.x / each / across;
  const int64_t b = row / args.shape.H, h = row % args.shape.H;
  if (tile < of_queries) weight_gradients<T, N>(args, tiles, b, h, static_cast<int>(tile * 8 * N), static_cast<int>(s0));
  else value_gradients<T>(args, tiles, b, h, static_cast<int>(s0), static_cast<int>((tile - of_queries) * kProductColumns));
}

// A warp has a row; the parts of its sum are added in order.
template <class R>
__device__ __forceinline__ void softmax(const ScoreGradients& args) {
  const int64_t rows = args.shape.B * args.shape.H * args.shape.T;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (kSoftmaxThreads / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t t = row % args.shape.T, h = row / args.shape.T % args.shape.H, b = row / args.shape.T / args.shape.H;
  R inner = 0;
  const int64_t tiles = ceil_div(args.shape.S, kProductColumns);
  for (int64_t tile = 0; tile < tiles; ++tile) inner += static_cast<const R*>(args.inner)[tile * rows + row];
  const Window seen = window(args.visibility, b, t, args.shape.S);
  const R* weights = row_of<R>(args.weights, b, h, t);
  R* gradients = reinterpret_cast<R*>(args.grad_scores.at(b, h, t));
  for (int s = seen.first + threadIdx.x % 32; s < seen.last; s += 32)
    if (kept(args.visibility, b, h, t, s)) gradients[s] = weights[s] * (gradients[s] - inner);
}

}  // namespace onepass::cuda::score_gradients
