// Backward of additive scores: dq[t] = sum_s g 4 v x r^2, dk[s] = sum_t of the same, dv = sum g (1 - 2 r), where g is the gradient of a
// score, x = X Y = e^(2q) e^(2k) and r = 1 / (1 + x). With h = g r^2 these are dq = 4 v X sum_s h Y and dk = 4 v Y sum_t h X, in which
// nothing cancels, and as g r = h + h x, dv = sum g - 2 (sum h + sum_t dq / 4 v).
//
// A lane has two channels, whose reciprocals merge into one, and some positions of the source, with their sums over queries, in registers.
// Its sums over positions go to shared memory, where those of all warps are added in order, a tile of queries at a time.
#pragma once

#include "additive_backward.h"
#include "arithmetic.cuh"
#include "visible.cuh"

namespace onepass::cuda::backward {

constexpr float kWidest = 10.0f;  // |q| and |k| up to which exponentials, their sums and the product of two denominators stay in float32
constexpr unsigned kEveryLane = 0xffffffffu;

template <class R>
struct alignas(2 * sizeof(R)) Two {
  R x, y;
};
template <class R>
using PairOf = std::conditional_t<sizeof(R) == 4, Pair, Two<R>>;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000 && __CUDA_ARCH__ < 1200  // sm_120 takes packed arithmetic apart
constexpr bool kPacked = true;
#else
constexpr bool kPacked = false;
#endif

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ < 1000
constexpr bool kVectors = true;  // whether a thread's factors come at once; from sm_100 on there are no registers for that
#else
constexpr bool kVectors = false;
#endif

// A gradient as the kernel multiplies by it: packed arithmetic by itself, twice by the root of its magnitude, of its sign.
__device__ __forceinline__ float as_factor(float g) {
  if constexpr (kPacked) return g;
  return copysignf(__fsqrt_rn(fabsf(g)), g);
}

__device__ __forceinline__ float from_factor(float factor) { return kPacked ? factor : __fmul_rn(factor, fabsf(factor)); }
__device__ __forceinline__ double as_factor(double g) { return g; }
__device__ __forceinline__ double from_factor(double factor) { return factor; }

// h = g r^2 of two channels, from their denominators; two positions at a time.
__device__ __forceinline__ void squares(Pair factor, Pair d0, Pair d1, Pair& h0, Pair& h1) {
  const Pair product = d0 * d1;
  const Pair inverse{reciprocal(product.x), reciprocal(product.y)};
  if constexpr (kPacked) {
    const Pair r0 = inverse * d1, r1 = inverse * d0;
    h0 = factor * r0 * r0;
    h1 = factor * r1 * r1;
  } else {
    const Pair root = factor * inverse, root0 = root * d1, root1 = root * d0;
    h0 = {__fmul_rn(root0.x, fabsf(root0.x)), __fmul_rn(root0.y, fabsf(root0.y))};  // never fused with the sums that h is added to
    h1 = {__fmul_rn(root1.x, fabsf(root1.x)), __fmul_rn(root1.y, fabsf(root1.y))};
  }
}

// Sums over both positions: packed arithmetic keeps two, of even and of odd ones.
__device__ __forceinline__ void add_product(Pair& sum, Pair a, Pair b) {
  if constexpr (kPacked) sum = multiply_add(a, b, sum);
  else sum.x = fmaf(a.y, b.y, fmaf(a.x, b.x, sum.x));
}

__device__ __forceinline__ void add(Pair& sum, Pair a) {
  if constexpr (kPacked) sum = sum + a;
  else sum.x = (sum.x + a.x) + a.y;
}

template <class P>
__device__ __forceinline__ auto total(P sum) {
  if constexpr (kPacked && sizeof(sum.x) == 4) return sum.x + sum.y;
  else return sum.x;
}

// The larger of a number that is not negative and magnitudes; NaN is the largest, as its bits are.
template <class R>
__device__ __forceinline__ float larger(float top, Two<R> x) {
  const int bits = max(__float_as_int(fabsf(static_cast<float>(x.x))), __float_as_int(fabsf(static_cast<float>(x.y))));
  return __int_as_float(max(__float_as_int(top), bits));
}

// What a block keeps in shared memory of a tile of queries.
template <class R>
struct Staged {
  Two<R>* exponentials;  // [kBackwardQueries][32]: e^(2q), or 1 where that is out of range
  Two<R>* sums;          // [kBackwardQueries][threads]: of each lane over its positions
  Two<R>* columns;       // [threads]: what each has added up of dq / 4 v, over queries
  R* gradients;          // [threads]: sums of the scores' gradients that each has staged of this tile
  R* all_gradients;      // [threads]: and of all
  R* factors;            // [kBackwardQueries][positions]: of the scores' gradients
  int* tops;             // [2]: the bits of the largest |q|, of this tile and of the next; 0 of few channels

