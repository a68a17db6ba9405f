"""The ops ``onepass::*``: what they take and give. Each backend implements them for its devices."""

SCHEMAS = (
    "additive_forward(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor? lengths, Tensor? mask) -> (Tensor context, Tensor "
    "weights)",
    "additive_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values, Tensor v, Tensor weights, "
    "Tensor? lengths, Tensor? mask) -> (Tensor, Tensor, Tensor, Tensor)",
    "additive_scores(Tensor query, Tensor keys, Tensor v, Tensor? lengths, Tensor? mask) -> Tensor",
    "additive_scores_backward(Tensor grad_scores, Tensor query, Tensor keys, Tensor v, Tensor? lengths, Tensor? mask) -> (Tensor, Tensor, "
    "Tensor)",
    "additive_prepare(Tensor keys, Tensor v, Tensor? lengths, Tensor? mask, bool half) -> (Tensor exponentials, Tensor sizes, Tensor "
    "weighting)",
    "additive_step(Tensor query, Tensor keys, Tensor values, Tensor v, Tensor exponentials, Tensor sizes, Tensor weighting, Tensor? "
    "lengths, Tensor? mask) -> (Tensor context, Tensor weights)",
    "additive_step_scores(Tensor query, Tensor keys, Tensor v, Tensor exponentials, Tensor sizes, Tensor weighting, Tensor? lengths, "
    "Tensor? mask) -> Tensor",
    # Without weights, grad_weights is the gradient of raw scores, here and in multiplicative_step_backward.
    "additive_step_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values, Tensor exponentials, "
    "Tensor sizes, Tensor weighting, Tensor? weights, Tensor? lengths, Tensor? mask) -> (Tensor grad_query, Tensor grad_scores)",
    "multiplicative_step(Tensor query, Tensor keys, Tensor values, float scale, Tensor? lengths, Tensor? mask) -> (Tensor context, Tensor "
    "weights)",
    "multiplicative_step_scores(Tensor query, Tensor keys, float scale, Tensor? lengths, Tensor? mask) -> Tensor",
    "multiplicative_step_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values, float scale, "
    "Tensor? weights, Tensor? lengths, Tensor? mask) -> (Tensor grad_query, Tensor grad_scores)",
    "stack_steps(Tensor[] steps, bool several) -> Tensor",
    "source_sums(Tensor weights, Tensor rows, Tensor? lengths, Tensor? mask) -> Tensor",
    "weighted_values(Tensor weights, Tensor values, Tensor? lengths, Tensor? mask) -> Tensor",
    "weighted_values_backward(Tensor grad_context, Tensor values, Tensor? lengths, Tensor? mask) -> Tensor",
    "multiplicative_forward(Tensor query, Tensor keys, Tensor values, float scale, Tensor? lengths, Tensor? mask, bool keep_weights) -> "
    "(Tensor context, Tensor weights)",
    "multiplicative_backward(Tensor? grad_context, Tensor? grad_weights, Tensor query, Tensor keys, Tensor values, float scale, Tensor "
    "weights, Tensor? lengths, Tensor? mask) -> (Tensor, Tensor, Tensor)",
)
