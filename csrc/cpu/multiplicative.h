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
class MultiplicativeContexts : public Contexts<R, MultiplicativeForward> {
 public:
  using Contexts<R, MultiplicativeForward>::Contexts;

  bool next(Scratch& scratch) {
    if (!Contexts<R, MultiplicativeForward>::next(scratch)) return false;
    query_ = this->query_rows(scratch, this->args_.query, this->args_.shape.A);
    return true;
  }

  void stage(int i, Share share) const {
    if (i > 0) return this->after_scores(i, share);
    const Shape& shape = this->args_.shape;
    const Range some = share.of(this->visible_.count, kWidth<R>);
    multiplicative_scores<R>(query_, this->queries_, shape.T, this->seen_rows(this->args_.keys, shape.A, some), some.count,
                             R(this->args_.scale), this->scores_ + some.first, this->stride_);
  }

 private:
  const R* const* query_ = nullptr;
};

template <class R>
void multiplicative_forward(const MultiplicativeForward& args, const Executor& executor) {
  by_blocks<MultiplicativeContexts<R>>(args, executor, query_block(args.shape, executor.threads, kQueryBlock));
}

// All gradients of one (b, h), blocks of queries in order; the block depends on the shape and the spans alone, so that sums over T do too.
// Of a block come dL/dweights and, unless the forward kept the weights, the scores, position by position; then dL/dscores, query by query;
// then what both give, column by column.
template <class R>
class MultiplicativeGradients {
 public:
  MultiplicativeGradients(Scratch& scratch, const MultiplicativeBackward& args, int64_t b, int64_t h)
      : args_(args), b_(b), h_(h), all_(visible_to(scratch, args.visibility, args.shape.S, b, h, 0, args.shape.T)),
        most_(query_block(args.shape, 0, kQueryBlock)), in_groups_(all_.window != nullptr),
        through_context_(args.grad_context.data != nullptr),
        grad_keys_(scratch, args.grad_keys, b, h, all_.first, all_.count, args.shape.A, all_.index),
        grad_values_(scratch, args.grad_values, b, h, all_.first, all_.count, args.shape.D, all_.index),
        grad_query_(scratch, args.grad_query, b, h, 0, args.shape.T, args.shape.A),
        keys_(scratch, args.keys, b, h, all_.first, all_.count, args.shape.A, all_.index),
        values_(scratch, args.values, b, h, all_.first, all_.count, args.shape.D, all_.index),
        query_(row_pointers<R>(scratch, args.query, b, h, 0, args.shape.T, args.shape.A)),
        upstream_(through_context_ ? row_pointers<R>(scratch, args.grad_context, b, h, 0, args.shape.T, args.shape.D) : nullptr),
        seeing_query_(scratch.take<const R*>(most_), args.shape.A), seeing_upstream_(scratch.take<const R*>(most_), args.shape.D),
        weights_(scratch.take<R>(most_ * padded<R>(all_.count))), grad_(scratch.take<R>(most_ * padded<R>(all_.count))) {
    clear_unseen<R>(args.grad_keys, b, h, args.shape.S, all_, 0, args.shape.A);
    clear_unseen<R>(args.grad_values, b, h, args.shape.S, all_, 0, args.shape.D);
    if (!in_groups_ && args.shape.T > 0) return;
    weighted_sums<R>(grad_, 1, all_.count, seeing_query_, 0, grad_keys_.rows, all_.count);  // zeros, to add to
    weighted_sums<R>(weights_, 1, all_.count, seeing_upstream_, 0, grad_values_.rows, all_.count);
    if (args.shape.T > 0) return;
    grad_keys_.flush();
    grad_values_.flush();
  }

  bool next(Scratch&) {
    const int64_t left = args_.shape.T - (t0_ += queries_);
    if (left == 0) return false;
    Group group{most_ < left ? most_ : left, 0, all_.count};
    if (in_groups_) group = group_of(group.queries, [&](int64_t t) { return Span{all_.begin(t0_ + t), all_.end(t0_ + t)}; });
    queries_ = group.queries;
    from_ = group.first;
    visible_ = all_.part(t0_, from_, group.last - from_);
    stride_ = padded<R>(visible_.count);
    seers_ = 0;
    for (int64_t t = 0; t < queries_; ++t) {
      if (!visible_.sees_any(t)) continue;
      seeing_query_.at[seers_] = query_[t0_ + t];
      if (through_context_) seeing_upstream_.at[seers_] = upstream_[t0_ + t];
      ++seers_;
    }
    return true;
  }

  int stages() const { return 3; }
  void stage(int i, Share share) const {
    if (i == 0) positions(share.of(visible_.count, kWidth<R>));
    if (i == 1) rows(share.of(queries_, 1));
    if (i == 2) keys(share.of(args_.shape.A, kWidth<R>)), values(share.of(args_.shape.D, kWidth<R>));
  }

 private:
  void positions(Range some) const {
    const int64_t first = from_ + some.first, T = args_.shape.T;
    if (args_.weights.data == nullptr)
      multiplicative_scores<R>(query_ + t0_, queries_, T, keys_.from(first), some.count, R(args_.scale), weights_ + some.first, stride_);
    if (through_context_)
      dot_products<R>(upstream_ + t0_, queries_, T, values_.from(first), some.count, grad_ + some.first, stride_);
  }