  __device__ Staged(void* memory)
      : exponentials(static_cast<Two<R>*>(memory)),
        sums(exponentials + kBackwardQueries * 32),
        columns(sums + kBackwardQueries * blockDim.x),
        gradients(reinterpret_cast<R*>(columns + blockDim.x)),
        all_gradients(gradients + blockDim.x),
        factors(all_gradients + blockDim.x),
        tops(reinterpret_cast<int*>(factors + kBackwardQueries * kBackwardPositions * (blockDim.x / 32))) {}
};

// Of a thread's positions, in whole vectors.
template <class P>
struct alignas(16) Factors {
  P pairs[kBackwardPositions / 2];
};

// This lane's two channels in the rows of one batch and head.
template <class T>
struct Rows {
  T* data;
  int64_t stride;
  bool has[2];

  __device__ Rows(T* first, int64_t stride, int channel, int64_t A)
      : data(first + channel), stride(stride), has{channel < A, channel + 32 < A} {}

  __device__ __forceinline__ Two<Wide<T>> operator()(int row) const {
    const T* from = data + row * stride;
    Two<Wide<T>> found{0, 0};
    if (has[0]) found.x = wide(from[0]);
    if (has[1]) found.y = wide(from[32]);
    return found;
  }

  __device__ __forceinline__ void store(int row, Two<Wide<T>> x) const {
    T* to = data + row * stride;
    if (has[0]) to[0] = narrow<T>(x.x);
    if (has[1]) to[32] = narrow<T>(x.y);
  }
};

template <class T>
struct Gradients {
  using R = Wide<T>;
  using P = PairOf<R>;
  static constexpr bool kFactored = sizeof(R) == 4;  // else each element by itself

  const AdditiveBackward& args;
  Staged<R> staged;
  int lane, warp, warps, split, query_split, channel, position, last_query;
  int64_t b, h;
  P exponentials[kBackwardPositions / 2][2], key_sums[kBackwardPositions / 2][2], v_sums[2];
  bool near;  // whether all of this warp's keys are in range

  __device__ Gradients(const AdditiveBackward& args, void* memory)
      : args(args), staged(memory), lane(threadIdx.x % 32), warp(threadIdx.x / 32), warps(blockDim.x / 32) {
    unsigned block = blockIdx.x;
    const unsigned across = (args.shape.A + kBackwardChannels - 1) / kBackwardChannels;
    channel = block % across * kBackwardChannels + lane;
    block /= across;
    split = block % args.parts.splits;
    block /= args.parts.splits;
    query_split = block % args.parts.query_splits;
    block /= args.parts.query_splits;
    b = block / args.shape.H;
    h = block % args.shape.H;
    position = split * args.parts.positions + warp * kBackwardPositions;
    last_query = min((query_split + 1) * args.parts.queries, static_cast<int>(args.shape.T));
  }

  __device__ __forceinline__ Rows<T> rows(const Tensor& x) const {
    return {reinterpret_cast<T*>(x.at(b, h, 0)), x.row, channel, args.shape.A};
  }

  // Those of part number `part` of a result.
  __device__ __forceinline__ Rows<R> rows(void* parts, int part, int64_t rows) const {
    const int64_t first = ((part * args.shape.B + b) * args.shape.H + h) * rows;
    return {static_cast<R*>(parts) + first * args.shape.A, args.shape.A, channel, args.shape.A};
  }

