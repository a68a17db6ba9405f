// The two matrix products that attention is made of, over rows given by pointers: strided, gathered and half-precision rows alike, these
// converted in parts that stay in the first-level cache.
// Every element of a result is one sum in one order, whichever tile it falls into.
#pragma once

#include "rows.h"

namespace onepass::ONEPASS_ISA {

constexpr int kTileRows = kRegisters == 32 ? 6 : 3;  // times four vectors of columns: sums of a tile, all in registers
constexpr int64_t kFewRows = 16;                     // up to which the others are taken as they lie
constexpr int64_t kMostQueries = 256;                // that any caller takes at once
constexpr int64_t kPanel = 96;                       // positions that are summed by themselves, so that roundings of long sums stay few
constexpr int kLine = 64;                            // bytes of a cache line

// Whether tiles fetch what comes later: of vectors that are shorter than a line that would take too many instructions.
template <class R>
constexpr bool kFetches = sizeof(Vec<R>) == kLine;

// How many rows before their turn such rows are fetched, that are taken so many at once: the shorter, the sooner comes their turn.
inline int64_t rows_ahead(int64_t at_once, int64_t bytes) {
  constexpr int64_t kAhead = 2048;
  return at_once * bytes < kAhead ? kAhead / (bytes + 1) : at_once;
}

// At which positions the terms of a sum lie: where it is cut into panels must not depend on what other terms there are.
struct Positions {
  int64_t first = 0;
  const int32_t* index = nullptr;  // ascending; null: first, first + 1, ...

  // How many of n terms, from the i-th on, belong to its panel.
  int64_t panel(int64_t i, int64_t n) const {
    const int64_t position = index == nullptr ? first + i : i < n ? index[i] : 0, end = (position / kPanel + 1) * kPanel;
    if (index == nullptr) return n - i < end - position ? n - i : end - position;
    int64_t count = 0;
    while (i + count < n && index[i + count] < end) ++count;
    return count;
  }
};

// Calls f(rows of a tile, first row) for all m, in as few tiles as there can be, of sizes as even: the larger ones first.
template <int Most, class F>
ONEPASS_INLINE void by_tiles(int64_t m, const F& f) {
  if (m == 0) return;
  const int64_t tiles = (m + Most - 1) / Most, size = m / tiles, larger = m % tiles;
  int64_t i = 0;
  const auto run = [&](auto rows, int64_t end) __attribute__((always_inline)) {
    for (; i < end; i += rows) f(rows, i);
  };
  for (const int64_t rows : {size + 1, size}) {
    const int64_t end = rows == size ? m : larger * rows;
    switch (rows) {
      case 1: run(std::integral_constant<int, 1>{}, end); break;
      case 2: run(std::integral_constant<int, 2>{}, end); break;
      case 3: if constexpr (Most >= 3) run(std::integral_constant<int, 3>{}, end); break;
      case 4: if constexpr (Most >= 4) run(std::integral_constant<int, 4>{}, end); break;
      case 5: if constexpr (Most >= 5) run(std::integral_constant<int, 5>{}, end); break;
      case 6: if constexpr (Most >= 6) run(std::integral_constant<int, 6>{}, end); break;
    }
  }
}

// The sums over the lanes of N vectors, each passed through f, to a place with room for a vector more.
template <class R, int N, class F>
ONEPASS_INLINE void sums_to(Vec<R>* sum, R* out, const F& f) {
  constexpr int W = kWidth<R>, kCount = N >= W ? W : N >= 8 ? 8 : N >= 4 ? 4 : N >= 2 ? 2 : 1;
  store<R>(out, f(sum_lanes<R, kCount>(sum)));
  if constexpr (N > kCount) sums_to<R, N - kCount>(sum + kCount, out + kCount, f);
}

// The sums over the lanes of M * N vectors, each passed through f, as an M by N block of `out`.
template <class R, int M, int N, class F>
ONEPASS_INLINE void store_sums(Vec<R>* sum, R* out, int64_t stride, const F& f) {
  R block[M * N + kWidth<R>];
  sums_to<R, M * N>(sum, block, f);
  for (int i = 0; i < M; ++i) __builtin_memcpy(out + i * stride, block + i * N, N * sizeof(R));
}

// Rows of `left` by rows of `right`, in whatever type: out[i * stride + j] = left[i] . right[j], i < M, j < N, over n columns. Who reads
// these rows first fetches those that come next meanwhile, so many bytes ahead.
template <class R, int M, int N, bool First, class Element>
ONEPASS_INLINE void dot_tile(const R* const* left, const Element* const* right, int64_t ahead, int64_t n, R* out, int64_t stride) {
  constexpr int W = kWidth<R>;
  Vec<R> sum[M * N] = {};
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    Vec<R> r[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if constexpr (First && (M == 1 || kFetches<R>)) prefetch(right[j], c * static_cast<int64_t>(sizeof(Element)) + ahead);
      r[j] = load_as<R>(right[j] + c);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<R> l = load<R>(left[i] + c);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i * N + j] = fma<R>(l, r[j], sum[i * N + j]);
    }
  }
  if (c < n) {
    Vec<R> r[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) {
      if constexpr (First && (M == 1 || kFetches<R>)) prefetch(right[j], (n - 1) * static_cast<int64_t>(sizeof(Element)) + ahead);
      r[j] = load_as<R>(right[j] + c, n - c);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<R> l = load_first<R>(left[i] + c, n - c);
#pragma GCC unroll 8
      for (int j = 0; j < N; ++j) sum[i * N + j] = fma<R>(l, r[j], sum[i * N + j]);
    }
  }
  store_sums<R, M, N>(sum, out, stride, [](Vec<R> x) __attribute__((always_inline)) { return x; });
}

