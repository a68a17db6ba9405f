// The gradients of additive scores: of queries, keys and v, from those of the scores. Four queries at a time against the keys in order, a
// vector of channels at a time; as in the scores, reciprocals merge where that is safe.
#pragma once

#include "additive_scores.h"

namespace onepass::ONEPASS_ISA {

// A few vectors of channels of some rows of queries or keys, exponentiated, vector by vector: e[(vector * n + row) * W].
template <class R>
struct Slice {
  const R* const* rows;  // as given, from the first channel of the slice
  R* e;
  R* largest;  // magnitude in each row; infinite or NaN if an element is
  R least_of_all, largest_of_all;
  int64_t count, width;

  Slice(Scratch& scratch, Tensor tensor, int64_t b, int64_t h, const int32_t* index, int64_t first, int64_t n, int64_t column,
        int64_t width)
      : e(scratch.take<R>(n * padded<R>(width))), largest(scratch.take<R>(n)), least_of_all(R(__builtin_inf())), largest_of_all(0),
        count(n), width(width) {
    constexpr int W = kWidth<R>, kAhead = 4;  // rows that are fetched before they are wanted
    tensor.data = static_cast<char*>(tensor.data) + column * size_of(tensor.dtype);
    rows = row_pointers<R>(scratch, tensor, b, h, first, n, width, index);
    for (int64_t i = 0; i < n; ++i) {
      Vec<R> top = {};
      const R* next = rows[i + kAhead < n ? i + kAhead : i];
      for (int64_t c = 0; c < width; c += W) {
        __builtin_prefetch(next + c);
        const Vec<R> value = at(i, c);
        top = larger_magnitude<R>(absolute<R>(value), top);
        store<R>(e + c * n + i * W, exp_normal<R>(value + value));
      }
      largest[i] = largest_magnitude<R>(top);
      least_of_all = largest[i] < least_of_all ? largest[i] : least_of_all;
      largest_of_all = largest[i] <= largest_of_all ? largest_of_all : largest[i] + R(0) * largest_of_all;  // a NaN stays
    }
  }

  ONEPASS_INLINE Vec<R> at(int64_t i, int64_t c) const {
    return c + kWidth<R> <= width ? load<R>(rows[i] + c) : load_first<R>(rows[i] + c, width - c);
  }
};

// The largest magnitude, of a NaN and a number the number.
template <class R>
R largest_of(const R* x, int64_t n) {
  constexpr int W = kWidth<R>;
  Vec<R> top = {};
  for (int64_t i = 0; i < n; i += W) top = larger<R>(absolute<R>(i + W <= n ? load<R>(x + i) : load_first<R>(x + i, n - i)), top);
  return largest_lane<R>(top);
}

// v in a slice. It factors out of the sums for dq and dk, but for an infinite or NaN one: g v must then be in each term, as in the
// eager formula, where opposite infinities make a NaN.
template <class R>
struct Factors {
  R *early, *late;  // early * late = 4 v
  bool finite;      // and 4 v too

  Factors(Scratch& scratch, const Tensor& v, int64_t h, int64_t column, int64_t width)
      : early(scratch.take<R>(padded<R>(width))), late(scratch.take<R>(padded<R>(width))) {
    read_row<R>(early, v.at(0, h, 0) + column * size_of(v.dtype), v.dtype, width);
    for (int64_t c = width; c < padded<R>(width); ++c) early[c] = 0;
    finite = largest_of<R>(early, width) <= std::numeric_limits<R>::max() / 4 && all_finite<R>(early, width);
    for (int64_t c = 0; c < padded<R>(width); ++c) {
      late[c] = finite ? R(4) * early[c] : R(4);
      early[c] = finite ? R(1) : early[c];
    }
  }
};

// 1 / d for Q vectors by one reciprocal of their product, in two halves that a loop can take at different times.
template <class R, int Q>
struct Merging {
  Vec<R> d[Q], low, high, all, estimate;

