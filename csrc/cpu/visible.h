// Which source positions a block of queries sees, as a list: work follows the list, and what is not on it is never read.
#pragma once

#include "kernels.h"
#include "scratch.h"
#include "simd.h"

namespace onepass::ONEPASS_ISA {

struct Span {
  int64_t first, last;  // last >= first
};

struct Visible {
  int64_t count;         // positions that some query of the block sees
  const int32_t* index;  // them, ascending; null if they are first, first + 1, ..., first + count - 1
  const uint8_t* seen;   // [queries, stride], non-zero where the query sees the position, with a vector's bytes behind the last that may be
                         // read; null if all do, or all that their windows hold
  int64_t first = 0, stride = 0;
  const int32_t* window = nullptr;  // [queries, 2]: the part of the list that a query's span holds; null if they all hold the same
  int64_t skipped = 0;              // positions of the list before this part of it: windows count them

  int64_t position(int64_t i) const { return index != nullptr ? index[i] : first + i; }
  bool alike() const { return seen == nullptr && window == nullptr; }
  int64_t begin(int64_t query) const { return window == nullptr ? 0 : window[2 * query] - skipped; }
  int64_t end(int64_t query) const { return window == nullptr ? count : window[2 * query + 1] - skipped; }
  bool sees(int64_t query, int64_t i) const {
    return i >= begin(query) && i < end(query) && (seen == nullptr || seen[query * stride + i] != 0);
  }
  // Where what each query sees is one run of positions: it, on the list.
  bool in_a_row() const { return index == nullptr && seen == nullptr; }
  Span seen_of(int64_t query) const {
    const auto within = [this](int64_t i) { return i < 0 ? 0 : i > count ? count : i; };  // one that holds nothing may lie anywhere
    return {within(begin(query)), within(end(query))};
  }
  // Numbers of a query's row that it does not see become this one.
  template <class R>
  void hide(R* row, int64_t query, R number) const {
    if (alike()) return;
    const Span within = seen_of(query);
    for (int64_t i = 0; i < within.first; ++i) row[i] = number;
    if (seen != nullptr) {
      const uint8_t* sees = seen + query * stride;
      int64_t i = within.first;
      for (; i + kWidth<R> <= within.last; i += kWidth<R>) store<R>(row + i, where<R>(sees + i, load<R>(row + i), number));
      if (i < within.last) {
        const int64_t rest = within.last - i;
        store_first<R>(row + i, where<R>(sees + i, load_first<R>(row + i, rest), number), rest);
      }
    }
    for (int64_t i = within.last; i < count; ++i) row[i] = number;
  }
  bool sees_any(int64_t query) const {
    if (seen == nullptr) return end(query) > begin(query);
    for (int64_t i = begin(query); i < end(query); ++i)
      if (seen[query * stride + i]) return true;
    return false;
  }
  bool mixed(int64_t queries, int64_t i) const {
    for (int64_t t = 0; t < queries; ++t)
      if (!sees(t, i)) return true;
    return false;
  }

