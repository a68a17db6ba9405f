// One vector type for every width: the compiler's vector extensions, and the few instructions that they lack.
// Included once per instruction set, inside a namespace of its own; ONEPASS_VECTOR_BYTES is the width.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>
#include <utility>

#if defined(__AVX2__)
#if !defined(__clang__)  // gcc 12 warns of its own header, wherever it is used
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#endif
#include <immintrin.h>
#if !defined(__clang__)
#pragma GCC diagnostic pop
#endif
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

// Fetches what lies so many bytes from an address, which may be nobody's: into the first-level cache, or no nearer than the second.
template <int Locality = 3>
ONEPASS_INLINE void prefetch(const void* from, int64_t bytes) {
  __builtin_prefetch(reinterpret_cast<const void*>(reinterpret_cast<uintptr_t>(from) + static_cast<uintptr_t>(bytes)), 0, Locality);
}

// In bytes; rows need not lie in one array.
ONEPASS_INLINE int64_t distance(const void* from, const void* to) {
  return reinterpret_cast<intptr_t>(to) - reinterpret_cast<intptr_t>(from);
}

// A store that leaves the caches alone, where the machine has one for the address; finish_stores() before others may read.
template <class R>
ONEPASS_INLINE void store_past_cache(R* p, Vec<R> x) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof x == 0) return _mm512_stream_si512(reinterpret_cast<__m512i*>(p), (__m512i)x);
#elif defined(__AVX2__)
  if (reinterpret_cast<uintptr_t>(p) % sizeof x == 0) return _mm256_stream_si256(reinterpret_cast<__m256i*>(p), (__m256i)x);
#endif
  store<R>(p, x);
}

ONEPASS_INLINE void finish_stores() {
#if defined(__AVX2__)
  _mm_sfence();
#endif
}

// Whether masked instructions move what is less than a vector. The sanitizers see through calls of memcpy, and not through these.
#if defined(__AVX2__) && !defined(__SANITIZE_ADDRESS__)
#define ONEPASS_MASKED 1
#else
#define ONEPASS_MASKED 0
#endif

#if ONEPASS_MASKED && defined(__AVX512F__)
ONEPASS_INLINE uint32_t first_lanes(int64_t n) { return (uint32_t{1} << n) - 1; }
#elif ONEPASS_MASKED
ONEPASS_INLINE __m256i first_lanes(int64_t n, float) {
  return _mm256_cmpgt_epi32(_mm256_set1_epi32(static_cast<int>(n)), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
}
ONEPASS_INLINE __m256i first_lanes(int64_t n, double) { return _mm256_cmpgt_epi64(_mm256_set1_epi64x(n), _mm256_setr_epi64x(0, 1, 2, 3)); }
#endif

// The first n lanes, which may be all; the others are zero, and untouched by the store.
template <class R>
ONEPASS_INLINE Vec<R> load_first(const R* p, int64_t n) {
#if ONEPASS_MASKED && defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return _mm512_maskz_loadu_ps(static_cast<__mmask16>(first_lanes(n)), p);
  else return _mm512_maskz_loadu_pd(static_cast<__mmask8>(first_lanes(n)), p);
#elif ONEPASS_MASKED
  if constexpr (sizeof(R) == 4) return _mm256_maskload_ps(p, first_lanes(n, R{}));
  else return _mm256_maskload_pd(p, first_lanes(n, R{}));
#else
  Vec<R> x = {};
  __builtin_memcpy(&x, p, static_cast<size_t>(n) * sizeof(R));
  return x;
#endif
}

template <class R>
ONEPASS_INLINE void store_first(R* p, Vec<R> x, int64_t n) {
#if ONEPASS_MASKED && defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) _mm512_mask_storeu_ps(p, static_cast<__mmask16>(first_lanes(n)), x);
  else _mm512_mask_storeu_pd(p, static_cast<__mmask8>(first_lanes(n)), x);
#elif ONEPASS_MASKED
  if constexpr (sizeof(R) == 4) _mm256_maskstore_ps(p, first_lanes(n, R{}), x);
  else _mm256_maskstore_pd(p, first_lanes(n, R{}), x);
#else
  __builtin_memcpy(p, &x, static_cast<size_t>(n) * sizeof(R));
#endif
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

// acc + n / d, for |d| in [2^-126, 2^126): by an estimate and one Newton step where that is good to the last bit, else by a division.
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

// 1 / d, likewise, in two steps.
template <class R>
ONEPASS_INLINE Vec<R> reciprocal_estimate(Vec<R> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return _mm512_rcp14_ps(d);
#endif
  return splat<R>(1) / d;
}

template <class R>
ONEPASS_INLINE Vec<R> refined(Vec<R> r, [[maybe_unused]] Vec<R> d) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return fma<R>(r, _mm512_fnmadd_ps(d, r, splat<R>(1)), r);
#endif
  return r;
}

template <class R>
ONEPASS_INLINE Vec<R> reciprocal(Vec<R> d) {
  return refined<R>(reciprocal_estimate<R>(d), d);
}

template <class R>
ONEPASS_INLINE Vec<R> absolute(Vec<R> x) {
  constexpr auto magnitude = sizeof(R) == 4 ? int64_t{0x7fffffff} : int64_t{0x7fffffffffffffff};
  return (Vec<R>)((Int<R>)x & (Int<R>{} + static_cast<std::conditional_t<sizeof(R) == 4, int32_t, int64_t>>(magnitude)));
}

// The larger lanes; of a NaN and a number, the number b where a is NaN.
template <class R>
ONEPASS_INLINE Vec<R> larger(Vec<R> a, Vec<R> b) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) return _mm512_max_ps(a, b);
  else return _mm512_max_pd(a, b);
