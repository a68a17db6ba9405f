// Additive scores: v . tanh(q + k) = sum v - 2 sum v r, r = 1 / (1 + x), x = e^(2q) e^(2k).
//
// Exponentials are taken once per query and once per key. Reciprocals merge: with u = 1 / v and d = u (1 + x),
//   1/d1 + 1/d2 = (d1 + d2) / (d1 d2),   n1/D1 + n2/D2 = (n1 D2 + n2 D1) / (D1 D2),
// so eight channels cost eight multiply-adds for d, 17 operations to merge, and one reciprocal: 3.6 operations per element and channel.
//
// Exactness: a pair (t, s) takes one of three ways, by the sizes of its own two rows only, so no other position can change its bits:
//   merged  the product of eight d cannot overflow
//   single  x cannot overflow; a reciprocal per element
//   direct  tanh itself: rows too large for an exponential, not finite, or so small that 1 - 2r would lose their digits
#pragma once

#include "attend.h"

namespace onepass::ONEPASS_ISA {

template <class R>
struct Limits;
template <>
struct Limits<float> {
  static constexpr float product = 120;  // bits that a product of d may have
  static constexpr float single = 40;    // |q| + |k| with x = e^80
};
template <>
struct Limits<double> {
  static constexpr double product = 1000;
  static constexpr double single = 330;
};
constexpr float kSmall = 1.f / 16;  // |q| + |k| below which tanh is taken directly

// The size of a row: its largest magnitude (NaN if an element is not finite), and the largest sum of positive parts of the channels
// that are merged.
template <class R>
struct Size {
  R largest, merged;
};

// Channels as the tiles take them: eights, fours and twos of vectors merged, then up to two vectors taken singly.
template <class R>
struct Channels {
  static constexpr int W = kWidth<R>;
  int64_t count, merged, whole;  // whole: padded to vectors
  explicit Channels(int64_t A) : count(A), merged(A / (2 * W) * (2 * W)), whole(padded<R>(A)) {}

  // Call f(group of 8, 4 or 2, first channel) over the merged ones.
  template <class F>
  ONEPASS_INLINE void groups(const F& f) const {
    int64_t a = 0;
    for (; a + 8 * W <= merged; a += 8 * W) f(std::integral_constant<int, 8>{}, a);
    if (a + 4 * W <= merged) f(std::integral_constant<int, 4>{}, a), a += 4 * W;
    if (a + 2 * W <= merged) f(std::integral_constant<int, 2>{}, a);
  }
};

// v with what the tiles need of it.
template <class R>
struct Weighting {
  const R* v;       // padded with zeros
  R* scaled;        // v / unit, padded with zeros; |scaled| <= 1
  R* merged;        // unit / v where channels are merged, `scaled` behind them
  R unit;           // a power of two
  R sum;            // of v
  R bits;           // log2 of the largest product of u = unit / v in a group, plus one per member
  bool finite;

