// Sums that a step takes of the rows of a piece of the source: over their width, beside queries, and over the rows themselves.
#pragma once

#include <type_traits>

#include "arithmetic.cuh"
#include "cluster.cuh"
#include "step.h"

namespace onepass::cuda {

constexpr float kWidest = 10.5f;      // |q| + |k| up to which four reciprocals merge: the product of four 1 + e^21 is finite
constexpr float kWidestPair = 20.0f;  // and two
constexpr float kHeaviest = 1e9f;     // |v| up to which they do: v times the product of three is finite
constexpr int kNarrow = 8;            // channels up to which merging gains nothing, and would cost accuracy

// Rows of one batch and head.
template <class T>
struct Rows {
  const T* data;
  int64_t stride;
  int width;

  __device__ Rows(const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t width)
      : data(static_cast<const T*>(x.data) + b * x.batch + h * x.head + first * x.row), stride(x.row), width(static_cast<int>(width)) {}

  __device__ __forceinline__ const T* at(int row) const { return data + row * stride; }

  // Whether every N elements of a row can be loaded at once.
  template <int N>
  __device__ __forceinline__ bool whole() const {
    constexpr int kBytes = N * sizeof(T);
    return (reinterpret_cast<uintptr_t>(data) | (stride * sizeof(T)) | (width * sizeof(T))) % kBytes == 0;
  }
};

template <class T, int N>
struct Raw {
  uint32_t words[N * sizeof(T) / 4];

  __device__ __forceinline__ void widen(Wide<T> (&x)[N]) const {
    T narrow[N];
    memcpy(narrow, words, sizeof narrow);
#pragma unroll
    for (int n = 0; n < N; ++n) x[n] = wide(narrow[n]);
  }

  // Another element at the end; the first one leaves.
  __device__ __forceinline__ void push(T x) {
    constexpr int kWords = sizeof words / 4, kStep = sizeof(T) / 4;
    if constexpr (sizeof(T) == 2) {
      uint16_t bits;
      memcpy(&bits, &x, sizeof bits);
#pragma unroll
      for (int i = 0; i < kWords; ++i) words[i] = __funnelshift_r(words[i], i + 1 < kWords ? words[i + 1] : bits, 16);
    } else {
#pragma unroll
      for (int i = 0; i < kWords - kStep; ++i) words[i] = words[i + kStep];
      memcpy(&words[kWords - kStep], &x, sizeof x);
    }
  }
};

template <class T, int N>
__device__ __forceinline__ Raw<T, N> load_whole(const T* from) {
  Raw<T, N> raw;
  if constexpr (sizeof raw == 16) {
    const uint4 words = __ldg(reinterpret_cast<const uint4*>(from));
    memcpy(&raw, &words, sizeof raw);
  } else if constexpr (sizeof raw == 8) {
    const uint2 words = __ldg(reinterpret_cast<const uint2*>(from));
    memcpy(&raw, &words, sizeof raw);
  } else {
    raw.words[0] = __ldg(reinterpret_cast<const unsigned*>(from));
  }
  return raw;
}

// N elements of each of several rows, `step` apart, in flight together; zeros where a row is not wanted and beyond the `left` ones that it
// has.
template <class T, int N, int Count>
__device__ __forceinline__ void load_rows(Raw<T, N> (&raw)[Count], const T* from, int64_t step, unsigned wanted, int left, bool whole) {
#pragma unroll
  for (int i = 0; i < Count; ++i) raw[i] = {};
  if (whole) {
#pragma unroll
    for (int i = 0; i < Count; ++i)
      if (wanted >> i & 1) raw[i] = load_whole<T, N>(from + i * step);
  } else {
#pragma unroll 1
    for (int n = 0; n < N; ++n)
#pragma unroll
      for (int i = 0; i < Count; ++i) raw[i].push((wanted >> i & 1) && n < left ? from[i * step + n] : narrow<T>(0));
  }
}

template <class T, int N>
__device__ __forceinline__ void store_row(T* row, int at, int width, bool whole, const Wide<T> (&x)[N]) {
  T narrowed[N];
#pragma unroll
  for (int n = 0; n < N; ++n) narrowed[n] = narrow<T>(x[n]);
  if (whole) {
    constexpr int kBytes = N * sizeof(T) < 16 ? N * sizeof(T) : 16;
    using Words = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, unsigned>>;
#pragma unroll
    for (int i = 0; i < static_cast<int>(N * sizeof(T)) / kBytes; ++i) {
      Words words;
      memcpy(&words, reinterpret_cast<const char*>(narrowed) + i * kBytes, kBytes);
      reinterpret_cast<Words*>(row + at)[i] = words;
    }
  } else {
#pragma unroll
    for (int n = 0; n < N; ++n)
      if (at + n < width) row[at + n] = narrowed[n];
  }
}

// Queries beside which rows are read, four channels at a time, vectors side by side, so that neighbours read other banks. Products take the
// query itself; tanh takes e^(2q), -2v, and of each four channels the sum of v and the largest |q|, infinite where v cannot merge. K: of
// the rows.
template <class K, bool Tanh>
struct Factors {
  using R = Wide<K>;
  static constexpr int kVector = 16 / sizeof(K), kFour = kVector < 4 ? kVector : 4, kFours = kVector / kFour;
  R* data;
  int W, vectors;

