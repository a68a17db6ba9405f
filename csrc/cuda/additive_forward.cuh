// Scores, softmax and context of a tile of queries by one block. Scores go to where the weights will be, and are read back from there.
#pragma once

#include "additive_forward.h"
#include "additive_scores.cuh"

namespace onepass::cuda {

// What the threads of a block tell each other.
template <class W, int Queries>
struct Notes {
  int b, h, t0;
  int first[Queries], last[Queries];  // what each query sees, before the mask
  int begin, end;                     // what any of them sees
  float partial[kWarps], sizes[Queries + kSources];
  Weighting weighting;
  bool seen[Queries];                // whether a query sees anything
  W highest[Queries], sum[Queries];  // of scores and of e^(score - highest); in the end 0 for minus infinity, and the sum's inverse
};

template <class T, int R>
struct Forward {
  using W = Wide<T>;
  static constexpr int kQueries = 16 * R;
  using Shared = Notes<W, kQueries>;

  const AdditiveForward& p;
  Shared& notes;
  char* staging;

  // Where the block is, each time as it is noted: registers go to the sums.
  template <class X>
  __device__ __forceinline__ X* row_of(const Tensor& x, int64_t n) const {
    return reinterpret_cast<X*>(x.at(notes.b, notes.h, n));
  }

  __device__ __forceinline__ bool sees(int row, int s) const {
    return notes.first[row] <= s && s < notes.last[row] && kept(p.visibility, notes.b, notes.h, notes.t0 + row, s);
  }

  __device__ __forceinline__ bool has(int row) const { return notes.t0 + row < p.shape.T; }

  __device__ __forceinline__ void note_windows() const {
    const int row = threadIdx.x, tiles = static_cast<int>((p.shape.T + kQueries - 1) / kQueries), heads = static_cast<int>(p.shape.H);
    if (row == 0) {
      notes.b = blockIdx.x / tiles / heads, notes.h = blockIdx.x / tiles % heads, notes.t0 = blockIdx.x % tiles * kQueries;
      notes.begin = static_cast<int>(p.shape.S), notes.end = 0;
    }
    __syncthreads();
    if (row < kQueries) {
      const Window seen = has(row) ? window(p.visibility, notes.b, notes.t0 + row, p.shape.S) : Window{0, 0};
      notes.first[row] = seen.first, notes.last[row] = seen.last;
      notes.seen[row] = false, notes.highest[row] = -INFINITY, notes.sum[row] = 0;
      if (seen.first < seen.last) {
        atomicMin(&notes.begin, seen.first / kStep<T> * kStep<T>);
        atomicMax(&notes.end, seen.last);
      }
    }
    __syncthreads();
  }

  // Everything outside [begin, end) in the block's rows.
  template <class O>
  __device__ __forceinline__ void fill_outside(int begin, int end, O value) const {
    for (int row = threadIdx.x / 32; row < kQueries && has(row); row += kWarps) {
      O* out = row_of<O>(p.weights, notes.t0 + row);
      for (int64_t s = threadIdx.x % 32; s < p.shape.S; s += 32) {
        if (s < begin || s >= end) out[s] = value;
      }
    }
  }

  __device__ __forceinline__ Factors* factors() const {
    return reinterpret_cast<Factors*>(staging + forward_staging(kQueries, kStep<T>));
  }

  __device__ __forceinline__ ScoreTile<T, R> tile() const {
    const int A = static_cast<int>(p.shape.A);
    const bool pieces = in_pieces(p.query, A, kChunk<T> * sizeof(T)) && in_pieces(p.keys, A, kChunk<T> * sizeof(T));
    const int64_t row = min(int64_t{notes.t0} + min(copied_row(), kQueries - 1), p.shape.T - 1);
    const T* query = row_of<const T>(p.query, row);
    return {staging, factors(), notes.sizes, reinterpret_cast<const T*>(p.v.at(0, notes.h, 0)), A, pieces, query, {}};
  }

  // Which of its pairs a thread's queries see: bits of ScoreTile.
  __device__ __forceinline__ unsigned pairs_seen(int s0) const {
    unsigned seen = 0;
#pragma unroll 1
    for (int i = 0; i < R; ++i) {
      const int row = R * thread_y() + i;
      unsigned found = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (sees(row, s0 + thread_x() + 16 * j)) found |= 1u << j;
      }
      if (found != 0) notes.seen[row] = true;
      seen |= found << (kColumns * i);
    }
    return seen;
  }

