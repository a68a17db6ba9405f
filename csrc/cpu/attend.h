// What both families share once there are scores: the softmax over the visible positions, sums weighted by it, and its gradient.
#pragma once

#include <cmath>

#include "gemm.h"
#include "softmax.h"
#include "stages.h"

namespace onepass::ONEPASS_ISA {

// How many queries to take at once, so that their [queries, S] scores stay in the second-level cache; but at least so many that reading
// keys and values for each block anew costs less than scores that do not stay.
inline int64_t query_block(const Shape& shape, int threads, int64_t at_most) {
  constexpr int64_t kScores = 64 * 1024, kFewest = 32;
  const int64_t T = shape.T, S = shape.S, heads = shape.B * shape.H;
  int64_t block = kScores / (S < 1 ? 1 : S);
  block = block < kFewest ? kFewest : block > at_most ? at_most : block;
  const int64_t wanted = (4 * threads + heads - 1) / (heads < 1 ? 1 : heads);  // blocks per head that keep all threads busy
  if (wanted > 1) {
    const int64_t share = (T + wanted - 1) / wanted;
    const int64_t busy = share < kFewest ? kFewest : share;
    block = busy < block ? busy : block;
  }
  return block < T ? (block + 3) / 4 * 4 : (T < 1 ? 1 : T);
}

template <class R>
bool all_finite(const R* row, int64_t n) {
  Vec<R> poison[1] = {};  // 0 * x is NaN unless x is finite
  int64_t i = 0;
  for (; i + kWidth<R> <= n; i += kWidth<R>) poison[0] = poison[0] + load<R>(row + i) * R(0);
  if (i < n) poison[0] = poison[0] + load_first<R>(row + i, n - i) * R(0);
  return sum_lanes<R, 1>(poison)[0] == R(0);
}

// out[t] = sum over i of weights[t, i] * rows[i]. A row that only some of the queries see must not reach the others. Where it is not finite,
// 0 times it would, and then no sum is finite that it is a term of: queries with such sums have theirs again, with zeros for those of these
// rows that they do not see.
template <class R>
void sum_visible(Scratch& scratch, const R* weights, int64_t stride, const Visible& visible, int64_t queries, const Rows<R>& rows,
                 R* const* out) {
  const int64_t width = rows.width, n = visible.count;
  const Positions positions{visible.first, visible.index};
  weighted_sums<R>(weights, stride, 1, rows, n, out, queries, Into::cache, positions);
  bool finite = true;
  for (int64_t t = 0; t < queries && finite && !visible.alike(); ++t) finite = all_finite<R>(out[t], width);
  if (finite) return;

  R* buffer = rows.native() ? nullptr : scratch.take<R>(width);
  auto* suspect = scratch.take<int64_t>(n);
  int64_t suspects = 0;
  for (int64_t i = 0; i < n; ++i)
    if (visible.mixed(queries, i) && !all_finite<R>(rows.row(i, buffer), width)) suspect[suspects++] = i;
  const void* zeros = scratch.zeros<char>(width * size_of(rows.dtype));
  Rows<R> own = rows;
  own.at = scratch.take<const void*>(n);
  for (int64_t t = 0; t < queries && suspects > 0; ++t) {
    if (all_finite<R>(out[t], width)) continue;
    bool sees_all = true;
    __builtin_memcpy(own.at, rows.at, static_cast<size_t>(n) * sizeof(void*));
    for (int64_t k = 0; k < suspects; ++k)
      if (!visible.sees(t, suspect[k])) own.at[suspect[k]] = zeros, sees_all = false;
    if (!sees_all) weighted_sums<R>(weights + t * stride, stride, 1, own, n, out + t, 1, Into::cache, positions);
  }
}

// One row of a [.., T, S] tensor from its visible entries; the others become `elsewhere`.
template <class R>
void scatter_row(void* to, Dtype dtype, const R* row, const Visible& visible, int64_t query, int64_t S, R elsewhere, R* buffer) {
  R* dense = is_native<R>(dtype) ? static_cast<R*>(to) : buffer;
  if (visible.in_a_row()) {
    const Span seen = visible.seen_of(query);
    const int64_t first = visible.first + seen.first, end = visible.first + seen.last;
    for (int64_t s = 0; s < first; ++s) dense[s] = elsewhere;
    __builtin_memcpy(dense + first, row + seen.first, static_cast<size_t>(end - first) * sizeof(R));
    for (int64_t s = end; s < S; ++s) dense[s] = elsewhere;
  } else if (visible.index == nullptr) {
    for (int64_t s = 0; s < visible.first; ++s) dense[s] = elsewhere;
    __builtin_memcpy(dense + visible.first, row, static_cast<size_t>(visible.count) * sizeof(R));
    visible.hide(dense + visible.first, query, elsewhere);
    for (int64_t s = visible.first + visible.count; s < S; ++s) dense[s] = elsewhere;
  } else {
    for (int64_t s = 0; s < S; ++s) dense[s] = elsewhere;
    for (int64_t i = visible.begin(query); i < visible.end(query); ++i)
      if (visible.sees(query, i)) dense[visible.position(i)] = row[i];
  }
  if (dense == buffer) write_row<R>(to, buffer, dtype, S);
}

// The visible entries of one such row; 0 where the query does not see the position.
template <class R>
void gather_row(R* row, const void* from, Dtype dtype, const Visible& visible, int64_t query, R* buffer) {
  if (visible.count == 0) return;
  const auto read = [&](R* to, int64_t position, int64_t n) {
    read_row<R>(to, static_cast<const char*>(from) + position * size_of(dtype), dtype, n);
  };
  if (visible.in_a_row()) {
    const Span seen = visible.seen_of(query);
    for (int64_t i = 0; i < seen.first; ++i) row[i] = 0;
    read(row + seen.first, visible.first + seen.first, seen.last - seen.first);
    for (int64_t i = seen.last; i < visible.count; ++i) row[i] = 0;
    return;
  }
  if (visible.index == nullptr) {
    read(row, visible.first, visible.count);
    return visible.hide(row, query, R(0));
  }
  const R* dense = static_cast<const R*>(from);
  if (!is_native<R>(dtype)) {
    const int64_t first = visible.position(0), end = visible.position(visible.count - 1) + 1;
    read(buffer + first, first, end - first);
    dense = buffer;
  }
  for (int64_t i = 0; i < visible.count; ++i) row[i] = visible.sees(query, i) ? dense[visible.position(i)] : R(0);
}

// Some queries of one (b, h) and their scores, or gradients of scores. Queries with spans come in groups that lie close, so that the work
// follows the spans.
template <class R, class Args>
class QueryBlock {
 public:
  QueryBlock(const Args& args, int64_t b, int64_t h, int64_t t0, int64_t queries) : args_(args), b_(b), h_(h), t0_(t0), left_(queries) {}