  Weighting(Scratch& scratch, const Tensor& tensor, int64_t h, const Channels<R>& channels) {
    constexpr int W = kWidth<R>;
    const int64_t A = channels.count, whole = channels.whole;
    R* copy = scratch.take<R>(whole);
    read_row<R>(copy, tensor.at(0, h, 0), tensor.dtype, A);
    for (int64_t a = A; a < whole; ++a) copy[a] = 0;
    v = copy;
    R largest = 0;
    for (int64_t a = 0; a < A; ++a) largest = std::fabs(v[a]) > largest ? std::fabs(v[a]) : largest;
    finite = all_finite<R>(v, A);
    int exponent = 0;
    if (finite && largest > 0) std::frexp(largest, &exponent);
    unit = std::ldexp(R(1), exponent > 100 ? 100 : exponent < -100 ? -100 : exponent);
    scaled = scratch.take<R>(whole);
    merged = scratch.take<R>(whole);
    Vec<R> sums[1] = {};
    for (int64_t a = 0; a < whole; a += W) {
      const Vec<R> x = load<R>(v + a);
      sums[0] += x;
      store<R>(scaled + a, x / unit);
      store<R>(merged + a, a < channels.merged ? unit / x : x / unit);
    }
    sum = sum_lanes<R, 1>(sums)[0];
    bits = 0;
    channels.groups([&](auto group, int64_t a) {
      for (int lane = 0; lane < W; ++lane) {
        R b = group;
        for (int i = 0; i < group; ++i) b += std::log2(std::fabs(merged[a + i * W + lane]));
        bits = b > bits || b != b ? b : bits;
      }
    });
  }
};

// e = e^(2x), and where `times` is given e * times too; returns the row's size. `next`: the row after, fetched meanwhile.
template <class R>
Size<R> exponentiate(const R* x, const R* next, const Channels<R>& channels, R* e, const R* times = nullptr, R* product = nullptr) {
  constexpr int W = kWidth<R>;
  Vec<R> largest = {}, merged = {}, poison = {};
  const auto vector = [&](Vec<R> value, int64_t a) {
    __builtin_prefetch(next + a);
    largest = larger<R>(absolute<R>(value), largest);
    poison = fma<R>(value, Vec<R>{}, poison);
    const Vec<R> power = exp_normal<R>(value + value);
    store<R>(e + a, power);
    if (times != nullptr) store<R>(product + a, a < channels.merged ? power * load<R>(times + a) : power);
  };
  channels.groups([&](auto group, int64_t a) {
    constexpr int G = decltype(group)::value;
    Vec<R> sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      const Vec<R> value = load<R>(x + a + i * W);
      sum += larger<R>(value, Vec<R>{});
      vector(value, a + i * W);
    }
    merged = larger<R>(sum, merged);
  });
  for (int64_t a = channels.merged; a < channels.count; a += W)
    vector(a + W <= channels.count ? load<R>(x + a) : load_first<R>(x + a, channels.count - a), a);
  Vec<R> poisons[1] = {poison};
  return {largest_lane<R>(largest) + sum_lanes<R, 1>(poisons)[0], largest_lane<R>(merged)};
}

template <class R>
struct Ratio {
  Vec<R> n, d;
};

// The sum of 1 / d[i] over G vectors as one ratio.
template <class R, int G>
ONEPASS_INLINE Ratio<R> merge(const Vec<R>* d) {
  if constexpr (G == 2) {
    return {d[0] + d[1], d[0] * d[1]};
  } else {
    const Ratio<R> low = merge<R, G / 2>(d), high = merge<R, G / 2>(d + G / 2);
    return {fma<R>(low.n, high.d, low.d * high.n), low.d * high.d};
  }
}

template <class R>
struct ScoreContext {
  Channels<R> channels;
  Weighting<R> weighting;
};

// A tile of scores, TT queries by SS keys, all pairs merged (or all single).
template <class R, bool Merged, int TT, int SS>
ONEPASS_INLINE void score_tile(const ScoreContext<R>& c, const R* eq, const R* ek, R* out, int64_t stride) {
  constexpr int W = kWidth<R>;
  const int64_t whole = c.channels.whole;
  const R* weight = Merged ? c.weighting.merged : c.weighting.scaled;
  Vec<R> sum[TT * SS] = {};
  int64_t a = 0;
  if constexpr (Merged) {
    c.channels.groups([&](auto group, int64_t first) __attribute__((always_inline)) {
      constexpr int G = decltype(group)::value;
#pragma GCC unroll 4
      for (int t = 0; t < TT; ++t)
#pragma GCC unroll 4
        for (int s = 0; s < SS; ++s) {
          Vec<R> d[G];
#pragma GCC unroll 8
          for (int i = 0; i < G; ++i) {
            const int64_t at = first + i * W;
            d[i] = fma<R>(load<R>(eq + t * whole + at), load<R>(ek + s * whole + at), load<R>(weight + at));
          }
          const Ratio<R> ratio = merge<R, G>(d);
          sum[t * SS + s] = add_ratio<R>(sum[t * SS + s], ratio.n, ratio.d);
        }
    });
    a = c.channels.merged;
  }
  for (; a < whole; a += W)
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t)
#pragma GCC unroll 4
      for (int s = 0; s < SS; ++s) {
        const Vec<R> d = fma<R>(load<R>(eq + t * whole + a), load<R>(ek + s * whole + a), splat<R>(1));
        sum[t * SS + s] = add_ratio<R>(sum[t * SS + s], load<R>(weight + a), d);
      }
  const R factor = R(-2) * c.weighting.unit;
  store_sums<R, TT, SS>(sum, out, stride, [&](Vec<R> x) __attribute__((always_inline)) { return x * factor + c.weighting.sum; });
}

