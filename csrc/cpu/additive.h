// Additive attention, forward and backward, for one instruction set. The scores are in additive_scores.h, the gradients of what they are
// made of in additive_gradients.h.
#pragma once

#include "additive_gradients.h"

namespace onepass::ONEPASS_ISA {

template <class R>
void additive_forward(const AdditiveForward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const auto part = [&](int64_t b, int64_t h, int64_t first, int64_t n, R* scores, int64_t stride) {
    AdditiveForward some = args;
    some.keys = from_row(args.keys, first);
    some.memory.sizes = from_row(args.memory.sizes, first);
    some.memory.exponentials = from_row(args.memory.exponentials, first);
    additive_scores<R>(Scratch::mine(), some, b, h, 0, shape.T, {n, nullptr, nullptr}, scores, stride);
  };
  if (args.context.data != nullptr && split_forward<R>(args, executor, part)) return;
  const int64_t block = query_block(shape.T, shape.S, shape.B * shape.H, executor.threads, kMostQueries);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t stride = padded<R>(visible.count);
    R* scores = scratch.take<R>(queries * stride);
    R* buffer = scratch.take<R>(shape.S);
    additive_scores<R>(scratch, args, b, h, t0, queries, visible, scores, stride);
    const bool raw = args.context.data == nullptr;
    for (int64_t t = 0; t < queries; ++t) {
      R* row = scores + t * stride;
      if (!raw) softmax_row<R>(row, visible, t);
      scatter_row<R>(args.weights.at(b, h, t0 + t), args.weights.dtype, row, visible, t, shape.S, raw ? -R(__builtin_inf()) : R(0),
                     buffer);
    }
    if (raw) return;
    const Rows<R> values(scratch, args.values, b, h, visible.first, visible.count, shape.D, visible.index);
    const Output<R> context(scratch, args.context, b, h, t0, queries, shape.D);
    sum_visible<R>(scratch, scores, stride, visible, queries, values, context.rows);
    context.flush();
  });
}

// The score gradients of a block of queries, into args.grad_scores.
template <class R>
void additive_score_gradient(const AdditiveBackward& args, int64_t b, int64_t h, int64_t t0, int64_t queries) {
  Scratch& scratch = Scratch::mine();
  const Visible visible = visible_to(scratch, args.visibility, args.shape.S, b, h, t0, queries);
  const int64_t stride = padded<R>(visible.count);
  R* grad = scratch.take<R>(queries * stride);
  R* buffer = scratch.take<R>(args.shape.S);
  score_gradient<R>(scratch, args, b, h, t0, queries, visible, grad, stride);
  for (int64_t t = 0; t < queries; ++t)
    scatter_row<R>(args.grad_scores.at(b, h, t0 + t), args.grad_scores.dtype, grad + t * stride, visible, t, args.shape.S, R(0), buffer);
}

