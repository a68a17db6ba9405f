// Rows of a tensor, read in the accumulator's type: as they lie, a vector at a time, or converted into scratch.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace onepass::ONEPASS_ISA {

struct Range {
  int64_t first, count;
};

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

// Where the machine cannot.
ONEPASS_INLINE float from_f16(uint16_t x) {
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

// Elements of the half types, as tensors hold them.
struct Bf16 {
  uint16_t bits;
};
struct F16 {
  uint16_t bits;
};

// Calls f(an element of the dtype, of whatever value).
template <class R, class F>
ONEPASS_INLINE void with_element(Dtype dtype, const F& f) {
  if constexpr (sizeof(R) == 4) {
    if (dtype == Dtype::bf16) return f(Bf16{});
    if (dtype == Dtype::f16) return f(F16{});
  }
  f(R{});
}

// A vector's worth of halves as floats; the compiler's own conversions of vectors take twice as many instructions.
#if defined(__AVX512F__)
template <class Half>
ONEPASS_INLINE Vec<float> widened(__m256i halves) {
  if constexpr (std::is_same_v<Half, Bf16>) return (Vec<float>)_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16);
  else return _mm512_cvtph_ps(halves);
}
template <class Half>
ONEPASS_INLINE Vec<float> widened(const Half* p) {
  return widened<Half>(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
#elif defined(__AVX2__)
ONEPASS_INLINE __m128i halves_at(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
ONEPASS_INLINE Vec<float> widened(const Bf16* p) { return (Vec<float>)_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves_at(p)), 16); }
ONEPASS_INLINE Vec<float> widened(const F16* p) { return _mm256_cvtph_ps(halves_at(p)); }
#else
ONEPASS_INLINE float widened(Bf16 x) { return from_bf16(x.bits); }
ONEPASS_INLINE float widened(F16 x) { return from_f16(x.bits); }
template <class Half>
ONEPASS_INLINE Vec<float> widened(const Half* p) {
  Vec<float> x;
  for (int i = 0; i < kWidth<float>; ++i) x[i] = widened(p[i]);
  return x;
}
#endif

// The first n elements (all, unless told) as a vector of R, zeros behind them.
template <class R, class Element>
ONEPASS_INLINE Vec<R> load_as(const Element* p, int64_t n = kWidth<R>) {
  if constexpr (std::is_same_v<R, Element>) {
    return n == kWidth<R> ? load<R>(p) : load_first<R>(p, n);
  } else {
    if (n == kWidth<R>) return widened(p);
#if ONEPASS_MASKED && defined(__AVX512F__)
    return widened<Element>(_mm256_maskz_loadu_epi16(static_cast<__mmask16>(first_lanes(n)), p));
#else
    Element first[kWidth<R>] = {};
    __builtin_memcpy(first, p, static_cast<size_t>(n) * sizeof(Element));
    return widened(first);
#endif
  }
}

template <class R>
void read_row(R* to, const void* from, Dtype dtype, int64_t n) {
  constexpr int W = kWidth<R>;
  with_element<R>(dtype, [&](auto element) {
    const auto* elements = static_cast<const decltype(element)*>(from);
    int64_t i = 0;
    for (; i + W <= n; i += W) store<R>(to + i, load_as<R>(elements + i));
    if (i < n) store_first<R>(to + i, load_as<R>(elements + i, n - i), n - i);
  });
}

template <class R>
constexpr bool is_native(Dtype dtype) {
  return size_of(dtype) == static_cast<int>(sizeof(R));
}

#if ONEPASS_MASKED && defined(__AVX512F__)
ONEPASS_INLINE __m256i narrowed(Vec<float> x, Dtype dtype) {
  if (dtype == Dtype::f16) return _mm512_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT);
  const Int<float> bits = (Int<float>)x, rounded = bits + 0x7fff + ((bits >> 16) & 1);
  return _mm512_cvtepi32_epi16((__m512i)((x != x ? Int<float>{} + 0x7fc00000 : rounded) >> 16));
}
#endif

