// The softmax of rows of scores over the positions that each query sees, and its gradient. Of a row every step waits for the one before it,
// so that several rows are taken at once.
#pragma once

#include "elementary.h"
#include "rows.h"
#include "visible.h"

namespace onepass::ONEPASS_ISA {

// The row stride of a [queries, n] matrix in scratch: whole vectors.
template <class R>
int64_t padded(int64_t n) {
  return (n + kWidth<R> - 1) / kWidth<R> * kWidth<R>;
}

constexpr int64_t kRowsAtOnce = kRegisters == 32 ? 4 : 2;

// Calls f for so many rows at a time, what is done with them being in the first-level cache.
template <class F>
void by_few(Range rows, const F& f) {
  for (int64_t done = 0, left; (left = rows.count - done) > 0; done += kRowsAtOnce)
    f(Range{rows.first + done, left < kRowsAtOnce ? left : kRowsAtOnce});
}

// Rows of such a matrix, `stride` apart, with an entry for each visible position; by_few calls of these.
template <class R>
class SoftmaxRows {
 public:
  SoftmaxRows(Scratch& scratch, const Visible& visible, int64_t stride) : visible_(visible), stride_(stride) {
    if (visible.index == nullptr) return;
    auto* place = scratch.take<int32_t>(visible.count);
    int32_t last = -1;
    for (int64_t i = 0; i < visible.count; ++i) {
      const int32_t position = visible.index[i];
      if (position / W != last) last = position / W, ++vectors_;
      place[i] = static_cast<int32_t>((vectors_ - 1) * W) + position % W;
    }
    place_ = place;
    spread_ = scratch.zeros<R>(vectors_ * W);
  }

  // Scores to weights, in place. Unseen positions get 0, a query that sees nothing gets zeros.
  void weights(R* rows, Range few) const {
    together(few, [&](auto count, int64_t t) { weights_of<count()>(rows + t * stride_, few.first + t); });
  }

  // dL/dscores, times the scale, in place of dL/dweights, or of dL/dscores itself where there are no weights: weight * (dL/dweight - sum
  // over s of weight * dL/dweight), exactly 0 where not seen.
  void gradients(R* grad, const R* weights, R scale, Range few) const {
    together(weights == nullptr ? Range{0, 0} : few, [&](auto count, int64_t t) {
      gradients_of<count()>(grad + t * stride_, weights + t * stride_, few.first + t);
    });
    for (int64_t t = 0; t < few.count && scale != R(1); ++t)
      for (int64_t i = 0; i < visible_.count; ++i) grad[t * stride_ + i] *= scale;
  }

 private:
  static constexpr int W = kWidth<R>;
  static constexpr R infinity = R(__builtin_inf());

  // f(how many queries, how many before them). Rows that are longer fill the first-level cache by themselves.
  template <class F>
  void together(Range few, const F& f) const {
    constexpr int64_t kShort = 4096 / sizeof(R);
    if (stride_ <= kShort && few.count == kRowsAtOnce) return f(std::integral_constant<int, kRowsAtOnce>{}, 0);
    for (int64_t t = 0; t < few.count; ++t) f(std::integral_constant<int, 1>{}, t);
  }

  // The sums of N rows' entries, in the first lanes; they are given a vector or one at a time, those past the end as 0. Each goes to the
  // lane of its position, whatever others a block of queries sees: how queries are shared out in blocks must not show in the last bit. Nor
  // is a sum off by more for a long row: gradients of scores add up to 0, and what is left of them is small beside an error that they share.
  template <int N, class FV, class F1>
  ONEPASS_INLINE Vec<R> sums(const FV& vector, const F1& one) const {
    Vec<R> total[N] = {}, low[N] = {};
    for (int64_t i = 0; i < visible_.count && place_ == nullptr; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) add_exactly(total[r], low[r], vector(r, i));
    for (int r = 0; r < N && place_ != nullptr; ++r) {
      for (int64_t i = 0; i < visible_.count; ++i) spread_[place_[i]] = one(r, i);
      for (int64_t i = 0; i < vectors_; ++i) add_exactly(total[r], low[r], load<R>(spread_ + i * W));
    }
    const int64_t turn = place_ == nullptr ? visible_.first % W : 0;
    for (int r = 0; r < N; ++r) {
      total[r] = exact_sum(total[r], low[r]);
      if (turn == 0) continue;
      R twice[2 * W];
      store<R>(twice, total[r]);
      store<R>(twice + W, total[r]);
      total[r] = load<R>(twice + W - turn);
    }
    return sum_lanes<R, N>(total);
  }