  ONEPASS_INLINE void begin() {
    if constexpr (Q == 4) {
      low = d[0] * d[1];
      high = d[2] * d[3];
      all = low * high;
    } else {
      all = Q == 2 ? d[0] * d[1] : d[0];
    }
    estimate = reciprocal_estimate<R>(all);
  }

  ONEPASS_INLINE void begin(const Vec<R>* eq, Vec<R> ek) {
#pragma GCC unroll 4
    for (int i = 0; i < Q; ++i) d[i] = fma<R>(eq[i], ek, splat<R>(1));
    begin();
  }

  ONEPASS_INLINE void finish(Vec<R>* r) const {
    const Vec<R> of_all = refined<R>(estimate, all);
    if constexpr (Q == 4) {
      const Vec<R> of_low = of_all * high, of_high = of_all * low;
      r[0] = of_low * d[1];
      r[1] = of_low * d[0];
      r[2] = of_high * d[3];
      r[3] = of_high * d[2];
    } else if constexpr (Q == 2) {
      r[0] = of_all * d[1];
      r[1] = of_all * d[0];
    } else {
      r[0] = of_all;
    }
  }
};

// With w = e^(2q) e^(2k) r^2 = r (1 - r), a fourth of the slope of tanh at q + k: dq[i] += g[i] w[i], dk += g[i] w[i], fast += g[i] r[i].
// e^(2q) comes out of the sum for dq, and for dk e^(2k): `factored` is dq over e^(2q).
template <class R, int Q>
ONEPASS_INLINE void gradient_step(const Vec<R>* eq, Vec<R> ek, const Vec<R>* r, const R* g, Vec<R>* factored, Vec<R>& dk, Vec<R>& fast) {
  Vec<R> of_key = {}, of_all = {};
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) {
    const Vec<R> gr = splat<R>(g[i]) * r[i], grr = gr * r[i];
    of_all = i == 0 ? gr : of_all + gr;
    factored[i] = fma<R>(ek, grr, factored[i]);
    of_key = i == 0 ? eq[i] * grr : fma<R>(eq[i], grr, of_key);
  }
  dk = fma<R>(ek, of_key, dk);
  fast += of_all;  // not one by one: the next key waits for it
}

// Where pairs merge, a gradient of a score is divided by d^2, and then multiplied by e^(2q) and e^(2k) one after the other.
template <class R>
struct MergeLimits {
  static constexpr R kSize = (Limits<R>::product / 4 - 1) / R(2.8853900817779268);  // |q| + |k| up to which pairs merge
  static constexpr R kGradient = sizeof(R) == 4 ? R(0x1p90) : R(0x1p740);           // up to which that cannot overflow
  // Gradients come multiplied by `scale`, or the quotient of a small one would not be a normal number; by 1 if any exceeds `kScaled`,
  // or where v is in the terms.
  static constexpr R kScale = sizeof(R) == 4 ? R(0x1p60) : R(0x1p500), kScaled = sizeof(R) == 4 ? R(0x1p20) : R(0x1p200);
};

// Some queries, from the t-th seer on, against the keys from `from` to `end` of a slice.
template <class R>
struct GradientTile {
  int64_t t, queries, from, end;
  R least, most;        // of the queries' sizes
  const R* g;           // [end - from, queries]: gradients of scores, scaled
  const uint8_t* seen;  // likewise, what the queries see; null if all
  bool few;             // channels, or keys: roundings have few others to average with, so that no pairs merge
  bool uniform;         // all pairs merge

  // The way of a pair, by the key's size (or of all pairs, by those of the smallest and the largest key).
  bool in_range(R smallest, R largest) const { return most + largest <= Limits<R>::single && least + smallest >= R(kSmall); }
  bool merges(R largest) const { return !few && most + largest <= MergeLimits<R>::kSize; }
};