  bool next(Scratch& scratch) {
    t0_ += queries_;
    left_ -= queries_;
    if (left_ == 0) return false;
    const int64_t S = args_.shape.S;
    const auto span = [&](int64_t i) { return span_of(args_.visibility, S, b_, t0_ + i); };
    queries_ = args_.visibility.firsts == nullptr ? left_ : group_of(left_, span).queries;
    visible_ = visible_to(scratch, args_.visibility, S, b_, h_, t0_, queries_);
    stride_ = padded<R>(visible_.count);
    scores_ = scratch.take<R>(queries_ * stride_);
    return true;
  }

 protected:
  const R* const* query_rows(Scratch& scratch, const Tensor& x, int64_t width) const {
    return row_pointers<R>(scratch, x, b_, h_, t0_, queries_, width);
  }

  // Some of the rows of a [B, H, S, width] tensor at the visible positions, or some columns of all of them.
  Rows<R> seen_rows(const Tensor& x, int64_t width, Range some) const {
    const int32_t* index = visible_.index == nullptr ? nullptr : visible_.index + some.first;
    return Rows<R>(Scratch::mine(), x, b_, h_, visible_.first + some.first, some.count, width, index);
  }
  Rows<R> seen_columns(const Tensor& x, Range some) const { return seen_rows(from_column(x, some.first), some.count, {0, visible_.count}); }

  // scores[t, i] = rows[t] . x[i], for a share of the positions.
  void dot_products_of(const R* const* rows, const Tensor& x, int64_t width, Share share) const {
    const Range some = share.of(visible_.count, kWidth<R>);
    dot_products<R>(rows, queries_, args_.shape.T, seen_rows(x, width, some), some.count, scores_ + some.first, stride_);
  }