// Where results go: into a cache, past it, or onto what is there.
enum class Into { cache, memory, sum };

// What comes after a panel: rows `step` bytes apart, of each of which so many tiles fetch two lines.
struct Coming {
  const char* at;
  int64_t step, tiles;
};

inline Coming nothing(const void* panel) { return {static_cast<const char*>(panel), 0, 0}; }  // but what is there

// A panel of N vectors of each of some rows, which fill(panel, first row, rows) packs. Every kind of fill has this one type. As rows lie
// apart, the machine's own prefetching does not follow: a tile that is at position j fetches something that comes later.
template <class R, int N>
struct Packed {
  const R* panel;
  Coming coming;
  ONEPASS_INLINE Vec<R> operator()(int64_t j, int k) const { return load<R>(panel + (j * N + k) * kWidth<R>); }
  ONEPASS_INLINE void fetch(int64_t j) const {
    prefetch<2>(coming.at, j * coming.step);
    prefetch<2>(coming.at, j * coming.step + kLine);
  }
  void next_tile() {
    coming.at += 2 * kLine;
    if (--coming.tiles <= 0) coming = nothing(panel);
  }
};

template <class R, int N>
class Packing {
 public:
  template <class Fill>
  explicit Packing(const Fill& fill) : fill_(&fill), call_([](const void* fill, R* panel, int64_t first, int64_t count) {
    (*static_cast<const Fill*>(fill))(panel, first, count);
  }) {}
  // Of n rows, from column `offset` on.
  template <class Fill>
  Packing(const Fill& fill, const Rows<R>& rows, int64_t n, int64_t offset) : Packing(fill) {
    rows_ = &rows;
    n_ = n;
    offset_ = offset;
  }
  Packed<R, N> part(R* panel, int64_t first, int64_t count) const {
    call_(fill_, panel, first, count);
    return {panel, after(panel, first + count)};
  }

 private:
  Coming after(const R* panel, int64_t row) const {
    constexpr int64_t kVectors = N * kWidth<R>;
    const int64_t column = row < n_ ? offset_ : offset_ + kVectors, from = row < n_ ? row : 0;
    if (rows_ == nullptr || column >= rows_->width) return nothing(panel);
    const auto* const at = reinterpret_cast<const char* const*>(rows_->at) + from;
    const int size = size_of(rows_->dtype);
    return {at[0] + column * size, n_ - from > 1 ? distance(at[0], at[1]) : 0, (kVectors * size + 2 * kLine - 1) / (2 * kLine)};
  }

  const void* fill_;
  void (*call_)(const void* fill, R* panel, int64_t first, int64_t count);
  const Rows<R>* rows_ = nullptr;
  int64_t n_ = 0, offset_ = 0;
};