  __device__ Factors(R* data, int W, int width) : data(data), W(W), vectors(static_cast<int>(ceil_div(width, kVector))) {}

  __device__ __forceinline__ R* four(int t, int f, int vector) const { return data + ((t * kFours + f) * vectors + vector) * kFour; }
  __device__ __forceinline__ R* note(int f, int vector) const {
    return data + (W + 1) * vectors * kVector + (f * vectors + vector) * 2;
  }

  // All of them, or a block's share of what its cluster collects.
  template <class T>
  __device__ void fill(const Rows<T>& queries, int steps, const T* v, int rank, int cluster) const {
    if constexpr (Tanh && sizeof(K) == 8) return;
    const int begin = first_piece(vectors, rank, cluster), many = first_piece(vectors, rank + 1, cluster) - begin;
    if constexpr (Tanh) {
#pragma unroll 1
      for (int i = threadIdx.x; i < many * kFours; i += kStepThreads) {
        const int f = i / many, vector = begin + i % many, first = vector * kVector + f * kFour;
        float sum = 0, top = first < queries.width ? 0 : 1;
#pragma unroll
        for (int n = 0; n < kFour; ++n) {
          const bool there = first + n < queries.width;
          const float x = there ? wide(v[first + n]) : 0.0f;
          sum += x;
          if (there && (!(fabsf(x) <= kHeaviest) || queries.width <= kNarrow)) top = INFINITY;
          four(W, f, vector)[n] = -2 * x;
        }
#pragma unroll 1
        for (int t = 0; t < W; ++t)
#pragma unroll
          for (int n = 0; n < kFour; ++n) {
            const float x = t < steps && first + n < queries.width ? wide(queries.at(t)[first + n]) : 0.0f;
            top = fmaxf(top, fabsf(x));
            four(t, f, vector)[n] = exponential<2>(x);
          }
        note(f, vector)[0] = sum;
        note(f, vector)[1] = top;
      }
    } else {
#pragma unroll 1
      for (int i = threadIdx.x; i < many * kVector * W; i += kStepThreads) {
        const int t = i / (many * kVector), a = begin * kVector + i % (many * kVector), n = a % kVector;
        four(t, n / kFour, a / kVector)[n % kFour] = t < steps && a < queries.width ? wide(queries.at(t)[a]) : R(0);
      }
    }
  }

