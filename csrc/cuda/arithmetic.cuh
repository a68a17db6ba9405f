// Reciprocals and exponentials of float32 as the hardware approximates them, good to a unit or two in the last place; float64 exactly.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../tensors.h"

namespace onepass::cuda {

constexpr float kLog2E = 1.4426950216293335f, kLog2ELow = 1.9259629911266175e-8f;  // what float32 lacks of log2 e
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kSmall = 1.0f / 16;  // |q| + |k| below which tanh is summed itself, so that it is relatively accurate
constexpr int kFewChannels = 8;      // up to which it always is: so few roundings of 1 - 2r do not average out

__device__ __forceinline__ float reciprocal(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ double reciprocal(double x) { return 1.0 / x; }

__device__ __forceinline__ float power_of_2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// e^(Factor x) for a Factor of 1 or 2 and finite results. The exponent of 2 is kept in two parts: one alone is off by as many roundings
// as it is large.
template <int Factor>
__device__ __forceinline__ float exponential(float x) {
  const float high = x * (Factor * kLog2E);
  const float low = fmaf(x, Factor * kLog2ELow, fmaf(x, Factor * kLog2E, -high));
  const float power = power_of_2(high);
  return fmaf(power * kLn2, low, power);
}

template <int Factor>
__device__ __forceinline__ double exponential(double x) {
  return exp(Factor * x);
}

// Two numbers that one instruction computes from sm_100 on.
using Pair = float2;

#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
__device__ __forceinline__ unsigned long long packed(Pair x) { return __builtin_bit_cast(unsigned long long, x); }
__device__ __forceinline__ Pair unpacked(unsigned long long x) { return __builtin_bit_cast(Pair, x); }

__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) {
  unsigned long long d;
  asm("fma.rn.f32x2 %0, %1, %2, %3;" : "=l"(d) : "l"(packed(a)), "l"(packed(b)), "l"(packed(c)));
  return unpacked(d);
}

__device__ __forceinline__ Pair operator+(Pair a, Pair b) {
  unsigned long long d;
  asm("add.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(d);
}

__device__ __forceinline__ Pair operator*(Pair a, Pair b) {
  unsigned long long d;
  asm("mul.rn.f32x2 %0, %1, %2;" : "=l"(d) : "l"(packed(a)), "l"(packed(b)));
  return unpacked(d);
}
#else
__device__ __forceinline__ Pair multiply_add(Pair a, Pair b, Pair c) { return {fmaf(a.x, b.x, c.x), fmaf(a.y, b.y, c.y)}; }
__device__ __forceinline__ Pair operator+(Pair a, Pair b) { return {a.x + b.x, a.y + b.y}; }
__device__ __forceinline__ Pair operator*(Pair a, Pair b) { return {a.x * b.x, a.y * b.y}; }
#endif

__device__ __forceinline__ float multiply_add(float a, float b, float c) { return fmaf(a, b, c); }

// e^(score - highest): 0 for a score of minus infinity, NaN for one of NaN and where highest is infinite.
template <class R>
__device__ __forceinline__ R softmax_term(R score, R highest) {
  const R x = score - highest;
  const R least = sizeof(R) == 8 ? R(-700) : R(-87);
  return x < least ? R(0) : exponential<1>(x);
}

// 1 / (1 + e^(2x)) for every x, NaN for NaN: the r of tanh x = 1 - 2 r. Beyond 40 both formats have saturated.
template <class R>
__device__ __forceinline__ R half_of_one_minus_tanh(R x) {
  x = x > R(40) ? R(40) : x < R(-40) ? R(-40) : x;
  return reciprocal(R(1) + exponential<2>(x));
}

// tanh x = 1 - 2 r, by its series where the difference would lose its digits.
__device__ __forceinline__ float tangent(float x, float r) {
  const float square = x * x;
  const float series = 2.0f / 15 - square * (17.0f / 315);
  return square < kSmall * kSmall ? x + x * square * (-1.0f / 3 + square * series) : 1.0f - 2.0f * r;
}

__device__ __forceinline__ double tangent(double x, double) { return tanh(x); }

template <class R>
__device__ __forceinline__ R hyperbolic_tangent(R x) {
  return tangent(x, half_of_one_minus_tanh(x));
}

// What a dtype is computed in, and its numbers widened and narrowed.
template <class T>
struct Accumulator {
  using type = float;
};
template <>
struct Accumulator<double> {
  using type = double;
};
template <class T>
using Wide = typename Accumulator<T>::type;

__device__ __forceinline__ float wide(float x) { return x; }
__device__ __forceinline__ double wide(double x) { return x; }
__device__ __forceinline__ float wide(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float wide(__half x) { return __half2float(x); }

template <class T>
__device__ __forceinline__ T narrow(Wide<T> x) {
  if constexpr (sizeof(T) == 2 && sizeof(Wide<T>) == 4) {
    if constexpr (__is_same(T, __half)) return __float2half_rn(x);
    else return __float2bfloat16_rn(x);
  } else {
    return x;
  }
}

}  // namespace onepass::cuda
