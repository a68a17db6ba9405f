// With p = grad_context . value + grad_weights, r = sum of weight p: the gradient of a score is g = weight (p - r), and the query gets
// 4 v sum of g (r_a - r_a^2), where tanh = 1 - 2 r_a, or scale times the sum of g key. As r is of the whole source, a block sums (p - c)
// and 1 in place of (p - r), with the mean c of p of its piece, so that what is added later, (c - r) times the second sum, is small.
#pragma once

#include "step.cuh"
#include "step_backward.h"

namespace onepass::cuda {

// Slopes r - r^2 of tanh(q + k), of N columns.
template <class T, class K, int Q, int N>
struct Slopes {
  using R = Wide<T>;
  static constexpr int kAtOnce = Q == 1 ? 4 : 3;  // rows in flight, as registers allow
  const Rows<T> queries;
  const int steps;
  const Left<R> staged;  // the same queries in shared memory, or no rows
  R powers[Q][N];
  float top;
  int first, at;

  __device__ Slopes(const Rows<T>& queries, int steps, const Left<R>& staged) : queries(queries), steps(steps), staged(staged) {}

  __device__ __forceinline__ void begin(int query, int column) {
    first = query;
    at = column;
    top = 0;
    if constexpr (sizeof(T) < 8)
#pragma unroll
    for (int t = 0; t < Q; ++t)
#pragma unroll
      for (int n = 0; n < N; ++n) {
        const bool there = first + t < steps && at + n < queries.width;
        float q = 0;
        if (there) q = kClusters && staged.rows != nullptr ? staged.row(first + t)[at + n] : wide(queries.at(first + t)[at + n]);
        top = fmaxf(top, fabsf(q));
        powers[t][n] = exponential<2>(q);
      }
  }

  template <int Each, int Count>
  __device__ __forceinline__ void add(R (&sums)[Each][Q][N], const Raw<K, N> (&raw)[Count], const K* from, int64_t step,
                                      const unsigned (&sees)[Count], const R* numbers, int stride, int W) const {
    unsigned far = 0;
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (sees[i] == 0) continue;
      if constexpr (sizeof(T) == 8) {
        far |= 1u << i;
      } else {
        float k[N], largest = 0;
        raw[i].widen(k);
#pragma unroll
        for (int n = 0; n < N; ++n) largest = fmaxf(largest, fabsf(k[n]));
        if (!(largest + top <= kWidestPair)) {
          far |= 1u << i;
          continue;
        }
#pragma unroll
        for (int n = 0; n < N; ++n) k[n] = exponential<2>(k[n]);
#pragma unroll
        for (int t = 0; t < Q; ++t)
          if (Q == 1 || sees[i] >> t & 1)
#pragma unroll
            for (int n = 0; n < N; n += 2) {
              const float d0 = fmaf(powers[t][n], k[n], 1.0f), d1 = fmaf(powers[t][n + 1], k[n + 1], 1.0f);
              const float both = reciprocal(d0 * d1), r0 = d1 * both, r1 = d0 * both;
              const float slope0 = fmaf(-r0, r0, r0), slope1 = fmaf(-r1, r1, r1);
#pragma unroll
              for (int each = 0; each < Each; ++each) {
                const float number = numbers[i * stride + each * W + t];
                sums[each][t][n] = fmaf(number, slope0, sums[each][t][n]);
                sums[each][t][n + 1] = fmaf(number, slope1, sums[each][t][n + 1]);
              }
            }
      }
    }
    // Rows whose exponentials cannot be multiplied.
    while (far != 0) {
      const int which = __ffs(far) - 1;
      far &= far - 1;
      unsigned bits = 0;
#pragma unroll
      for (int i = 0; i < Count; ++i) bits = i == which ? sees[i] : bits;
      const K* row = from + which * step;
#pragma unroll 1
      for (int t = 0; t < Q; ++t) {
        if (!(bits >> t & 1)) continue;
        R slopes[N] = {};
#pragma unroll
        for (int n = 0; n < N; ++n)
          if (at + n < queries.width) {
            const R r = half_of_one_minus_tanh(wide(queries.at(first + t)[at + n]) + wide(row[n]));
            slopes[n] = fma(-r, r, r);
          }
#pragma unroll
        for (int i = 0; i < Q * Each; ++i) {
          const R number = numbers[which * stride + i / Q * W + i % Q];
#pragma unroll
          for (int n = 0; n < N; ++n)
            if (i % Q == t) sums[i / Q][i % Q][n] = fma(number, slopes[n], sums[i / Q][i % Q][n]);
        }
      }
    }
  }
};