// out[i] = sum over j < n of weights[i * row + j * column] * rows[j], i < M, over N vectors of columns from `offset` on, of which the last
// has `last` columns.
template <class R, int M, int N>
ONEPASS_INLINE void sum_tile(const R* weights, int64_t row, int64_t column, Packed<R, N> rows, int64_t n, int64_t offset, int64_t last,
                             R* const* out, Into into) {
  constexpr int W = kWidth<R>;
  Vec<R> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum[i][k] = Vec<R>{};
  for (int64_t j = 0; j < n; ++j) {
    if constexpr (M > 1 && kFetches<R>) rows.fetch(j);
    Vec<R> x[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = rows(j, k);
    const R* w = weights + j * column;
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<R> weight = splat<R>(w[i * row]);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[i][k] = fma<R>(weight, x[k], sum[i][k]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      R* to = out[i] + offset + k * W;
      if (k == N - 1 && last < W) {
        store_first<R>(to, into == Into::sum ? load_first<R>(to, last) + sum[i][k] : sum[i][k], last);
        continue;
      }
      const Vec<R> total = into == Into::sum ? load<R>(to) + sum[i][k] : sum[i][k];
      if (into == Into::memory) store_past_cache<R>(to, total);
      else store<R>(to, total);
    }
}

// N vectors of columns of a product.
template <class R, int N>
void sum_columns(const R* weights, int64_t row, int64_t column, const Packing<R, N>& packing, int64_t n, int64_t offset, int64_t last,
                 R* const* out, int64_t m, Into into, const Positions& positions) {
  alignas(64) R panel[kPanel * N * kWidth<R>];
  int64_t first = 0;
  do {
    const int64_t count = positions.panel(first, n);
    Packed<R, N> rows = packing.part(panel, first, count);
    const Into here = first > 0 ? Into::sum : into == Into::memory && count < n ? Into::cache : into;
    by_tiles<kTileRows>(m, [&](auto tile, int64_t i) {
      sum_tile<R, decltype(tile)::value, N>(weights + i * row + first * column, row, column, rows, count, offset, last, out + i, here);
      rows.next_tile();
    });
    first += count;
  } while (first < n);
}

// All columns, four vectors at a time: f(vectors, whether the last one is whole, first column, columns of the last vector).
template <class R, class F>
void by_columns(int64_t width, const F& f) {
  constexpr int W = kWidth<R>;
  int64_t offset = 0;
  for (; offset + 4 * W <= width; offset += 4 * W) f(std::integral_constant<int, 4>{}, std::true_type{}, offset, int64_t{W});
  const int64_t rest = width - offset, last = rest % W == 0 ? W : rest % W;
  const auto edge = [&](auto vectors) {
    if (last == W) f(vectors, std::true_type{}, offset, last);
    else f(vectors, std::false_type{}, offset, last);
  };
  switch ((rest + W - 1) / W) {
    case 4: return edge(std::integral_constant<int, 4>{});
    case 3: return edge(std::integral_constant<int, 3>{});
    case 2: return edge(std::integral_constant<int, 2>{});
    case 1: return edge(std::integral_constant<int, 1>{});
  }
}

// to[i][c] += sum over j < J of weights[i * row + j * column] * rows[j][offset + c], i < M, in this order, or that sum alone. The rows
// that come next, as far apart as these, are fetched meanwhile, or not.
template <class R, int M, int J, bool Fetch, class Element>
void add_rows(const R* weights, int64_t row, int64_t column, const Element* const* rows, int64_t offset, int64_t width, R* const* to,
              bool alone) {
  constexpr int W = kWidth<R>;
  [[maybe_unused]] const int64_t ahead = Fetch ? rows_ahead(J, width * static_cast<int64_t>(sizeof(Element))) * distance(rows[0], rows[1]) : 0;
  Vec<R> weight[M][J];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) weight[i][j] = splat<R>(weights[i * row + j * column]);
  R* out[M];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i) out[i] = to[i];
  const Element* from[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) from[j] = rows[j] + offset;
  const auto vector = [&](int64_t c, int64_t n, const auto& put) __attribute__((always_inline)) {
    Vec<R> sum[M];
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) sum[i] = alone ? Vec<R>{} : load_as<R>(out[i] + c, n);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) {
      if constexpr (Fetch) prefetch(from[j], c * static_cast<int64_t>(sizeof(Element)) + ahead);
      const Vec<R> x = load_as<R>(from[j] + c, n);
#pragma GCC unroll 8
      for (int i = 0; i < M; ++i) sum[i] = fma<R>(weight[i][j], x, sum[i]);
    }
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) put(out[i] + c, sum[i]);
  };
  int64_t c = 0;
  for (; c + W <= width; c += W) vector(c, W, [](R* p, Vec<R> x) __attribute__((always_inline)) { store<R>(p, x); });
  if (c < width) vector(c, width - c, [&](R* p, Vec<R> x) __attribute__((always_inline)) { store_first<R>(p, x, width - c); });
}