  // to[t] = sum over i of scores[t, i] * x[i], for some columns.
  void sum_columns(const R* scores, const Tensor& x, const Tensor& to, Range some) const {
    if (some.count == 0) return;
    Scratch& scratch = Scratch::mine();
    const Output<R> out(scratch, to, b_, h_, t0_, queries_, some.count, nullptr, some.first);
    sum_visible<R>(scratch, scores, stride_, visible_, queries_, seen_columns(x, some), out.rows);
    out.flush();
  }

  const Args& args_;
  const int64_t b_, h_;
  int64_t t0_, left_, queries_ = 0, stride_ = 0;
  Visible visible_{};
  R* scores_ = nullptr;  // [queries, stride]
};

// After the scores, position by position: the softmax, query by query, and the context, column by column. All that share few scores do a
// softmax each, so that they wait for each other once. Raw scores stay as they are.
template <class R, class Args>
class Contexts : public QueryBlock<R, Args> {
 public:
  using QueryBlock<R, Args>::QueryBlock;

  int stages() const { return few() ? 2 : 3; }

 protected:
  void after_scores(int stage, Share share) const {
    R* scores = this->scores_;
    if (stage == 1 && !few()) return rows(scores, share.of(this->queries_, 1), true);
    const Range columns = share.of(this->args_.scores_only ? 0 : this->args_.shape.D, kWidth<R>);
    if (few()) {
      if (share.index > 0 && columns.count == 0) return;
      if (share.count > 1) {
        const int64_t numbers = this->queries_ * this->stride_;
        scores = Scratch::mine().take<R>(numbers);
        __builtin_memcpy(scores, this->scores_, static_cast<size_t>(numbers) * sizeof(R));
      }
      rows(scores, {0, this->queries_}, share.index == 0);
    }
    this->sum_columns(scores, this->args_.values, this->args_.context, columns);
  }

 private:
  bool few() const { return this->queries_ == 1 || this->queries_ * this->stride_ <= 4096; }  // for which they would wait longer

  void rows(R* scores, Range some, bool writes) const {
    const Tensor& weights = this->args_.weights;
    const bool raw = this->args_.scores_only;
    writes = writes && weights.data != nullptr;
    const int64_t S = this->args_.shape.S;
    R* buffer = writes ? Scratch::mine().take<R>(S) : nullptr;
    const SoftmaxRows<R> softmax(Scratch::mine(), this->visible_, this->stride_);
    by_few(some, [&](Range few) {
      if (!raw) softmax.weights(scores + few.first * this->stride_, few);
      for (int64_t t = few.first; t < few.first + few.count && writes; ++t)
        scatter_row<R>(weights.at(this->b_, this->h_, this->t0_ + t), weights.dtype, scores + t * this->stride_, this->visible_, t, S,
                       raw ? -R(__builtin_inf()) : R(0), buffer);
    });
  }
};

// dL/dscores, from dL/dcontext and dL/dweights (or dL/dscores itself, if there are no weights): position by position, then query by query.
template <class R, class Args>
class ScoreGradients : public QueryBlock<R, Args> {
 public:
  using QueryBlock<R, Args>::QueryBlock;

  bool next(Scratch& scratch) {
    if (!QueryBlock<R, Args>::next(scratch)) return false;
    const Tensor& upstream = this->args_.grad_context;
    if (upstream.data != nullptr) upstream_ = this->query_rows(scratch, upstream, this->args_.shape.D);
    return true;
  }

  int stages() const { return 2; }
  void stage(int i, Share share) const {
    if (i == 1) return rows(share);
    if (upstream_ != nullptr) this->dot_products_of(upstream_, this->args_.values, this->args_.shape.D, share);
  }