  static __device__ __forceinline__ bool in_range(Two<R> x) { return fabs(x.x) <= R(kWidest) && fabs(x.y) <= R(kWidest); }

  static __device__ __forceinline__ Two<R> powers(Two<R> x) {
    if (!kFactored || !in_range(x)) return {1, 1};
    return {exponential<2>(x.x), exponential<2>(x.y)};
  }

  __device__ __forceinline__ void load_keys() {
    const bool of_query = args.visibility.firsts != nullptr || args.visibility.lengths_step != 0;
    const int end = of_query ? static_cast<int>(args.shape.S) : window(args.visibility, b, 0, args.shape.S).last;
    const Rows<T> keys = rows(args.keys);
    float top = 0;
#pragma unroll
    for (int i = 0; i < kBackwardPositions / 2; ++i) {
      const int s = position + 2 * i;
      const Two<R> k0 = s < end ? keys(s) : Two<R>{0, 0}, k1 = s + 1 < end ? keys(s + 1) : Two<R>{0, 0};
      const Two<R> y0 = powers(k0), y1 = powers(k1);
      exponentials[i][0] = {y0.x, y1.x};
      exponentials[i][1] = {y0.y, y1.y};
      key_sums[i][0] = key_sums[i][1] = {0, 0};
      top = larger(larger(top, k0), k1);
    }
    v_sums[0] = v_sums[1] = {0, 0};
    near = __all_sync(kEveryLane, top <= kWidest);
  }

  // Of a tile, the exponentials of queries, rows by warps, and the scores' gradients, four of a thread.
  __device__ void stage(int tile, int* top_query) {
    const int row = threadIdx.x / (2 * warps), column = threadIdx.x % (2 * warps) * 4, first = split * args.parts.positions + column;
    Window seen{0, 0};
    if (tile + row < last_query) seen = window(args.visibility, b, tile + row, args.shape.S);
    const R* from = reinterpret_cast<const R*>(args.grad_scores.at(b, h, tile + row)) + first;
    R g[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const bool visible = seen.has(first + i) && kept(args.visibility, b, h, tile + row, first + i);
      g[i] = visible ? from[i] : R(0);
    }
    const Rows<T> queries = rows(args.query);
    float top = 0;
    for (int t = warp; t < kBackwardQueries; t += warps) {
      const Two<R> q = tile + t < last_query ? queries(tile + t) : Two<R>{0, 0};
      staged.exponentials[t * 32 + lane] = powers(q);
      top = larger(top, q);
    }
    const int bits = __reduce_max_sync(kEveryLane, __float_as_int(top));
    if (lane == 0 && args.shape.A > kFewChannels) atomicMax(top_query, bits);  // few are as good as small
    staged.gradients[threadIdx.x] = (g[0] + g[1]) + (g[2] + g[3]);
    R* to = staged.factors + row * kBackwardPositions * warps + column;
    if constexpr (kFactored) *reinterpret_cast<float4*>(to) = {as_factor(g[0]), as_factor(g[1]), as_factor(g[2]), as_factor(g[3])};
    else for (int i = 0; i < 4; ++i) to[i] = g[i];
  }

  // A position and a query out of range, or small, or of few channels: h is 0 then, and what it stands for is added here, of whole terms.
  __device__ __forceinline__ void apart(int t, int s, R g, bool small, R y0, R y1, R& h0, R& h1, Two<R>& sums, R& key0, R& key1) {
    if (g == R(0)) return;  // before anything is read of what is hidden
    const Two<R> q = rows(args.query)(t), k = rows(args.keys)(s);
    if (kFactored && !small && in_range(q) && in_range(k)) return;
    h0 = h1 = 0;
    const auto add_one = [&](R x, R y, R& sum, R& key_sum, R& v_sum) {
      if constexpr (kFactored) {
        const R r = half_of_one_minus_tanh(x), term = g * r * half_of_one_minus_tanh(-x);
        sum += term;
        key_sum += term * reciprocal(y);
        v_sum += small ? -0.5f * g * tangent(x, r) : g * r * r;
      } else {
        const R tangent = tanh(x), term = R(0.25) * g * (1 - tangent) * (1 + tangent);
        sum += term;
        key_sum += term;
        v_sum -= R(0.5) * g * tangent;
      }
    };
    add_one(q.x + k.x, y0, sums.x, key0, v_sums[0].x);
    add_one(q.y + k.y, y1, sums.y, key1, v_sums[1].x);
  }

