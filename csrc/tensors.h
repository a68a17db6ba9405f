// What kernels take on any device: plain structs over raw pointers, no torch.
#pragma once

#include <cstdint>

// Inlined always: the files compiled for one instruction set must not provide code to those compiled for another.
#ifdef __CUDACC__
#define ONEPASS_ANYWHERE __host__ __device__ __forceinline__
#else
#define ONEPASS_ANYWHERE __attribute__((always_inline)) inline
#endif

namespace onepass {

enum class Dtype : int { f32, f64, bf16, f16 };

ONEPASS_ANYWHERE int size_of(Dtype dtype) {
  return dtype == Dtype::f64 ? 8 : dtype == Dtype::f32 ? 4 : 2;
}

// A [B, H, N, W] tensor whose last stride is 1; strides in elements. A null pointer is an absent tensor.
struct Tensor {
  void* data = nullptr;
  int64_t batch = 0, head = 0, row = 0;
  Dtype dtype = Dtype::f32;

  ONEPASS_ANYWHERE char* at(int64_t b, int64_t h, int64_t n) const {
    return static_cast<char*>(data) + (b * batch + h * head + n * row) * size_of(dtype);
  }
};

// Which source positions a query sees: the first lengths[b, t] of them, or with spans those from firsts[b, t] to lengths[b, t], where
// mask[b, h, t, s] holds.
struct Visibility {
  const int64_t *lengths = nullptr, *firsts = nullptr;  // of the same strides
  int64_t lengths_batch = 0, lengths_step = 0;
  const uint8_t* mask = nullptr;
  int64_t mask_batch = 0, mask_head = 0, mask_step = 0, mask_source = 0;
};

struct Shape {
  int64_t B, H, T, S, A, D;
};

}  // namespace onepass
