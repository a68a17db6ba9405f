// Scores of a piece, its softmax and its sum of values by one block; pieces are put together within a cluster, then by the last block of a
// group. A part leaves its highest score and the sum of its exponentials beside its row.
#pragma once

#include "step.cuh"
#include "step_forward.h"

namespace onepass::cuda {

template <class T>
__device__ __forceinline__ void combine_forward(const StepForward& args, const Place& place, Wide<T>* exchange) {
  using R = Wide<T>;
  const Parts<R> parts(args.parts, args.shape, step_padded(args.shape.D), place);
  constexpr int N = 16 / sizeof(R);
  const int D = static_cast<int>(args.shape.D), vectors = static_cast<int>(ceil_div(D, N)), W = place.W, mine = threadIdx.x % W;
  const Rows<T> contexts(args.context, place.b, place.h, place.t, D);
  const bool whole = contexts.template whole<N>();
  R highest = -INFINITY, total = 0;
#pragma unroll 1
  for (int i = threadIdx.x / W; mine < place.steps && i < place.parts(); i += kStepThreads / W)
    if (parts.pair(i, mine)[1] != R(0)) highest = larger(parts.pair(i, mine)[0], highest);
  highest = over_threads(highest, W, exchange, larger<R>);
#pragma unroll 1
  for (int i = threadIdx.x / W; mine < place.steps && i < place.parts(); i += kStepThreads / W) {
    const R sum = parts.pair(i, mine)[1];
    if (sum != R(0)) total += sum * softmax_term(parts.pair(i, mine)[0], highest);
  }
  total = over_threads(total, W, exchange, plus<R>);
  R *tops = exchange + kStepWarps * kMostQueries, *inverses = tops + kMostQueries;
  if (threadIdx.x < W) {
    tops[mine] = highest;
    inverses[mine] = total == R(0) ? R(0) : R(1) / total;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < place.steps * vectors; i += kStepThreads) {
    const int t = i / vectors, at = i % vectors * N;
    R sums[N] = {};
#pragma unroll 4
    for (int part = 0; part < place.parts(); ++part) {
      const R* softmax = parts.pair(part, t);
      const R factor = softmax[1] == R(0) ? R(0) : softmax_term(softmax[0], tops[t]);  // times zeros, of a part that sees nothing
      R x[N];
      memcpy(x, __builtin_assume_aligned(parts.row(part, t) + at, 16), sizeof x);
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = fma(factor, x[n], sums[n]);
    }
#pragma unroll
    for (int n = 0; n < N; ++n) sums[n] *= inverses[t];
    store_row<T, N>(const_cast<T*>(contexts.at(t)), at, D, whole, sums);
  }
#pragma unroll 1
  for (int t = 0; t < place.steps; ++t) {
    R* weights = reinterpret_cast<R*>(args.weights.at(place.b, place.h, place.t + t));
    const R top = tops[t], inverse = inverses[t];
    const bool finite = fabs(top) < R(INFINITY) && inverse == inverse;
    const Window seen = window(args.visibility, place.b, place.t + t, args.shape.S);
    some_at_once(
        static_cast<int>(args.shape.S), [&](int s) { return weights[s]; },
        [&](int s, R score) {
          const R weight = softmax_term(score, top) * inverse;
          weights[s] = finite || (seen.has(s) && kept(args.visibility, place.b, place.h, place.t + t, s)) ? weight : R(0);
        });
  }
}

// Puts together what the blocks of a cluster found: each of them some of the columns.
template <class T>
__device__ __forceinline__ void gather_forward(const StepForward& args, const Place& place, const Left<Wide<T>>& left,
                                               const Wide<T>* numbers, const uint16_t* seen, Wide<T>* exchange) {
  using R = Wide<T>;
  constexpr int N = 16 / sizeof(R);
  const Parts<R> parts(args.parts, args.shape, left.padded, place);
  const int W = place.W, mine = threadIdx.x % W, rank = place.rank(), vectors = static_cast<int>(ceil_div(args.shape.D, N));
  const Rows<T> contexts(args.context, place.b, place.h, place.t, args.shape.D);
  const bool whole = contexts.template whole<N>(), apart = place.apart();
  R *factors = exchange, *inverses = exchange + kStepWarps * kMostQueries;
  static_assert(kCluster <= kStepWarps);
  cluster_sync();
  if (threadIdx.x < W) {
    R highest = -INFINITY, total = 0, of[kCluster][2];
#pragma unroll
    for (int other = 0; other < kCluster; ++other)
      if (other < place.cluster) read_block<2>(of[other], other, left.more(mine));
#pragma unroll
    for (int other = 0; other < kCluster; ++other)
      if (other < place.cluster && of[other][1] != R(0)) highest = larger(of[other][0], highest);
#pragma unroll
    for (int other = 0; other < kCluster; ++other) {
      if (other >= place.cluster) break;
      const R(&found)[2] = of[other];
      // Infinite scores make NaNs where they are seen last: in this cluster, or where all parts are. -1: a block that sees nothing.
      const R term = apart && found[0] == highest ? R(1) : softmax_term(found[0], highest), factor = found[1] == R(0) ? R(-1) : term;
      if (found[1] != R(0)) total += found[1] * factor;
      factors[other * kMostQueries + mine] = factor;
    }
    inverses[mine] = total == R(0) ? R(0) : R(1) / total;
    if (apart && rank == 0 && mine < place.steps) {
      parts.pair(place.part(), mine)[0] = highest;
      parts.pair(place.part(), mine)[1] = total;
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x + rank * kStepThreads; i < place.steps * vectors; i += place.cluster * kStepThreads) {
    const int t = i / vectors, at = i % vectors * N;
    R sums[N] = {};
#pragma unroll 2
    for (int other = 0; other < place.cluster; ++other) {
      const R factor = factors[other * kMostQueries + t];
      if (factor < R(0)) continue;
      R x[N];
      read_block<N>(x, other, left.row(t) + at);
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] = fma(factor, x[n], sums[n]);
    }
    if (apart) {
      store_row<R, N>(parts.row(place.part(), t), at, vectors * N, true, sums);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n) sums[n] *= inverses[t];
      store_row<T, N>(const_cast<T*>(contexts.at(t)), at, static_cast<int>(args.shape.D), whole, sums);
    }
  }
#pragma unroll 1
  for (int t = 0; !apart && t < place.steps; ++t) {
    R* weights = reinterpret_cast<R*>(args.weights.at(place.b, place.h, place.t + t)) + place.first;
    const R factor = factors[rank * kMostQueries + t] * inverses[t];
#pragma unroll 1
    for (int row = threadIdx.x; row < place.rows; row += kStepThreads)
      weights[row] = seen[row] >> t & 1 ? numbers[row * step_stride(W, 1) + t] * factor : R(0);
  }
  cluster_sync();  // before a block leaves
}