  __device__ void collect(int rank, int cluster) const {
    if constexpr (Tanh && sizeof(K) == 8) return;
    cuda::collect<kFour>(data, (Tanh ? W + 1 : W) * kFours, vectors * kFour, vectors, rank, cluster);
    if constexpr (Tanh) cuda::collect<2>(note(0, 0), kFours, vectors * 2, vectors, rank, cluster);
  }
};

// The sum of v tanh(q + k) over four channels, of whose v the sum is `total`: their reciprocals merge into one.
__device__ __forceinline__ float merged(const float4& q, const float4& k, const float4& v, float total) {
  const float d0 = fmaf(q.x, k.x, 1.0f), d1 = fmaf(q.y, k.y, 1.0f), d2 = fmaf(q.z, k.z, 1.0f), d3 = fmaf(q.w, k.w, 1.0f);
  const float low = d0 * d1, high = d2 * d3;
  const float n = fmaf(fmaf(v.x, d1, v.y * d0), high, fmaf(v.z, d3, v.w * d2) * low);
  return fmaf(n, reciprocal(low * high), total);
}

// How many neighbours share a row and its queries: few, unless rows are.
__device__ __forceinline__ int lanes_of(int rows, int sets, int at_once) {
  int lanes = 8;
  while (lanes * sets < 32 && kStepThreads / (lanes * sets) * at_once >= 2 * rows) lanes *= 2;
  return lanes;
}

// q . k or, with Tanh, v . tanh(q + k) of the seen rows of a piece and the queries, handed to `use(row, query, sum)`.
template <int Q, class K, class T, bool Tanh, class Use>
__device__ __forceinline__ void row_sums(const Rows<K>& rows, int count, const uint16_t* seen, const Rows<T>& queries, int steps,
                                         const T* v, const Factors<K, Tanh>& factors, Use use) {
  using R = Wide<K>;
  using F = Factors<K, Tanh>;
  constexpr int N = F::kVector, kAtOnce = sizeof(K) == 8 ? 2 : 4;
  const int sets = factors.W / Q, lanes = lanes_of(count, sets, kAtOnce), lane = threadIdx.x % lanes, step = kStepThreads / (lanes * sets);
  const int own = threadIdx.x / (lanes * sets), first = threadIdx.x / lanes % sets * Q;  // the first of the rows, and of the queries
  const bool whole = rows.template whole<N>();
#pragma unroll 1
  for (int start = 0; start < count; start += step * kAtOnce) {
    R sums[kAtOnce][Q] = {};
    const K* from = rows.at(start + own);
    unsigned wanted = 0;
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      const int row = start + i * step + own;
      if (row < count && seen[row] != 0) wanted |= 1u << i;
    }
    if (!__any_sync(~0u, wanted != 0)) continue;
#pragma unroll 1
    for (int vector = lane; vector < factors.vectors; vector += lanes) {
      unsigned far = 0;
      if constexpr (Tanh && sizeof(K) == 8) {
        far = wanted;
      } else {
        Raw<K, N> raw[kAtOnce];
        load_rows<K, N, kAtOnce>(raw, from + vector * N, step * rows.stride, wanted, rows.width - vector * N, whole);
#pragma unroll
        for (int f = 0; f < F::kFours; ++f) {
          R k[kAtOnce][F::kFour];
#pragma unroll
          for (int i = 0; i < kAtOnce; ++i) {
            R x[N];
            raw[i].widen(x);
#pragma unroll
            for (int e = 0; e < F::kFour; ++e) k[i][e] = x[f * F::kFour + e];
          }
          if constexpr (Tanh) {
            const float4 weight = *reinterpret_cast<const float4*>(factors.four(factors.W, f, vector));
            const float2 note = *reinterpret_cast<const float2*>(factors.note(f, vector));
            bool near[kAtOnce];
            float4 powers[kAtOnce];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
              const float top = fmaxf(fmaxf(fabsf(k[i][0]), fabsf(k[i][1])), fmaxf(fabsf(k[i][2]), fabsf(k[i][3]))) + note.y;
              near[i] = top >= kSmall && top <= kWidest;
              if ((wanted >> i & 1) && !near[i]) far |= 1u << (i * F::kFours + f);
              powers[i] = {exponential<2>(k[i][0]), exponential<2>(k[i][1]), exponential<2>(k[i][2]), exponential<2>(k[i][3])};
            }
#pragma unroll
            for (int t = 0; t < Q; ++t) {
              const float4 query = *reinterpret_cast<const float4*>(factors.four(first + t, f, vector));
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i)
                if (near[i]) sums[i][t] += merged(query, powers[i], weight, note.x);
            }
          } else {
#pragma unroll
            for (int t = 0; t < Q; ++t) {
              R query[F::kFour];
              memcpy(query, __builtin_assume_aligned(factors.four(first + t, f, vector), 16), sizeof query);
#pragma unroll
              for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int e = 0; e < F::kFour; ++e) sums[i][t] = fma(query[e], k[i][e], sums[i][t]);
            }
          }
        }
      }
      if constexpr (Tanh) {
        // Channels whose exponentials cannot be multiplied, or whose tanh is small, one by one.
        while (far != 0) {
          const int which = __ffs(far) - 1, row = which / F::kFours;
          far &= far - 1;
          const int four = vector * N + which % F::kFours * F::kFour;
#pragma unroll 1
          for (int t = 0; t < Q && first + t < steps; ++t) {
            R found = 0;
#pragma unroll 1
            for (int a = four; a < four + F::kFour && a < rows.width; ++a)
              found += wide(v[a]) * hyperbolic_tangent(wide(queries.at(first + t)[a]) + wide(from[row * step * rows.stride + a]));
#pragma unroll
            for (int i = 0; i < kAtOnce * Q; ++i)
              if (i / Q == row && i % Q == t) sums[i / Q][i % Q] += found;
          }
        }
      }
    }