  // n positions of the list, as the queries from t0 on see them, who see no others.
  Visible part(int64_t t0, int64_t from, int64_t n) const {
    return {n,
            index == nullptr ? nullptr : index + from,
            seen == nullptr ? nullptr : seen + t0 * stride + from,
            first + from,
            stride,
            window == nullptr ? nullptr : window + 2 * t0,
            skipped + from};
  }
};

inline Span span_of(const Visibility& v, int64_t S, int64_t b, int64_t t) {
  const auto within = [S](int64_t n) { return n < 0 ? 0 : n > S ? S : n; };
  const int64_t at = b * v.lengths_batch + t * v.lengths_step;
  const int64_t first = v.firsts == nullptr ? 0 : within(v.firsts[at]), last = v.lengths == nullptr ? S : within(v.lengths[at]);
  return {first, last > first ? last : first};
}

// Some queries, and the part of a list from the first to the last position that any of them sees.
struct Group {
  int64_t queries, first, last;
};

// How many queries to take at once, at most `most`: so many that computing all of them over all their positions does not more than double
// the work. span(t): of the t-th query.
template <class F>
Group group_of(int64_t most, const F& span) {
  Group group{0, 0, 0};
  int64_t sum = 0;
  for (int64_t t = 0; t < most; ++t) {
    const Span next = span(t);
    int64_t first = group.first, last = group.last;
    if (next.last > next.first) {
      first = sum == 0 || next.first < first ? next.first : first;
      last = next.last > last ? next.last : last;
    }
    sum += next.last - next.first;
    if (t > 0 && (last - first) * (t + 1) > 2 * sum) break;
    group = {t + 1, first, last};
  }
  return group;
}

// Queries by the first positions of their spans: a merge sort, as spans come in any order.
inline const int32_t* by_first(Scratch& scratch, const Span* spans, int64_t n) {
  auto *order = scratch.take<int32_t>(n), *merged = scratch.take<int32_t>(n);
  for (int64_t i = 0; i < n; ++i) order[i] = static_cast<int32_t>(i);
  for (int64_t run = 1; run < n; run *= 2) {
    for (int64_t low = 0; low < n; low += 2 * run) {
      const int64_t middle = low + run < n ? low + run : n, high = middle + run < n ? middle + run : n;
      for (int64_t i = low, j = middle, k = low; k < high; ++k)
        merged[k] = j == high || (i < middle && spans[order[i]].first <= spans[order[j]].first) ? order[i++] : order[j++];
    }
    auto* done = merged;
    merged = order;
    order = done;
  }
  return order;
}

inline bool shown(const Visibility& v, int64_t b, int64_t h, int64_t t, int64_t s) {
  return v.mask == nullptr || v.mask[b * v.mask_batch + h * v.mask_head + t * v.mask_step + s * v.mask_source] != 0;
}

// Sixteen bytes of a mask.
typedef uint8_t Bytes __attribute__((vector_size(16)));

inline Bytes load_bytes(const uint8_t* p) {
  Bytes x;
  __builtin_memcpy(&x, p, sizeof x);
  return x;
}

inline void store_bytes(uint8_t* p, Bytes x) { __builtin_memcpy(p, &x, sizeof x); }

// Whether each of n positions is shown to a query: 0 or 1.
inline void mask_row(const Visibility& v, int64_t b, int64_t h, int64_t t, int64_t first, int64_t n, uint8_t* row) {
  constexpr int64_t W = sizeof(Bytes);
  if (v.mask == nullptr) return static_cast<void>(__builtin_memset(row, 1, static_cast<size_t>(n)));
  const uint8_t* mask = v.mask + b * v.mask_batch + h * v.mask_head + t * v.mask_step + first * v.mask_source;
  const auto bytes = [&](int64_t i) { store_bytes(row + i, (Bytes)(load_bytes(mask + i) != 0) & 1); };
  if (v.mask_source == 1 && n >= W) {
    for (int64_t i = 0; i + W < n; i += W) bytes(i);
    return bytes(n - W);
  }
  for (int64_t i = 0; i < n; ++i) row[i] = mask[i * v.mask_source] != 0;
}

// Of queries whose spans differ: what their spans hold together, and each one's window on it. No other position is looked at.
inline Visible visible_in_spans(Scratch& scratch, const Visibility& v, int64_t S, int64_t b, int64_t h, int64_t t0, int64_t queries) {
  auto* spans = scratch.take<Span>(queries);
  for (int64_t t = 0; t < queries; ++t) spans[t] = span_of(v, S, b, t0 + t);
  const int32_t* order = by_first(scratch, spans, queries);
  auto* window = scratch.take<int32_t>(2 * queries);
  int64_t count = 0, least = 0, end = 0, pieces = 0;  // end: of the last piece without a gap
  for (int64_t k = 0; k < queries; ++k) {
    const Span span = spans[order[k]];
    int32_t* own = window + 2 * order[k];
    own[0] = own[1] = 0;
    if (span.first == span.last) continue;
    if (pieces == 0) least = span.first;
    if (pieces == 0 || span.first > end) end = span.first, ++pieces;
    if (span.last > end) count += span.last - end, end = span.last;
    own[0] = static_cast<int32_t>(count - (end - span.first));
    own[1] = static_cast<int32_t>(count - (end - span.last));
  }
  if (v.mask == nullptr && pieces <= 1) return {count, nullptr, nullptr, least, 0, window};
  auto* index = scratch.take<int32_t>(count);
  for (int64_t k = 0; k < queries; ++k) {
    const Span span = spans[order[k]];
    for (int64_t s = span.first; s < span.last; ++s) index[window[2 * order[k]] + s - span.first] = static_cast<int32_t>(s);
  }
  if (v.mask == nullptr) return {count, index, nullptr, 0, 0, window};

  auto* seers = scratch.take<uint8_t>(count);
  __builtin_memset(seers, 0, static_cast<size_t>(count));
  for (int64_t t = 0; t < queries; ++t)
    for (int64_t i = window[2 * t]; i < window[2 * t + 1]; ++i) seers[i] |= shown(v, b, h, t0 + t, index[i]);
  auto* kept = scratch.take<int32_t>(count + 1);  // positions with a seer, before the i-th
  kept[0] = 0;
  for (int64_t i = 0; i < count; ++i) {
    kept[i + 1] = kept[i] + seers[i];
    if (seers[i]) index[kept[i]] = index[i];
  }
  count = kept[count];
  auto* seen = scratch.take<uint8_t>(queries * count);
  bool all = true;
  for (int64_t t = 0; t < queries; ++t) {
    int32_t* own = window + 2 * t;
    own[0] = kept[own[0]];
    own[1] = kept[own[1]];
    for (int64_t i = own[0]; i < own[1]; ++i) {
      seen[t * count + i] = shown(v, b, h, t0 + t, index[i]);
      all = all && seen[t * count + i] != 0;
    }
  }
  return {count, index, all ? nullptr : seen, 0, count, window};
}

inline Visible visible_to(Scratch& scratch, const Visibility& v, int64_t S, int64_t b, int64_t h, int64_t t0, int64_t queries) {
  // One query stands for all where they see the same.
  const bool alike = (v.lengths == nullptr || v.lengths_step == 0) && (v.mask == nullptr || v.mask_step == 0);
  const int64_t kinds = alike && queries > 1 ? 1 : queries;
  Span all{S, 0};
  int64_t shortest = S;
  bool same = true;
  for (int64_t t = 0; t < kinds; ++t) {
    const Span span = span_of(v, S, b, t0 + t);
    same = same && (t == 0 || span.first == all.first);
    all.first = span.first < all.first ? span.first : all.first;
    all.last = span.last > all.last ? span.last : all.last;
    shortest = span.last < shortest ? span.last : shortest;
  }
  if (kinds == 0) all.first = 0;
  if (!same || (v.firsts != nullptr && all.last != shortest)) return visible_in_spans(scratch, v, S, b, h, t0, queries);
  if (v.mask == nullptr && all.last == shortest) return {all.last - all.first, nullptr, nullptr, all.first};

  const int64_t n = all.last - all.first;
  constexpr int64_t W = sizeof(Bytes);
  auto* rows = scratch.take<uint8_t>(kinds * n);                                      // what each sees
  auto *some = scratch.zeros<uint8_t>(n + W), *every = scratch.take<uint8_t>(n + W);  // whether any does, and whether all do
  __builtin_memset(every, 1, static_cast<size_t>(n));
  for (int64_t t = 0; t < kinds; ++t) {
    const int64_t own = span_of(v, S, b, t0 + t).last - all.first, shown_to = own < 0 ? 0 : own;
    uint8_t* row = rows + t * n;
    mask_row(v, b, h, t0 + t, all.first, shown_to, row);
    for (int64_t i = shown_to; i < n; ++i) row[i] = 0;
    for (int64_t i = 0; i < n; i += W) {
      store_bytes(some + i, load_bytes(some + i) | load_bytes(row + i));
      store_bytes(every + i, load_bytes(every + i) & load_bytes(row + i));
    }
  }
  auto* index = scratch.take<int32_t>(n + 1);
  int64_t count = 0;
  bool by_all = true;
  for (int64_t i = 0; i < n; ++i) {
    index[count] = static_cast<int32_t>(all.first + i);
    count += some[i];
    by_all = by_all && some[i] == every[i];
  }
  const bool dense = count == n;
  if (by_all) return {count, dense ? nullptr : index, nullptr, all.first};
  if (dense) return {n, nullptr, rows, all.first, n};
  for (int64_t t = 0; t < kinds; ++t)  // in place: nothing is written beyond what is read
    for (int64_t i = 0; i < count; ++i) rows[t * count + i] = rows[t * n + index[i] - all.first];
  return {count, index, rows, 0, count};
}

}  // namespace onepass::ONEPASS_ISA
