// What the kernels take and where they are: plain structs over raw pointers, no torch. One table of entry points per instruction set.
#pragma once

#include <cstdint>

#include "../tensors.h"

namespace onepass {

// Runs task(context, i) for i in [0, count) on the caller's threads, in any order; that order is the other way round if `backwards`.
struct Executor {
  int threads;
  bool backwards;
  void (*run)(const Executor& self, int64_t count, void (*task)(void* context, int64_t i), void* context);
};

// What an attention memory keeps of its keys and of v, for one instruction set; absent in a call without a memory.
struct Prepared {
  Tensor exponentials;  // [B, H, S, stride] e^(2k), of the accumulator's dtype or bf16
  Tensor sizes;         // [B, H, S, 2] of the accumulator's dtype
  Tensor weighting;     // [H, 3 stride + 8], likewise
  int64_t stride = 0;   // A, padded to whole vectors of any instruction set
};

struct AdditivePrepare {
  Shape shape;  // T = 1
  Tensor keys, v;
  Visibility visibility;
  Prepared memory;
};

struct AdditiveForward {
  Shape shape;
  Tensor query, keys, values, v;  // v: [H, A], row stride unused
  Prepared memory;
  Visibility visibility;
  Tensor context, weights;   // weights in the accumulator's dtype
  bool scores_only = false;  // raw scores in the query's dtype in the place of weights, and no context
};

struct AdditiveBackward {
  Shape shape;
  Tensor query, keys, values, v;
  Visibility visibility;
  Tensor weights, grad_context, grad_weights;  // either gradient may be absent; without weights, grad_weights is dL/dscores
  Tensor grad_scores;                          // [B, H, T, S] of the accumulator's dtype, scratch; or given, if those three are absent
  Tensor partial_v;                            // [B, H, 1, A] of the accumulator's dtype, scratch
  Tensor grad_query, grad_keys, grad_values, grad_v;  // those of query and values may be absent
};

// A step's share of the backward: what arrives at its query. Its share of the gradients of keys, values and v waits for all steps.
struct StepBackward {
  Shape shape;
  double scale = 1;                // of multiplicative scores
  Tensor query, keys, values;
  Prepared memory;                 // additive
  Visibility visibility;
  Tensor weights, grad_context, grad_weights;  // as in AdditiveBackward
  Tensor grad_query, grad_scores;  // grad_scores [B, H, T, S] of the accumulator's dtype, times the scale
};

// sums[b, h, s] = sum over t of weights[b, h, t, s] rows[b, h, t]: gradients of all steps at once.
struct SourceSums {
  Shape shape;
  Visibility visibility;
  Tensor weights, grad_context, grad_values;
};

// context[b, h, t] = sum over s of weights[b, h, t, s] values[b, h, s], and what arrives at the context taken back to the weights.
struct WeightedValues {
  Shape shape;  // A = 0
  Tensor weights, values;
  Visibility visibility;
  Tensor context;
};

struct MultiplicativeForward {
  Shape shape;
  double scale;
  Tensor query, keys, values;
  Visibility visibility;
  Tensor context, weights;   // weights may be absent
  bool scores_only = false;  // as in AdditiveForward
};

struct MultiplicativeBackward {
  Shape shape;
  double scale;
  Tensor query, keys, values;
  Visibility visibility;
  Tensor weights, grad_context, grad_weights;  // weights may be absent: they are computed again
  Tensor grad_query, grad_keys, grad_values;
};

struct Kernels {
  void (*additive_prepare)(const AdditivePrepare&, const Executor&);
  void (*additive_step_backward)(const StepBackward&, const Executor&);
  void (*multiplicative_step_backward)(const StepBackward&, const Executor&);
  void (*source_sums)(const SourceSums&, const Executor&);
  void (*weighted_values)(const WeightedValues&, const Executor&);
  void (*weighted_values_backward)(const WeightedValues&, const Executor&);
  void (*additive_forward)(const AdditiveForward&, const Executor&);
  void (*additive_backward)(const AdditiveBackward&, const Executor&);
  void (*multiplicative_forward)(const MultiplicativeForward&, const Executor&);
  void (*multiplicative_backward)(const MultiplicativeBackward&, const Executor&);
  int vector_bytes;
};

extern const Kernels kernels_baseline;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

}  // namespace onepass
