// With p = grad_context . value + grad_weights, r = sum of weight p: the gradient of a score is g = weight (p - r), and the query gets
// 4 v sum of g (r_a - r_a^2), where tanh = 1 - 2 r_a, or scale times the sum of g key. As r is of all parts, a part sums (p - c) and 1
// in place of (p - r), with its own mean c of p, so that what is added later, (c - r) times the second sum, is small.
#pragma once

#include "step.cuh"
#include "step_backward.h"

namespace onepass::cuda {

// Slopes r - r^2 of tanh(q + k), of N columns.
template <class T, int Q, int N>
struct Slopes {
  using R = Wide<T>;
  static constexpr int kAtOnce = Q == 1 ? 4 : 3;  // rows in flight, as registers allow
  const Rows<T> queries;
  const int steps;
  R powers[Q][N];
  float top;
  int first, at;

  __device__ Slopes(const Rows<T>& queries, int steps) : queries(queries), steps(steps) {}

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
        const float q = there ? static_cast<float>(wide(queries.at(first + t)[at + n])) : 0;
        top = fmaxf(top, fabsf(q));
        powers[t][n] = exponential<2>(q);
      }
  }

  template <int Each, int Count>
  __device__ __forceinline__ void add(R (&sums)[Each][Q][N], const Raw<T, N> (&raw)[Count], const T* from, int64_t step,
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
      const T* row = from + which * step;
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
    for (int i = threadIdx.x / W; i < place.splits; i += kStepThreads / W) mean += parts.pair(i, mine)[0];
  mean = over_threads(mean, W, exchange, plus<R>);
  R* means = exchange + kStepWarps * kMostQueries;
  if (threadIdx.x < W) means[mine] = mean;
  __syncthreads();
#pragma unroll 1
  for (int i = threadIdx.x; i < place.steps * A; i += kStepThreads) {
    const int t = i / A, a = i % A;
    R sum = 0;
#pragma unroll 4
    for (int part = 0; part < place.splits; ++part) {
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
#pragma unroll 1
    for (int s = threadIdx.x; s < args.shape.S; s += kStepThreads) {
      const R gradient = weights[s] * (gradients[s] - means[t]) * (Additive ? R(1) : scale);
      gradients[s] = finite || (seen.has(s) && kept(args.visibility, place.b, place.h, place.t + t, s)) ? gradient : R(0);
    }
  }
}

template <class T, int Q, bool Additive>
__device__ void step_backward(const StepBackward& args) {
  using R = Wide<T>;
  constexpr int N = Q > 1 && sizeof(T) == 2 ? 4 : 16 / sizeof(T);  // of two bytes 16 would take too many registers
  extern __shared__ __align__(16) char shared[];
  const Shape& shape = args.shape;
  const int W = Q == 1 ? 1 : step_queries(shape.T), stride = step_stride(W, 2);
  const Place place(shape, args.splits, W);
  const StepLayout layout(ceil_div(shape.S, args.splits), W, 2, step_factors(shape.D, W, sizeof(T), false), sizeof(T));
  R* numbers = reinterpret_cast<R*>(shared + layout.numbers);
  R* exchange = reinterpret_cast<R*>(shared + layout.exchange);
  uint16_t* seen = reinterpret_cast<uint16_t*>(shared + layout.seen);
  const R scale = static_cast<R>(args.scale);
  const bool alone = args.splits == 1, of_context = args.grad_context.data != nullptr, of_weights = args.grad_weights.data != nullptr;

  mark_seen(args.visibility, place, shape.S, reinterpret_cast<Window*>(shared + layout.windows), seen);
  if (of_context) {
    const Rows<T> values(args.values, place.b, place.h, place.first, shape.D);
    const Rows<T> gradient(args.grad_context, place.b, place.h, place.t, shape.D);
    const Factors<T, false> factors(reinterpret_cast<R*>(shared), W, gradient.width);
    factors.fill(gradient, place.steps, nullptr);
    __syncthreads();
    row_sums<T, Q, false>(values, place.rows, seen, gradient, place.steps, nullptr, factors,
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
  if (!alone && threadIdx.x < place.steps) {
    const Parts<R> parts(args.parts, shape, 2 * step_padded(shape.A), place);
    parts.pair(place.split, mine)[0] = mean;
    parts.pair(place.split, mine)[1] = centre;
  }
  R* const gradients = mine < place.steps ? reinterpret_cast<R*>(args.grad_scores.at(place.b, place.h, t)) + place.first : nullptr;
#pragma unroll 1
  for (int row = threadIdx.x / W; row < place.rows; row += kStepThreads / W) {
    const R p = numbers[row * stride + mine], weight = numbers[row * stride + W + mine];
    const R gradient = seen[row] >> mine & 1 ? weight * (p - centre) : R(0);
    numbers[row * stride + mine] = gradient;
    if (mine < place.steps) gradients[row] = !alone ? p : Additive ? gradient : gradient * scale;
  }
  __syncthreads();

  const Rows<T> query(args.query, place.b, place.h, place.t, shape.A), keys(args.keys, place.b, place.h, place.first, shape.A);
  using Terms = std::conditional_t<Additive, Slopes<T, Q, N>, Itself<T, Q, N>>;
  Terms terms = [&] {
    if constexpr (Additive) return Terms(query, place.steps);
    else return Terms{};
  }();
  column_sums<T, Q, 2, N>(keys, place.rows, place.steps, seen, W, numbers, reinterpret_cast<R*>(shared), terms,
                          [&](int step, int at, auto sums) {
                            R(&sum)[N] = sums(0);
                            if (alone) {
                              const Rows<T> out(args.grad_query, place.b, place.h, place.t, shape.A);
#pragma unroll
                              for (int n = 0; n < N; ++n)
                                if (at + n < out.width) sum[n] *= slope_factor<Additive, T>(args.v, place.h, at + n, scale);
                              store_row<T, N>(const_cast<T*>(out.at(step)), at, out.width, out.template whole<N>(), sum);
                            } else {
                              const Parts<R> parts(args.parts, shape, 2 * step_padded(shape.A), place);
                              R* row = parts.row(place.split, step);
                              store_row<R, N>(row, at, query.width, true, sum);
                              store_row<R, N>(row + parts.padded / 2, at, query.width, true, sums(1));
                            }
                          });
  if (!alone && comes_last(args.counters + place.group(shape), args.splits)) combine_backward<T, Additive>(args, place, exchange);
}

}  // namespace onepass::cuda
