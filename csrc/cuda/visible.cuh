// Which source positions a query sees; lengths and spans may lie anywhere: here they are clamped to [0, S].
#pragma once

#include "../tensors.h"

namespace onepass::cuda {

struct Window {
  int first, last;  // the first position seen, and the one after the last

  __device__ __forceinline__ bool has(int s) const { return first <= s && s < last; }
};

__device__ __forceinline__ int clamped(int64_t position, int64_t S) {
  return static_cast<int>(position < 0 ? 0 : position > S ? S : position);
}

__device__ __forceinline__ Window window(const Visibility& v, int64_t b, int64_t t, int64_t S) {
  if (v.lengths == nullptr) return {0, static_cast<int>(S)};
  const int64_t at = b * v.lengths_batch + t * v.lengths_step;
  return {v.firsts == nullptr ? 0 : clamped(v.firsts[at], S), clamped(v.lengths[at], S)};
}

// What the mask says of a position, within the window or not.
__device__ __forceinline__ bool kept(const Visibility& v, int64_t b, int64_t h, int64_t t, int64_t s) {
  return v.mask == nullptr || v.mask[b * v.mask_batch + h * v.mask_head + t * v.mask_step + s * v.mask_source] != 0;
}

}  // namespace onepass::cuda
