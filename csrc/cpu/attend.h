// What both families share once there are scores: the softmax over the visible positions, sums weighted by it, and its gradient.
#pragma once

#include <cmath>

#include "elementary.h"
#include "gemm.h"
#include "rows.h"
#include "visible.h"

namespace onepass::ONEPASS_ISA {

// The row stride of a [queries, n] matrix in scratch: whole vectors.
template <class R>
int64_t padded(int64_t n) {
  return (n + kWidth<R> - 1) / kWidth<R> * kWidth<R>;
}

// How many queries to take at once, so that their [queries, S] scores stay in the second-level cache; but at least so many that reading
// keys and values for each block anew costs less than scores that do not stay.
inline int64_t query_block(int64_t T, int64_t S, int64_t heads, int threads, int64_t at_most) {
  constexpr int64_t kScores = 64 * 1024, kFewest = 32;
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

// Calls f(b, h, first query, queries) for all queries, blocks of them shared out over the threads. Queries with spans come in groups that
// lie close, so that the work follows the spans.
template <class F>
void for_queries(const Executor& executor, const Shape& shape, const Visibility& visibility, int64_t block, const F& f) {
  const int64_t blocks = (shape.T + block - 1) / block;
  parallel(executor, shape.B * shape.H * blocks, [&](int64_t item) {
    const int64_t b = item / blocks / shape.H, h = item / blocks % shape.H, t0 = item % blocks * block;
    const int64_t end = t0 + block <= shape.T ? t0 + block : shape.T;
    if (visibility.firsts == nullptr) return f(b, h, t0, end - t0);
    for (int64_t t = t0, queries; t < end; t += queries) {
      queries = group_of(end - t, [&](int64_t i) { return span_of(visibility, shape.S, b, t + i); }).queries;
      Scratch::mine().reset();
      f(b, h, t, queries);
    }
  });
}

// The sum of a row's visible entries, given a vector or one at a time. Each goes to the lane of its position, whatever others a block of
// queries sees: how queries are shared out in blocks must not show in the last bit. Nor is it off by more for a long row: gradients of
// scores add up to 0, and what is left of them is small beside an error that they share.
template <class R, class FV, class F1>
ONEPASS_INLINE R sum_by_position(const Visible& visible, const FV& vector, const F1& one) {
  constexpr int W = kWidth<R>;
  Vec<R> sums[1] = {};
  if (visible.index == nullptr) {
    Vec<R> low = {};
    for (int64_t i = 0; i < visible.count; i += W) add_exactly(sums[0], low, vector(i));
    sums[0] = exact_sum(sums[0], low);
    if (const int64_t turn = visible.first % W; turn != 0) {
      R lanes[W], turned[W];
      store<R>(lanes, sums[0]);
      for (int64_t lane = 0; lane < W; ++lane) turned[(lane + turn) % W] = lanes[lane];
      sums[0] = load<R>(turned);
    }
  } else {
    R lanes[W] = {}, low[W] = {};
    for (int64_t i = 0; i < visible.count; ++i) add_exactly(lanes[visible.index[i] % W], low[visible.index[i] % W], R(one(i)));
    sums[0] = exact_sum(load<R>(lanes), load<R>(low));
  }
  return sum_lanes<R, 1>(sums)[0];
}

// Scores to weights, in place; the row has whole vectors. Unseen positions get 0, a query that sees nothing gets zeros.
template <class R>
void softmax_row(R* row, const Visible& visible, int64_t query) {
  constexpr R infinity = R(__builtin_inf());
  constexpr int W = kWidth<R>;
  const int64_t n = visible.count, whole = padded<R>(n);
  if (!visible.sees_any(query)) {
    for (int64_t i = 0; i < whole; ++i) row[i] = 0;
    return;
  }
  for (int64_t i = n; i < whole; ++i) row[i] = -infinity;
  if (!visible.alike())
    for (int64_t i = 0; i < n; ++i)
      if (!visible.sees(query, i)) row[i] = -infinity;
  Vec<R> top = splat<R>(-infinity);
  for (int64_t i = 0; i < whole; i += W) top = larger<R>(load<R>(row + i), top);
  const R largest = largest_lane<R>(top);
  for (int64_t i = 0; i < whole; i += W) store<R>(row + i, exp_nonpositive<R>(load<R>(row + i) - largest));
  const R sum = sum_by_position<R>(visible, [&](int64_t i) { return load<R>(row + i); }, [&](int64_t i) { return row[i]; });
  for (int64_t i = 0; i < whole; i += W) store<R>(row + i, load<R>(row + i) / sum);
  if (!visible.alike())
    for (int64_t i = 0; i < n; ++i)
      if (!visible.sees(query, i)) row[i] = 0;
}

template <class R>
bool all_finite(const R* row, int64_t n) {
  Vec<R> poison[1] = {};  // 0 * x is NaN unless x is finite
  int64_t i = 0;
  for (; i + kWidth<R> <= n; i += kWidth<R>) poison[0] = poison[0] + load<R>(row + i) * R(0);
  if (i < n) poison[0] = poison[0] + load_first<R>(row + i, n - i) * R(0);
  return sum_lanes<R, 1>(poison)[0] == R(0);
}

// out[t] = sum over i of weights[t, i] * rows[i]. A row that only some of the queries see must not reach the others: where it is not
// finite, 0 times it would: its numbers that are not are taken out, and added for its seers alone.
template <class R>
void sum_visible(Scratch& scratch, const R* weights, int64_t stride, const Visible& visible, int64_t queries, const Rows<R>& rows,
                 R* const* out) {
  const int64_t width = rows.width;
  int64_t suspects = 0;
  int64_t* suspect = nullptr;
  Rows<R> safe = rows;
  R* buffer = rows.native() || visible.alike() ? nullptr : scratch.take<R>(width);
  if (!visible.alike()) {
    suspect = scratch.take<int64_t>(visible.count);
    for (int64_t i = 0; i < visible.count; ++i)
      if (visible.mixed(queries, i) && !all_finite<R>(rows.row(i, buffer), width)) suspect[suspects++] = i;
  }
  const auto poisons = [&](int64_t i, const auto& f) {  // f(column, number)
    const R* row = rows.row(i, buffer);
    for (int64_t c = 0; c < width; ++c)
      if (!std::isfinite(row[c])) f(c, row[c]);
  };
  if (suspects > 0) {
    const int size = size_of(rows.dtype);
    safe.at = scratch.take<const void*>(visible.count);
    for (int64_t i = 0; i < visible.count; ++i) safe.at[i] = rows.at[i];
    for (int64_t k = 0; k < suspects; ++k) {
      char* finite = scratch.take<char>(width * size);
      __builtin_memcpy(finite, rows.at[suspect[k]], static_cast<size_t>(width * size));
      poisons(suspect[k], [&](int64_t c, R) { __builtin_memset(finite + c * size, 0, static_cast<size_t>(size)); });
      safe.at[suspect[k]] = finite;
    }
  }
  weighted_sums<R>(weights, stride, 1, safe, visible.count, out, queries, Into::cache, {visible.first, visible.index});
  for (int64_t k = 0; k < suspects; ++k)
    poisons(suspect[k], [&](int64_t c, R poison) {
      for (int64_t t = 0; t < queries; ++t)
        if (visible.sees(t, suspect[k])) out[t][c] += weights[t * stride + suspect[k]] * poison;
    });
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
  const R* dense = static_cast<const R*>(from);
  if (!is_native<R>(dtype)) {
    const int64_t first = visible.position(0), end = visible.position(visible.count - 1) + 1;
    read(buffer + first, first, end - first);
    dense = buffer;
  }
  for (int64_t i = 0; i < visible.count; ++i) row[i] = visible.sees(query, i) ? dense[visible.position(i)] : R(0);
}

// dL/dscore = weight * (dL/dweight - sum_s weight * dL/dweight), in place of dL/dweight; exactly 0 where not seen.
template <class R>
void softmax_gradient_row(R* grad, const R* weights, const Visible& visible, int64_t query) {
  constexpr int W = kWidth<R>;
  const int64_t n = visible.count;
  if (!visible.alike())
    for (int64_t i = 0; i < n; ++i)
      if (!visible.sees(query, i)) grad[i] = 0;
  const auto vector = [&](int64_t i) {
    return i + W <= n ? load<R>(weights + i) * load<R>(grad + i) : load_first<R>(weights + i, n - i) * load_first<R>(grad + i, n - i);
  };
  const R mean = sum_by_position<R>(visible, vector, [&](int64_t i) { return weights[i] * grad[i]; });
  for (int64_t i = 0; i < n; ++i) grad[i] = weights[i] * (grad[i] - mean);
  if (!visible.alike())
    for (int64_t i = 0; i < n; ++i)
      if (!visible.sees(query, i)) grad[i] = 0;
}

// dL/dscores of a block of queries, from dL/dcontext and dL/dweights (or dL/dscores itself, if there are no weights), as rows of the
// given stride.
template <class R, class Args>
void score_gradient(Scratch& scratch, const Args& args, int64_t b, int64_t h, int64_t t0, int64_t queries, const Visible& visible, R* grad,
                    int64_t stride) {
  const Shape& shape = args.shape;
  const int64_t n = visible.count;
  R* row = scratch.take<R>(stride);
  R* buffer = scratch.take<R>(shape.S);
  if (args.grad_context.data != nullptr) {
    const Rows<R> values(scratch, args.values, b, h, visible.first, n, shape.D, visible.index);
    const R* const* upstream = row_pointers<R>(scratch, args.grad_context, b, h, t0, queries, shape.D);
    dot_products<R>(upstream, queries, shape.T, values, n, grad, stride);
  } else {
    for (int64_t i = 0; i < queries * stride; ++i) grad[i] = 0;
  }
  for (int64_t t = 0; t < queries; ++t) {
    R* g = grad + t * stride;
    if (args.grad_weights.data != nullptr) {
      gather_row<R>(row, args.grad_weights.at(b, h, t0 + t), args.grad_weights.dtype, visible, t, buffer);
      for (int64_t i = 0; i < n; ++i) g[i] += row[i];
    }
    if (args.weights.data != nullptr) {
      gather_row<R>(row, args.weights.at(b, h, t0 + t), args.weights.dtype, visible, t, buffer);
      softmax_gradient_row<R>(g, row, visible, t);
    }
  }
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

template <class R>
constexpr int64_t kColumns = 16 * kWidth<R>;  // of values that a task takes

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
  Tensor slice = args.grad_context;
  slice.data = slice.data == nullptr ? nullptr : static_cast<char*>(slice.data) + column * size_of(slice.dtype);
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
void weighted_values(const WeightedValues& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t block = query_block(shape.T, shape.S, shape.B * shape.H, executor.threads, kMostQueries);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t n = visible.count;
    R *weights = scratch.take<R>(queries * n), *buffer = scratch.take<R>(shape.S);
    for (int64_t t = 0; t < queries; ++t)
      gather_row<R>(weights + t * n, args.weights.at(b, h, t0 + t), args.weights.dtype, visible, t, buffer);
    const Rows<R> values(scratch, args.values, b, h, visible.first, n, shape.D, visible.index);
    const Output<R> context(scratch, args.context, b, h, t0, queries, shape.D);
    sum_visible<R>(scratch, weights, n, visible, queries, values, context.rows);
    context.flush();
  });
}

// dL/dweights from dL/dcontext; exactly 0 where not seen.
template <class R>
void weighted_values_backward(const WeightedValues& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t block = query_block(shape.T, shape.S, shape.B * shape.H, executor.threads, kMostQueries);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t n = visible.count, stride = padded<R>(n);
    R *grad = scratch.take<R>(queries * stride), *buffer = scratch.take<R>(shape.S);
    const Rows<R> values(scratch, args.values, b, h, visible.first, n, shape.D, visible.index);
    const R* const* upstream = row_pointers<R>(scratch, args.context, b, h, t0, queries, shape.D);
    dot_products<R>(upstream, queries, shape.T, values, n, grad, stride);
    for (int64_t t = 0; t < queries; ++t)
      scatter_row<R>(args.weights.at(b, h, t0 + t), args.weights.dtype, grad + t * stride, visible, t, shape.S, R(0), buffer);
  });
}

