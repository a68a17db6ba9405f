// Exponentials and the hyperbolic tangent of whole vectors, good to about one unit in the last place.
#pragma once

#include "simd.h"

namespace onepass::ONEPASS_ISA {

template <class R>
struct Constants;

template <>
struct Constants<float> {
  static constexpr float rounder = 12582912.f;                     // 1.5 * 2^23: adding it rounds to an integer
  static constexpr float ln2_high = 0.693145751953125f;            // 15 bits, so that n * ln2_high is exact
  static constexpr float ln2_low = 1.42860677e-6f;
  static constexpr float smallest = -87.3f;                        // exp of less is not a normal number
  static constexpr int mantissa_bits = 23;
  static constexpr int bias = 127;
  // of r^2, r^3, ... in e^r, |r| <= ln2 / 2, off by 3e-9 of it at most and by 2e-8 of e^r - 1
  static constexpr float series[] = {0x1.fffffcp-2f, 0x1.555492p-3f, 0x1.5558b0p-5f, 0x1.12399cp-7f, 0x1.6a4eccp-10f};
};

template <>
struct Constants<double> {
  static constexpr double rounder = 6755399441055744.;             // 1.5 * 2^52
  static constexpr double ln2_high = 0.6931471803691238164;        // 33 bits
  static constexpr double ln2_low = 1.9082149292705877e-10;
  static constexpr double smallest = -708.3;
  static constexpr int mantissa_bits = 52;
  static constexpr int bias = 1023;
  static constexpr double series[] = {1. / 2,     1. / 6,      1. / 24,      1. / 120,      1. / 720,       1. / 5040,
                                      1. / 40320, 1. / 362880, 1. / 3628800, 1. / 39916800, 1. / 479001600, 1. / 6227020800};
};

// e^x = scale * (1 + p) with scale = 2^n a power of two and |p| < 0.42; x in [smallest, -smallest], or NaN (which p then is).
template <class R>
ONEPASS_INLINE void split_exp(Vec<R> x, Vec<R>& scale, Vec<R>& p) {
  using C = Constants<R>;
  const Vec<R> shifted = fma<R>(x, splat<R>(R(1.4426950408889634074)), splat<R>(C::rounder));
  const Vec<R> n = shifted - C::rounder;
  Vec<R> r = fma<R>(n, splat<R>(-C::ln2_high), x);
  r = fma<R>(n, splat<R>(-C::ln2_low), r);
  constexpr int terms = sizeof(C::series) / sizeof(R);
  Vec<R> q = splat<R>(C::series[terms - 1]);
#pragma GCC unroll 16
  for (int i = terms - 2; i >= 0; --i) q = fma<R>(q, r, splat<R>(C::series[i]));
  p = fma<R>(r * r, q, r);
  scale = (Vec<R>)(((Int<R>)shifted + C::bias) << C::mantissa_bits);  // the low bits of `shifted` are n
}

// e^x for x in [smallest, -smallest] or NaN.
template <class R>
ONEPASS_INLINE Vec<R> exp_normal(Vec<R> x) {
  Vec<R> scale, p;
  split_exp<R>(x, scale, p);
  return fma<R>(scale, p, scale);
}

// e^x for any x <= 0 or NaN; 0 where it would not be a normal number.
template <class R>
ONEPASS_INLINE Vec<R> exp_nonpositive(Vec<R> x) {
  constexpr R low = Constants<R>::smallest;
  const Vec<R> clamped = x < low ? splat<R>(low) : x;
  return x < low ? Vec<R>{} : exp_normal<R>(clamped);
}

// tanh z and 1 - tanh^2 z for every z, to relative accuracy: with e = exp(-2 |z|), tanh |z| = (1 - e) / (1 + e).
template <class R>
ONEPASS_INLINE void tanh_and_slope(Vec<R> z, Vec<R>& tangent, Vec<R>& slope) {
  constexpr R low = Constants<R>::smallest;
  const Vec<R> magnitude = absolute<R>(z);
  Vec<R> x = magnitude * R(-2);
  x = x < low ? splat<R>(low) : x;
  Vec<R> scale, p;
  split_exp<R>(x, scale, p);
  const Vec<R> e_minus_1 = fma<R>(scale, p, scale - R(1));
  const Vec<R> e = fma<R>(scale, p, scale);
  const Vec<R> r = R(1) / (R(1) + e);
  const Vec<R> positive = -e_minus_1 * r;
  tangent = z < R(0) ? -positive : positive;
  slope = R(4) * e * r * r;
}

}  // namespace onepass::ONEPASS_ISA