  // The queries of a tile with this warp's positions; Careful where some may be out of range or all are small or of few channels.
  template <bool Careful>
  __device__ __forceinline__ void sweep(int tile, int count, bool small) {
    const Two<R>* powers = staged.exponentials + lane;
    const R* row = staged.factors + warp * kBackwardPositions;
    Two<R>* sums = staged.sums + threadIdx.x;
#pragma unroll(Careful ? 1 : 2)
    for (int t = 0; t < count; ++t, powers += 32, row += kBackwardPositions * warps, sums += blockDim.x) {
      const Two<R> x = *powers;
      Factors<P> factors;
      constexpr bool kAtOnce = kVectors && !Careful;
      if constexpr (kAtOnce) factors = *reinterpret_cast<const Factors<P>*>(row);
      P query_sums[2] = {{0, 0}, {0, 0}};
      Two<R> whole{0, 0};
#pragma unroll
      for (int i = 0; i < kBackwardPositions / 2; ++i) {
        P h0{0, 0}, h1{0, 0};
        const P factor = kAtOnce ? factors.pairs[i] : reinterpret_cast<const P*>(row)[i];
        const P x0{x.x, x.x}, x1{x.y, x.y}, y0 = exponentials[i][0], y1 = exponentials[i][1];
        if constexpr (kFactored) squares(factor, multiply_add(x0, y0, P{1, 1}), multiply_add(x1, y1, P{1, 1}), h0, h1);
        if constexpr (Careful) {
          const int s = position + 2 * i;
          apart(tile + t, s, from_factor(factor.x), small, y0.x, y1.x, h0.x, h1.x, whole, key_sums[i][0].x, key_sums[i][1].x);
          apart(tile + t, s + 1, from_factor(factor.y), small, y0.y, y1.y, h0.y, h1.y, whole, key_sums[i][0].y, key_sums[i][1].y);
        }
        if constexpr (kFactored) {
          add_product(query_sums[0], h0, y0);
          add_product(query_sums[1], h1, y1);
          key_sums[i][0] = multiply_add(h0, x0, key_sums[i][0]);
          key_sums[i][1] = multiply_add(h1, x1, key_sums[i][1]);
          add(v_sums[0], h0);
          add(v_sums[1], h1);
        }
      }
      *sums = {x.x * total(query_sums[0]) + whole.x, x.y * total(query_sums[1]) + whole.y};
    }
  }

  // The positions from where to where some query of a tile sees.
  __device__ __forceinline__ Window reach(int tile) const {
    const Window seen = window(args.visibility, b, min(tile + lane % kBackwardQueries, last_query - 1), args.shape.S);
    const bool any = seen.first < seen.last;
    const int S = static_cast<int>(args.shape.S);
    return {__reduce_min_sync(kEveryLane, any ? seen.first : S), __reduce_max_sync(kEveryLane, any ? seen.last : 0)};
  }

