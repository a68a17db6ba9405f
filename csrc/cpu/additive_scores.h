// Additive scores: v . tanh(q + k) = sum v - 2 sum v r, r = 1 / (1 + x), x = e^(2q) e^(2k).
//
// Exponentials are taken once per query and once per key. With u = 1 / v and d = u (1 + x), reciprocals merge one after another:
//   1 / d1 + 1 / d2 = (d1 + d2) / (d1 d2),   n / p + 1 / d = (n d + p) / (p d),
// so a channel costs three operations, and eight share one reciprocal: 3.3 operations an element.
//
// Exactness: a pair (t, s) takes one of three ways, by the sizes of its own two rows only, so no other position can change its bits:
//   merged  the product of eight d cannot overflow
//   single  x cannot overflow; a reciprocal per element
//   direct  tanh itself: rows too large for an exponential, not finite, or so small that 1 - 2r would lose their digits
// Where channels are few all pairs are direct, as the roundings of 1 - 2r, which count twice, have few others to average with; a
// vector then holds one channel of many keys, not many channels of one.
#pragma once

#include <limits>

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
constexpr int64_t kChunk = 64 * 1024;    // elements of keys that the second-level cache keeps beside all else
constexpr int64_t kConverted = 4 * 1024;  // and the first, of keys that are only converted
constexpr int64_t kNear = 2 << 20;       // bytes of all keys of a memory of which second-level caches keep enough
constexpr int64_t kFew = 8;         // channels up to which it always is, none included

// The size of a row: its largest magnitude (infinite or NaN if an element is), and the largest sum of positive parts of the channels
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

// Numbers of a row in which a Weighting is kept: three of the padded width, then its scalars.
constexpr int64_t weighting_numbers(int64_t stride) { return 3 * stride + 8; }

// v with what the tiles need of it, kept in a row of numbers: made by make_weighting, in scratch or in a memory.
template <class R>
struct Weighting {
  const R* v;       // padded with zeros
  const R* scaled;  // v / unit, padded with zeros; |scaled| <= 1
  const R* merged;  // unit / v where channels are merged, `scaled` behind them
  R unit;           // a power of two
  R sum;            // of v
  R bits;           // log2 of the largest product of u = unit / v in a group, plus one per member
  bool finite;      // and so are sums of A numbers four times as large

  Weighting(const R* row, int64_t stride)
      : v(row), scaled(row + stride), merged(row + 2 * stride), unit(row[3 * stride]), sum(row[3 * stride + 1]),
        bits(row[3 * stride + 2]), finite(row[3 * stride + 3] != R(0)) {}
};

// Fills such a row, of the given stride (at least whole vectors) between its parts.
template <class R>
void make_weighting(const void* given, Dtype dtype, const Channels<R>& channels, int64_t stride, R* row) {
  constexpr int W = kWidth<R>;
  using Wide = std::conditional_t<sizeof(R) == 4, double, long double>;  // a product of eight does not overflow
  const int64_t A = channels.count, whole = channels.whole;
  R *v = row, *scaled = row + stride, *merged = row + 2 * stride, *scalars = row + 3 * stride;
  read_row<R>(v, given, dtype, A);
  for (int64_t a = A; a < stride; ++a) v[a] = 0;
  R largest = 0;
  for (int64_t a = 0; a < A; ++a) largest = std::fabs(v[a]) > largest ? std::fabs(v[a]) : largest;
  const bool finite = all_finite<R>(v, A) && largest <= std::numeric_limits<R>::max() / (4 * static_cast<R>(A));
  int exponent = 0;
  if (finite && largest > 0) std::frexp(largest, &exponent);
  const R unit = std::ldexp(R(1), exponent < -100 ? -100 : exponent);
  Vec<R> sums[1] = {};
  for (int64_t a = 0; a < whole; a += W) {
    const Vec<R> x = load<R>(v + a);
    sums[0] += x;
    store<R>(scaled + a, x / unit);
    store<R>(merged + a, a < channels.merged ? unit / x : x / unit);
  }
  R bits = 0;
  channels.groups([&](auto group, int64_t a) {
    for (int lane = 0; lane < W; ++lane) {
      Wide product = 1;
      for (int i = 0; i < group; ++i) product *= std::fabs(merged[a + i * W + lane]);
      const R b = R(group) + static_cast<R>(std::log2(product));
      bits = b > bits || b != b ? b : bits;
    }
  });
  const R values[8] = {unit, sum_lanes<R, 1>(sums)[0], bits, R(finite), R(W)};
  __builtin_memcpy(scalars, values, sizeof values);
}