// A product of few rows. The other rows are read once, in long pieces, as the machine likes best to fetch them.
template <class R>
void few_weighted_sums(const R* weights, int64_t row, int64_t column, const Rows<R>& rows, int64_t n, R* const* out, int64_t m, Into into,
                       const Positions& positions) {
  const bool fewest = m <= kTileRows / 2;  // registers keep the weights of eight rows, the first-level cache longer pieces
  const int64_t piece = fewest ? 1024 : 512, stride = piece + 64;  // not a power of two, as rows may be apart: they would meet in the cache
  if (n == 0 && into != Into::sum)
    for (int64_t i = 0; i < m; ++i) __builtin_memset(out[i], 0, static_cast<size_t>(rows.width) * sizeof(R));
  with_element<R>(rows.dtype, [&](auto element) {
    const auto* const* all = reinterpret_cast<const decltype(element)* const*>(rows.at);
    alignas(64) R panel[kFewRows * (512 + 64)];
    for (int64_t offset = 0; offset < rows.width; offset += piece) {
      const int64_t width = rows.width - offset < piece ? rows.width - offset : piece;
      for (int64_t first = 0, count; first < n; first += count) {
        count = positions.panel(first, n);
        const bool adds = first > 0 || into == Into::sum, in_place = m == 1 && !adds;
        R* to[kFewRows];
        for (int64_t i = 0; i < m; ++i) to[i] = in_place ? out[i] + offset : panel + i * stride;
        const auto add = [&](auto together, int64_t j) {
          const auto* const* at = all + first + j;
          constexpr int J = decltype(together)::value;
          by_tiles<J == 8 ? kTileRows / 2 : kTileRows>(m, [&](auto tile, int64_t i) {
            constexpr int M = decltype(tile)::value;
            constexpr bool kFetch = M >= 4 && J > 1 && kFetches<R>;  // with less to do meanwhile the machine itself is as fast
            const R* w = weights + i * row + (first + j) * column;
            if (kFetch && i == 0) add_rows<R, M, J, kFetch>(w, row, column, at, offset, width, to + i, j == 0);
            else add_rows<R, M, J, false>(w, row, column, at, offset, width, to + i, j == 0);
          });
        };
        int64_t j = 0;
        for (; fewest && j + 8 <= count; j += 8) add(std::integral_constant<int, 8>{}, j);
        for (; j + 4 <= count; j += 4) add(std::integral_constant<int, 4>{}, j);
        for (; j < count; ++j) add(std::integral_constant<int, 1>{}, j);
        for (int64_t i = 0; i < m && !in_place; ++i)
          for (int64_t c = 0; c < width; ++c) out[i][offset + c] = adds ? out[i][offset + c] + to[i][c] : to[i][c];
      }
    }
  });
}

// out[i] = sum over j < n of weights[i * row + j * column] * rows[j], i < m. For more results the rows are packed: as they lie, often a
// power of two apart, few of them fit into the first-level cache at once, and halves are converted for every tile.
template <class R>
void weighted_sums(const R* weights, int64_t row, int64_t column, const Rows<R>& rows, int64_t n, R* const* out, int64_t m,
                   Into into = Into::cache, const Positions& positions = {}) {
  if (m == 1 || (m <= kFewRows && into != Into::memory))
    return few_weighted_sums<R>(weights, row, column, rows, n, out, m, into, positions);
  by_columns<R>(rows.width, [&](auto vectors, auto whole, int64_t offset, int64_t last) {
    constexpr int N = decltype(vectors)::value, W = kWidth<R>;
    const auto pack = [&](R* panel, int64_t first, int64_t count) {
      with_element<R>(rows.dtype, [&](auto element) {
        const auto* const* at = reinterpret_cast<const decltype(element)* const*>(rows.at) + first;
        for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
          for (int k = 0; k < N; ++k) {
            const auto* from = at[j] + offset + k * W;
            if constexpr (!kFetches<R>) __builtin_prefetch(from + N * W);  // the next columns
            store<R>(panel + (j * N + k) * W, load_as<R>(from, whole || k < N - 1 ? W : last));
          }
      });
    };
    sum_columns<R, N>(weights, row, column, Packing<R, N>(pack, rows, n, offset), n, offset, last, out, m, into, positions);
  });
  if (into == Into::memory) finish_stores();
}

// W vectors as the rows of a square, transposed: log2(W) rounds in which blocks of H lanes change places.
template <class R, int H, int... I>
ONEPASS_INLINE void transpose_round(Vec<R>* x, std::integer_sequence<int, I...>) {
  constexpr int W = kWidth<R>;
#pragma GCC unroll 16
  for (int i = 0; i < W; ++i)
    if ((i & H) == 0) {
      const Vec<R> a = x[i], b = x[i + H];
      x[i] = pick<R, (I & H ? (I ^ H) + W : I)...>(a, b);
      x[i + H] = pick<R, (I & H ? I + W : I ^ H)...>(a, b);
    }
}

