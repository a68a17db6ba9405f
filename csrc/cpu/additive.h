// Additive attention, forward and backward, for one instruction set. The scores are in additive_scores.h, the gradients of what they are
// made of in additive_gradients.h.
#pragma once

#include "additive_gradients.h"

namespace onepass::ONEPASS_ISA {

template <class R>
class AdditiveContexts : public Contexts<R, AdditiveForward> {
 public:
  using Contexts<R, AdditiveForward>::Contexts;

  void stage(int i, Share share) const {
    if (i > 0) return this->after_scores(i, share);
    const Range some = share.of(this->visible_.count, kWidth<R>);
    if (some.count == 0) return;
    additive_scores<R>(Scratch::mine(), this->args_, this->b_, this->h_, this->t0_, this->queries_,
                       this->visible_.part(0, some.first, some.count), this->scores_ + some.first, this->stride_);
  }
};

template <class R>
void additive_forward(const AdditiveForward& args, const Executor& executor) {
  by_blocks<AdditiveContexts<R>>(args, executor, query_block(args.shape, executor.threads, kMostQueries));
}

// One query against N keys of a memory: dq += g w over some of the channels, w as in gradient_step, times v if that is not finite. The next
// keys are fetched meanwhile, or not. Keys that the query does not see (g is 0) have one that it sees in their place.
template <class R, int N, bool Fetch, class Element>
void query_gradient(const R* q, const R* eq, R q_size, const Keys<R, Element>& k, int64_t s, const R* g, const uint8_t* seen,
                    const ScoreContext<R>& c, Range some, R* dq) {
  constexpr int W = kWidth<R>;
  constexpr R kMerged = (Limits<R>::product / N - 1) / R(2.8853900817779268);
  int any = 0;
  while (seen != nullptr && any < N && seen[any] == 0) ++any;
  if (any == N) return;
  const Element* e[N];
  R least = k.size[s + any].largest, most = least;
  for (int i = 0; i < N; ++i) {
    const int64_t taken = s + (seen == nullptr || seen[i] != 0 ? i : any);
    const R size = k.size[taken].largest;
    e[i] = k.e[taken];
    least = size < least ? size : least;
    most = size <= most ? most : size + R(0) * most;  // a NaN stays
  }
  const int64_t end = some.first + some.count;
  const auto step = [&](auto merged) __attribute__((always_inline)) {
    for (int64_t a = some.first; a < end; a += W) {
      const Vec<R> query = load<R>(eq + a);
      Merging<R, N> merging;
      Vec<R> x[N], r[N], sum = load<R>(dq + a);
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        if constexpr (Fetch) __builtin_prefetch(e[i] + N * c.channels.whole + a);
        x[i] = query * load_as<R>(e[i] + a);
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
    for (int i = 0; i < N; ++i)
      query_gradient<R, 1, false>(q, eq, q_size, k, s + i, g + i, seen == nullptr ? nullptr : seen + i, c, some, dq);
  } else {
    const int64_t A = c.channels.count;
    const R* key = k.rows.row(s, k.buffer);
    const auto at = [A](const R* row, int64_t a) { return a + W <= A ? load<R>(row + a) : load_first<R>(row + a, A - a); };
    for (int64_t a = some.first; a < end; a += W) {
      Vec<R> tangent, slope;
      tanh_and_slope<R>(at(q, a) + at(key, a), tangent, slope);
      const Vec<R> early = c.weighting.finite ? splat<R>(R(1)) : load<R>(c.weighting.v + a);
      store<R>(dq + a, fma<R>(splat<R>(*g), early * (slope * R(0.25)), load<R>(dq + a)));
    }
  }
}

// dL/dscores and dL/dquery of queries over a memory.
template <class R>
class AdditiveStepGradients : public ScoreGradients<R, StepBackward> {
  using Base = ScoreGradients<R, StepBackward>;

 public:
  using Base::Base;

  int stages() const { return 3; }

  bool next(Scratch& scratch) {
    if (!Base::next(scratch)) return false;
    const Shape& shape = this->args_.shape;
    const Channels<R> channels(shape.A);
    query_ = this->query_rows(scratch, this->args_.query, shape.A);
    eq_ = scratch.take<R>(this->queries_ * channels.whole);
    size_ = scratch.take<R>(this->queries_);
    for (int64_t t = 0; t < this->queries_; ++t)
      size_[t] = exponentiate<R>(query_[t], query_[t], channels, eq_ + t * channels.whole).largest;
    return true;
  }

  void stage(int i, Share share) const {
    if (i < 2) Base::stage(i, share);
    else channels(share.of(this->args_.shape.A, kWidth<R>));
  }

 private:
  void channels(Range some) const {
    if (some.count == 0) return;
    constexpr int W = kWidth<R>;
    Scratch& scratch = Scratch::mine();
    const StepBackward& args = this->args_;
    const Visible& visible = this->visible_;
    const int64_t n = visible.count, queries = this->queries_, end = some.first + some.count;
    const Channels<R> channels(args.shape.A);
    const int64_t whole = channels.whole;
    const auto* weighting = reinterpret_cast<const R*>(args.memory.weighting.at(0, this->h_, 0));
    const ScoreContext<R> c{channels, Weighting<R>(weighting, args.memory.stride)};
    const bool many = n > kGradientKeys;
    const LongSums<R> dq(scratch, queries * whole, many);
    R* run = many ? scratch.zeros<R>(queries * whole) : nullptr;  // of the kGradientKeys keys at hand, whatever chunks they come in
    const uint8_t* rows_seen = visible.seen;
    if (visible.window != nullptr) {
      auto* rows = scratch.take<uint8_t>(queries * n);
      for (int64_t t = 0; t < queries; ++t)
        for (int64_t i = 0; i < n; ++i) rows[t * n + i] = visible.sees(t, i);
      rows_seen = rows;
    }
    for_keys<R>(scratch, args.keys, args.memory, channels, this->b_, this->h_, visible, queries,
                [&](int64_t first, int64_t count, const auto& k) {
      for (int64_t t = 0; t < queries; ++t) {
        const R* row = this->scores_ + t * this->stride_ + first;
        const uint8_t* seen = rows_seen == nullptr ? nullptr : rows_seen + t * n + first;
        R* sum = (many ? run : dq.total) + t * whole;
        const auto keys = [&](auto together, int64_t s) {
          const auto gradient = [&](auto fetch) {
            query_gradient<R, decltype(together)::value, decltype(fetch)::value>(
                query_[t], eq_ + t * whole, size_[t], k, s, row + s, seen == nullptr ? nullptr : seen + s, c, some, sum);
          };
          if (t == 0) gradient(std::true_type{});
          else gradient(std::false_type{});
        };
        for (int64_t s = 0, stop; s < count; s = stop) {
          const int64_t left = kGradientKeys - (first + s) % kGradientKeys;
          stop = many && s + left < count ? s + left : count;
          int64_t i = s;
          for (; i + 4 <= stop; i += 4) keys(std::integral_constant<int, 4>{}, i);
          for (; i < stop; ++i) keys(std::integral_constant<int, 1>{}, i);
          if (!many || (stop - s < left && first + stop < n)) continue;
          for (int64_t a = some.first; a < end; a += W) {
            dq.add(t * whole + a, load<R>(sum + a));
            store<R>(sum + a, Vec<R>{});
          }
        }
      }
    });
    const Output<R> out(scratch, args.grad_query, this->b_, this->h_, this->t0_, queries, some.count, nullptr, some.first);
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t a = some.first; a < end; a += W) {
        const Vec<R> late = c.weighting.finite ? load<R>(c.weighting.v + a) * R(4) : splat<R>(R(4));
        const Vec<R> gradient = visible.sees_any(t) ? late * dq.at(t * whole + a) : Vec<R>{};
        if (a + W <= end) store<R>(out.rows[t] + (a - some.first), gradient);
        else store_first<R>(out.rows[t] + (a - some.first), gradient, end - a);
      }
    out.flush();
  }

  const R* const* query_ = nullptr;
  R *eq_ = nullptr, *size_ = nullptr;
};

// Blocks by the shape alone: keys merge four by four, as the block sees them.
template <class R>
void additive_step_backward(const StepBackward& args, const Executor& executor) {
  by_blocks<AdditiveStepGradients<R>>(args, executor, query_block(args.shape, 0, kMostQueries));
}

template <class R>
void additive_backward(const AdditiveBackward& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const int64_t heads = shape.B * shape.H;
  if (args.weights.data != nullptr || args.grad_weights.data != nullptr)
    by_blocks<ScoreGradients<R, AdditiveBackward>>(args, executor, query_block(shape, executor.threads, kMostQueries));

  // Channels of a task: slices that stay in the second-level cache, tasks enough to share. By the shape alone: how pairs are computed
  // depends on the slice.
  constexpr int64_t kUnit = 8 * kWidth<R>, kSlices = 256 * 1024 / sizeof(R), kTasks = 16;
  const int64_t fitting = kSlices / ((shape.S < kGradientKeys ? shape.S : kGradientKeys) + shape.T + 1), sharing = heads * shape.A / kTasks;
  const int64_t least = (fitting < sharing ? fitting : sharing) / kUnit * kUnit;
  const int64_t channels = least < kUnit ? kUnit : least;
  const int64_t channel_blocks = (shape.A + channels - 1) / channels;
  const int64_t columns = columns_of_task<R>(shape, executor.threads);
  const int64_t column_blocks = args.grad_values.data == nullptr ? 0 : (shape.D + columns - 1) / columns;
  const int64_t items = channel_blocks + column_blocks;
  parallel(executor, heads * items, [&](int64_t task) {
    const int64_t b = task / items / shape.H, h = task / items % shape.H, item = task % items;
    const auto width = [](int64_t first, int64_t step, int64_t end) { return first + step <= end ? step : end - first; };
    if (item < channel_blocks) {
      score_inputs_gradient<R>(args, b, h, item * channels, width(item * channels, channels, shape.A));
    } else {
      const int64_t column = (item - channel_blocks) * columns;
      values_gradient<R>(args, b, h, column, width(column, columns, shape.D));
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
