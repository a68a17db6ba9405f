// One vector type for every width: the compiler's vector extensions, and the few instructions that they lack.
// Included once per instruction set, inside a namespace of its own; ONEPASS_VECTOR_BYTES is the width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__ARM_NEON) && defined(__aarch64__)
#include <arm_neon.h>
#endif

namespace onepass::ONEPASS_ISA {

#if defined(__AVX512F__)
constexpr int kRegisters = 32;
#elif defined(__aarch64__)
constexpr int kRegisters = 32;
#else
constexpr int kRegisters = 16;
#endif

template <class R>
struct Simd;

template <>
struct Simd<float> {
  typedef float V __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
  typedef int32_t I __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
};

template <>
struct Simd<double> {
  typedef double V __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
  typedef int64_t I __attribute__((vector_size(ONEPASS_VECTOR_BYTES)));
};

template <class R>
using Vec = typename Simd<R>::V;
template <class R>
using Int = typename Simd<R>::I;
template <class R>
constexpr int kWidth = ONEPASS_VECTOR_BYTES / static_cast<int>(sizeof(R));

#define ONEPASS_INLINE inline __attribute__((always_inline))

template <class R>
ONEPASS_INLINE Vec<R> load(const R* p) {
  Vec<R> x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

template <class R>
ONEPASS_INLINE void store(R* p, Vec<R> x) {
  __builtin_memcpy(p, &x, sizeof x);
}

// The first n lanes; the others are zero, and untouched by the store.
template <class R>
ONEPASS_INLINE Vec<R> load_first(const R* p, int64_t n) {
  Vec<R> x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * sizeof(R));
  return x;
}

template <class R>
ONEPASS_INLINE void store_first(R* p, Vec<R> x, int64_t n) {
  __builtin_memcpy(p, &x, static_cast<size_t>(n) * sizeof(R));
}

template <class R>
ONEPASS_INLINE Vec<R> splat(R x) {
  return x - Vec<R>{};  // x - 0 is x for every x, and folds to a broadcast
}

// a * b + c in one rounding where the machine has it. Contraction by the compiler is off: which product it would fuse may differ
// from one tile shape to the next, and results must not depend on the tile.
template <class R>
ONEPASS_INLINE Vec<R> fma(Vec<R> a, Vec<R> b, Vec<R> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return _mm512_fmadd_ps(a, b, c);
  else return _mm512_fmadd_pd(a, b, c);
#elif defined(__FMA__)
  if constexpr (sizeof(R) == 4) return _mm256_fmadd_ps(a, b, c);
  else return _mm256_fmadd_pd(a, b, c);
#elif defined(__ARM_NEON) && defined(__aarch64__)
  if constexpr (sizeof(R) == 4) return (Vec<R>)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
  else return (Vec<R>)vfmaq_f64((float64x2_t)c, (float64x2_t)a, (float64x2_t)b);
#else
  return a * b + c;
#endif
}

// acc + n / d, for d in [1, 2^126): by an estimate and one Newton step where that is good to the last bit, else by a division.
template <class R>
ONEPASS_INLINE Vec<R> add_ratio(Vec<R> acc, Vec<R> n, Vec<R> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const Vec<R> r = _mm512_rcp14_ps(d);
    return fma<R>(n * r, _mm512_fnmadd_ps(d, r, splat<R>(2)), acc);
  }
#endif
  return acc + n / d;
}

// 1 / d, likewise.
template <class R>
ONEPASS_INLINE Vec<R> reciprocal(Vec<R> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const Vec<R> r = _mm512_rcp14_ps(d);
    return fma<R>(r, _mm512_fnmadd_ps(d, r, splat<R>(1)), r);
  }
#endif
  return splat<R>(1) / d;
}

template <class R>
ONEPASS_INLINE Vec<R> absolute(Vec<R> x) {
  constexpr auto magnitude = sizeof(R) == 4 ? int64_t{0x7fffffff} : int64_t{0x7fffffffffffffff};
  return (Vec<R>)((Int<R>)x & (Int<R>{} + static_cast<std::conditional_t<sizeof(R) == 4, int32_t, int64_t>>(magnitude)));
}

// The larger lanes; of a NaN and a number, the number b where a is NaN.
template <class R>
ONEPASS_INLINE Vec<R> larger(Vec<R> a, Vec<R> b) {
  return a > b ? a : b;
}

template <class R, int... I>
struct Lanes {};

template <class R, int... I>
ONEPASS_INLINE Vec<R> pick(Vec<R> a, Vec<R> b, Lanes<R, I...>) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Int<R>{I...});
#endif
}

template <class R, int Offset, class = std::make_integer_sequence<int, kWidth<R>>>
struct Alternate;
template <class R, int Offset, int... I>
struct Alternate<R, Offset, std::integer_sequence<int, I...>> {
  using type = Lanes<R, (2 * I + Offset)...>;
};

// Sums of neighbouring lanes: those of a in the lower half, those of b in the upper.
template <class R>
ONEPASS_INLINE Vec<R> add_neighbours(Vec<R> a, Vec<R> b) {
  return pick<R>(a, b, typename Alternate<R, 0>::type{}) + pick<R>(a, b, typename Alternate<R, 1>::type{});
}

// The sums over the lanes of N vectors (N a power of two, at most the width), in the first N lanes of the result. Every vector is
// summed by the same tree, whatever N is.
template <class R, int N>
ONEPASS_INLINE Vec<R> sum_lanes(Vec<R> (&x)[N]) {
  int count = N;
#pragma GCC unroll 8
  for (int width = kWidth<R>; width > 1; width /= 2) {
    if (count == 1) {
      x[0] = add_neighbours<R>(x[0], x[0]);
    } else {
#pragma GCC unroll 16
      for (int i = 0; i < count / 2; ++i) x[i] = add_neighbours<R>(x[2 * i], x[2 * i + 1]);
      count /= 2;
    }
  }
  return x[0];
}

template <class R>
ONEPASS_INLINE R largest_lane(Vec<R> x) {
  R m = x[0];
  for (int i = 1; i < kWidth<R>; ++i) m = x[i] > m ? x[i] : m;
  return m;
}

}  // namespace onepass::ONEPASS_ISA
