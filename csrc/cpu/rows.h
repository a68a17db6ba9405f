// Rows of a tensor in the accumulator's type: in place where the tensor has that type, else converted into scratch.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace onepass::ONEPASS_ISA {

ONEPASS_INLINE float from_bf16(uint16_t x) {
  const uint32_t bits = static_cast<uint32_t>(x) << 16;
  float y;
  __builtin_memcpy(&y, &bits, 4);
  return y;
}

ONEPASS_INLINE uint16_t to_bf16(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}

ONEPASS_INLINE float from_f16(uint16_t x) {
#if defined(__F16C__)
  return _cvtsh_ss(x);
#else
  // Shift the exponent and mantissa into place and rescale by 2^112; the multiplication also makes subnormals right.
  const uint32_t magnitude = static_cast<uint32_t>(x & 0x7fffu) << 13;
  float y;
  __builtin_memcpy(&y, &magnitude, 4);
  y *= 5.192296858534828e33f;
  uint32_t bits;
  __builtin_memcpy(&bits, &y, 4);
  if ((x & 0x7c00u) == 0x7c00u) bits = 0x7f800000u | magnitude;
  bits |= static_cast<uint32_t>(x & 0x8000u) << 16;
  __builtin_memcpy(&y, &bits, 4);
  return y;
#endif
}

ONEPASS_INLINE uint16_t to_f16(float x) {
#if defined(__F16C__)
  return static_cast<uint16_t>(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT));
#else
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return static_cast<uint16_t>(sign | 0x7e00u);
  if (magnitude >= 0x477ff000u) return static_cast<uint16_t>(sign | 0x7c00u);  // rounds to 65536 or more
  if (magnitude < 0x38800000u) {                                               // subnormal: let an addition round it
    float y;
    __builtin_memcpy(&y, &magnitude, 4);
    y += 0.5f;
    uint32_t sum;
    __builtin_memcpy(&sum, &y, 4);
    return static_cast<uint16_t>(sign | (sum - 0x3f000000u));
  }
  const uint32_t rounded = magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u);
  return static_cast<uint16_t>(sign | (rounded >> 13));
#endif
}

template <class R>
void read_row(R* to, const void* from, Dtype dtype, int64_t n) {
  if constexpr (sizeof(R) == 4) {
    const auto* half = static_cast<const uint16_t*>(from);
    if (dtype == Dtype::bf16)
      for (int64_t i = 0; i < n; ++i) to[i] = from_bf16(half[i]);
    else if (dtype == Dtype::f16)
      for (int64_t i = 0; i < n; ++i) to[i] = from_f16(half[i]);
  }
  if (dtype == Dtype::f32 || dtype == Dtype::f64) __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(R));
}

template <class R>
void write_row(void* to, const R* from, Dtype dtype, int64_t n) {
  if constexpr (sizeof(R) == 4) {
    auto* half = static_cast<uint16_t*>(to);
    if (dtype == Dtype::bf16)
      for (int64_t i = 0; i < n; ++i) half[i] = to_bf16(from[i]);
    else if (dtype == Dtype::f16)
      for (int64_t i = 0; i < n; ++i) half[i] = to_f16(from[i]);
  }
  if (dtype == Dtype::f32 || dtype == Dtype::f64) __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(R));
}

template <class R>
constexpr bool is_native(Dtype dtype) {
  return size_of(dtype) == static_cast<int>(sizeof(R));
}

// Pointers to rows first, first + 1, ..., or to those of an index, of a tensor at (b, h).
template <class R>
const R** row_pointers(Scratch& scratch, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width,
                       const int32_t* index = nullptr) {
  auto** rows = scratch.take<const R*>(n);
  const bool native = is_native<R>(x.dtype);
  R* copy = native ? nullptr : scratch.take<R>(n * width);
  for (int64_t i = 0; i < n; ++i) {
    const void* row = x.at(b, h, index != nullptr ? index[i] : first + i);
    if (native) {
      rows[i] = static_cast<const R*>(row);
    } else {
      read_row<R>(copy + i * width, row, x.dtype, width);
      rows[i] = copy + i * width;
    }
  }
  return rows;
}

// A place to write n rows to: the tensor itself, or scratch that flush() then converts. With an index, the row that goes to index[i].
template <class R>
struct Output {
  R** rows;
  R* copy = nullptr;
  const Tensor* to;
  int64_t b, h, first, n, width, column;
  const int32_t* index;

  Output(Scratch& scratch, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width,
         const int32_t* index = nullptr, int64_t column = 0)
      : to(&x), b(b), h(h), first(first), n(n), width(width), column(column), index(index) {
    rows = scratch.take<R*>(n);
    const bool native = is_native<R>(x.dtype);
    if (!native) copy = scratch.take<R>(n * width);
    for (int64_t i = 0; i < n; ++i) rows[i] = native ? reinterpret_cast<R*>(target(i)) : copy + i * width;
  }

  char* target(int64_t i) const {
    return to->at(b, h, index != nullptr ? index[i] : first + i) + column * size_of(to->dtype);
  }

  void flush() const {
    if (copy != nullptr)
      for (int64_t i = 0; i < n; ++i) write_row<R>(target(i), copy + i * width, to->dtype, width);
  }
};

}  // namespace onepass::ONEPASS_ISA
