// The ops onepass::multiplicative_*.
#include "cpu.h"
#include "named.h"

namespace onepass {
namespace {

using Two = std::tuple<TorchTensor, TorchTensor>;
using Three = std::tuple<TorchTensor, TorchTensor, TorchTensor>;

Two forward(TorchTensor query, TorchTensor keys, TorchTensor values, double scale, OptionalTensor lengths, OptionalTensor mask,
            bool keep_weights) {
  Arguments in(query);
  MultiplicativeForward args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  args.scale = scale;
  const Shape& s = args.shape;
  TorchTensor context = empty(query, in.with_heads(s, s.T, s.D));
  TorchTensor weights = empty(query, keep_weights ? in.with_heads(s, s.T, s.S) : Sizes{0}, accumulator(query));
  args.query = in.in("query", query, in.with_heads(s, s.T, s.A));
  args.keys = in.in("keys", keys, in.with_heads(s, s.S, s.A));
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.visibility = in.visibility(lengths, mask, s);
  args.context = in.view("context", context);
  if (keep_weights) args.weights = in.view("weights", weights);
  const Named named("multiplicative_forward", s, args.visibility, args.query.dtype);
  kernels().multiplicative_forward(args, executor());
  return {context, weights};
}

Three backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys, TorchTensor values,
               double scale, TorchTensor weights, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(query);
  MultiplicativeBackward args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  args.scale = scale;
  const Shape& s = args.shape;
  TorchTensor grad_query = empty(query, in.with_heads(s, s.T, s.A));
  TorchTensor grad_keys = empty(query, in.with_heads(s, s.S, s.A));
  TorchTensor grad_values = empty(query, in.with_heads(s, s.S, s.D));
  args.query = in.in("query", query, in.with_heads(s, s.T, s.A));
  args.keys = in.in("keys", keys, in.with_heads(s, s.S, s.A));
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.visibility = in.visibility(lengths, mask, s);
  if (weights.dim() != 1) args.weights = in.in("weights", weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.grad_context = in.in("grad_context", grad_context, in.with_heads(s, s.T, s.D));
  args.grad_weights = in.in("grad_weights", grad_weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.grad_query = in.view("grad_query", grad_query);
  args.grad_keys = in.view("grad_keys", grad_keys);
  args.grad_values = in.view("grad_values", grad_values);
  const Named named("multiplicative_backward", s, args.visibility, args.query.dtype);
  kernels().multiplicative_backward(args, executor());
  return {grad_query, grad_keys, grad_values};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, library) {
  library.impl("multiplicative_forward", TORCH_BOX(&forward));
  library.impl("multiplicative_backward", TORCH_BOX(&backward));
}

}  // namespace onepass
