// The two matrix products that attention is made of, over rows given by pointers: strided, gathered and half-precision rows alike, these
// converted in parts that stay in the first-level cache.
// Every element of a result is one sum in one order, whichever tile it falls into.
#pragma once

#include "rows.h"

namespace onepass::ONEPASS_ISA {

constexpr int kTileRows = kRegisters == 32 ? 6 : 3;  // times four vectors of columns: sums of a tile, all in registers
constexpr int64_t kMostQueries = 256;                // that any caller takes at once
constexpr int64_t kMany = 16;                        // rows for which transposing the others pays
constexpr int64_t kPanel = 96;                       // positions that are summed by themselves, so that roundings of long sums stay few
constexpr int kLine = 64;                            // bytes of a cache line

// Whether tiles fetch what comes later: of vectors that are shorter than a line that would take too many instructions.
template <class R>
constexpr bool kFetches = sizeof(Vec<R>) == kLine;

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

// The sums over the lanes of M * N vectors, each passed through f, as an M by N block of `out`.
template <class R, int M, int N, class F>
ONEPASS_INLINE void store_sums(Vec<R>* sum, R* out, int64_t stride, const F& f) {
  constexpr int W = kWidth<R>, kCount = M * N < W ? M * N : W;
  R block[M * N < W ? W : M * N];
#pragma GCC unroll 16
  for (int k = 0; k < M * N; k += kCount) store<R>(block + k, f(sum_lanes<R, kCount>(sum + k)));
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
  if (c < n)
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j)
        sum[i * N + j] = fma<R>(load_first<R>(left[i] + c, n - c), load_as<R>(right[j] + c, n - c), sum[i * N + j]);
  store_sums<R, M, N>(sum, out, stride, [](Vec<R> x) __attribute__((always_inline)) { return x; });
}

// Where results go: into a cache, past it, or onto what is there.
enum class Into { cache, memory, sum };

// Rows of which N vectors from some column on are read, a part of them at a time: where they lie, the last vector `last` columns wide; or
// from a panel of N vectors each, which fill(panel, first row, rows) packs. Every kind of fill has this one type. As rows lie apart, the
// machine's own prefetching does not follow: a tile that is at position j fetches something that comes later, or else who packs does.
template <class R, int N, bool Whole>
struct Lying {
  static constexpr int64_t kAhead = 8;  // rows
  const R* const* rows;
  int64_t offset, last, ahead = 0;
  Lying part(R*, int64_t first, int64_t count) const {
    return {rows + first, offset, last, count > kAhead ? kAhead * distance(rows[first], rows[first + 1]) : 0};
  }
  ONEPASS_INLINE Vec<R> operator()(int64_t j, int k) const {
    return load_as<R>(rows[j] + offset + k * kWidth<R>, Whole || k < N - 1 ? kWidth<R> : last);
  }
  ONEPASS_INLINE void fetch(int64_t j) const {
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) prefetch(rows[j], (offset + k * kWidth<R>) * static_cast<int64_t>(sizeof(R)) + ahead);
  }
  void next_tile() {}
};

// What comes after a panel: rows `step` bytes apart, of each of which so many tiles fetch two lines.
struct Coming {
  const char* at;
  int64_t step, tiles;
};