// A column's part in what the query gets, but for the sums.
template <bool Additive, class T>
__device__ __forceinline__ Wide<T> slope_factor(const Tensor& v, int h, int a, Wide<T> scale) {
  return Additive ? Wide<T>(4) * wide(static_cast<const T*>(v.data)[h * v.head + a]) : scale;
}

template <class T, bool Additive>
__device__ __forceinline__ void combine_backward(const StepBackward& args, const Place& place, Wide<T>* exchange) {
  using R = Wide<T>;
  const Parts<R> parts(args.parts, args.shape, 2 * step_padded(args.shape.A), place);
  const int A = static_cast<int>(args.shape.A), W = place.W, mine = threadIdx.x % W;
  const R scale = static_cast<R>(args.scale);
  R mean = 0;
  if (mine < place.steps)
#pragma unroll 1
    for (int i = threadIdx.x / W; i < place.parts(); i += kStepThreads / W) mean += parts.pair(i, mine)[0];
  mean = over_threads(mean, W, exchange, plus<R>);
  R* means = exchange + kStepWarps * kMostQueries;
  if (threadIdx.x < W) means[mine] = mean;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < place.steps * A; i += kStepThreads) {
    const int t = i / A, a = i % A;
    R sum = 0;
#pragma unroll 4
    for (int part = 0; part < place.parts(); ++part) {
      const R* row = parts.row(part, t);
      sum += fma(parts.pair(part, t)[1] - means[t], row[parts.padded / 2 + a], row[a]);
    }
    T* out = reinterpret_cast<T*>(args.grad_query.at(place.b, place.h, place.t + t));
    out[a] = narrow<T>(slope_factor<Additive, T>(args.v, place.h, a, scale) * sum);
  }
#pragma unroll 1
  for (int t = 0; t < place.steps; ++t) {
    const R* weights = reinterpret_cast<const R*>(args.weights.at(place.b, place.h, place.t + t));
    R* gradients = reinterpret_cast<R*>(args.grad_scores.at(place.b, place.h, place.t + t));
    const bool finite = fabs(means[t]) < R(INFINITY);
    const Window seen = window(args.visibility, place.b, place.t + t, args.shape.S);
    struct Both {
      R weight, gradient;
    };
    some_at_once(
        static_cast<int>(args.shape.S), [&](int s) { return Both{weights[s], gradients[s]}; },
        [&](int s, const Both& of) {
          const R gradient = of.weight * (of.gradient - means[t]) * (Additive ? R(1) : scale);
          gradients[s] = finite || (seen.has(s) && kept(args.visibility, place.b, place.h, place.t + t, s)) ? gradient : R(0);
        });
  }
}

// Queries, or a block's share of what its cluster collects, where Slopes looks for them.
template <class T>
__device__ __forceinline__ void stage(const Rows<T>& queries, int steps, const Left<Wide<T>>& to, int rank, int cluster) {
  constexpr int N = 16 / sizeof(Wide<T>);
  const int pieces = static_cast<int>(ceil_div(queries.width, N)), begin = first_piece(pieces, rank, cluster) * N;
  const int many = first_piece(pieces, rank + 1, cluster) * N - begin;
#pragma unroll 1
  for (int i = threadIdx.x; i < steps * many; i += kStepThreads) {
    const int t = i / many, a = begin + i % many;
    to.row(t)[a] = a < queries.width ? wide(queries.at(t)[a]) : Wide<T>(0);
  }
}

