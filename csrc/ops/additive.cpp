// The ops onepass::additive_*.
#include <utility>

#include "cpu.h"
#include "named.h"

namespace onepass {
namespace {

using Grads4 = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor>;
using Grads3 = std::tuple<TorchTensor, TorchTensor, TorchTensor>;

std::tuple<TorchTensor, TorchTensor> forward(TorchTensor query, TorchTensor keys, TorchTensor values, TorchTensor v,
                                             OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(query);
  AdditiveForward args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  TorchTensor context = empty(query, in.with_heads(s, s.T, s.D));
  TorchTensor weights = empty(query, in.with_heads(s, s.T, s.S), accumulator(query));
  set_scored(in, args, query, keys, v);
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.visibility = in.visibility(lengths, mask, s);
  args.context = in.view("context", context);
  args.weights = in.view("weights", weights);
  const Named named("additive_forward", s, args.visibility, args.query.dtype);
  kernels().additive_forward(args, executor());
  return {context, weights};
}

TorchTensor scores(TorchTensor query, TorchTensor keys, TorchTensor v, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(query);
  AdditiveForward args;
  args.shape = shape_of_call(query, keys, 0);
  const Shape& s = args.shape;
  TorchTensor scores = empty(query, in.with_heads(s, s.T, s.S));
  set_scored(in, args, query, keys, v);
  args.visibility = in.visibility(lengths, mask, s);
  args.weights = in.view("scores", scores);
  args.scores_only = true;
  const Named named("additive_scores", s, args.visibility, args.query.dtype);
  kernels().additive_forward(args, executor());
  return scores;
}

Grads3 score_gradients(const char* op, Arguments& in, AdditiveBackward& args, const TorchTensor& query, const TorchTensor& keys,
                       const TorchTensor& v, const OptionalTensor& lengths, const OptionalTensor& mask, bool of_query = true) {
  const Shape& s = args.shape;
  TorchTensor grad_query = empty(query, of_query ? in.with_heads(s, s.T, s.A) : Sizes{0});
  TorchTensor grad_keys = empty(query, in.with_heads(s, s.S, s.A));
  TorchTensor grad_v = empty(query, in.width_of_v(s));
  TorchTensor partial_v = empty(query, {s.B, s.H, 1, s.A}, accumulator(query));
  set_scored(in, args, query, keys, v);
  args.visibility = in.visibility(lengths, mask, s);
  // What arrives at scores is taken as it lies, where nobody reads what some query does not see.
  const bool as_given = args.weights.data == nullptr && args.grad_weights.dtype == dtype_of("grad_scores", accumulator(query)) &&
                        args.visibility.mask == nullptr && args.visibility.lengths_step == 0;
  TorchTensor grad_scores = empty(query, as_given ? Sizes{0} : in.with_heads(s, s.T, s.S), accumulator(query));
  args.grad_scores = as_given ? std::exchange(args.grad_weights, {}) : in.view("grad_scores", grad_scores);
  if (of_query) args.grad_query = in.view("grad_query", grad_query);
  args.grad_keys = in.view("grad_keys", grad_keys);
  args.grad_v = in.view("grad_v", grad_v);
  args.partial_v = in.view("partial_v", partial_v);
  const Named named(op, s, args.visibility, args.query.dtype);
  kernels().additive_backward(args, executor());
  return {grad_query, grad_keys, grad_v};
}

Grads4 backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys, TorchTensor values,
                TorchTensor v, TorchTensor weights, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(query);
  AdditiveBackward args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  TorchTensor grad_values = empty(query, in.with_heads(s, s.S, s.D));
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.weights = in.in("weights", weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.grad_context = in.in("grad_context", grad_context, in.with_heads(s, s.T, s.D));
  args.grad_weights = in.in("grad_weights", grad_weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.grad_values = in.view("grad_values", grad_values);
  auto [grad_query, grad_keys, grad_v] = score_gradients("additive_backward", in, args, query, keys, v, lengths, mask);
  return {grad_query, grad_keys, grad_values, grad_v};
}

Grads3 scores_backward(TorchTensor grad_scores, TorchTensor query, TorchTensor keys, TorchTensor v, OptionalTensor lengths,
                       OptionalTensor mask, bool of_query) {
  Arguments in(query);
  AdditiveBackward args;
  args.shape = shape_of_call(query, keys, 0);
  const ScalarType wide = accumulator(query), dtype = grad_scores.scalar_type() == wide ? wide : query.scalar_type();
  args.grad_weights = in.in("grad_scores", grad_scores, in.with_heads(args.shape, args.shape.T, args.shape.S), dtype);
  return score_gradients("additive_scores_backward", in, args, query, keys, v, lengths, mask, of_query);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, library) {
  library.impl("additive_forward", TORCH_BOX(&forward));
  library.impl("additive_backward", TORCH_BOX(&backward));
  library.impl("additive_scores", TORCH_BOX(&scores));
  library.impl("additive_scores_backward", TORCH_BOX(&scores_backward));
}

}  // namespace onepass