template <class R, int H = kWidth<R> / 2>
ONEPASS_INLINE void transpose(Vec<R>* x) {
  transpose_round<R, H>(x, std::make_integer_sequence<int, kWidth<R>>{});
  if constexpr (H > 1) transpose<R, H / 2>(x);
}

// A square of some rows, `lanes` of them and `columns` wide, transposed to vectors that lie `stride` apart.
template <class R, class Element>
void transpose_square(const Element* const* rows, int64_t offset, int64_t lanes, int64_t columns, R* to, int64_t stride) {
  constexpr int W = kWidth<R>;
  const auto square = [=](int64_t lanes, int64_t columns) __attribute__((always_inline)) {
    Vec<R> x[W];
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l) x[l] = l < lanes ? load_as<R>(rows[l] + offset, columns) : Vec<R>{};
    transpose<R>(x);
#pragma GCC unroll 16
    for (int l = 0; l < W; ++l)
      if (l < columns) store<R>(to + l * stride, x[l]);
  };
  if (lanes == W && columns == W) square(W, W);
  else square(lanes, columns);
}

// The same products with the rows of `right` transposed into panels, which pays where many rows of `left` use them. Rows of `left` lie
// one stride apart.
template <class R>
void packed_dot_products(const R* const* left, int64_t m, const Rows<R>& right, int64_t p, R* out, int64_t stride) {
  R* rows[kMostQueries];
  for (int64_t i = 0; i < m; ++i) rows[i] = out + i * stride;
  by_columns<R>(p, [&](auto vectors, auto, int64_t offset, int64_t last) {
    constexpr int N = decltype(vectors)::value, W = kWidth<R>;
    const auto pack = [&](R* panel, int64_t first, int64_t count) {
      with_element<R>(right.dtype, [&](auto element) {
        const auto* const* at = reinterpret_cast<const decltype(element)* const*>(right.at) + offset;
        for (int k = 0; k < N; ++k)
          for (int64_t c = 0; c < count; c += W)
            transpose_square<R>(at + k * W, first + c, k < N - 1 ? W : last, count - c < W ? count - c : W, panel + (c * N + k) * W, N * W);
      });
    };
    const int64_t next = m > 1 ? left[1] - left[0] : 0;
    sum_columns<R, N>(left[0], next, 1, Packing<R, N>(pack), right.width, offset, last, rows, m, Into::cache, {});
  });
}

// out[i, j] = left[i] . right[j] for i < m, j < p. With many rows of `left` in all it pays to transpose `right`, the sooner the shorter
// rows are, as a sum over lanes then weighs more; the two ways round differently, so that this must not depend on how the rows are shared
// out. Here rows of `right` come in blocks that stay in the first-level cache.
template <class R>
void dot_products(const R* const* left, int64_t m, int64_t in_all, const Rows<R>& right, int64_t p, R* out, int64_t stride) {
  const int64_t many = kRegisters == 32 && right.width >= 128 ? 24 : 16;
  if (in_all >= many) return packed_dot_products<R>(left, m, right, p, out, stride);
  constexpr int kTile = kRegisters == 32 ? 6 : 2;
  constexpr int64_t kBlockBytes = 24 * 1024;
  const int64_t n = right.width;
  int64_t block = kBlockBytes / (n * size_of(right.dtype) + 1) / 4 * 4;
  block = block < 4 ? 4 : block;
  const int64_t coming = rows_ahead(4, n * size_of(right.dtype));
  with_element<R>(right.dtype, [&](auto element) {
    const auto* const* rows = reinterpret_cast<const decltype(element)* const*>(right.at);
    for (int64_t first = 0; first < p; first += block) {
      const int64_t end = first + block < p ? first + block : p;
      by_tiles<kTile>(m, [&](auto tile_rows, int64_t i) {
        constexpr int M = decltype(tile_rows)::value;
        const auto tiles = [&](auto first_of_all) {
          const auto tile = [&](auto together, int64_t j) {
            constexpr int N = decltype(together)::value;
            const auto* next = rows[j + coming < p ? j + coming : j];
            dot_tile<R, M, N, decltype(first_of_all)::value>(left + i, rows + j, distance(rows[j], next), n, out + i * stride + j, stride);
          };
          int64_t j = first;
          for (; j + 4 <= end; j += 4) tile(std::integral_constant<int, 4>{}, j);
          for (; j < end; ++j) tile(std::integral_constant<int, 1>{}, j);
        };
        if (i == 0) tiles(std::true_type{});
        else tiles(std::false_type{});
      });
    }
  });
}

}  // namespace onepass::ONEPASS_ISA