 private:
  void rows(Share share) const {
    Scratch& scratch = Scratch::mine();
    const Args& args = this->args_;
    const Visible& visible = this->visible_;
    const int64_t S = args.shape.S;
    const int64_t stride = this->stride_;
    R *row = scratch.take<R>(stride), *buffer = scratch.take<R>(S);
    R* weights = args.weights.data == nullptr ? nullptr : scratch.take<R>(kRowsAtOnce * stride);
    const SoftmaxRows<R> softmax(scratch, visible, stride);
    const auto gather = [&](R* to, const Tensor& x, int64_t t) {
      gather_row<R>(to, x.at(this->b_, this->h_, this->t0_ + t), x.dtype, visible, t, buffer);
    };
    by_few(share.of(this->queries_, 1), [&](Range few) {
      for (int64_t t = few.first; t < few.first + few.count; ++t) {
        R* g = this->scores_ + t * stride;
        if (upstream_ == nullptr) __builtin_memset(g, 0, static_cast<size_t>(stride) * sizeof(R));
        if (weights != nullptr) gather(weights + (t - few.first) * stride, args.weights, t);
        if (args.grad_weights.data == nullptr) continue;
        gather(row, args.grad_weights, t);
        for (int64_t i = 0; i < visible.count; ++i) g[i] += row[i];
      }
      softmax.gradients(this->scores_ + few.first * stride, weights, scale(), few);
      for (int64_t t = few.first; t < few.first + few.count; ++t)
        scatter_row<R>(args.grad_scores.at(this->b_, this->h_, this->t0_ + t), args.grad_scores.dtype, this->scores_ + t * stride, visible,
                       t, S, R(0), buffer);
    });
  }

  R scale() const {
    if constexpr (requires(const Args& args) { args.scale; }) return R(this->args_.scale);
    else return R(1);
  }

  const R* const* upstream_ = nullptr;
};

// Does such a Work for all queries, blocks of them shared out over the threads.
template <class Work, class Args>
void by_blocks(const Args& args, const Executor& executor, int64_t block) {
  const int64_t H = args.shape.H, T = args.shape.T, blocks = (T + block - 1) / block;
  by_stages(executor, args.shape.B * H * blocks, block * args.shape.S * (args.shape.A + args.shape.D), [&](Scratch&, int64_t item) {
    const int64_t t0 = item % blocks * block;
    return Work(args, item / blocks / H, item / blocks % H, t0, t0 + block <= T ? block : T - t0);
  });
}

// Rows of zeros wherever `visible` has no position.
template <class R>
void clear_unseen(const Tensor& x, int64_t b, int64_t h, int64_t S, const Visible& visible, int64_t column, int64_t width) {
  int64_t i = 0;
  for (int64_t s = 0; s < S; ++s) {
    if (i < visible.count && visible.position(i) == s) ++i;
    else __builtin_memset(x.at(b, h, s) + column * size_of(x.dtype), 0, static_cast<size_t>(width * size_of(x.dtype)));
  }
}

// Gradients that no cache would keep go past it: a store into the cache reads the line first.
template <class R>
Into destination(const Tensor& gradient, const Shape& shape) {
  constexpr int64_t kCached = int64_t{32} << 20;
  return shape.B * gradient.batch * size_of(gradient.dtype) >= kCached && is_native<R>(gradient.dtype) ? Into::memory : Into::cache;
}

// The queries of (b, h) that see something, as a list: what the others hold is never read.
struct Seers {
  int64_t count;
  int32_t* index;

  Seers(Scratch& scratch, const Visible& visible, int64_t T) : count(0), index(scratch.take<int32_t>(T)) {
    for (int64_t t = 0; t < T; ++t)
      if (visible.sees_any(t)) index[count++] = static_cast<int32_t>(t);
  }