  template <class O>
  __device__ __forceinline__ void store(int s0, const W (&scores)[R][kColumns]) const {
    const int row = R * thread_y(), s = s0 + thread_x();
    O* out = row_of<O>(p.weights, notes.t0 + row) + s;
#pragma unroll
    for (int i = 0; i < R; ++i) {
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (has(row + i) && s + 16 * j < p.shape.S) out[i * p.weights.row + 16 * j] = narrow<O>(scores[i][j]);
      }
    }
  }

  // The highest score so far of each query, and the sum of e^(score - highest): half a warp's.
  __device__ __forceinline__ void note_softmax(unsigned seen, const W (&scores)[R][kColumns]) const {
#pragma unroll
    for (int i = 0; i < R; ++i) {
      W &highest = notes.highest[R * thread_y() + i], &total = notes.sum[R * thread_y() + i];
      const W before = highest;
      W top = before;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) top = fmax(top, scores[i][j]);
      for (int distance = 8; distance; distance /= 2) top = fmax(top, __shfl_xor_sync(~0u, top, distance));
      const W base = top == W(-INFINITY) ? W(0) : top;
      W sum = 0;
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        if (seen >> (kColumns * i + j) & 1) sum += softmax_term(scores[i][j], base);
      }
      for (int distance = 8; distance; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
      __syncwarp();
      if (thread_x() == 0) highest = top, total = fma(total, softmax_term(before, base), sum);
    }
  }

  // Scores, which are all where they are asked for alone; else the softmax of what was seen is noted.
  __device__ __forceinline__ void scores(bool alone) const {
    ScoreTile<T, R> scored = tile();
#pragma unroll 1
    for (int s0 = notes.begin; s0 < notes.end; s0 += kSources) {
      const unsigned seen = pairs_seen(s0);
      W sums[R][kColumns];
      if (__syncthreads_or(seen)) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const int64_t row = min(int64_t{s0} + 64 * i + copied_row(), p.shape.S - 1);
          scored.keys[i] = row_of<const T>(p.keys, row);
        }
        scored.scores(notes.weighting, seen, sums);
      }
