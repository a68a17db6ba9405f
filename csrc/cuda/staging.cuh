// Tiles on their way from global to shared memory: each thread copies chunks of its own, and changes them in place once they are there.
#pragma once

#include "arithmetic.cuh"

namespace onepass::cuda {

constexpr int kVector = 16;                // bytes that a thread takes at a time
constexpr int kRow = 64, kPitch = kRow + 16;  // bytes of a staged row, and from one to the next: eight rows meet no bank twice

// Numbers in 16 bytes and in a staged row of what T is computed in.
template <class T>
constexpr int kChunk = kVector / sizeof(Wide<T>);
template <class T>
constexpr int kStep = kRow / sizeof(Wide<T>);

template <class T, int N = kChunk<T>>
struct alignas(N * sizeof(T)) Chunk {
  T x[N];
};

template <class T>
using WideChunk = Chunk<Wide<T>>;

template <class T>
__device__ __forceinline__ WideChunk<T> widened(const Chunk<T, kChunk<T>>& raw) {
  WideChunk<T> found;
#pragma unroll
  for (int i = 0; i < kChunk<T>; ++i) found.x[i] = wide(raw.x[i]);
  return found;
}

// Whether every row of a tensor can be taken in pieces of so many bytes.
__device__ __forceinline__ bool in_pieces(const Tensor& x, int64_t width, int bytes) {
  const int64_t strides = x.batch | x.head | x.row | width;
  return reinterpret_cast<uintptr_t>(x.data) % bytes == 0 && strides % (bytes / size_of(x.dtype)) == 0;
}

// The first `count` of N numbers, then zeros. In pieces, these copies are asynchronous and `count` is 0 or N.
template <int N, class T>
__device__ __forceinline__ void copy(void* to, const T* from, int count, bool pieces) {
  if (pieces) {
    const auto target = static_cast<unsigned>(__cvta_generic_to_shared(to));
    const int bytes = count <= 0 ? 0 : N * sizeof(T);
    if constexpr (N * sizeof(T) == 16) {
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
    } else {
      static_assert(N * sizeof(T) == 8);
      asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(from), "r"(bytes) : "memory");
    }
  } else {
    T* target = static_cast<T*>(to);
#pragma unroll
    for (int i = 0; i < N; ++i) target[i] = i < count ? from[i] : narrow<T>(0);
  }
}

// The first `count` of a chunk, then zeros; with 16 bytes to a piece in one access.
template <int N, class T>
__device__ __forceinline__ Chunk<T, N> load(const T* from, int count, bool pieces) {
  if (pieces && count >= N) return *reinterpret_cast<const Chunk<T, N>*>(from);
  Chunk<T, N> found;
#pragma unroll
  for (int i = 0; i < N; ++i) found.x[i] = i < count ? from[i] : narrow<T>(0);
  return found;
}

template <int N, class T>
__device__ __forceinline__ void store(T* to, const Chunk<T, N>& chunk, int count, bool pieces) {
  if (pieces && count >= N) {
    *reinterpret_cast<Chunk<T, N>*>(to) = chunk;
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (i < count) to[i] = chunk.x[i];
    }
  }
}

// Until this thread's copies have arrived.
__device__ __forceinline__ void arrived() { asm volatile("cp.async.wait_all;" ::: "memory"); }

}  // namespace onepass::cuda
