// Multiplicative attention, forward and backward, for one instruction set: blocks of queries whose scores stay in cache.
#pragma once

#include "attend.h"

namespace onepass::ONEPASS_ISA {

constexpr int64_t kQueryBlock = 128;

// scores[t * stride + i] = scale * q[t] . k[i]
template <class R>
void multiplicative_scores(const R* const* query, int64_t queries, int64_t in_all, const Rows<R>& keys, int64_t n, R scale, R* scores,
                           int64_t stride) {
  dot_products<R>(query, queries, in_all, keys, n, scores, stride);
  if (scale == R(1)) return;
  for (int64_t t = 0; t < queries; ++t)
    for (int64_t i = 0; i < n; ++i) scores[t * stride + i] *= scale;
}

template <class R>
void multiplicative_forward(const MultiplicativeForward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const auto part = [&](int64_t b, int64_t h, int64_t first, int64_t n, R* scores, int64_t stride) {
    Scratch& scratch = Scratch::mine();
    const R* const* query = row_pointers<R>(scratch, args.query, b, h, 0, shape.T, shape.A);
    const Rows<R> keys(scratch, args.keys, b, h, first, n, shape.A);
    multiplicative_scores<R>(query, shape.T, shape.T, keys, n, R(args.scale), scores, stride);
  };
  if (split_forward<R>(args, executor, part)) return;
  const int64_t block = query_block(shape.T, shape.S, shape.B * shape.H, executor.threads, kQueryBlock);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t n = visible.count, stride = padded<R>(n);
    R* scores = scratch.take<R>(queries * stride);
    const R* const* query = row_pointers<R>(scratch, args.query, b, h, t0, queries, shape.A);
    const Rows<R> keys(scratch, args.keys, b, h, visible.first, n, shape.A, visible.index);
    multiplicative_scores<R>(query, queries, shape.T, keys, n, R(args.scale), scores, stride);
    R* buffer = args.weights.data == nullptr ? nullptr : scratch.take<R>(shape.S);
    for (int64_t t = 0; t < queries; ++t) {
      R* row = scores + t * stride;
      softmax_row<R>(row, visible, t);
      if (buffer != nullptr)
        scatter_row<R>(args.weights.at(b, h, t0 + t), args.weights.dtype, row, visible, t, shape.S, R(0), buffer);
    }
    const Rows<R> values(scratch, args.values, b, h, visible.first, n, shape.D, visible.index);
    const Output<R> context(scratch, args.context, b, h, t0, queries, shape.D);
    sum_visible<R>(scratch, scores, stride, visible, queries, values, context.rows);
    context.flush();
  });
}

// Weights of a block of queries: kept by the forward, or as it made them.
template <class R>
void weights_again(const MultiplicativeBackward& args, int64_t b, int64_t h, int64_t t0, int64_t queries,
                   const Visible& visible, const R* const* query, const Rows<R>& keys, R* weights, int64_t stride, R* buffer) {
  const int64_t n = visible.count;
  if (args.weights.data != nullptr) {
    for (int64_t t = 0; t < queries; ++t)
      gather_row<R>(weights + t * stride, args.weights.at(b, h, t0 + t), args.weights.dtype, visible, t, buffer);
    return;
  }
  multiplicative_scores<R>(query, queries, args.shape.T, keys, n, R(args.scale), weights, stride);
  for (int64_t t = 0; t < queries; ++t) softmax_row<R>(weights + t * stride, visible, t);
}