// One query against N keys of a memory: dq += g w over the channels, w as in gradient_step, times v if that is not finite. The next keys
// are fetched meanwhile, or not.
template <class R, int N, bool Fetch, class Element>
void query_gradient(const R* q, const R* eq, R q_size, const Keys<R, Element>& k, int64_t s, const R* g, const uint8_t* seen,
                    const ScoreContext<R>& c, R* dq) {
  constexpr int W = kWidth<R>;
  constexpr R kMerged = (Limits<R>::product / N - 1) / R(2.8853900817779268);
  R least = k.size[s].largest, most = k.size[s].largest;
  for (int i = 1; i < N; ++i) {
    const R size = k.size[s + i].largest;
    least = size < least ? size : least;
    most = size <= most ? most : size + R(0) * most;  // a NaN stays
  }
  const auto step = [&](auto merged) __attribute__((always_inline)) {
    for (int64_t a = 0; a < c.channels.whole; a += W) {
      const Vec<R> query = load<R>(eq + a);
      Merging<R, N> merging;
      Vec<R> x[N], r[N], sum = load<R>(dq + a);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        if constexpr (Fetch) __builtin_prefetch(k.e[s + i] + N * c.channels.whole + a);
        x[i] = query * load_as<R>(k.e[s + i] + a);
        merging.d[i] = x[i] + R(1);
      }
      if constexpr (decltype(merged)::value) {
        merging.begin();
        merging.finish(r);
      } else {
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) r[i] = reciprocal<R>(merging.d[i]);
      }
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) sum = fma<R>(splat<R>(g[i]), x[i] * r[i] * r[i], sum);
      store<R>(dq + a, sum);
    }
  };
  if (q_size + most <= Limits<R>::single && q_size + least >= R(kSmall) && c.weighting.finite) {
    if (q_size + most <= kMerged) step(std::true_type{});
    else step(std::false_type{});
  } else if constexpr (N > 1) {
    for (int i = 0; i < N; ++i) query_gradient<R, 1, false>(q, eq, q_size, k, s + i, g + i, seen == nullptr ? nullptr : seen + i, c, dq);
  } else if (seen == nullptr || *seen != 0) {
    const int64_t A = c.channels.count;
    const R* key = k.rows.row(s, k.buffer);
    const auto at = [A](const R* row, int64_t a) { return a + W <= A ? load<R>(row + a) : load_first<R>(row + a, A - a); };
    for (int64_t a = 0; a < A; a += W) {
      Vec<R> tangent, slope;
      tanh_and_slope<R>(at(q, a) + at(key, a), tangent, slope);
      const Vec<R> early = c.weighting.finite ? splat<R>(R(1)) : load<R>(c.weighting.v + a);
      store<R>(dq + a, fma<R>(splat<R>(*g), early * (slope * R(0.25)), load<R>(dq + a)));
    }
  }
}

// dL/dscores and dL/dquery of queries over a memory. Blocks by the shape alone: keys merge four by four, as the block sees them.
template <class R>
void additive_step_backward(const StepBackward& args, const Executor& executor) {
  constexpr int W = kWidth<R>;
  const Shape& shape = args.shape;
  const Channels<R> channels(shape.A);
  const int64_t whole = channels.whole, block = query_block(shape.T, shape.S, shape.B * shape.H, 0, kMostQueries);
  for_queries(executor, shape, args.visibility, block, [&](int64_t b, int64_t h, int64_t t0, int64_t queries) {
    Scratch& scratch = Scratch::mine();
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, t0, queries);
    const int64_t n = visible.count, stride = padded<R>(n);
    R* g = scratch.take<R>(queries * stride);
    R* buffer = scratch.take<R>(shape.S);
    score_gradient<R>(scratch, args, b, h, t0, queries, visible, g, stride);
    for (int64_t t = 0; t < queries; ++t)
      scatter_row<R>(args.grad_scores.at(b, h, t0 + t), args.grad_scores.dtype, g + t * stride, visible, t, shape.S, R(0), buffer);
    if (shape.A == 0) return;

    const ScoreContext<R> c{channels, Weighting<R>(reinterpret_cast<const R*>(args.memory.weighting.at(0, h, 0)), args.memory.stride)};
    const R* const* query = row_pointers<R>(scratch, args.query, b, h, t0, queries, shape.A);
    R *eq = scratch.take<R>(queries * whole), *size = scratch.take<R>(queries);
    const bool many = n > kGradientKeys;
    const LongSums<R> dq(scratch, queries * whole, many);
    R* some = many ? scratch.zeros<R>(queries * whole) : nullptr;  // of the run of kGradientKeys keys at hand, whatever chunks they come in
    for (int64_t t = 0; t < queries; ++t) size[t] = exponentiate<R>(query[t], query[t], channels, eq + t * whole).largest;
    const uint8_t* rows_seen = visible.seen;
    if (visible.window != nullptr) {
      auto* rows = scratch.take<uint8_t>(queries * n);
      for (int64_t t = 0; t < queries; ++t)
        for (int64_t i = 0; i < n; ++i) rows[t * n + i] = visible.sees(t, i);
      rows_seen = rows;
    }
    for_keys<R>(scratch, args.keys, args.memory, channels, b, h, visible, queries, [&](int64_t first, int64_t count, const auto& k) {
      for (int64_t t = 0; t < queries; ++t) {
        const R* row = g + t * stride + first;
        const uint8_t* seen = rows_seen == nullptr ? nullptr : rows_seen + t * n + first;
        R* sum = (many ? some : dq.total) + t * whole;
        const auto keys = [&](auto together, int64_t s) {
          const auto gradient = [&](auto fetch) {
            query_gradient<R, decltype(together)::value, decltype(fetch)::value>(
                query[t], eq + t * whole, size[t], k, s, row + s, seen == nullptr ? nullptr : seen + s, c, sum);
          };
          if (t == 0) gradient(std::true_type{});
          else gradient(std::false_type{});
        };
        for (int64_t s = 0, end; s < count; s = end) {
          const int64_t left = kGradientKeys - (first + s) % kGradientKeys;
          end = many && s + left < count ? s + left : count;
          int64_t i = s;
          for (; i + 4 <= end; i += 4) keys(std::integral_constant<int, 4>{}, i);
          for (; i < end; ++i) keys(std::integral_constant<int, 1>{}, i);
          if (!many || (end - s < left && first + end < n)) continue;
          for (int64_t a = 0; a < whole; a += W) {
            dq.add(t * whole + a, load<R>(sum + a));
            store<R>(sum + a, Vec<R>{});
          }
        }
      }
    });
    const Output<R> out(scratch, args.grad_query, b, h, t0, queries, shape.A);
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t a = 0; a < shape.A; a += W) {
        const Vec<R> late = c.weighting.finite ? load<R>(c.weighting.v + a) * R(4) : splat<R>(R(4));
        const Vec<R> gradient = visible.sees_any(t) ? late * dq.at(t * whole + a) : Vec<R>{};
        if (a + W <= shape.A) store<R>(out.rows[t] + a, gradient);
        else store_first<R>(out.rows[t] + a, gradient, shape.A - a);
      }
    out.flush();
  });
}

