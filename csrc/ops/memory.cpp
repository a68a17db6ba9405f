// The ops of attention memories: onepass::additive_prepare, the steps of both families, and what all steps share in the backward.
#include <cstring>

#include "cpu.h"
#include "named.h"

namespace onepass {
namespace {

using Two = std::tuple<TorchTensor, TorchTensor>;
using Three = std::tuple<TorchTensor, TorchTensor, TorchTensor>;

int64_t padded_width(int64_t A) { return (A + 15) / 16 * 16; }

Three prepare(TorchTensor keys, TorchTensor v, OptionalTensor lengths, OptionalTensor mask, bool half) {
  Arguments in(keys);
  AdditivePrepare args;
  args.shape = shape_of_call(keys, keys, 0);
  args.shape.T = 1;
  const Shape& s = args.shape;
  const int64_t stride = padded_width(s.A);
  const ScalarType type = accumulator(keys);
  ONEPASS_CHECK(!half || type == ScalarType::Float, "a memory of float64 keys cannot be kept in bfloat16");
  TorchTensor exponentials = empty(keys, in.with_heads(s, s.S, stride), half ? ScalarType::BFloat16 : type);
  TorchTensor sizes = empty(keys, in.with_heads(s, s.S, 2), type);
  TorchTensor weighting = empty(keys, {s.H, 3 * stride + 8}, type);
  args.keys = in.in("keys", keys, in.with_heads(s, s.S, s.A));
  args.v = in.in("v", v, in.width_of_v(s));
  args.visibility = in.visibility(lengths, mask, s);
  args.memory = {in.view("exponentials", exponentials), in.view("sizes", sizes), in.view("weighting", weighting), stride};
  const Named named("additive_prepare", s, args.visibility, args.keys.dtype, args.memory.exponentials.dtype);
  kernels().additive_prepare(args, executor());
  return {exponentials, sizes, weighting};
}

Prepared prepared(Arguments& in, const Shape& s, const TorchTensor& query, const TorchTensor& exponentials, const TorchTensor& sizes,
                  const TorchTensor& weighting) {
  const int64_t stride = padded_width(s.A);
  const ScalarType type = accumulator(query);
  Prepared memory{in.in_memory("exponentials", exponentials, in.with_heads(s, s.S, stride), type),
                  in.in("sizes", sizes, in.with_heads(s, s.S, 2), type),
                  in.in("weighting", weighting, {s.H, 3 * stride + 8}, type), stride};
  if (s.H > 0) {
    const void* row = memory.weighting.at(0, 0, 0);
    const int64_t at = 3 * stride + 4;
    const double made = type == ScalarType::Double ? static_cast<const double*>(row)[at] : static_cast<const float*>(row)[at];
    const int width = kernels().vector_bytes / (type == ScalarType::Double ? 8 : 4);
    ONEPASS_CHECK(made == width, "this memory was made with vectors of ", made, " elements, but the instruction set in use has ", width);
  }
  return memory;
}

// What the scores of a step are made of, in both families.
void set_scored(Arguments& in, AdditiveForward& args, const TorchTensor& query, const TorchTensor& keys, const TorchTensor& v,
                const TorchTensor& exponentials, const TorchTensor& sizes, const TorchTensor& weighting, const OptionalTensor& lengths,
                const OptionalTensor& mask) {
  set_scored(in, args, query, keys, v);
  args.memory = prepared(in, args.shape, query, exponentials, sizes, weighting);
  args.visibility = in.visibility(lengths, mask, args.shape);
}

void set_scored(Arguments& in, MultiplicativeForward& args, const TorchTensor& query, const TorchTensor& keys, double scale,
                const OptionalTensor& lengths, const OptionalTensor& mask) {
  const Shape& s = args.shape;
  args.scale = scale;
  args.query = in.in("query", query, in.per_query(s, s.A));
  args.keys = in.in_memory("keys", keys, in.with_heads(s, s.S, s.A), query.scalar_type());
  args.visibility = in.visibility(lengths, mask, s);
}

// The dtype of what scores read of a memory.
Dtype kept(const AdditiveForward& args) {
  return args.memory.exponentials.dtype == Dtype::bf16 ? Dtype::bf16 : args.query.dtype;
}
Dtype kept(const MultiplicativeForward& args) { return args.keys.dtype; }

// A step; `scored` are the arguments that its scores are made of besides.
template <class Args, class... Scored>
Two step(const char* op, void (*kernel)(const Args&, const Executor&), const TorchTensor& query, const TorchTensor& keys,
         const TorchTensor& values, const Scored&... scored) {
  Arguments in(query, keys);
  Args args;
  args.shape = shape_of_step(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  TorchTensor context = empty(query, in.per_query(s, s.D));
  TorchTensor weights = empty(query, in.per_query(s, s.S), accumulator(query));
  set_scored(in, args, query, keys, scored...);
  args.values = in.in_memory("values", values, in.with_heads(s, s.S, s.D), query.scalar_type());
  args.context = in.view("context", context);
  args.weights = in.view("weights", weights);
  const Named named(op, s, args.visibility, args.query.dtype, args.values.dtype);
  kernel(args, executor());
  return {context, weights};
}

template <class Args, class... Scored>
TorchTensor step_scores(const char* op, void (*kernel)(const Args&, const Executor&), const TorchTensor& query, const TorchTensor& keys,
                        const Scored&... scored) {
  Arguments in(query, keys);
  Args args;
  args.shape = shape_of_step(query, keys, 0);
  TorchTensor scores = empty(query, in.per_query(args.shape, args.shape.S));
  set_scored(in, args, query, keys, scored...);
  args.weights = in.view("scores", scores);
  args.scores_only = true;
  const Named named(op, args.shape, args.visibility, args.query.dtype, kept(args));
  kernel(args, executor());
  return scores;
}

Two additive_step(TorchTensor query, TorchTensor keys, TorchTensor values, TorchTensor v, TorchTensor exponentials, TorchTensor sizes,
                  TorchTensor weighting, OptionalTensor lengths, OptionalTensor mask) {
  return step("additive_step", kernels().additive_forward, query, keys, values, v, exponentials, sizes, weighting, lengths, mask);
}

TorchTensor additive_step_scores(TorchTensor query, TorchTensor keys, TorchTensor v, TorchTensor exponentials, TorchTensor sizes,
                                 TorchTensor weighting, OptionalTensor lengths, OptionalTensor mask) {
  return step_scores("additive_step_scores", kernels().additive_forward, query, keys, v, exponentials, sizes, weighting, lengths, mask);
}

Two multiplicative_step(TorchTensor query, TorchTensor keys, TorchTensor values, double scale, OptionalTensor lengths,
                        OptionalTensor mask) {
  return step("multiplicative_step", kernels().multiplicative_forward, query, keys, values, scale, lengths, mask);
}

TorchTensor multiplicative_step_scores(TorchTensor query, TorchTensor keys, double scale, OptionalTensor lengths, OptionalTensor mask) {
  return step_scores("multiplicative_step_scores", kernels().multiplicative_forward, query, keys, scale, lengths, mask);
}

// What both families take in a step's backward; the outputs are made here.
struct Step {
  Arguments in;
  StepBackward args;
  TorchTensor grad_query, grad_scores;

  Step(const OptionalTensor& grad_context, const OptionalTensor& grad_weights, const TorchTensor& query, const TorchTensor& keys,
       const TorchTensor& values, const OptionalTensor& weights, const OptionalTensor& lengths, const OptionalTensor& mask)
      : in(query, keys) {
    args.shape = shape_of_step(query, keys, values.size(values.dim() - 1));
    const Shape& s = args.shape;
    grad_query = empty(query, in.per_query(s, s.A));
    grad_scores = empty(query, in.per_query(s, s.S), accumulator(query));
    args.query = in.in("query", query, in.per_query(s, s.A));
    args.keys = in.in_memory("keys", keys, in.with_heads(s, s.S, s.A), query.scalar_type());
    args.values = in.in_memory("values", values, in.with_heads(s, s.S, s.D), query.scalar_type());
    args.weights = in.in("weights", weights, in.per_query(s, s.S), accumulator(query));
    args.grad_context = in.in("grad_context", grad_context, in.per_query(s, s.D));
    args.grad_weights = in.in("grad_weights", grad_weights, in.per_query(s, s.S), accumulator(query));
    args.visibility = in.visibility(lengths, mask, s);
    args.grad_query = in.view("grad_query", grad_query);
    args.grad_scores = in.view("grad_scores", grad_scores);
  }

  Named named(const char* op) const { return {op, args.shape, args.visibility, args.query.dtype, args.values.dtype}; }
};

Two additive_step_backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys,
                           TorchTensor values, TorchTensor exponentials, TorchTensor sizes, TorchTensor weighting, OptionalTensor weights,
                           OptionalTensor lengths, OptionalTensor mask) {
  Step step(grad_context, grad_weights, query, keys, values, weights, lengths, mask);
  step.args.memory = prepared(step.in, step.args.shape, query, exponentials, sizes, weighting);
  const Named named = step.named("additive_step_backward");
  kernels().additive_step_backward(step.args, executor());
  return {step.grad_query, step.grad_scores};
}

Two multiplicative_step_backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys,
                                 TorchTensor values, double scale, OptionalTensor weights, OptionalTensor lengths, OptionalTensor mask) {
  Step step(grad_context, grad_weights, query, keys, values, weights, lengths, mask);
  step.args.scale = scale;
  const Named named = step.named("multiplicative_step_backward");
  kernels().multiplicative_step_backward(step.args, executor());
  return {step.grad_query, step.grad_scores};
}

// Steps [B, (H,) W] or [B, (H,) K, W] side by side, [B, (H,) T, W]; `several`: whether they have the dimension K.
TorchTensor stack_steps(std::vector<TorchTensor> steps, bool several) {
  ONEPASS_CHECK(!steps.empty(), "no steps to stack");
  const TorchTensor& first = steps[0];
  const int64_t rank = first.dim() + (several ? 0 : 1);
  ONEPASS_CHECK(rank == 3 || rank == 4, "steps must be [B, W], [B, H, W] or, if several, [B, K, W], [B, H, K, W]; got ", shape_of(first));
  Sizes sizes;
  for (const int64_t size : first.sizes()) {
    if (!several && static_cast<int64_t>(sizes.size()) == rank - 2) sizes.push_back(1);
    sizes.push_back(size);
  }
  const size_t row = sizes.size() - 2;
  const int64_t B = sizes[0], H = rank == 4 ? sizes[1] : 1, W = sizes[row + 1];
  sizes[row] = 0;
  std::vector<Tensor> from;
  std::vector<int64_t> begin{0};
  for (TorchTensor& step : steps) {
    bool fits = step.is_cpu() && step.scalar_type() == first.scalar_type() && step.dim() == first.dim();
    for (int64_t i = 0; fits && i < step.dim(); ++i) fits = (several && i == rank - 2) || step.size(i) == first.size(i);
    ONEPASS_CHECK(fits, "steps must be alike; got ", shape_of(first), " and ", shape_of(step));
    check_storage("steps", step);
    if (W > 1 && step.stride(step.dim() - 1) != 1) step = torch::stable::contiguous(step);
    from.push_back({step.mutable_data_ptr(), step.stride(0), rank == 4 ? step.stride(1) : 0, several ? step.stride(rank - 2) : 0,
                    dtype_of("steps", step)});
    begin.push_back(begin.back() + (several ? step.size(rank - 2) : 1));
  }
  sizes[row] = begin.back();
  TorchTensor stacked = empty(first, sizes);
  const Tensor to{stacked.mutable_data_ptr(), stacked.stride(0), rank == 4 ? stacked.stride(1) : 0, stacked.stride(rank - 2),
                  from[0].dtype};
  const auto copy = [&](int64_t bh) {
    for (size_t i = 0; i < from.size(); ++i)
      for (int64_t k = begin[i]; k < begin[i + 1]; ++k)
        std::memcpy(to.at(bh / H, bh % H, k), from[i].at(bh / H, bh % H, k - begin[i]), static_cast<size_t>(W * size_of(to.dtype)));
  };
  const Named named("stack_steps", {B, H, begin.back(), 0, 0, W}, {}, to.dtype);
  if (W > 0) {
    const Executor threads = executor();
    threads.run(
        threads, B * H, [](void* context, int64_t bh) { (*static_cast<decltype(copy)*>(context))(bh); },
        const_cast<void*>(static_cast<const void*>(&copy)));
  }
  return stacked;
}

TorchTensor source_sums(TorchTensor weights, TorchTensor rows, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(rows);
  SourceSums args;
  args.shape = shape_of_call(rows, weights, 0);
  Shape& s = args.shape;
  s.D = s.A;
  s.A = 0;
  s.S = weights.size(weights.dim() - 1);
  TorchTensor sums = empty(rows, in.with_heads(s, s.S, s.D));
  args.weights = in.in("weights", weights, in.with_heads(s, s.T, s.S), accumulator(rows));
  args.grad_context = in.in("rows", rows, in.with_heads(s, s.T, s.D));
  args.visibility = in.visibility(lengths, mask, s);
  args.grad_values = in.view("sums", sums);
  const Named named("source_sums", s, args.visibility, args.grad_context.dtype);
  kernels().source_sums(args, executor());
  return sums;
}

// Weights or what arrives at their context, and values, as the kernels take them; the output is made by the caller.
WeightedValues weighted(Arguments& in, const TorchTensor& rows, const TorchTensor& values, const OptionalTensor& lengths,
                        const OptionalTensor& mask) {
  WeightedValues args;
  args.shape = shape_of_step(rows, values, values.size(values.dim() - 1));
  args.shape.A = 0;
  args.values = in.in_memory("values", values, in.with_heads(args.shape, args.shape.S, args.shape.D), rows.scalar_type());
  args.visibility = in.visibility(lengths, mask, args.shape);
  return args;
}

TorchTensor weighted_values(TorchTensor weights, TorchTensor values, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(weights, values);
  WeightedValues args = weighted(in, weights, values, lengths, mask);
  TorchTensor context = empty(weights, in.per_query(args.shape, args.shape.D));
  args.weights = in.in("weights", weights, in.per_query(args.shape, args.shape.S));
  args.context = in.view("context", context);
  const Named named("weighted_values", args.shape, args.visibility, args.weights.dtype, args.values.dtype);
  kernels().weighted_values(args, executor());
  return context;
}

TorchTensor weighted_values_backward(TorchTensor grad_context, TorchTensor values, OptionalTensor lengths, OptionalTensor mask) {
  Arguments in(grad_context, values);
  WeightedValues args = weighted(in, grad_context, values, lengths, mask);
  TorchTensor grad_weights = empty(grad_context, in.per_query(args.shape, args.shape.S));
  args.context = in.in("grad_context", grad_context, in.per_query(args.shape, args.shape.D));
  args.weights = in.view("grad_weights", grad_weights);
  const Named named("weighted_values_backward", args.shape, args.visibility, args.context.dtype, args.values.dtype);
  kernels().weighted_values_backward(args, executor());
  return grad_weights;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass, CPU, library) {
  library.impl("additive_prepare", TORCH_BOX(&prepare));
  library.impl("additive_step", TORCH_BOX(&additive_step));
  library.impl("additive_step_scores", TORCH_BOX(&additive_step_scores));
  library.impl("additive_step_backward", TORCH_BOX(&additive_step_backward));
  library.impl("multiplicative_step", TORCH_BOX(&multiplicative_step));
  library.impl("multiplicative_step_scores", TORCH_BOX(&multiplicative_step_scores));
  library.impl("multiplicative_step_backward", TORCH_BOX(&multiplicative_step_backward));
  library.impl("stack_steps", TORCH_BOX(&stack_steps));
  library.impl("source_sums", TORCH_BOX(&source_sums));
  library.impl("weighted_values", TORCH_BOX(&weighted_values));
  library.impl("weighted_values_backward", TORCH_BOX(&weighted_values_backward));
}

}  // namespace onepass