  __device__ void run() {
    load_keys();
    if (threadIdx.x < 2) staged.tops[threadIdx.x] = 0;
    staged.columns[threadIdx.x] = {0, 0};
    staged.gradients[threadIdx.x] = staged.all_gradients[threadIdx.x] = 0;
    __syncthreads();
    int tile = query_split * args.parts.queries, number = 0;
    const int first = split * args.parts.positions;
    if (tile < last_query) stage(tile, &staged.tops[0]);
    for (; tile < last_query; tile += kBackwardQueries, ++number) {
      const int count = min(kBackwardQueries, last_query - tile);
      const Window seen = reach(tile);
      const int from = max(0, (seen.first - first) / kBackwardPositions);
      const int to = min(warps, (seen.last - first + kBackwardPositions - 1) / kBackwardPositions);
      __syncthreads();
      const float top_query = __int_as_float(staged.tops[number % 2]);
      const bool small = !kFactored || top_query < kSmall;
      if (!small) staged.all_gradients[threadIdx.x] += staged.gradients[threadIdx.x];
      if (threadIdx.x == 0) staged.tops[(number + 1) % 2] = 0;
      if (from <= warp && warp < to) {
        if (kFactored && !small && top_query <= kWidest && near) sweep<false>(tile, count, false);
        else sweep<true>(tile, count, small);
      }
      __syncthreads();
      const Rows<T> whole = rows(args.grad_query);
      const Rows<R> part = rows(args.query_parts, split, args.shape.T);
      const Two<R> v4 = four_v();
      for (int t = warp; t < count; t += warps) {
        Two<R> sum{0, 0};
        for (int other = from; other < to; ++other) {
          const Two<R> more = staged.sums[t * blockDim.x + other * 32 + lane];
          sum = {sum.x + more.x, sum.y + more.y};
        }
        Two<R>& column = staged.columns[threadIdx.x];
        if (!small) column = {column.x + sum.x, column.y + sum.y};
        if (args.grad_query.data == nullptr) continue;  // its sums were for dv
        const Two<R> dq{v4.x * sum.x, v4.y * sum.y};
        if (args.parts.splits == 1) whole.store(tile + t, dq);
        else part.store(tile + t, dq);
      }
      if (tile + kBackwardQueries < last_query) stage(tile + kBackwardQueries, &staged.tops[(number + 1) % 2]);
    }
    store_keys();
    store_v();
  }

  // Loaded again for each use: registers are short.
  __device__ __forceinline__ Two<R> four_v() const {
    const Two<R> v = rows(args.v)(0);
    return {4 * v.x, 4 * v.y};
  }

  __device__ __forceinline__ void store_keys() const {
    const Two<R> v4 = four_v();
    const Rows<T> whole = rows(args.grad_keys);
    const Rows<R> part = rows(args.key_parts, query_split, args.shape.S);
#pragma unroll
    for (int i = 0; i < kBackwardPositions; ++i) {
      const auto of = [&](P x) { return i % 2 ? x.y : x.x; };
      const P *y = exponentials[i / 2], *sum = key_sums[i / 2];
      const Two<R> dk{v4.x * (of(y[0]) * of(sum[0])), v4.y * (of(y[1]) * of(sum[1]))};
      if (position + i >= args.shape.S) break;
      if (args.parts.query_splits == 1) whole.store(position + i, dk);
      else part.store(position + i, dk);
    }
  }

  // dv's part: the warps' sums in order, and the gradients' own.
  __device__ void store_v() {
    R gradients = staged.all_gradients[threadIdx.x];
    const Two<R> column = staged.columns[threadIdx.x];
#pragma unroll
    for (int distance = 16; distance > 0; distance /= 2) gradients += __shfl_xor_sync(kEveryLane, gradients, distance);
    __syncthreads();
    staged.sums[threadIdx.x] = {total(v_sums[0]) + column.x, total(v_sums[1]) + column.y};
    if (lane == 0) staged.factors[warp] = gradients;
    __syncthreads();
    if (warp > 0) return;
    Two<R> sum{0, 0};
    R all = 0;
    for (int other = 0; other < warps; ++other) {
      const Two<R> more = staged.sums[other * 32 + lane];
      sum = {sum.x + more.x, sum.y + more.y};
      all += staged.factors[other];
    }
    rows(args.v_parts, query_split * args.parts.splits + split, 1).store(0, {all - 2 * sum.x, all - 2 * sum.y});
  }
};

template <class T>
__device__ __forceinline__ void gradients(const AdditiveBackward& args) {
  extern __shared__ float4 memory[];
  Gradients<T>(args, memory).run();
}

}  // namespace onepass::cuda::backward