#pragma unroll 1
    for (int distance = lanes / 2; distance > 0; distance /= 2)
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
        for (int t = 0; t < Q; ++t) sums[i][t] += __shfl_xor_sync(~0u, sums[i][t], distance);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
      for (int t = 0; t < Q; ++t)
        if ((wanted >> i & 1) && t == lane) use(start + i * step + own, first + t, sums[i][t]);
  }
}

// Elements of rows as they are, each times what every query that sees the row gives it.
template <class T, int Q, int N>
struct Itself {
  using R = Wide<T>;
  static constexpr int kAtOnce = 4;

  __device__ __forceinline__ void begin(int, int) {}

  template <int Each, int Count>
  __device__ __forceinline__ void add(R (&sums)[Each][Q][N], const Raw<T, N> (&raw)[Count], const T*, int64_t,
                                      const unsigned (&sees)[Count], const R* numbers, int stride, int W) const {
#pragma unroll
    for (int i = 0; i < Count; ++i) {
      if (sees[i] == 0) continue;
      R x[N];
      raw[i].widen(x);
#pragma unroll
      for (int t = 0; t < Q; ++t)
        if (Q == 1 || sees[i] >> t & 1)
#pragma unroll
          for (int each = 0; each < Each; ++each)
#pragma unroll
            for (int n = 0; n < N; ++n) sums[each][t][n] = fma(numbers[i * stride + each * W + t], x[n], sums[each][t][n]);
    }
  }
};

// Sums over the seen rows of a piece of what `terms` makes of their elements, times `Each` numbers of each query; handed to
// `use(query, first column, sums by each)`, N columns at a time.
template <class T, int Q, int Each, int N, class Terms, class Use>
__device__ __forceinline__ void column_sums(const Rows<T>& rows, int count, int steps, const uint16_t* seen, int W,
                                            const Wide<T>* numbers, Wide<T>* fold, Terms terms, Use use) {
  using R = Wide<T>;
  constexpr int kAtOnce = Terms::kAtOnce;
  const int vectors = static_cast<int>(ceil_div(rows.width, N)), stride = step_stride(W, Each), sets = W / Q;
  const int first = threadIdx.x % sets * Q, most = kStepThreads / sets;
  const unsigned everyone = (1u << Q) - 1;
  const bool whole = rows.template whole<N>();
#pragma unroll 1
  for (int pass = 0; pass < vectors; pass += most) {
    const int across = vectors - pass < most ? vectors - pass : most, threads = across * sets;
    const int groups = kStepThreads / threads, group = threadIdx.x / threads, at = (pass + threadIdx.x % threads / sets) * N;
    R sums[Each][Q][N] = {};
    terms.begin(first, group < groups ? at : rows.width);  // threads too many have none: others may be done with theirs
#pragma unroll 1
    for (int start = group; group < groups && start < count; start += groups * kAtOnce) {
      const T* from = rows.at(start) + at;
      const int64_t step = groups * rows.stride;
      unsigned sees[kAtOnce], wanted = 0;
      Raw<T, N> raw[kAtOnce];
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        const int row = start + i * groups;
        sees[i] = row < count ? seen[row] >> first & everyone : 0;
        if (sees[i] != 0) wanted |= 1u << i;
      }
      load_rows<T, N, kAtOnce>(raw, from, step, wanted, rows.width - at, whole);
      terms.add(sums, raw, from, step, sees, numbers + start * stride + first, groups * stride, W);
    }
#pragma unroll
    for (int i = 0; i < Q * Each; ++i)
      if (groups > 1) {
        R(&own)[N] = sums[i / Q][i % Q];
        __syncthreads();
#pragma unroll
        for (int n = 0; n < N; ++n) fold[n * kStepThreads + threadIdx.x] = own[n];
        __syncthreads();
#pragma unroll 1
        for (int other = 1; group == 0 && other < groups; ++other)
#pragma unroll
          for (int n = 0; n < N; ++n) own[n] += fold[n * kStepThreads + other * threads + threadIdx.x];
      }
#pragma unroll
    for (int t = 0; t < Q; ++t) {
      int query = first + t;
      asm volatile("" : "+r"(query));  // else the addresses that follow from it are kept all the time
      if (group == 0 && query < steps) use(query, at, [&](int each) -> R(&)[N] { return sums[each][t]; });
    }
  }
}

}  // namespace onepass::cuda
