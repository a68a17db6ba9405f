// Clusters, from sm_90 on: blocks that run side by side, wait for each other and read each other's shared memory.
#pragma once

#include <cstdint>
#include <cstring>

namespace onepass::cuda {

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
constexpr bool kClusters = true;
#else
constexpr bool kClusters = false;
#endif

// All threads of the cluster have come here, and see what any of them wrote before.
__device__ __forceinline__ void cluster_sync() {
  if constexpr (kClusters) asm volatile("barrier.cluster.arrive.release.aligned;\n\tbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// N numbers in the shared memory of block `rank`, from where `own` lies in this one's; 8 bytes or whole sixteens.
template <int N, class R>
__device__ __forceinline__ void read_block(R (&x)[N], int rank, const R* own) {
  if constexpr (kClusters) {
    uint32_t at;
    asm volatile("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(at) : "r"(static_cast<uint32_t>(__cvta_generic_to_shared(own))), "r"(rank));
    if constexpr (sizeof x == 8) {
      uint2 words;
      asm volatile("ld.shared::cluster.v2.u32 {%0, %1}, [%2];" : "=r"(words.x), "=r"(words.y) : "r"(at));
      memcpy(x, &words, sizeof words);
    } else {
      static_assert(sizeof x % 16 == 0);
#pragma unroll
      for (int i = 0; i < static_cast<int>(sizeof x) / 16; ++i) {
        uint4 words;
        asm volatile("ld.shared::cluster.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w) : "r"(at + 16 * i));
        memcpy(reinterpret_cast<char*>(x) + 16 * i, &words, sizeof words);
      }
    }
  }
}

// Of so many pieces the first that a block fills, and which block fills one.
__device__ __forceinline__ int first_piece(int pieces, int rank, int cluster) { return pieces * rank / cluster; }
__device__ __forceinline__ int filled_by(int piece, int pieces, int cluster) { return ((piece + 1) * cluster - 1) / pieces; }

// What the others of a cluster filled of an array of such pieces, of N numbers each, `rows` times over.
template <int N, class R>
__device__ __forceinline__ void collect(R* data, int rows, int64_t stride, int pieces, int rank, int cluster) {
#pragma unroll 1
  for (int i = threadIdx.x; i < rows * pieces; i += blockDim.x) {
    const int piece = i % pieces, owner = filled_by(piece, pieces, cluster);
    if (owner == rank) continue;
    R* own = data + i / pieces * stride + piece * N;
    R x[N];
    read_block<N>(x, owner, own);
    memcpy(static_cast<R*>(__builtin_assume_aligned(own, sizeof x)), x, sizeof x);
  }
}

}  // namespace onepass::cuda