// e = e^(2x), and with Times e * times too; returns the row's size. `next`: a row to come, fetched meanwhile.
template <class R, bool Times>
Size<R> exponentiate(const R* x, const R* next, const Channels<R>& channels, R* e, const R* times, R* product) {
  constexpr int W = kWidth<R>;
  Vec<R> largest = {}, merged = {};
  const auto vector = [&](Vec<R> value, int64_t a, bool merges) __attribute__((always_inline)) {
    __builtin_prefetch(next + a);
    largest = larger_magnitude<R>(absolute<R>(value), largest);
    const Vec<R> power = exp_normal<R>(value + value);
    store<R>(e + a, power);
    if constexpr (Times) store<R>(product + a, merges ? power * load<R>(times + a) : power);
  };
  channels.groups([&](auto group, int64_t a) __attribute__((always_inline)) {
    constexpr int G = decltype(group)::value;
    Vec<R> sum = {};
#pragma GCC unroll 8
    for (int i = 0; i < G; ++i) {
      const Vec<R> value = load<R>(x + a + i * W);
      sum += larger<R>(value, Vec<R>{});
      vector(value, a + i * W, true);
    }
    merged = larger<R>(sum, merged);
  });
  for (int64_t a = channels.merged; a < channels.count; a += W)
    vector(a + W <= channels.count ? load<R>(x + a) : load_first<R>(x + a, channels.count - a), a, false);
  return {largest_magnitude<R>(largest), largest_lane<R>(merged)};
}

template <class R>
Size<R> exponentiate(const R* x, const R* next, const Channels<R>& channels, R* e) {
  return exponentiate<R, false>(x, next, channels, e, nullptr, nullptr);
}

template <class R>
struct ScoreContext {
  Channels<R> channels;
  Weighting<R> weighting;
};