inline Coming nothing(const void* panel) { return {static_cast<const char*>(panel), 0, 0}; }  // but what is there

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
template <class R, int M, int N, class Source>
ONEPASS_INLINE void sum_tile(const R* weights, int64_t row, int64_t column, Source rows, int64_t n, int64_t offset, int64_t last,
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
template <class R, int N, class Source>
void sum_columns(const R* weights, int64_t row, int64_t column, const Source& source, int64_t n, int64_t offset, int64_t last,
                 R* const* out, int64_t m, Into into, const Positions& positions) {
  alignas(64) R panel[kPanel * N * kWidth<R>];
  int64_t first = 0;
  do {
    const int64_t count = positions.panel(first, n);
    auto rows = source.part(panel, first, count);
    const Into here = first > 0 ? Into::sum : into == Into::memory && count < n ? Into::cache : into;
    const auto tile = [&](auto tile_rows, int64_t i) {
      sum_tile<R, decltype(tile_rows)::value, N>(weights + i * row + first * column, row, column, rows, count, offset, last, out + i, here);
      rows.next_tile();
    };
    int64_t i = 0;
    for (; i + kTileRows <= m; i += kTileRows) tile(std::integral_constant<int, kTileRows>{}, i);
    if (m - i >= 4) tile(std::integral_constant<int, 4>{}, i), i += 4;
    if (m - i >= 2) tile(std::integral_constant<int, 2>{}, i), i += 2;
    if (m - i >= 1) tile(std::integral_constant<int, 1>{}, i);
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

// to[c] += sum over j < J of weights[j * column] * rows[j][offset + c] in this order, or that sum alone.
template <class R, int J, class Element>
void add_rows(const R* weights, int64_t column, const Element* const* rows, int64_t offset, int64_t width, R* to, bool alone) {
  constexpr int W = kWidth<R>;
  Vec<R> weight[J];
#pragma GCC unroll 8
  for (int j = 0; j < J; ++j) weight[j] = splat<R>(weights[j * column]);
  const auto vector = [&](int64_t c, int64_t n) __attribute__((always_inline)) {
    Vec<R> sum = alone ? Vec<R>{} : load_as<R>(to + c, n);
#pragma GCC unroll 8
    for (int j = 0; j < J; ++j) sum = fma<R>(weight[j], load_as<R>(rows[j] + offset + c, n), sum);
    return sum;
  };
  int64_t c = 0;
  for (; c + W <= width; c += W) store<R>(to + c, vector(c, W));
  if (c < width) store_first<R>(to + c, vector(c, width - c), width - c);
}

// One row of a product. The other rows are read once, in long pieces, as the machine likes best to fetch them.
template <class R>
void weighted_sum(const R* weights, int64_t column, const Rows<R>& rows, int64_t n, R* out, Into into, const Positions& positions) {
  constexpr int64_t kPiece = 1024, kTogether = 8;
  if (n == 0 && into != Into::sum) __builtin_memset(out, 0, static_cast<size_t>(rows.width) * sizeof(R));
  with_element<R>(rows.dtype, [&](auto element) {
    const auto* const* at = reinterpret_cast<const decltype(element)* const*>(rows.at);
    alignas(64) R panel[kPiece];
    for (int64_t offset = 0; offset < rows.width; offset += kPiece) {
      const int64_t width = rows.width - offset < kPiece ? rows.width - offset : kPiece;
      for (int64_t first = 0, count; first < n; first += count) {
        count = positions.panel(first, n);
        const bool adds = first > 0 || into == Into::sum;
        R* to = adds ? panel : out + offset;
        const auto add = [&](auto together, int64_t j) {
          add_rows<R, decltype(together)::value>(weights + (first + j) * column, column, at + first + j, offset, width, to, j == 0);
        };
        int64_t j = 0;
        for (; j + kTogether <= count; j += kTogether) add(std::integral_constant<int, kTogether>{}, j);
        for (; j < count; ++j) add(std::integral_constant<int, 1>{}, j);
        for (int64_t c = 0; c < width && adds; ++c) out[offset + c] += panel[c];
      }
    }
  });
}

// out[i] = sum over j < n of weights[i * row + j * column] * rows[j], i < m. With more than one tile of results the rows are packed: as
// they lie, often a power of two apart, few of them fit into the first-level cache at once. So are halves, to convert them once.
template <class R>
void weighted_sums(const R* weights, int64_t row, int64_t column, const Rows<R>& rows, int64_t n, R* const* out, int64_t m,
                   Into into = Into::cache, const Positions& positions = {}) {
  if (m == 1) return weighted_sum<R>(weights, column, rows, n, out[0], into, positions);
  by_columns<R>(rows.width, [&](auto vectors, auto whole, int64_t offset, int64_t last) {
    constexpr int N = decltype(vectors)::value, W = kWidth<R>;
    const auto sum = [&](const auto& source) {
      sum_columns<R, N>(weights, row, column, source, n, offset, last, out, m, into, positions);
    };
    if (m <= kTileRows && rows.native()) {
      return sum(Lying<R, N, decltype(whole)::value>{reinterpret_cast<const R* const*>(rows.at), offset, last});
    }
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
    sum(Packing<R, N>(pack, rows, n, offset));
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

// out[i, j] = left[i] . right[j] for i < m, j < p. `many`: whether a call has so many rows of `left` in all that transposing `right` pays;
// the two ways round differently, so that this must not depend on how the rows are shared out. Here rows of `right` come in blocks that
// stay in the first-level cache.
template <class R>
void dot_products(const R* const* left, int64_t m, const Rows<R>& right, int64_t p, R* out, int64_t stride, bool many) {
  if (many) return packed_dot_products<R>(left, m, right, p, out, stride);
  constexpr int kTile = kRegisters == 32 ? 4 : 2;
  constexpr int64_t kBlockBytes = 24 * 1024;
  const int64_t n = right.width;
  int64_t block = kBlockBytes / (n * size_of(right.dtype) + 1) / 4 * 4;
  block = block < 4 ? 4 : block;
  with_element<R>(right.dtype, [&](auto element) {
    const auto* const* rows = reinterpret_cast<const decltype(element)* const*>(right.at);
    for (int64_t first = 0; first < p; first += block) {
      const int64_t end = first + block < p ? first + block : p;
      int64_t i = 0;
      while (i < m) {
        const auto row_of_tiles = [&](auto tile_rows, auto first_of_all) {
          constexpr int M = decltype(tile_rows)::value;
          const auto tile = [&](auto together, int64_t j) {
            constexpr int N = decltype(together)::value;
            const auto* next = rows[j + N < p ? j + N : j];
            dot_tile<R, M, N, decltype(first_of_all)::value>(left + i, rows + j, distance(rows[j], next), n, out + i * stride + j, stride);
          };
          int64_t j = first;
          for (; j + 4 <= end; j += 4) tile(std::integral_constant<int, 4>{}, j);
          for (; j < end; ++j) tile(std::integral_constant<int, 1>{}, j);
          i += M;
        };
        const auto tiles = [&](auto first_of_all) {
          if (m - i >= kTile) row_of_tiles(std::integral_constant<int, kTile>{}, first_of_all);
          else if (m - i >= 2) row_of_tiles(std::integral_constant<int, 2>{}, first_of_all);
          else row_of_tiles(std::integral_constant<int, 1>{}, first_of_all);
        };
        if (i == 0) tiles(std::true_type{});
        else tiles(std::false_type{});
      }
    }
  });
}

}  // namespace onepass::ONEPASS_ISA