// Puts together what the blocks of a cluster found: each of them some of the columns.
template <class T, bool Additive>
__device__ __forceinline__ void gather_backward(const StepBackward& args, const Place& place, const Left<Wide<T>>& left,
                                                const Wide<T>* numbers, const uint16_t* seen, Wide<T>* exchange) {
  using R = Wide<T>;
  constexpr int N = 16 / sizeof(R);
  const Parts<R> parts(args.parts, args.shape, left.padded, place);
  const int W = place.W, mine = threadIdx.x % W, rank = place.rank(), vectors = static_cast<int>(ceil_div(args.shape.A, N));
  const Rows<T> out(args.grad_query, place.b, place.h, place.t, args.shape.A);
  const bool whole = out.template whole<N>(), apart = place.apart();
  const R scale = static_cast<R>(args.scale);
  R* shifts = exchange;
  static_assert(kCluster <= kStepWarps);
  cluster_sync();
  if (threadIdx.x < W) {
    R mean = 0, total = 0;
#pragma unroll 1
    for (int other = 0; other < place.cluster; ++other) {
      R found[4];
      read_block<4>(found, other, left.more(mine));
      mean += found[0];
      total += found[2];
      shifts[other * kMostQueries + mine] = found[1];
    }
    R centre = mean;
    if (apart) {
      centre = mean / total;
      if (!(fabs(centre) < R(INFINITY))) centre = 0;
      if (rank == 0 && mine < place.steps) {
        parts.pair(place.part(), mine)[0] = mean;
        parts.pair(place.part(), mine)[1] = centre;
      }
    }
#pragma unroll 1
    for (int other = 0; other < place.cluster; ++other) shifts[other * kMostQueries + mine] -= centre;
  }
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x + rank * kStepThreads; i < place.steps * vectors; i += place.cluster * kStepThreads) {
    const int t = i / vectors, at = i % vectors * N;
    R sums[N] = {}, totals[N] = {};
#pragma unroll 2
    for (int other = 0; other < place.cluster; ++other) {
      const R shift = shifts[other * kMostQueries + t];
      R x[N], y[N];
      read_block<N>(x, other, left.row(t) + at);
      read_block<N>(y, other, left.row(t) + left.padded / 2 + at);
#pragma unroll
      for (int n = 0; n < N; ++n) {
        sums[n] += fma(shift, y[n], x[n]);
        totals[n] += y[n];
      }
    }
    if (apart) {
      R* row = parts.row(place.part(), t);
      store_row<R, N>(row, at, vectors * N, true, sums);
      store_row<R, N>(row + left.padded / 2, at, vectors * N, true, totals);
    } else {
#pragma unroll
      for (int n = 0; n < N; ++n)
        if (at + n < out.width) sums[n] *= slope_factor<Additive, T>(args.v, place.h, at + n, scale);
      store_row<T, N>(const_cast<T*>(out.at(t)), at, out.width, whole, sums);
    }
  }
#pragma unroll 1
  for (int t = 0; !apart && t < place.steps; ++t) {
    R* gradients = reinterpret_cast<R*>(args.grad_scores.at(place.b, place.h, place.t + t)) + place.first;
    const R shift = shifts[rank * kMostQueries + t];
#pragma unroll 1
    for (int row = threadIdx.x; row < place.rows; row += kStepThreads) {
      const R* number = numbers + row * step_stride(W, 2) + t;
      gradients[row] = seen[row] >> t & 1 ? fma(number[W], shift, number[0]) * (Additive ? R(1) : scale) : R(0);
    }
  }
  cluster_sync();  // before a block leaves
}