template <class R>
R direct_score(const R* q, const R* k, const R* v, int64_t A) {
  constexpr int W = kWidth<R>;
  Vec<R> sums[1] = {}, tangent, slope;
  int64_t a = 0;
  for (; a + W <= A; a += W) {
    tanh_and_slope<R>(load<R>(q + a) + load<R>(k + a), tangent, slope);
    sums[0] = fma<R>(load<R>(v + a), tangent, sums[0]);
  }
  if (a < A) {
    tanh_and_slope<R>(load_first<R>(q + a, A - a) + load_first<R>(k + a, A - a), tangent, slope);
    sums[0] = fma<R>(load<R>(v + a), tangent, sums[0]);
  }
  return sum_lanes<R, 1>(sums)[0];
}

// Some rows of queries or keys, exponentiated.
template <class R>
struct Exponentials {
  const R* const* rows;  // as given
  R* e;                  // [n, whole]
  R* merged;             // [n, whole], e / v; for queries only
  Size<R>* size;
};

enum class Way { merged, single, direct };

template <class R>
ONEPASS_INLINE Way way_of(const Weighting<R>& weighting, Size<R> least, Size<R> most) {
  constexpr R two_log2e = R(2.8853900817779268);
  const bool in_range = most.largest <= Limits<R>::single && least.largest >= R(kSmall) && weighting.finite;
  if (!in_range) return Way::direct;
  return weighting.bits + two_log2e * most.merged <= Limits<R>::product ? Way::merged : Way::single;
}

template <class R>
ONEPASS_INLINE Size<R> operator+(Size<R> a, Size<R> b) {
  return {a.largest + b.largest, a.merged + b.merged};
}

// Scores of TT queries and SS keys.
template <class R, int TT, int SS>
ONEPASS_INLINE void score_pairs(const ScoreContext<R>& c, const Exponentials<R>& q, int64_t t, const Exponentials<R>& k, int64_t s,
                                R* out, int64_t stride) {
  const int64_t whole = c.channels.whole;
  const auto extremes = [](const Size<R>* size, int n, Size<R>& least, Size<R>& most) {
    least = most = size[0];
    for (int i = 1; i < n; ++i) {  // a NaN stays in `most`
      least = {size[i].largest < least.largest ? size[i].largest : least.largest,
               size[i].merged < least.merged ? size[i].merged : least.merged};
      most = {size[i].largest <= most.largest ? most.largest : size[i].largest + R(0) * most.largest,
              size[i].merged <= most.merged ? most.merged : size[i].merged};
    }
  };
  Size<R> q_least, q_most, k_least, k_most;
  extremes(q.size + t, TT, q_least, q_most);
  extremes(k.size + s, SS, k_least, k_most);
  const Way way = way_of<R>(c.weighting, q_least + k_least, q_most + k_most);
  if (way == Way::merged) {
    score_tile<R, true, TT, SS>(c, q.merged + t * whole, k.e + s * whole, out, stride);
  } else if (TT * SS > 1 && way == Way::single && way_of<R>(c.weighting, q_least + k_least, q_least + k_least) == Way::single) {
    score_tile<R, false, TT, SS>(c, q.e + t * whole, k.e + s * whole, out, stride);
  } else if constexpr (TT * SS > 1) {
    for (int i = 0; i < TT; ++i)
      for (int j = 0; j < SS; ++j) score_pairs<R, 1, 1>(c, q, t + i, k, s + j, out + i * stride + j, stride);
  } else if (way == Way::single) {
    score_tile<R, false, 1, 1>(c, q.e + t * whole, k.e + s * whole, out, stride);
  } else {
    *out = direct_score<R>(q.rows[t], k.rows[s], c.weighting.v, c.channels.count);
  }
}