#pragma unroll
      for (int i = 0; i < R; ++i) {
#pragma unroll
        for (int j = 0; j < kColumns; ++j) {
          if (!(seen >> (kColumns * i + j) & 1)) sums[i][j] = -INFINITY;
        }
      }
      if (alone) {
        store<T>(s0, sums);
      } else {
        store<W>(s0, sums);
        note_softmax(seen, sums);
      }
    }
    __syncthreads();
    for (int row = threadIdx.x; row < kQueries; row += kThreads) {
      if (notes.highest[row] == W(-INFINITY)) notes.highest[row] = 0;
      notes.sum[row] = notes.seen[row] ? 1 / notes.sum[row] : W(0);
    }
  }

  // A thread's chunk of a row of weights, from scores or as they are already.
  __device__ __forceinline__ WideChunk<T> weights_at(int row, int s, bool pieces, bool scored) const {
    if (row >= kQueries || !has(row)) return {};
    W* at = row_of<W>(p.weights, notes.t0 + row) + s;
    const int count = static_cast<int>(min(p.shape.S - s, int64_t{kChunk<T>}));
    WideChunk<T> found = load<kChunk<T>>(at, count, pieces);
    if (!scored) return found;
#pragma unroll
    for (int i = 0; i < kChunk<T>; ++i) {
      found.x[i] = sees(row, s + i) ? softmax_term(found.x[i], notes.highest[row]) * notes.sum[row] : W(0);
    }
    cuda::store<kChunk<T>>(at, found, count, pieces);
    return found;
  }

  static constexpr int kValueColumns = 32 * kChunk<T>;  // a lane's chunk each

  __device__ __forceinline__ char* weights_tile(int buffer) const { return staging + buffer * kQueries * kPitch; }
  __device__ __forceinline__ T* values_tile(int buffer) const {
    return reinterpret_cast<T*>(staging + 2 * kQueries * kPitch) + buffer * kStep<T> * kValueColumns;
  }

  __device__ __forceinline__ void stage_values(int s0, int64_t d0, int buffer, bool pieces) const {
    constexpr int kPiece = kVector / sizeof(T), kPieces = kValueColumns / kPiece;
    for (int i = threadIdx.x; i < kStep<T> * kPieces; i += kThreads) {
      const int64_t s = s0 + i / kPieces, d = d0 + i % kPieces * kPiece;
      const bool there = s < notes.end && d < p.shape.D;
      const T* from = row_of<const T>(p.values, there ? s : 0) + (there ? d : 0);
      copy<kPiece>(values_tile(buffer) + i * kPiece, from, there ? static_cast<int>(min(p.shape.D - d, int64_t{kPiece})) : 0, pieces);
    }
  }

  // Weights times values of a step; a warp has 2 R queries.
  __device__ __forceinline__ void multiply(int buffer, W (&sums)[2 * R][kChunk<T>]) const {
    const char* rows = weights_tile(buffer) + 2 * R * (threadIdx.x / 32) * kPitch;
    const T* columns = values_tile(buffer) + threadIdx.x % 32 * kChunk<T>;
#pragma unroll
    for (int s = 0; s < kStep<T>; s += kChunk<T>) {
      WideChunk<T> weights[2 * R];
#pragma unroll
      for (int i = 0; i < 2 * R; ++i) weights[i] = *reinterpret_cast<const WideChunk<T>*>(rows + i * kPitch + s * sizeof(W));
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        const WideChunk<T> values = widened<T>(*reinterpret_cast<const Chunk<T, kChunk<T>>*>(columns + (s + e) * kValueColumns));
#pragma unroll
        for (int i = 0; i < 2 * R; ++i) {
#pragma unroll
          for (int d = 0; d < kChunk<T>; ++d) sums[i][d] = fma(weights[i].x[e], values.x[d], sums[i][d]);
        }
      }
    }
  }

  // The context again, where it is not finite: of what its query sees alone, as a weight of 0 hides no such value.
  __device__ __forceinline__ void mend(int row, int64_t d0, int count) const {
#pragma unroll 1
    for (int i = 0; i < 2 * R * count; ++i) {
      const int t = row + i / count;
      const int64_t d = d0 + i % count;
      if (!has(t)) continue;
      T& context = row_of<T>(p.context, notes.t0 + t)[d];
      if (isfinite(wide(context))) continue;
      const W* weights = row_of<const W>(p.weights, notes.t0 + t);
      W sum = 0;
#pragma unroll 1
      for (int s = notes.begin; s < notes.end; ++s) {
        if (sees(t, s)) sum = fma(weights[s], wide(row_of<const T>(p.values, s)[d]), sum);
      }
      context = narrow<T>(sum);
    }
  }

  __device__ __forceinline__ void store_context(int64_t d0, const W (&sums)[2 * R][kChunk<T>]) const {
    const int row = 2 * R * (threadIdx.x / 32);
    const int64_t d = d0 + threadIdx.x % 32 * kChunk<T>;
    const int count = static_cast<int>(min(p.shape.D - d, int64_t{kChunk<T>}));
    const bool pieces = in_pieces(p.context, p.shape.D, kChunk<T> * sizeof(T));
    T* out = row_of<T>(p.context, notes.t0 + row) + d;
    bool finite = true;
#pragma unroll
    for (int i = 0; i < 2 * R; ++i) {
      Chunk<T, kChunk<T>> chunk;
#pragma unroll
      for (int e = 0; e < kChunk<T>; ++e) {
        finite &= isfinite(sums[i][e]);
        chunk.x[e] = narrow<T>(sums[i][e]);
      }
      if (has(row + i)) cuda::store<kChunk<T>>(out + i * p.context.row, chunk, count, pieces);
    }
    if (!finite && count > 0) mend(row, d, count);
  }

  __device__ __forceinline__ void context() const {
    const bool pieces = in_pieces(p.values, p.shape.D, kVector), weights_in_pieces = in_pieces(p.weights, p.shape.S, kVector);
#pragma unroll 1
    for (int64_t d0 = 0; d0 == 0 || d0 < p.shape.D; d0 += kValueColumns) {
      W sums[2 * R][kChunk<T>] = {};
      __syncthreads();
      if (notes.begin < notes.end) stage_values(notes.begin, d0, 0, pieces);
#pragma unroll 1
      for (int s = notes.begin, buffer = 0; s < notes.end; s += kStep<T>, buffer ^= 1) {
        const WideChunk<T> chunk = weights_at(copied_row(), s + copied_chunk() * kChunk<T>, weights_in_pieces, d0 == 0);
        if (copied_row() < kQueries) {
          *reinterpret_cast<WideChunk<T>*>(weights_tile(buffer) + copied_row() * kPitch + copied_chunk() * kVector) = chunk;
        }
        arrived();
        __syncthreads();
        if (s + kStep<T> < notes.end) stage_values(s + kStep<T>, d0, buffer ^ 1, pieces);
        multiply(buffer, sums);
      }
      store_context(d0, sums);
    }
  }
};

template <class T, int R>
__device__ __forceinline__ void additive_forward(const AdditiveForward& p) {
  using W = Wide<T>;
  using Block = Forward<T, R>;
  extern __shared__ __align__(16) char dynamic[];
  __shared__ typename Block::Shared notes;
  const Block block{p, notes, dynamic};
  block.note_windows();
  const bool alone = p.context.data == nullptr;
  if constexpr (sizeof(W) == 4) {
    const T* v = reinterpret_cast<const T*>(p.v.at(0, notes.h, 0));
    weigh(v, static_cast<int>(p.shape.A), block.factors(), notes.partial, notes.weighting);
  }
  block.scores(alone);
  const int step = alone ? kSources : kStep<T>;
  const int end = notes.begin + (max(notes.end - notes.begin, 0) + step - 1) / step * step;
  if (alone) {
    block.fill_outside(notes.begin, end, narrow<T>(-INFINITY));
    return;
  }
  block.context();
  block.fill_outside(notes.begin, end, W(0));
}

}  // namespace onepass::cuda