#elif defined(__AVX2__)
  if constexpr (sizeof(R) == 4) return _mm256_max_ps(a, b);
  else return _mm256_max_pd(a, b);
#else
  return a > b ? a : b;
#endif
}

// The larger of two lanes that are not negative: an infinity before any number, a NaN before an infinity.
template <class R>
ONEPASS_INLINE Vec<R> larger_magnitude(Vec<R> a, Vec<R> b) {
  const Int<R> x = (Int<R>)a, y = (Int<R>)b;
  return (Vec<R>)(x > y ? x : y);
}

// The first n lanes, and `rest` in the others.
template <class R, int... I>
ONEPASS_INLINE Vec<R> first_or(Vec<R> x, int64_t n, R rest, std::integer_sequence<int, I...>) {
  using Lane = std::conditional_t<sizeof(R) == 4, int32_t, int64_t>;
  return Int<R>{I...} < static_cast<Lane>(n) ? x : splat<R>(rest);
}
template <class R>
ONEPASS_INLINE Vec<R> first_or(Vec<R> x, int64_t n, R rest) {
  return first_or<R>(x, n, rest, std::make_integer_sequence<int, kWidth<R>>{});
}

// Lanes of x whose byte is not 0, and `rest` in the others.
template <class R>
ONEPASS_INLINE Vec<R> where(const uint8_t* bytes, Vec<R> x, R rest) {
#if defined(__AVX512F__)
  if constexpr (sizeof(R) == 4) {
    const __m128i all = _mm_loadu_si128(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_mask_blend_ps(_mm_test_epi8_mask(all, all), splat<R>(rest), x);
  } else {
    const __m128i all = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(bytes));
    return _mm512_mask_blend_pd(static_cast<__mmask8>(_mm_test_epi8_mask(all, all)), splat<R>(rest), x);
  }
#elif defined(__AVX2__)
  int64_t all = 0;
  __builtin_memcpy(&all, bytes, kWidth<R>);
  if constexpr (sizeof(R) == 4) return (Int<R>)_mm256_cvtepu8_epi32(_mm_cvtsi64_si128(all)) != 0 ? x : splat<R>(rest);
  else return (Int<R>)_mm256_cvtepu8_epi64(_mm_cvtsi64_si128(all)) != 0 ? x : splat<R>(rest);
#else
  for (int lane = 0; lane < kWidth<R>; ++lane) x[lane] = bytes[lane] != 0 ? x[lane] : rest;
  return x;
#endif
}

template <class R, int... I>
ONEPASS_INLINE Vec<R> pick(Vec<R> a, Vec<R> b) {
#if defined(__clang__)
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, Int<R>{I...});
#endif
}

// Adds x to a sum of many, and what that rounds off to `low` (Knuth's TwoSum): a number or a vector.
template <class V>
ONEPASS_INLINE void add_exactly(V& total, V& low, V x) {
  const V sum = total + x, added = sum - total;
  low += (total - (sum - added)) + (x - added);
  total = sum;
}

// The sum of both. What infinity, or the largest numbers, make of `low` does not count.
template <class V>
ONEPASS_INLINE V exact_sum(V total, V low) {
  return low - low == V{} ? total + low : total;
}

// Halve two vectors into one: lane i combines the lanes i and i ^ H, of b where i has the bit H, else of a. A blend, one permutation and
// one combination.
template <class R, int H, class F, int... I>
ONEPASS_INLINE Vec<R> halve(Vec<R> a, Vec<R> b, const F& combine, std::integer_sequence<int, I...>) {
  constexpr int W = kWidth<R>;
  return combine(pick<R, (I & H ? I + W : I)...>(a, b), pick<R, (I & H ? (I ^ H) + W : I ^ H)...>(a, b));
}

template <class R, int H, int N, class F>
ONEPASS_INLINE Vec<R> combine_lanes(Vec<R>* x, const F& combine) {
  constexpr auto lanes = std::make_integer_sequence<int, kWidth<R>>{};
  if constexpr (H == kWidth<R>) {
    return x[0];
  } else if constexpr (N == 1) {
    x[0] = halve<R, H>(x[0], x[0], combine, lanes);
    return combine_lanes<R, 2 * H, 1>(x, combine);
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < N / 2; ++i) x[i] = halve<R, H>(x[2 * i], x[2 * i + 1], combine, lanes);
    return combine_lanes<R, 2 * H, N / 2>(x, combine);
  }
}

// The sums over the lanes of N vectors (N a power of two, at most the width), in the first N lanes of the result; x is lost. Every
// vector is summed by the same tree, whatever N is.
template <class R, int N>
ONEPASS_INLINE Vec<R> sum_lanes(Vec<R>* x) {
  return combine_lanes<R, 1, N>(x, [](Vec<R> a, Vec<R> b) __attribute__((always_inline)) { return a + b; });
}

// Their largest, none of them a NaN.
template <class R, int N>
ONEPASS_INLINE Vec<R> largest_lanes(Vec<R>* x) {
  return combine_lanes<R, 1, N>(x, [](Vec<R> a, Vec<R> b) __attribute__((always_inline)) { return larger<R>(a, b); });
}

template <class R>
ONEPASS_INLINE R largest_lane(Vec<R> x) {
  return largest_lanes<R, 1>(&x)[0];
}

template <class R>
ONEPASS_INLINE R largest_magnitude(Vec<R> x) {
  return combine_lanes<R, 1, 1>(&x, [](Vec<R> a, Vec<R> b) __attribute__((always_inline)) { return larger_magnitude<R>(a, b); })[0];
}

}  // namespace onepass::ONEPASS_ISA