// All gradients of one (b, h), blocks of queries in order; the block depends on the shape and the spans alone, so that sums over T do too.
template <class R>
void multiplicative_gradients(const MultiplicativeBackward& args, int64_t b, int64_t h) {
  Scratch& scratch = Scratch::mine();
  const Shape& shape = args.shape;
  const Visible whole = visible_to(scratch, args.visibility, shape.S, b, h, 0, shape.T);
  const int64_t listed = whole.count, T = shape.T;
  clear_unseen<R>(args.grad_keys, b, h, shape.S, whole, 0, shape.A);
  clear_unseen<R>(args.grad_values, b, h, shape.S, whole, 0, shape.D);
  const Output<R> grad_keys(scratch, args.grad_keys, b, h, whole.first, listed, shape.A, whole.index);
  const Output<R> grad_values(scratch, args.grad_values, b, h, whole.first, listed, shape.D, whole.index);
  const Output<R> grad_query(scratch, args.grad_query, b, h, 0, T, shape.A);
  const Rows<R> keys(scratch, args.keys, b, h, whole.first, listed, shape.A, whole.index);
  const Rows<R> values(scratch, args.values, b, h, whole.first, listed, shape.D, whole.index);
  const R* const* query = row_pointers<R>(scratch, args.query, b, h, 0, T, shape.A);
  const bool through_context = args.grad_context.data != nullptr;
  const R* const* upstream = through_context ? row_pointers<R>(scratch, args.grad_context, b, h, 0, T, shape.D) : nullptr;
  const R scale = R(args.scale);

  const int64_t block = query_block(T, shape.S, 1, 0, kQueryBlock);
  R* weights = scratch.take<R>(block * padded<R>(listed));
  R* grad = scratch.take<R>(block * padded<R>(listed));
  R* row = scratch.take<R>(padded<R>(listed));
  R* buffer = scratch.take<R>(shape.S);
  const Rows<R> seeing_query(scratch.take<const R*>(block), shape.A), seeing_upstream(scratch.take<const R*>(block), shape.D);
  const bool in_groups = whole.window != nullptr;
  if (in_groups || T == 0) {  // zeros, to add to
    weighted_sums<R>(grad, 1, listed, seeing_query, 0, grad_keys.rows, listed);
    weighted_sums<R>(weights, 1, listed, seeing_upstream, 0, grad_values.rows, listed);
  }
  for (int64_t t0 = 0, queries; t0 < T; t0 += queries) {
    Group group{t0 + block <= T ? block : T - t0, 0, listed};
    if (in_groups) group = group_of(group.queries, [&](int64_t t) { return Span{whole.begin(t0 + t), whole.end(t0 + t)}; });
    queries = group.queries;
    const int64_t from = group.first, n = group.last - from, stride = padded<R>(n);
    const Visible visible = whole.part(t0, from, n);
    weights_again<R>(args, b, h, t0, queries, visible, query + t0, keys.from(from), weights, stride, buffer);
    if (through_context) dot_products<R>(upstream + t0, queries, T, values.from(from), n, grad, stride);
    else __builtin_memset(grad, 0, static_cast<size_t>(queries * stride) * sizeof(R));
    for (int64_t t = 0; t < queries; ++t) {
      R* g = grad + t * stride;
      if (args.grad_weights.data != nullptr) {
        gather_row<R>(row, args.grad_weights.at(b, h, t0 + t), args.grad_weights.dtype, visible, t, buffer);
        for (int64_t i = 0; i < n; ++i) g[i] += row[i];
      }
      softmax_gradient_row<R>(g, weights + t * stride, visible, t);
      for (int64_t i = 0; i < n; ++i) g[i] *= scale;
    }
    sum_visible<R>(scratch, grad, stride, visible, queries, keys.from(from), grad_query.rows + t0);
    // Queries that see nothing are left out of the sums over queries: what they hold is never read.
    int64_t seers = 0;
    for (int64_t t = 0; t < queries; ++t) {
      if (!visible.sees_any(t)) continue;
      if (seers < t) {
        __builtin_memcpy(weights + seers * stride, weights + t * stride, static_cast<size_t>(n) * sizeof(R));
        __builtin_memcpy(grad + seers * stride, grad + t * stride, static_cast<size_t>(n) * sizeof(R));
      }
      seeing_query.at[seers] = query[t0 + t];
      if (through_context) seeing_upstream.at[seers] = upstream[t0 + t];
      ++seers;
    }
    const auto into = [&](const Tensor& gradient) {
      return in_groups || t0 > 0 ? Into::sum : queries < T ? Into::cache : destination<R>(gradient, shape);
    };
    weighted_sums<R>(grad, 1, stride, seeing_query, seers, grad_keys.rows + from, n, into(args.grad_keys));
    weighted_sums<R>(weights, 1, stride, seeing_upstream, through_context ? seers : 0, grad_values.rows + from, n,
                     into(args.grad_values));
  }
  grad_query.flush();
  grad_keys.flush();
  grad_values.flush();
}

template <class R>
void multiplicative_backward(const MultiplicativeBackward& args, const Executor& executor) {
  const int64_t H = args.shape.H;
  parallel(executor, args.shape.B * H, [&](int64_t item) { multiplicative_gradients<R>(args, item / H, item % H); });
}

// dL/dscores, times the scale, and dL/dquery of queries over a memory.
template <class R>
void multiplicative_step_backward(const StepBackward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t block = query_block(shape.T, shape.S, shape.B * shape.H, executor.threads, kQueryBlock);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t n = visible.count, stride = padded<R>(n);
    R* g = scratch.take<R>(queries * stride);
    R* buffer = scratch.take<R>(shape.S);
    score_gradient<R>(scratch, args, b, h, t0, queries, visible, g, stride);
    for (int64_t t = 0; t < queries; ++t) {
      for (int64_t i = 0; i < n; ++i) g[t * stride + i] *= R(args.scale);
      scatter_row<R>(args.grad_scores.at(b, h, t0 + t), args.grad_scores.dtype, g + t * stride, visible, t, shape.S, R(0), buffer);
    }
    const Rows<R> keys(scratch, args.keys, b, h, visible.first, n, shape.A, visible.index);
    const Output<R> grad_query(scratch, args.grad_query, b, h, t0, queries, shape.A);
    sum_visible<R>(scratch, g, stride, visible, queries, keys, grad_query.rows);
    grad_query.flush();
  });
}

}  // namespace onepass::ONEPASS_ISA