  void rows(Range some) const {
    Scratch& scratch = Scratch::mine();
    R *row = scratch.take<R>(stride_), *buffer = scratch.take<R>(args_.shape.S);
    const SoftmaxRows<R> softmax(scratch, visible_, stride_);
    by_few(some, [&](Range few) {
      R *weights = weights_ + few.first * stride_, *grad = grad_ + few.first * stride_;
      for (int64_t t = few.first; t < few.first + few.count; ++t) {
        R* g = grad_ + t * stride_;
        if (args_.weights.data != nullptr)
          gather_row<R>(weights_ + t * stride_, args_.weights.at(b_, h_, t0_ + t), args_.weights.dtype, visible_, t, buffer);
        if (!through_context_) __builtin_memset(g, 0, static_cast<size_t>(stride_) * sizeof(R));
        if (args_.grad_weights.data == nullptr) continue;
        gather_row<R>(row, args_.grad_weights.at(b_, h_, t0_ + t), args_.grad_weights.dtype, visible_, t, buffer);
        for (int64_t i = 0; i < visible_.count; ++i) g[i] += row[i];
      }
      if (args_.weights.data == nullptr) softmax.weights(weights, few);
      softmax.gradients(grad, weights, R(args_.scale), few);
    });
  }

  void keys(Range some) const {
    if (some.count == 0) return;
    Scratch& scratch = Scratch::mine();
    sum_visible<R>(scratch, grad_, stride_, visible_, queries_, keys_.from(from_).columns(scratch, visible_.count, some),
                   columns_from<R>(scratch, grad_query_.rows + t0_, queries_, some.first));
    grad_query_.flush({t0_, queries_}, some);
    sources(grad_, seeing_query_.columns(scratch, seers_, some), seers_, grad_keys_, some, args_.grad_keys);
  }

  void values(Range some) const {
    if (some.count == 0) return;
    const int64_t terms = through_context_ ? seers_ : 0;
    sources(weights_, seeing_upstream_.columns(Scratch::mine(), terms, some), terms, grad_values_, some, args_.grad_values);
  }

  // Queries that see nothing are left out of the sums over queries: what they hold is never read.
  void sources(const R* weights, const Rows<R>& rows, int64_t terms, const Output<R>& out, Range some, const Tensor& gradient) const {
    Scratch& scratch = Scratch::mine();
    if (seers_ < queries_) {
      R* seers = scratch.take<R>(seers_ * stride_);
      for (int64_t t = 0, seer = 0; t < queries_; ++t)
        if (visible_.sees_any(t))
          __builtin_memcpy(seers + seer++ * stride_, weights + t * stride_, static_cast<size_t>(visible_.count) * sizeof(R));
      weights = seers;
    }
    const Into into = in_groups_ || t0_ > 0 ? Into::sum : queries_ < args_.shape.T ? Into::cache : destination<R>(gradient, args_.shape);
    weighted_sums<R>(weights, 1, stride_, rows, terms, columns_from<R>(scratch, out.rows + from_, visible_.count, some.first),
                     visible_.count, into);
    if (t0_ + queries_ == args_.shape.T) out.flush({0, out.n}, some);
  }

  const MultiplicativeBackward& args_;
  const int64_t b_, h_;
  const Visible all_;
  const int64_t most_;
  const bool in_groups_, through_context_;
  const Output<R> grad_keys_, grad_values_, grad_query_;
  const Rows<R> keys_, values_;
  const R* const *query_, *const *upstream_;
  const Rows<R> seeing_query_, seeing_upstream_;
  R *const weights_, *const grad_;  // [queries, stride]
  // The block at hand.
  int64_t t0_ = 0, queries_ = 0, from_ = 0, stride_ = 0, seers_ = 0;
  Visible visible_{};
};

template <class R>
void multiplicative_backward(const MultiplicativeBackward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  by_stages(executor, shape.B * shape.H, shape.T * shape.S * (shape.A + shape.D), [&](Scratch& scratch, int64_t item) {
    return MultiplicativeGradients<R>(scratch, args, item / shape.H, item % shape.H);
  });
}

// dL/dscores, times the scale, and dL/dquery of queries over a memory.
template <class R>
class MultiplicativeStepGradients : public ScoreGradients<R, StepBackward> {
 public:
  using ScoreGradients<R, StepBackward>::ScoreGradients;

  int stages() const { return 3; }
  void stage(int i, Share share) const {
    if (i < 2) return ScoreGradients<R, StepBackward>::stage(i, share);
    this->sum_columns(this->scores_, this->args_.keys, this->args_.grad_query, share.of(this->args_.shape.A, kWidth<R>));
  }
};

template <class R>
void multiplicative_step_backward(const StepBackward& args, const Executor& executor) {
  by_blocks<MultiplicativeStepGradients<R>>(args, executor, query_block(args.shape, executor.threads, kQueryBlock));
}

}  // namespace onepass::ONEPASS_ISA