// A tile of scores, TT queries by SS keys, all pairs merged (or all single). The next tile's keys are fetched meanwhile, or
// not.
template <class R, bool Merged, int TT, int SS, bool Fetch, class Element>
ONEPASS_INLINE void score_tile(const ScoreContext<R>& c, const R* eq, const Element* const* ek, R* out, int64_t stride) {
  constexpr int W = kWidth<R>;
  const int64_t whole = c.channels.whole;
  const R* weight = Merged ? c.weighting.merged : c.weighting.scaled;
  // Ratios that grow side by side: those of four keys, or of two queries with two keys, where a sum may have to leave its register.
  constexpr int kWanted = kRegisters == 32 ? 1 : 2, kT = TT < kWanted ? TT : kWanted, kS = kRegisters == 32 || SS < 2 ? SS : 2;
  Vec<R> sum[TT * SS] = {};
  int64_t a = 0;
  if constexpr (Merged) {
    c.channels.groups([&](auto group, int64_t first) __attribute__((always_inline)) {
      constexpr int G = decltype(group)::value;
#pragma GCC unroll 4
      for (int t = 0; t < TT; t += kT)
#pragma GCC unroll 4
        for (int s = 0; s < SS; s += kS) {
          Vec<R> n[kT][kS], p[kT][kS];
#pragma GCC unroll 8
          for (int i = 0; i < G; ++i) {
            const int64_t at = first + i * W;
            const Vec<R> w = load<R>(weight + at);
#pragma GCC unroll 4
            for (int j = 0; j < kS; ++j) {
              if constexpr (Fetch) {
                if (t == 0) __builtin_prefetch(ek[s + j] + SS * whole + at);
              }
              const Vec<R> k = load_as<R>(ek[s + j] + at);
#pragma GCC unroll 2
              for (int u = 0; u < kT; ++u) {
                const Vec<R> d = fma<R>(load<R>(eq + (t + u) * whole + at), k, w);
                if (i > 0) n[u][j] = i == 1 ? p[u][j] + d : fma<R>(n[u][j], d, p[u][j]);
                p[u][j] = i == 0 ? d : p[u][j] * d;
              }
            }
          }
#pragma GCC unroll 2
          for (int u = 0; u < kT; ++u)
#pragma GCC unroll 4
            for (int j = 0; j < kS; ++j) {
              Vec<R>& of_pair = sum[(t + u) * SS + s + j];
              of_pair = add_ratio<R>(of_pair, n[u][j], p[u][j]);
            }
        }
    });
    a = c.channels.merged;
  }
  for (; a < whole; a += W)
#pragma GCC unroll 4
    for (int t = 0; t < TT; ++t)
#pragma GCC unroll 4
      for (int s = 0; s < SS; ++s) {
        const Vec<R> d = fma<R>(load<R>(eq + t * whole + a), load_as<R>(ek[s] + a), splat<R>(1));
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

// Rows of queries, exponentiated.
template <class R>
struct Queries {
  const R* const* rows;  // as given
  R* e;                  // [n, whole]
  R* merged;             // [n, whole], e / v
  Size<R>* size;
};

// Rows of keys, exponentiated: here, or once and for all in a memory, whose halves a single query reads as they are.
template <class R, class Element>
struct Keys {
  static constexpr bool kForOne = !std::is_same_v<R, Element>;
  Rows<R> rows;  // as given
  R* buffer;     // for one of them, converted
  const Element* const* e;
  const Size<R>* size;
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
template <class R, int TT, int SS, bool Fetch, class Element>
ONEPASS_INLINE void score_pairs(const ScoreContext<R>& c, const Queries<R>& q, int64_t t, const Keys<R, Element>& k, int64_t s, R* out,
                                int64_t stride) {
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
    score_tile<R, true, TT, SS, Fetch>(c, q.merged + t * whole, k.e + s, out, stride);
  } else if (TT * SS > 1 && way == Way::single && way_of<R>(c.weighting, q_least + k_least, q_least + k_least) == Way::single) {
    score_tile<R, false, TT, SS, false>(c, q.e + t * whole, k.e + s, out, stride);
  } else if constexpr (TT * SS > 1) {
    for (int i = 0; i < TT; ++i)
      for (int j = 0; j < SS; ++j) score_pairs<R, 1, 1, false>(c, q, t + i, k, s + j, out + i * stride + j, stride);
  } else if (way == Way::single) {
    score_tile<R, false, 1, 1, false>(c, q.e + t * whole, k.e + s, out, stride);
  } else {
    *out = direct_score<R>(q.rows[t], k.rows.row(s, k.buffer), c.weighting.v, c.channels.count);
  }
}

// Calls f(first, n, keys) for all visible keys of one (b, h) in chunks of a multiple of four, which stay in the second-level cache while
// many queries use them. They are exponentiated here, or once and for all in a memory.
template <class R, class F>
void for_keys(Scratch& scratch, const Tensor& given, const Prepared& memory, const Channels<R>& channels, int64_t b, int64_t h,
              const Visible& visible, int64_t queries, const F& f) {
  const int64_t all = visible.count, whole = channels.whole;
  const auto rows_of = [&](const Tensor& x, int64_t width) { return Rows<R>(scratch, x, b, h, visible.first, all, width, visible.index); };
  const bool prepared = memory.exponentials.data != nullptr;
  const Rows<R> rows = rows_of(given, channels.count), exponentials = prepared ? rows_of(memory.exponentials, whole) : rows;
  R* buffer = scratch.take<R>(channels.count);
  auto* size = scratch.take<Size<R>>(all);
  for (int64_t i = 0; i < all && prepared; ++i) size[i] = *reinterpret_cast<const Size<R>*>(memory.sizes.at(b, h, visible.position(i)));
  const auto chunks = [&](int64_t elements, const auto& take) {
    const int64_t fitting = elements / whole / 4 * 4, most = fitting < 4 ? 4 : fitting, chunk = most < all ? most : all;
    for (int64_t first = 0; first < all; first += chunk) {
      const int64_t n = all - first < chunk ? all - first : chunk;
      f(first, n, take(first, n, chunk));
    }
  };
  const auto in_place = [&](auto element) {
    using Element = decltype(element);
    chunks(kChunk, [&](int64_t first, int64_t, int64_t) {
      return Keys<R, Element>{rows.from(first), buffer, reinterpret_cast<const Element* const*>(exponentials.at) + first, size + first};
    });
  };
  if (prepared && exponentials.native()) return in_place(R{});
  if constexpr (sizeof(R) == 4)
    if (prepared && exponentials.dtype == Dtype::bf16 && queries == 1) return in_place(Bf16{});

  R* copy = nullptr;
  const R** e = nullptr;
  chunks(prepared && queries <= kFewRows ? kConverted : kChunk, [&](int64_t first, int64_t n, int64_t chunk) {
    copy = copy != nullptr ? copy : scratch.take<R>(chunk * whole);
    e = e != nullptr ? e : scratch.take<const R*>(chunk);
    for (int64_t i = 0; i < n; ++i) {
      e[i] = copy + i * whole;
      if (prepared) {
        exponentials.row(first + i, copy + i * whole);
      } else {
        const R* next = rows.native() && first + i + 1 < all ? static_cast<const R*>(rows.at[first + i + 1]) : buffer;
        size[first + i] = exponentiate<R>(rows.row(first + i, buffer), next, channels, copy + i * whole);
      }
    }
    return Keys<R, R>{rows.from(first), buffer, e, size + first};
  });
}

// The scores of few channels, key by key in the lanes.
template <class R>
void scores_of_few(Scratch& scratch, const AdditiveForward& args, int64_t b, int64_t h, int64_t t0, int64_t queries,
                   const Visible& visible, R* scores, int64_t stride) {
  constexpr int W = kWidth<R>;
  const int64_t A = args.shape.A, n = visible.count, whole = padded<R>(n);
  const R* const* q = row_pointers<R>(scratch, args.query, b, h, t0, queries, A);
  const R* const* k = row_pointers<R>(scratch, args.keys, b, h, visible.first, n, A, visible.index);
  R *channels = scratch.take<R>(A * whole), *v = scratch.take<R>(A);
  read_row<R>(v, args.v.at(0, h, 0), args.v.dtype, A);
  for (int64_t a = 0; a < A; ++a)
    for (int64_t i = 0; i < whole; ++i) channels[a * whole + i] = i < n ? k[i][a] : R(0);
  for (int64_t t = 0; t < queries; ++t)
    for (int64_t i = 0; i < n; i += W) {
      Vec<R> sum = {}, tangent, slope;
      for (int64_t a = 0; a < A; ++a) {
        tanh_and_slope<R>(splat<R>(q[t][a]) + load<R>(channels + a * whole + i), tangent, slope);
        sum = fma<R>(splat<R>(v[a]), tangent, sum);
      }
      if (i + W <= n) store<R>(scores + t * stride + i, sum);
      else store_first<R>(scores + t * stride + i, sum, n - i);
    }
}

// scores[t * stride + i] for the queries t0 .. t0 + queries and the visible positions.
template <class R>
void additive_scores(Scratch& scratch, const AdditiveForward& args, int64_t b, int64_t h, int64_t t0, int64_t queries,
                     const Visible& visible, R* scores, int64_t stride) {
  if (args.shape.A <= kFew) return scores_of_few<R>(scratch, args, b, h, t0, queries, visible, scores, stride);
  const Channels<R> channels(args.shape.A);
  const int64_t A = args.shape.A, whole = channels.whole;
  const bool prepared = args.memory.exponentials.data != nullptr;
  R* weighting = prepared ? reinterpret_cast<R*>(args.memory.weighting.at(0, h, 0)) : scratch.take<R>(weighting_numbers(whole));
  if (!prepared) make_weighting<R>(args.v.at(0, h, 0), args.v.dtype, channels, whole, weighting);
  const ScoreContext<R> c{channels, Weighting<R>(weighting, prepared ? args.memory.stride : whole)};
  const Queries<R> q{row_pointers<R>(scratch, args.query, b, h, t0, queries, A), scratch.take<R>(queries * whole),
                     scratch.take<R>(queries * whole), scratch.take<Size<R>>(queries)};
  for (int64_t t = 0; t < queries; ++t)
    q.size[t] = exponentiate<R, true>(q.rows[t], q.rows[t + 1 < queries ? t + 1 : t], channels, q.e + t * whole, c.weighting.merged,
                                      q.merged + t * whole);

  constexpr int TT = kRegisters == 32 ? 4 : 2, SS = kRegisters == 32 ? 4 : 2;
  const bool far = prepared && args.shape.B * args.memory.exponentials.batch * size_of(args.memory.exponentials.dtype) > kNear;
  for_keys<R>(scratch, args.keys, args.memory, channels, b, h, visible, queries, [&](int64_t first, int64_t n, const auto& k) {
    R* out = scores + first;
    const auto row_of_tiles = [&](auto tile, int64_t t) {
      constexpr int M = decltype(tile)::value;
      const auto tiles = [&](auto fetch) {
        constexpr bool kFetch = decltype(fetch)::value;
        int64_t i = 0;
        for (; i + SS <= n; i += SS) score_pairs<R, M, SS, kFetch>(c, q, t, k, i, out + t * stride + i, stride);
        for (; i < n; ++i) score_pairs<R, M, 1, kFetch>(c, q, t, k, i, out + t * stride + i, stride);
      };
      if (t == 0 && (queries == 1 || far)) tiles(std::true_type{});
      else tiles(std::false_type{});
    };
    int64_t t = 0;
    if constexpr (!std::decay_t<decltype(k)>::kForOne) {
      for (; t + TT <= queries; t += TT) row_of_tiles(std::integral_constant<int, TT>{}, t);
      if (TT > 2 && t + 2 <= queries) row_of_tiles(std::integral_constant<int, 2>{}, t), t += 2;
    }
    if (t < queries) row_of_tiles(std::integral_constant<int, 1>{}, t);
  });
}

// e^(2k) and the size of every visible key into a memory, and the weighting. All else is zeros, as a memory may leave the process: as the
// result of an exported program.
template <class R>
void additive_prepare(const AdditivePrepare& args, const Executor& executor) {
  const Shape& shape = args.shape;
  const Channels<R> channels(shape.A);
  const Tensor& exponentials = args.memory.exponentials;
  constexpr int64_t kRows = 64;
  const int64_t blocks = shape.S / kRows + 1, heads = shape.B * shape.H, stride = args.memory.stride;
  parallel(executor, heads * blocks + shape.H, [&](int64_t item) {
    Scratch& scratch = Scratch::mine();
    if (item >= heads * blocks) {
      const int64_t h = item - heads * blocks;
      auto* weighting = reinterpret_cast<R*>(args.memory.weighting.at(0, h, 0));
      __builtin_memset(weighting, 0, static_cast<size_t>(3 * stride + 8) * sizeof(R));
      return make_weighting<R>(args.v.at(0, h, 0), args.v.dtype, channels, stride, weighting);
    }
    const int64_t b = item / blocks / shape.H, h = item / blocks % shape.H, first = item % blocks * kRows;
    const Visible visible = visible_to(scratch, args.visibility, shape.S, b, h, 0, 1);
    if (first == 0) {
      clear_unseen<R>(exponentials, b, h, shape.S, visible, 0, stride);
      clear_unseen<R>(args.memory.sizes, b, h, shape.S, visible, 0, 2);
    }
    const int64_t n = visible.count - first < kRows ? visible.count - first : kRows, beyond = stride - channels.whole;
    if (n <= 0) return;
    const int32_t* index = visible.index == nullptr ? nullptr : visible.index + first;
    const R* const* rows = row_pointers<R>(scratch, args.keys, b, h, visible.first + first, n, shape.A, index);
    auto* sizes = reinterpret_cast<Size<R>*>(args.memory.sizes.at(b, h, 0));
    const Output<R> out(scratch, exponentials, b, h, visible.first + first, n, channels.whole, index);
    for (int64_t i = 0; i < n; ++i) {
      const int64_t s = visible.position(first + i), size = size_of(exponentials.dtype);
      sizes[s] = exponentiate<R>(rows[i], rows[i + 1 < n ? i + 1 : i], channels, out.rows[i]);
      if (beyond > 0) __builtin_memset(exponentials.at(b, h, s) + channels.whole * size, 0, static_cast<size_t>(beyond * size));
    }
    out.flush();
  });
}

}  // namespace onepass::ONEPASS_ISA