template <class T, class K, int Q, bool Additive>
__device__ void step_backward(const StepBackward& args) {
  using R = Wide<T>;
  static_assert(std::is_same_v<R, Wide<K>>);
  constexpr int N = Q > 1 && sizeof(K) == 2 ? 4 : 16 / sizeof(K);  // of two bytes 16 would take too many registers
  extern __shared__ __align__(16) char shared[];
  const Shape& shape = args.shape;
  const int W = Q == 1 ? 1 : step_queries(shape.T), stride = step_stride(W, 2);
  const Place place(shape, args.splits, args.cluster, W);
  const bool gathers = place.gathers(), shares = Q > 1 && gathers, apart = place.apart(), alone = args.splits == 1;
  const int64_t factor_numbers = step_factors(shape.D, W, sizeof(K), false), padded = 2 * step_padded(shape.A);
  const StepLayout layout(ceil_div(shape.S, args.splits), W, 2, factor_numbers, sizeof(K), gathers ? padded + kMore : 0);
  R* numbers = reinterpret_cast<R*>(shared + layout.numbers);
  R* exchange = reinterpret_cast<R*>(shared + layout.exchange);
  uint16_t* seen = reinterpret_cast<uint16_t*>(shared + layout.seen);
  const Left<R> left(shared + layout.rows_left, padded);
  const Rows<T> query(args.query, place.b, place.h, place.t, shape.A);
  const R scale = static_cast<R>(args.scale);
  const bool of_context = args.grad_context.data != nullptr, of_weights = args.grad_weights.data != nullptr;
  const bool stages = gathers && Additive && sizeof(T) < 8;
  constexpr const T* kNone = nullptr;
  const int rank = shares ? place.rank() : 0, cluster = shares ? place.cluster : 1;

  mark_seen(args.visibility, place, shape.S, reinterpret_cast<Window*>(shared + layout.windows), seen);
  const Rows<T> gradient(args.grad_context, place.b, place.h, place.t, shape.D);
  const Factors<K, false> factors(reinterpret_cast<R*>(shared), W, gradient.width);
  if (of_context) factors.fill(gradient, place.steps, kNone, rank, cluster);
  if (stages) stage(query, place.steps, left, rank, cluster);
  if (shares) {
    constexpr int kPiece = 16 / sizeof(R);
    cluster_sync();
    if (of_context) factors.collect(rank, cluster);
    if (stages) collect<kPiece>(left.rows, place.steps, left.padded + kMore, static_cast<int>(ceil_div(shape.A, kPiece)), rank, cluster);
  }
  __syncthreads();
  if (of_context) {
    const Rows<K> values(args.values, place.b, place.h, place.first, shape.D);
    row_sums<Q>(values, place.rows, seen, gradient, place.steps, kNone, factors,
                [&](int row, int t, R sum) { numbers[row * stride + t] = sum; });
  }
  __syncthreads();

  const int mine = threadIdx.x % W, t = place.t + mine;
  R mean = 0, total = 0;
#pragma unroll 1
  for (int row = threadIdx.x / W; row < place.rows; row += kStepThreads / W) {
    R p = 0, weight = 0;
    if (seen[row] >> mine & 1) {
      weight = reinterpret_cast<const R*>(args.weights.at(place.b, place.h, t))[place.first + row];
      if (of_context) p = numbers[row * stride + mine];
      if (of_weights) p += reinterpret_cast<const R*>(args.grad_weights.at(place.b, place.h, t))[place.first + row];
      mean = fma(weight, p, mean);
      total += weight;
    }
    numbers[row * stride + mine] = p;
    numbers[row * stride + W + mine] = weight;
  }
  mean = over_threads(mean, W, exchange, plus<R>);
  total = over_threads(total, W, exchange, plus<R>);
  R centre = mean;
  if (!alone) {
    centre = mean / total;
    if (!(fabs(centre) < R(INFINITY))) centre = 0;
  }
  if (gathers && threadIdx.x < W) {
    left.more(mine)[0] = mean;
    left.more(mine)[1] = centre;
    left.more(mine)[2] = total;
    left.more(mine)[3] = 0;
  } else if (!gathers && apart && threadIdx.x < place.steps) {
    const Parts<R> parts(args.parts, shape, padded, place);
    parts.pair(place.part(), mine)[0] = mean;
    parts.pair(place.part(), mine)[1] = centre;
  }
  R* const gradients = mine < place.steps ? reinterpret_cast<R*>(args.grad_scores.at(place.b, place.h, t)) + place.first : nullptr;
#pragma unroll 1
  for (int row = threadIdx.x / W; row < place.rows; row += kStepThreads / W) {
    const R p = numbers[row * stride + mine], weight = numbers[row * stride + W + mine];
    const R gradient = seen[row] >> mine & 1 ? weight * (p - centre) : R(0);
    numbers[row * stride + mine] = gradient;
    if (mine < place.steps && (alone || apart)) gradients[row] = apart ? p : Additive ? gradient : gradient * scale;
  }
  if (shares) cluster_sync();  // others are done with the factors, in whose place sums are folded, and with the staged queries
  else __syncthreads();

  const Rows<K> keys(args.keys, place.b, place.h, place.first, shape.A);
  using Terms = std::conditional_t<Additive, Slopes<T, K, Q, N>, Itself<K, Q, N>>;
  Terms terms = [&] {
    if constexpr (Additive) return Terms(query, place.steps, Left<R>(stages ? left.rows : nullptr, padded));
    else return Terms{};
  }();
  column_sums<K, Q, 2, N>(keys, place.rows, place.steps, seen, W, numbers, reinterpret_cast<R*>(shared), terms,
                          [&](int step, int at, auto sums) {
                            R(&sum)[N] = sums(0);
                            if (alone) {
                              const Rows<T> out(args.grad_query, place.b, place.h, place.t, shape.A);
#pragma unroll
                              for (int n = 0; n < N; ++n)
                                if (at + n < out.width) sum[n] *= slope_factor<Additive, T>(args.v, place.h, at + n, scale);
                              store_row<T, N>(const_cast<T*>(out.at(step)), at, out.width, out.template whole<N>(), sum);
                            } else {
                              R* row = left.row(step);
                              if (!gathers) row = Parts<R>(args.parts, shape, padded, place).row(place.part(), step);
                              store_row<R, N>(row, at, query.width, true, sum);
                              store_row<R, N>(row + padded / 2, at, query.width, true, sums(1));
                            }
                          });
  if (gathers) gather_backward<T, Additive>(args, place, left, numbers, seen, exchange);
  if (apart && comes_last(args.counters + place.group(shape), args.splits)) combine_backward<T, Additive>(args, place, exchange);
}

}  // namespace onepass::cuda