template <class R>
void additive_backward(const AdditiveBackward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t heads = shape.B * shape.H;
  const int64_t block = query_block(shape.T, shape.S, heads, executor.threads, kMostQueries);
  for_queries(executor, shape, args.visibility, block,
              [&](int64_t b, int64_t h, int64_t t0, int64_t queries) { additive_score_gradient<R>(args, b, h, t0, queries); });

  // Channels of a task: slices that stay in the second-level cache, tasks enough to share. By the shape alone: how pairs are computed
  // depends on the slice.
  constexpr int64_t kUnit = 8 * kWidth<R>, kSlices = 256 * 1024 / sizeof(R), kTasks = 16;
  const int64_t fitting = kSlices / ((shape.S < kGradientKeys ? shape.S : kGradientKeys) + shape.T + 1), sharing = heads * shape.A / kTasks;
  const int64_t least = (fitting < sharing ? fitting : sharing) / kUnit * kUnit;
  const int64_t channels = least < kUnit ? kUnit : least;
  const int64_t channel_blocks = (shape.A + channels - 1) / channels;
  const int64_t column_blocks = args.grad_values.data == nullptr ? 0 : (shape.D + kColumns<R> - 1) / kColumns<R>;
  const int64_t items = channel_blocks + column_blocks;
  parallel(executor, heads * items, [&](int64_t task) {
    const int64_t b = task / items / shape.H, h = task / items % shape.H, item = task % items;
    const auto width = [](int64_t first, int64_t step, int64_t end) { return first + step <= end ? step : end - first; };
    if (item < channel_blocks) {
      score_inputs_gradient<R>(args, b, h, item * channels, width(item * channels, channels, shape.A));
    } else {
      const int64_t column = (item - channel_blocks) * kColumns<R>;
      values_gradient<R>(args, b, h, column, width(column, kColumns<R>, shape.D));
    }
  });

  parallel(executor, shape.H, [&](int64_t h) {  // dv: the parts of all b, in order
    R *sum = Scratch::mine().zeros<R>(shape.A), *low = Scratch::mine().zeros<R>(shape.A);
    for (int64_t b = 0; b < shape.B; ++b) {
      const R* part = reinterpret_cast<const R*>(args.partial_v.at(b, h, 0));
      for (int64_t a = 0; a < shape.A; ++a) add_exactly(sum[a], low[a], part[a]);
    }
    for (int64_t a = 0; a < shape.A; ++a) sum[a] = exact_sum(sum[a], low[a]);
    write_row<R>(args.grad_v.at(0, h, 0), sum, args.grad_v.dtype, shape.A);
  });
}

}  // namespace onepass::ONEPASS_ISA