// A sum of many, kept in two parts. Without the second the error grows with the root of how many are added.
template <class R>
struct LongSums {
  R *total, *low;  // low: null where few are added

  LongSums(Scratch& scratch, int64_t count, bool many)
      : total(scratch.zeros<R>(count)), low(many ? scratch.zeros<R>(count) : nullptr) {}

  ONEPASS_INLINE void add(int64_t at, Vec<R> x) const {
    Vec<R> sum = load<R>(total + at);
    if (low != nullptr) {
      Vec<R> rest = load<R>(low + at);
      add_exactly(sum, rest, x);
      store<R>(low + at, rest);
    } else {
      sum += x;
    }
    store<R>(total + at, sum);
  }

  ONEPASS_INLINE Vec<R> at(int64_t at) const {
    return low == nullptr ? load<R>(total + at) : exact_sum(load<R>(total + at), load<R>(low + at));
  }
};

// Sums of a slice, vector by vector, as the slices.
template <class R>
struct GradientSums {
  LongSums<R> factored, plain;  // dq is e^(2q) factored + plain
  R* dk;                        // of the keys and queries at hand
  LongSums<R> fast, direct;     // per channel, of g r over the pairs in range and of g tanh over the others, and over all of a few
  R total = 0, low = 0;         // of g over those of the former
};

// One vector of channels of a tile, from the c-th on.
template <class R, int Q>
void gradient_tile(const Slice<R>& q, const Slice<R>& k, const Factors<R>& v, const GradientTile<R>& tile, int64_t c,
                   const GradientSums<R>& sums) {
  constexpr int W = kWidth<R>;
  const int64_t at = c * q.count + tile.t * W, end = tile.end;
  const R *ek = k.e + c * k.count, *g = tile.g - tile.from * Q;
  R* dk = sums.dk + c * k.count;
  Vec<R> eq[Q], factored[Q] = {}, fast = {};
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) eq[i] = load<R>(q.e + at + i * W);
  if (tile.uniform) {
    // Two keys ahead pairs are begun and one key ahead finished: the chain to a reciprocal is longer than the machine looks ahead.
    const auto key = [&](int64_t s) __attribute__((always_inline)) { return load<R>(ek + (s < end ? s : end - 1) * W); };
    Merging<R, Q> begun;
    Vec<R> r[Q];
    begun.begin(eq, key(tile.from));
    begun.finish(r);
    begun.begin(eq, key(tile.from + 1));
    for (int64_t s = tile.from; s < end; ++s) {
      Merging<R, Q> next;
      Vec<R> next_r[Q];
      next.begin(eq, key(s + 2));
      begun.finish(next_r);
      Vec<R> of_key = load<R>(dk + s * W);
      gradient_step<R, Q>(eq, load<R>(ek + s * W), r, g + s * Q, factored, of_key, fast);
      store<R>(dk + s * W, of_key);
      begun = next;
#pragma GCC unroll 4
      for (int i = 0; i < Q; ++i) r[i] = next_r[i];
    }
  } else {
    Vec<R> plain[Q] = {}, direct = {};
    const auto is_moderate = [](R gradient) { return gradient <= MergeLimits<R>::kGradient && -gradient <= MergeLimits<R>::kGradient; };
    for (int64_t s = tile.from; s < end; ++s) {
      Vec<R> r[Q], of_key = load<R>(dk + s * W);
      const auto add = [&](int i, Vec<R> w) {
        plain[i] = fma<R>(splat<R>(g[s * Q + i]), w, plain[i]);
        of_key = fma<R>(splat<R>(g[s * Q + i]), w, of_key);
      };
      const auto add_single = [&](int i, Vec<R> one) {
        add(i, eq[i] * load<R>(ek + s * W) * one * one);
        if (tile.few) direct = fma<R>(splat<R>(g[s * Q + i]), fma<R>(splat<R>(-2), one, splat<R>(1)), direct);
        else fast = fma<R>(splat<R>(g[s * Q + i]), one, fast);
      };
      if (!(tile.in_range(k.largest[s], k.largest[s]) && v.finite)) {
        for (int i = 0; i < Q; ++i) {
          if (tile.seen != nullptr && tile.seen[(s - tile.from) * Q + i] == 0) continue;
          Vec<R> tangent, slope;
          tanh_and_slope<R>(q.at(tile.t + i, c) + k.at(s, c), tangent, slope);
          add(i, load<R>(v.early + c) * (slope * R(0.25)));
          direct = fma<R>(splat<R>(g[s * Q + i]), tangent, direct);
        }
      } else if (tile.merges(k.largest[s])) {
        Merging<R, Q> merging;
        merging.begin(eq, load<R>(ek + s * W));
        merging.finish(r);
        R moderate[Q];
        for (int i = 0; i < Q; ++i) moderate[i] = is_moderate(g[s * Q + i]) ? g[s * Q + i] : R(0);
        gradient_step<R, Q>(eq, load<R>(ek + s * W), r, moderate, factored, of_key, fast);
        for (int i = 0; i < Q; ++i)
          if (!is_moderate(g[s * Q + i])) add_single(i, r[i]);
      } else {
        for (int i = 0; i < Q; ++i) add_single(i, reciprocal<R>(fma<R>(eq[i], load<R>(ek + s * W), splat<R>(1))));
      }
      store<R>(dk + s * W, of_key);
    }
    for (int i = 0; i < Q; ++i) sums.plain.add(at + i * W, plain[i]);
    sums.direct.add(c, direct);
  }