template <class T, class K, int Q, bool Additive>
__device__ void step_forward(const StepForward& args) {
  using R = Wide<T>;
  static_assert(std::is_same_v<R, Wide<K>>);
  constexpr int N = 16 / sizeof(K);
  extern __shared__ __align__(16) char shared[];
  const Shape& shape = args.shape;
  const int W = Q == 1 ? 1 : step_queries(shape.T), stride = step_stride(W, 1);
  const Place place(shape, args.splits, args.cluster, W);
  const bool gathers = place.gathers(), shares = Q > 1 && gathers && !(Additive && sizeof(K) == 8), apart = place.apart();
  const int64_t factor_numbers = step_factors(shape.A, W, sizeof(K), Additive), padded = step_padded(shape.D);
  const StepLayout layout(ceil_div(shape.S, args.splits), W, 1, factor_numbers, sizeof(K), gathers ? padded + kMore : 0);
  R* numbers = reinterpret_cast<R*>(shared + layout.numbers);
  R* exchange = reinterpret_cast<R*>(shared + layout.exchange);
  uint16_t* seen = reinterpret_cast<uint16_t*>(shared + layout.seen);
  const Left<R> left(shared + layout.rows_left, padded);
  const Rows<T> query(args.query, place.b, place.h, place.t, shape.A);
  const Rows<K> keys(args.keys, place.b, place.h, place.first, shape.A);
  const Factors<K, Additive> factors(reinterpret_cast<R*>(shared), W, query.width);
  const T* v = static_cast<const T*>(args.v.data) + place.h * args.v.head;

  mark_seen(args.visibility, place, shape.S, reinterpret_cast<Window*>(shared + layout.windows), seen);
  factors.fill(query, place.steps, v, shares ? place.rank() : 0, shares ? place.cluster : 1);
  if (shares) {
    cluster_sync();
    factors.collect(place.rank(), place.cluster);
  }
  __syncthreads();
  const R scale = static_cast<R>(args.scale);
  row_sums<Q>(keys, place.rows, seen, query, place.steps, v, factors,
              [&](int row, int t, R sum) { numbers[row * stride + t] = Additive ? sum : scale * sum; });
  __syncthreads();

  if (apart)
#pragma unroll 1
    for (int t = 0; t < place.steps; ++t) {
      R* scores = reinterpret_cast<R*>(args.weights.at(place.b, place.h, place.t + t)) + place.first;
#pragma unroll 1
      for (int row = threadIdx.x; row < place.rows; row += kStepThreads)
        scores[row] = seen[row] >> t & 1 ? numbers[row * stride + t] : -INFINITY;
    }
  const int mine = threadIdx.x % W;
  R highest = -INFINITY, total = 0;
#pragma unroll 1
  for (int row = threadIdx.x / W; row < place.rows; row += kStepThreads / W)
    if (seen[row] >> mine & 1) highest = larger(numbers[row * stride + mine], highest);
  highest = over_threads(highest, W, exchange, larger<R>);
#pragma unroll 1
  for (int row = threadIdx.x / W; row < place.rows; row += kStepThreads / W) {
    R term = 0;
    if (seen[row] >> mine & 1) {
      const R score = numbers[row * stride + mine];
      term = score == highest ? R(1) : softmax_term(score, highest);  // also where it is infinite: what all parts make of that is seen last
    }
    numbers[row * stride + mine] = term;
    total += term;
  }
  total = over_threads(total, W, exchange, plus<R>);
  R* inverses = exchange + kStepWarps * kMostQueries;
  if (threadIdx.x < W) {
    inverses[mine] = total == R(0) ? R(0) : softmax_term(highest, highest) / total;
    if (gathers) {
      left.more(mine)[0] = highest;
      left.more(mine)[1] = total;
    } else if (apart && mine < place.steps) {
      const Parts<R> parts(args.parts, shape, padded, place);
      parts.pair(place.part(), mine)[0] = highest;
      parts.pair(place.part(), mine)[1] = total;
    }
  }
  if (shares) cluster_sync();  // others are done with the factors, in whose place sums are folded
  else __syncthreads();

  const Rows<K> values(args.values, place.b, place.h, place.first, shape.D);
  column_sums<K, Q, 1, N>(values, place.rows, place.steps, seen, W, numbers, reinterpret_cast<R*>(shared), Itself<K, Q, N>{},
                          [&](int t, int at, auto sums) {
                            R(&context)[N] = sums(0);
                            if (gathers) return store_row<R, N>(left.row(t), at, values.width, true, context);
                            if (apart) {
                              const Parts<R> parts(args.parts, shape, padded, place);
                              return store_row<R, N>(parts.row(place.part(), t), at, values.width, true, context);
                            }
                            const Rows<T> contexts(args.context, place.b, place.h, place.t, shape.D);
#pragma unroll
                            for (int n = 0; n < N; ++n) context[n] *= inverses[t];
                            store_row<T, N>(const_cast<T*>(contexts.at(t)), at, values.width, contexts.template whole<N>(), context);
                          });
  if (gathers) {
    gather_forward<T>(args, place, left, numbers, seen, exchange);
  } else if (!apart) {
#pragma unroll 1
    for (int t = 0; t < place.steps; ++t) {
      R* weights = reinterpret_cast<R*>(args.weights.at(place.b, place.h, place.t + t));
#pragma unroll 1
      for (int row = threadIdx.x; row < place.rows; row += kStepThreads)
        weights[row] = seen[row] >> t & 1 ? numbers[row * stride + t] * inverses[t] : R(0);
    }
  }
  if (apart && comes_last(args.counters + place.group(shape), args.splits)) combine_forward<T>(args, place, exchange);
}

}  // namespace onepass::cuda