  // Of them from the t-th on, those to take at once, and the part of the list that they see.
  Group group(const Visible& visible, int64_t t, int64_t most) const {
    const auto span = [&](int64_t i) { return Span{visible.begin(index[t + i]), visible.end(index[t + i])}; };
    return group_of(most < count - t ? most : count - t, span);
  }
};

// Columns of values that a task takes: fewer where threads outnumber the tasks.
template <class R>
int64_t columns_of_task(const Shape& shape, int threads) {
  int64_t columns = 16 * kWidth<R>;
  while (columns > 4 * kWidth<R> && shape.B * shape.H * ((shape.D + columns - 1) / columns) < threads) columns /= 2;
  return columns;
}

// dvalues[s] = sum over t of weights[t, s] dcontext[t], for columns [column, column + width).
template <class R, class Args>
void values_gradient(const Args& args, int64_t b, int64_t h, int64_t column, int64_t width) {
  Scratch& scratch = Scratch::mine();
  const Shape& shape = args.shape;
  const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, 0, shape.T);
  const Seers seers(scratch, visible, shape.T);
  const int64_t n = visible.count;
  clear_unseen<R>(args.grad_values, b, h, shape.S, visible, column, width);
  const bool in_groups = visible.window != nullptr;
  const Into into = in_groups ? Into::sum : destination<R>(args.grad_values, shape);
  R* weights = scratch.take<R>((in_groups && seers.count > kMostQueries ? kMostQueries : seers.count) * n);
  R* buffer = scratch.take<R>(shape.S);
  const Tensor slice = from_column(args.grad_context, column);
  const int64_t terms = slice.data == nullptr ? 0 : seers.count;
  const Rows<R> upstream(scratch, slice, b, h, 0, terms, width, seers.index);
  const Output<R> out(scratch, args.grad_values, b, h, visible.first, n, width, visible.index, column);
  if (in_groups || terms == 0) weighted_sums<R>(weights, 1, n, upstream, 0, out.rows, n);  // zeros
  for (int64_t t0 = 0, count; t0 < terms; t0 += count) {
    const Group group = in_groups ? seers.group(visible, t0, kMostQueries) : Group{terms, 0, n};
    const Visible part = visible.part(0, group.first, group.last - group.first);
    count = group.queries;
    for (int64_t i = 0; i < count; ++i)
      gather_row<R>(weights + i * part.count, args.weights.at(b, h, seers.index[t0 + i]), args.weights.dtype, part, seers.index[t0 + i],
                    buffer);
    weighted_sums<R>(weights, 1, part.count, upstream.from(t0), count, out.rows + group.first, part.count, into);
  }
  out.flush();
}

template <class R>
class WeightedContexts : public QueryBlock<R, WeightedValues> {
 public:
  using QueryBlock<R, WeightedValues>::QueryBlock;

  int stages() const { return 2; }
  void stage(int i, Share share) const {
    const WeightedValues& args = this->args_;
    if (i == 1) return this->sum_columns(this->scores_, args.values, args.context, share.of(args.shape.D, kWidth<R>));
    R* buffer = Scratch::mine().take<R>(args.shape.S);
    const Range some = share.of(this->queries_, 1);
    for (int64_t t = some.first; t < some.first + some.count; ++t)
      gather_row<R>(this->scores_ + t * this->stride_, args.weights.at(this->b_, this->h_, this->t0_ + t), args.weights.dtype,
                    this->visible_, t, buffer);
  }
};

template <class R>
void weighted_values(const WeightedValues& args, const Executor& executor) {
  by_blocks<WeightedContexts<R>>(args, executor, query_block(args.shape, executor.threads, kMostQueries));
}

// dL/dweights from dL/dcontext; exactly 0 where not seen.
template <class R>
class WeightsGradients : public QueryBlock<R, WeightedValues> {
 public:
  using QueryBlock<R, WeightedValues>::QueryBlock;

  bool next(Scratch& scratch) {
    if (!QueryBlock<R, WeightedValues>::next(scratch)) return false;
    upstream_ = this->query_rows(scratch, this->args_.context, this->args_.shape.D);
    return true;
  }

  int stages() const { return 2; }
  void stage(int i, Share share) const {
    const WeightedValues& args = this->args_;
    if (i == 0) return this->dot_products_of(upstream_, args.values, args.shape.D, share);
    R* buffer = Scratch::mine().take<R>(args.shape.S);
    const Range some = share.of(this->queries_, 1);
    for (int64_t t = some.first; t < some.first + some.count; ++t)
      scatter_row<R>(args.weights.at(this->b_, this->h_, this->t0_ + t), args.weights.dtype, this->scores_ + t * this->stride_,
                     this->visible_, t, args.shape.S, R(0), buffer);
  }

 private:
  const R* const* upstream_ = nullptr;
};

template <class R>
void weighted_values_backward(const WeightedValues& args, const Executor& executor) {
  by_blocks<WeightsGradients<R>>(args, executor, query_block(args.shape, executor.threads, kMostQueries));
}

template <class R>
void source_sums(const SourceSums& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t columns = columns_of_task<R>(shape, executor.threads), blocks = (shape.D + columns - 1) / columns;
  parallel(executor, shape.B * shape.H * blocks, [&](int64_t task) {
    const int64_t bh = task / blocks, column = task % blocks * columns;
    values_gradient<R>(args, bh / shape.H, bh % shape.H, column, column + columns <= shape.D ? columns : shape.D - column);
  });
}

}  // namespace onepass::ONEPASS_ISA