// scores[t * stride + i] for the queries t0 .. t0 + queries and the visible positions.
template <class R>
void additive_scores(Scratch& scratch, const AdditiveForward& args, int64_t b, int64_t h, int64_t t0, int64_t queries,
                     const Visible& visible, R* scores, int64_t stride) {
  const Channels<R> channels(args.shape.A);
  const ScoreContext<R> c{channels, Weighting<R>(scratch, args.v, h, channels)};
  const int64_t A = args.shape.A, whole = channels.whole;
  if (A == 0) {
    for (int64_t t = 0; t < queries; ++t)
      for (int64_t i = 0; i < visible.count; ++i) scores[t * stride + i] = 0;
    return;
  }
  const auto exponentials = [&](const R* const* rows, int64_t n, bool merged) {
    return Exponentials<R>{rows, scratch.take<R>(n * whole), merged ? scratch.take<R>(n * whole) : nullptr, scratch.take<Size<R>>(n)};
  };
  Exponentials<R> q = exponentials(row_pointers<R>(scratch, args.query, b, h, t0, queries, A), queries, true);
  for (int64_t t = 0; t < queries; ++t)
    q.size[t] = exponentiate<R>(q.rows[t], q.rows[t + 1 < queries ? t + 1 : t], channels, q.e + t * whole, c.weighting.merged, q.merged + t * whole);

  // Keys in chunks that stay in the second-level cache.
  constexpr int64_t kChunk = 64 * 1024;
  constexpr int TT = kRegisters == 32 ? 4 : 2, SS = kRegisters == 32 ? 4 : 2;
  int64_t chunk = kChunk / whole / SS * SS;
  chunk = chunk < SS ? SS : chunk;
  const R** rows = row_pointers<R>(scratch, args.keys, b, h, 0, visible.count, A, visible.index);
  Exponentials<R> k = exponentials(rows, chunk < visible.count ? chunk : visible.count, false);
  for (int64_t first = 0; first < visible.count; first += chunk) {
    const int64_t n = visible.count - first < chunk ? visible.count - first : chunk;
    k.rows = rows + first;
    for (int64_t i = 0; i < n; ++i) k.size[i] = exponentiate<R>(k.rows[i], k.rows[first + i + 1 < visible.count ? i + 1 : i], channels, k.e + i * whole);
    R* out = scores + first;
    const auto row_of_tiles = [&](auto tile, int64_t t) {
      constexpr int M = decltype(tile)::value;
      int64_t i = 0;
      for (; i + SS <= n; i += SS) score_pairs<R, M, SS>(c, q, t, k, i, out + t * stride + i, stride);
      for (; i < n; ++i) score_pairs<R, M, 1>(c, q, t, k, i, out + t * stride + i, stride);
    };
    int64_t t = 0;
    for (; t + TT <= queries; t += TT) row_of_tiles(std::integral_constant<int, TT>{}, t);
    if (TT > 2 && t + 2 <= queries) row_of_tiles(std::integral_constant<int, 2>{}, t), t += 2;
    if (t < queries) row_of_tiles(std::integral_constant<int, 1>{}, t);
  }
}

}  // namespace onepass::ONEPASS_ISA