#pragma GCC unroll 4
  for (int i = 0; i < Q; ++i) sums.factored.add(at + i * W, factored[i]);
  sums.fast.add(c, fast);
}

constexpr int64_t kFewKeys = 4;  // in a tile below which sums over them have few terms

// The tile of Q seers from the t-th on against some keys, with its gradients of scores. g, seen: where they are to lie.
template <class R, int Q>
GradientTile<R> gradient_tile_of(const AdditiveBackward& args, int64_t b, int64_t h, const Visible& visible, const Seers& seers,
                                 const Slice<R>& q, const Slice<R>& k, const Factors<R>& v, R scale, int64_t t, int64_t from,
                                 int64_t end, R* g, uint8_t* seen, GradientSums<R>& sums) {
  constexpr int W = kWidth<R>;
  GradientTile<R> tile{t, Q, from, end, q.largest[t], q.largest[t], g, seen, args.shape.A <= kFew || end - from < kFewKeys, false};
  for (int i = 1; i < Q; ++i) {
    const R size = q.largest[t + i];
    tile.least = size < tile.least ? size : tile.least;
    tile.most = size <= tile.most ? tile.most : size + R(0) * tile.most;  // a NaN stays
  }
  const R* row[Q];
  for (int i = 0; i < Q; ++i) row[i] = reinterpret_cast<const R*>(args.grad_scores.at(b, h, seers.index[t + i]));
  const int64_t count = (end - from) * Q;
  if (visible.index == nullptr) {
    for (int i = 0; i < Q; ++i) row[i] += visible.first + from;
    for (int64_t s = 0; s < end - from; ++s)
      for (int i = 0; i < Q; ++i) g[s * Q + i] = row[i][s] * scale;
  } else {
    for (int64_t s = from; s < end; ++s)
      for (int i = 0; i < Q; ++i) g[(s - from) * Q + i] = row[i][visible.index[s]] * scale;
  }
  if (seen != nullptr)
    for (int64_t s = from; s < end; ++s)
      for (int i = 0; i < Q; ++i) seen[(s - from) * Q + i] = visible.sees(seers.index[t + i], s);

  const bool all_in_range = tile.in_range(k.least_of_all, k.largest_of_all) && v.finite;
  Vec<R> sum[1] = {};
  if (all_in_range) {
    for (int64_t j = 0; j < count; j += W) sum[0] += j + W <= count ? load<R>(g + j) : load_first<R>(g + j, count - j);
  } else if (v.finite) {
    R lanes[W] = {};
    for (int64_t j = 0; j < count; ++j)
      if (const R size = k.largest[from + j / Q]; tile.in_range(size, size)) lanes[j % W] += g[j];
    sum[0] = load<R>(lanes);
  }
  if (!tile.few) add_exactly(sums.total, sums.low, R(sum_lanes<R, 1>(sum)[0]));
  tile.uniform = all_in_range && tile.merges(k.largest_of_all) && largest_of<R>(g, count) <= MergeLimits<R>::kGradient;
  return tile;
}