template <class R>
void source_sums(const SourceSums& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t blocks = (shape.D + kColumns<R> - 1) / kColumns<R>;
  parallel(executor, shape.B * shape.H * blocks, [&](int64_t task) {
    const int64_t bh = task / blocks, column = task % blocks * kColumns<R>;
    values_gradient<R>(args, bh / shape.H, bh % shape.H, column, column + kColumns<R> <= shape.D ? kColumns<R> : shape.D - column);
  });
}

// A few queries over a long source, with fewer (b, h) than threads: the source is shared out for the scores, the columns of the values
// for the context. Every element is still one sum in one order, so that the result is the same to the last bit.
// scores(b, h, first, n, out, stride): of all queries and n positions from `first` on. Returns whether it took the call.
template <class R, class Args, class Scores>
bool split_forward(const Args& args, const Executor& executor, const Scores& scores) {
  constexpr int64_t kQueries = 16, kWork = 64 * 1024;
  const Shape& shape = args.shape;
  const int64_t heads = shape.B * shape.H, T = shape.T, parts = executor.threads;
  const bool alike = args.visibility.mask == nullptr && (args.visibility.lengths == nullptr || args.visibility.lengths_step == 0) &&
                     args.visibility.firsts == nullptr;  // a span is short
  if (heads == 0 || heads >= parts || !alike || T == 0 || T > kQueries || shape.S * (shape.A + shape.D) < kWork) return false;
  const auto share = [&](int64_t whole) { return (whole / parts / 64 + 1) * 64; };  // of a part: whole cache lines
  const int64_t stride = padded<R>(shape.S), rows = share(shape.S), columns = share(shape.D);
  R* all = static_cast<R*>(std::aligned_alloc(64, static_cast<size_t>(heads * T * stride + 64) / 64 * 64 * sizeof(R)));
  if (all == nullptr) throw std::bad_alloc();
  parallel(executor, heads * parts, [&](int64_t item) {
    const int64_t bh = item / parts, first = item % parts * rows;
    const int64_t n = visible_to(Scratch::mine(), args.visibility, shape.S, bh / shape.H, bh % shape.H, 0, T).count;
    if (first < n) scores(bh / shape.H, bh % shape.H, first, first + rows < n ? rows : n - first, all + bh * T * stride + first, stride);
  });
  parallel(executor, heads * parts, [&](int64_t item) {
    Scratch& scratch = Scratch::mine();
    const int64_t b = item / parts / shape.H, h = item / parts % shape.H, part = item % parts, column = part * columns;
    if (part > 0 && column >= shape.D) return;
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, 0, T);
    R* weights = scratch.take<R>(T * stride);
    R* buffer = scratch.take<R>(shape.S);
    for (int64_t t = 0; t < T; ++t) {
      R* row = weights + t * stride;
      __builtin_memcpy(row, all + (item / parts * T + t) * stride, static_cast<size_t>(visible.count) * sizeof(R));
      softmax_row<R>(row, visible, t);
      if (part == 0 && args.weights.data != nullptr)
        scatter_row<R>(args.weights.at(b, h, t), args.weights.dtype, row, visible, t, shape.S, R(0), buffer);
    }
    const int64_t width = column + columns < shape.D ? columns : shape.D - column;
    Tensor slice = args.values;
    slice.data = static_cast<char*>(slice.data) + column * size_of(slice.dtype);
    const Rows<R> values(scratch, slice, b, h, 0, visible.count, width);
    const Output<R> context(scratch, args.context, b, h, 0, T, width, nullptr, column);
    sum_visible<R>(scratch, weights, stride, visible, T, values, context.rows);
    context.flush();
  });
  std::free(all);
  return true;
}

}  // namespace onepass::ONEPASS_ISA