  // A vector of a query's row, from the i-th entry on, with `rest` in the place of those that its mask hides or that are past the end.
  ONEPASS_INLINE Vec<R> shown(int64_t query, int64_t i, Vec<R> x, R rest) const {
    if (visible_.seen != nullptr) x = where<R>(visible_.seen + query * visible_.stride + i, x, rest);
    return i + W <= visible_.count ? x : first_or<R>(x, visible_.count - i, rest);
  }

  template <int N>
  void weights_of(R* rows, int64_t query) const {
    const int64_t whole = padded<R>(visible_.count);
    const auto at = [&](int r, int64_t i) __attribute__((always_inline)) { return rows + r * stride_ + i; };
    Vec<R> top[N];
    for (int r = 0; r < N; ++r) {
      if (visible_.window != nullptr) visible_.hide(at(r, 0), query + r, -infinity);
      top[r] = splat<R>(-infinity);
    }
    for (int64_t i = 0; i < whole; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const Vec<R> x = shown(query + r, i, load<R>(at(r, i)), -infinity);
        store<R>(at(r, i), x);
        top[r] = larger<R>(x, top[r]);
      }
    const Vec<R> largest = largest_lanes<R, N>(top);
    for (int64_t i = 0; i < whole; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) store<R>(at(r, i), exp_nonpositive<R>(load<R>(at(r, i)) - largest[r]));
    const Vec<R> sum = sums<N>([&](int r, int64_t i) { return load<R>(at(r, i)); }, [&](int r, int64_t i) { return *at(r, i); });
    for (int64_t i = 0; i < whole; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) store<R>(at(r, i), load<R>(at(r, i)) / sum[r]);
    // All that is hidden is 0 now, but where a sum is NaN.
    bool numbers = true;
#pragma GCC unroll 4
    for (int r = 0; r < N; ++r) numbers = numbers && largest[r] > -infinity && sum[r] == sum[r];
    for (int r = 0; r < N && !numbers; ++r) {
      if (visible_.sees_any(query + r)) visible_.hide(at(r, 0), query + r, R(0));
      else __builtin_memset(at(r, 0), 0, static_cast<size_t>(whole) * sizeof(R));
    }
  }

  template <int N>
  void gradients_of(R* grad, const R* weights, int64_t query) const {
    const bool in_a_vector = visible_.window == nullptr && place_ == nullptr;
    const auto hide = [&](int r) { visible_.hide(grad + r * stride_, query + r, R(0)); };
    for (int r = 0; r < N && !in_a_vector; ++r) hide(r);
    const Vec<R> mean = sums<N>(
        [&](int r, int64_t i) {
          const int64_t at = r * stride_ + i;
          return shown(query + r, i, load<R>(weights + at) * load<R>(grad + at), R(0));
        },
        [&](int r, int64_t i) { return weights[r * stride_ + i] * grad[r * stride_ + i]; });
    for (int64_t i = 0; i < visible_.count; i += W)
#pragma GCC unroll 4
      for (int r = 0; r < N; ++r) {
        const int64_t at = r * stride_ + i;
        store<R>(grad + at, shown(query + r, i, load<R>(weights + at) * (load<R>(grad + at) - mean[r]), R(0)));
      }
    for (int r = 0; r < N && visible_.window != nullptr; ++r) hide(r);
  }

  const Visible& visible_;
  const int64_t stride_;
  // Of positions with gaps: where each goes, in as many vectors as hold any of them, and room for these.
  const int32_t* place_ = nullptr;
  int64_t vectors_ = 0;
  R* spread_ = nullptr;
};

}  // namespace onepass::ONEPASS_ISA