// Keys at a time: a vector of their exponentials and one of their sums stay in the first-level cache. And tiles of queries at a time: of so
// many terms a sum is good as it comes.
constexpr int64_t kGradientKeys = 128, kGradientTiles = 32;

// dquery, dkeys and this (b, h)'s part of dv for channels [column, column + width): channels do not mix, so each is one task's alone.
template <class R>
void score_inputs_gradient(const AdditiveBackward& args, int64_t b, int64_t h, int64_t column, int64_t width) {
  constexpr int W = kWidth<R>;
  Scratch& scratch = Scratch::mine();
  const Shape& shape = args.shape;
  const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, 0, shape.T);
  const Seers seers(scratch, visible, shape.T);
  const int64_t n = visible.count, whole = padded<R>(width);
  clear_unseen<R>(args.grad_keys, b, h, shape.S, visible, column, width);
  const bool of_query = args.grad_query.data != nullptr;
  if (of_query) clear_unseen<R>(args.grad_query, b, h, shape.T, Visible{seers.count, seers.index, nullptr}, column, width);
  const Slice<R> q(scratch, args.query, b, h, seers.index, 0, seers.count, column, width);
  const Factors<R> v(scratch, args.v, h, column, width);
  const bool many_keys = n > kGradientKeys, many_queries = seers.count > 4 * kGradientTiles;
  const auto of_queries = [&] { return LongSums<R>(scratch, seers.count * whole, many_keys); };
  const auto of_pairs = [&] { return LongSums<R>(scratch, whole, many_keys || many_queries); };
  GradientSums<R> sums{of_queries(), of_queries(), nullptr, of_pairs(), of_pairs()};
  R largest = 0;
  for (int64_t t = 0; t < seers.count && n > 0; ++t) {
    const R* row = reinterpret_cast<const R*>(args.grad_scores.at(b, h, seers.index[t]));
    const int64_t first = visible.position(0);
    const R size = largest_of<R>(row + first, visible.position(n - 1) + 1 - first);  // zeros where not seen
    largest = size > largest ? size : largest;
  }
  const R scale = v.finite && largest <= MergeLimits<R>::kScaled ? MergeLimits<R>::kScale : R(1), down = R(1) / scale;
  const int64_t keys = n < kGradientKeys ? n : kGradientKeys;
  R* g = scratch.take<R>(seers.count * keys);
  uint8_t* seen = visible.alike() ? nullptr : scratch.take<uint8_t>(seers.count * keys);
  auto* tiles = scratch.take<GradientTile<R>>(seers.count);
  const auto write = [&](const Tensor& to, const int32_t* index, int64_t first, int64_t count, const R* from) {
    const Output<R> out(scratch, to, b, h, first, count, width, index, column);
    const bool past_cache = destination<R>(to, shape) == Into::memory;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < width; c += W) {
        const Vec<R> gradient = load<R>(v.late + c) * (load<R>(from + c * count + i * W) * down);
        if (past_cache && c + W <= width) store_past_cache<R>(out.rows[i] + c, gradient);
        else if (c + W <= width) store<R>(out.rows[i] + c, gradient);
        else store_first<R>(out.rows[i] + c, gradient, width - c);
      }
    if (past_cache) finish_stores();
    out.flush();
  };
  for (int64_t first = 0; first < n; first += keys) {
    const auto before = scratch.mark();
    const Visible part = visible.part(0, first, n - first < keys ? n - first : keys);
    const Slice<R> k(scratch, args.keys, b, h, part.index, part.first, part.count, column, width);
    const LongSums<R> dk(scratch, part.count * whole, many_queries);
    int64_t count = 0, used = 0;
    const auto tile = [&](auto queries, int64_t t, int64_t from, int64_t end) {
      from = from < first ? 0 : from - first;
      end = end < first + part.count ? end - first : part.count;
      if (from >= end) return;
      tiles[count++] = gradient_tile_of<R, decltype(queries)::value>(args, b, h, part, seers, q, k, v, scale, t, from, end,
                                                                     g + used, seen == nullptr ? nullptr : seen + used, sums);
      used += (end - from) * decltype(queries)::value;
    };
    for (int64_t t = 0; t < seers.count;) {
      const int64_t left = seers.count - t, together = left >= 4 ? 4 : left >= 2 ? 2 : 1;
      Group group{together, 0, n};
      if (visible.window != nullptr) {
        group = seers.group(visible, t, together);
        if (group.queries == 3) group = seers.group(visible, t, 2);
      }
      if (group.queries == 4) tile(std::integral_constant<int, 4>{}, t, group.first, group.last);
      else if (group.queries == 2) tile(std::integral_constant<int, 2>{}, t, group.first, group.last);
      else tile(std::integral_constant<int, 1>{}, t, group.first, group.last);
      t += group.queries;
    }
    const int64_t together = many_queries ? kGradientTiles : count;
    R* some = many_queries ? scratch.take<R>(part.count * whole) : nullptr;
    for (int64_t c = 0; c < width; c += W)
      for (int64_t i = 0; i < count; i += together) {
        const int64_t at = c * part.count, size = part.count * W;
        sums.dk = many_queries ? some : dk.total;
        if (many_queries) __builtin_memset(some + at, 0, static_cast<size_t>(size) * sizeof(R));
        for (int64_t j = i; j < count && j < i + together; ++j) {
          if (tiles[j].queries == 4) gradient_tile<R, 4>(q, k, v, tiles[j], c, sums);
          else if (tiles[j].queries == 2) gradient_tile<R, 2>(q, k, v, tiles[j], c, sums);
          else gradient_tile<R, 1>(q, k, v, tiles[j], c, sums);
        }
        for (int64_t s = 0; s < size && many_queries; s += W) dk.add(at + s, load<R>(some + at + s));
      }
    for (int64_t at = 0; at < part.count * whole && many_queries; at += W) store<R>(dk.total + at, dk.at(at));
    write(args.grad_keys, part.index, part.first, part.count, dk.total);
    scratch.rewind(before);
  }
  for (int64_t c = 0; c < whole && of_query; c += W)
    for (int64_t t = 0; t < seers.count; ++t) {
      const int64_t at = c * seers.count + t * W;
      const bool merged = q.largest[t] <= MergeLimits<R>::kSize;  // else no pair did, and e^(2q) may be anything
      store<R>(sums.plain.total + at, merged ? fma<R>(load<R>(q.e + at), sums.factored.at(at), sums.plain.at(at)) : sums.plain.at(at));
    }
  if (of_query) write(args.grad_query, seers.index, 0, seers.count, sums.plain.total);
  R* partial = reinterpret_cast<R*>(args.partial_v.at(b, h, 0)) + column;
  const R total = exact_sum(sums.total, sums.low);
  for (int64_t c = 0; c < whole; c += W) {
    const Vec<R> gradient = ((splat<R>(total) - splat<R>(R(2)) * sums.fast.at(c)) + sums.direct.at(c)) * down;
    store_first<R>(partial + c, gradient, c + W <= width ? W : width - c);
  }
}

}  // namespace onepass::ONEPASS_ISA