template <class R>
void write_row(void* to, const R* from, Dtype dtype, int64_t n) {
  if constexpr (sizeof(R) == 4) {
    auto* half = static_cast<uint16_t*>(to);
    int64_t i = 0;
#if ONEPASS_MASKED && defined(__AVX512F__)
    for (constexpr int W = kWidth<R>; i < n && !is_native<R>(dtype); i += W) {
      const int64_t count = n - i < W ? n - i : W;
      _mm256_mask_storeu_epi16(half + i, static_cast<__mmask16>(first_lanes(count)), narrowed(load_first<R>(from + i, count), dtype));
    }
#endif
    if (dtype == Dtype::bf16)
      for (; i < n; ++i) half[i] = to_bf16(from[i]);
    else if (dtype == Dtype::f16) {
#if defined(__F16C__)
      for (; i + 8 <= n; i += 8)
        _mm_storeu_si128(reinterpret_cast<__m128i*>(half + i), _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
#endif
      for (; i < n; ++i) half[i] = to_f16(from[i]);
    }
  }
  if (dtype == Dtype::f32 || dtype == Dtype::f64) __builtin_memcpy(to, from, static_cast<size_t>(n) * sizeof(R));
}

inline Tensor from_column(Tensor x, int64_t column) {
  x.data = x.data == nullptr ? nullptr : static_cast<char*>(x.data) + column * size_of(x.dtype);
  return x;
}

// Rows of a tensor as they lie, in its own dtype: first, first + 1, ..., or those of an index.
template <class R>
struct Rows {
  const void** at;
  Dtype dtype;
  int64_t width;

  Rows(const R** at, int64_t width)
      : at(reinterpret_cast<const void**>(at)), dtype(sizeof(R) == 8 ? Dtype::f64 : Dtype::f32), width(width) {}
  Rows(Scratch& scratch, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width, const int32_t* index = nullptr)
      : at(scratch.take<const void*>(n)), dtype(x.dtype), width(width) {
    for (int64_t i = 0; i < n; ++i) at[i] = x.at(b, h, index != nullptr ? index[i] : first + i);
  }

  bool native() const { return is_native<R>(dtype); }

  Rows from(int64_t first) const {
    Rows rest = *this;
    rest.at += first;
    return rest;
  }

  // Some columns of n rows.
  Rows columns(Scratch& scratch, int64_t n, Range some) const {
    Rows narrow = *this;
    narrow.width = some.count;
    if (some.first == 0) return narrow;
    narrow.at = scratch.take<const void*>(n);
    for (int64_t i = 0; i < n; ++i) narrow.at[i] = static_cast<const char*>(at[i]) + some.first * size_of(dtype);
    return narrow;
  }

  // Row i itself, or a copy of it in the buffer.
  const R* row(int64_t i, R* buffer) const {
    if (native()) return static_cast<const R*>(at[i]);
    read_row<R>(buffer, at[i], dtype, width);
    return buffer;
  }
};

// Pointers to rows in the accumulator's type, all of them converted where the tensor has another.
template <class R>
const R* const* row_pointers(Scratch& scratch, const Tensor& x, int64_t b, int64_t h, int64_t first, int64_t n, int64_t width,
                             const int32_t* index = nullptr) {
  const Rows<R> rows(scratch, x, b, h, first, n, width, index);
  auto** in_type = rows.native() ? reinterpret_cast<const R**>(rows.at) : scratch.take<const R*>(n);
  R* copies = rows.native() ? nullptr : scratch.take<R>(n * width);
  for (int64_t i = 0; i < n && copies != nullptr; ++i) in_type[i] = rows.row(i, copies + i * width);
  return in_type;
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

  void flush() const { flush({0, n}, {0, width}); }
  void flush(Range some, Range columns) const {
    if (copy == nullptr) return;
    for (int64_t i = some.first; i < some.first + some.count; ++i)
      write_row<R>(target(i) + columns.first * size_of(to->dtype), copy + i * width + columns.first, to->dtype, columns.count);
  }
};

// n rows to write to, from a column on.
template <class R>
R* const* columns_from(Scratch& scratch, R* const* rows, int64_t n, int64_t column) {
  if (column == 0) return rows;
  R** from = scratch.take<R*>(n);
  for (int64_t i = 0; i < n; ++i) from[i] = rows[i] + column;
  return from;
}

}  // namespace onepass::ONEPASS_ISA
