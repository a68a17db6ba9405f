// The two matrix products that attention is made of, over rows given by pointers: strided, converted and gathered rows alike.
// Every element of a result is one sum in one order, whichever tile it falls into.
#pragma once

#include "simd.h"

namespace onepass::ONEPASS_ISA {

constexpr int kTileRows = kRegisters == 32 ? 6 : 3;  // times four vectors of columns: sums of a tile, all in registers
constexpr int64_t kMostQueries = 256;                // that any caller takes at once
constexpr int64_t kMany = 16;                        // rows for which transposing the others pays
constexpr int64_t kPanel = 96;                       // positions that are summed by themselves, so that roundings of long sums stay few

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

// Rows of `left` by rows of `right`: out[i * stride + j] = left[i] . right[j], i < M, j < N, over n columns.
template <class R, int M, int N>
ONEPASS_INLINE void dot_tile(const R* const* left, const R* const* right, int64_t n, R* out, int64_t stride) {
  constexpr int W = kWidth<R>;
  Vec<R> sum[M * N] = {};
  int64_t c = 0;
  for (; c + W <= n; c += W) {
    Vec<R> r[N];
#pragma GCC unroll 8
    for (int j = 0; j < N; ++j) r[j] = load<R>(right[j] + c);
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
        sum[i * N + j] = fma<R>(load_first<R>(left[i] + c, n - c), load_first<R>(right[j] + c, n - c), sum[i * N + j]);
  store_sums<R, M, N>(sum, out, stride, [](Vec<R> x) __attribute__((always_inline)) { return x; });
}

// Where results go: into a cache, past it, or onto what is there.
enum class Into { cache, memory, sum };

// out[i] = sum over j < n of weights[i * row + j * column] * rows[j], i < M, over N vectors of columns from `offset` on; the rows are
// packed, or behind pointers. Unless whole, the last vector has but `last` columns.
template <class R, int M, int N, bool Whole>
ONEPASS_INLINE void sum_tile(const R* weights, int64_t row, int64_t column, const R* packed, const R* const* rows, int64_t n,
                             int64_t offset, int64_t last, R* const* out, Into into) {
  constexpr int W = kWidth<R>;
  const auto in = [&](const R* p, int k) __attribute__((always_inline)) {
    return Whole || k < N - 1 ? load<R>(p + k * W) : load_first<R>(p + k * W, last);
  };
  Vec<R> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum[i][k] = Vec<R>{};
  const auto accumulate = [&](const R* w, const Vec<R>* x) __attribute__((always_inline)) {
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<R> wi = splat<R>(w[i * row]);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[i][k] = fma<R>(wi, x[k], sum[i][k]);
    }
  };
  for (int64_t j = 0; j < n; ++j) {
    Vec<R> x[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = packed != nullptr ? load<R>(packed + (j * N + k) * W) : in(rows[j] + offset, k);
    accumulate(weights + j * column, x);
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) {
      const Vec<R> total = into == Into::sum ? in(out[i] + offset, k) + sum[i][k] : sum[i][k];
      if (into == Into::memory && (Whole || k < N - 1)) store_past_cache<R>(out[i] + offset + k * W, total);
      else if (Whole || k < N - 1) store<R>(out[i] + offset + k * W, total);
      else store_first<R>(out[i] + offset + k * W, total, last);
    }
}

// N vectors of columns of a product: fill(panel, first, count) packs rows first .. first + count of them, N vectors each, or returns
// false where the rows are better read as they lie.
template <class R, int N, bool Whole, class Fill>
void sum_columns(const R* weights, int64_t row, int64_t column, const R* const* rows, const Fill& fill, int64_t n, int64_t offset,
                 int64_t last, R* const* out, int64_t m, Into into, const Positions& positions) {
  constexpr int W = kWidth<R>;
  alignas(64) R panel[kPanel * N * W];
  int64_t first = 0;
  do {
    const int64_t count = positions.panel(first, n);
    const R* packed = fill(panel, first, count) ? panel : nullptr;
    const auto tile = [&](auto tile_rows, int64_t i) {
      constexpr int M = decltype(tile_rows)::value;
      const R* w = weights + i * row + first * column;
      const Into here = first > 0 ? Into::sum : into == Into::memory && count < n ? Into::cache : into;
      if (packed != nullptr) sum_tile<R, M, N, Whole>(w, row, column, packed, nullptr, count, offset, last, out + i, here);
      else sum_tile<R, M, N, Whole>(w, row, column, nullptr, rows + first, count, offset, last, out + i, here);
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

// out[i, 0:width] = sum over j < n of weights[i * row + j * column] * rows[j, 0:width], i < m. With more than
// one tile of results the rows are packed: as they lie, often a power of two apart, few of them fit into the first-level cache at once.
template <class R>
void weighted_sums(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t width, R* const* out,
                   int64_t m, Into into = Into::cache, const Positions& positions = {}) {
  by_columns<R>(width, [&](auto vectors, auto whole, int64_t offset, int64_t last) {
    constexpr int N = decltype(vectors)::value, W = kWidth<R>;
    const auto fill = [&](R* panel, int64_t first, int64_t count) {
      if (m <= kTileRows) return false;
      for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
          const R* from = rows[first + j] + offset + k * W;
          __builtin_prefetch(from + N * W);  // the next columns: rows lie apart, which the machine's own prefetching does not follow
          store<R>(panel + (j * N + k) * W, whole || k < N - 1 ? load<R>(from) : load_first<R>(from, last));
        }
      return true;
    };
    sum_columns<R, N, decltype(whole)::value>(weights, row, column, rows, fill, n, offset, last, out, m, into, positions);
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

// The same products with the rows of `right` transposed into panels, which pays where many rows of `left` use them. Rows of `left` lie
// one stride apart.
template <class R>
void packed_dot_products(const R* const* left, int64_t m, const R* const* right, int64_t p, int64_t n, R* out, int64_t stride) {
  R* rows[kMostQueries];
  for (int64_t i = 0; i < m; ++i) rows[i] = out + i * stride;
  by_columns<R>(p, [&](auto vectors, auto whole, int64_t offset, int64_t last) {
    constexpr int N = decltype(vectors)::value, W = kWidth<R>;
    const auto fill = [&](R* panel, int64_t first, int64_t count) {
      for (int k = 0; k < N; ++k) {
        const int64_t lanes = whole || k < N - 1 ? W : last;
        for (int64_t c = 0; c < count; c += W) {
          const int64_t columns = count - c < W ? count - c : W;
          Vec<R> x[W];
#pragma GCC unroll 16
          for (int l = 0; l < W; ++l) {
            if (l >= lanes) x[l] = Vec<R>{};
            else if (columns == W) x[l] = load<R>(right[offset + k * W + l] + first + c);
            else x[l] = load_first<R>(right[offset + k * W + l] + first + c, columns);
          }
          transpose<R>(x);
          for (int64_t l = 0; l < columns; ++l) store<R>(panel + ((c + l) * N + k) * W, x[l]);
        }
      }
      return true;
    };
    sum_columns<R, N, decltype(whole)::value>(left[0], m > 1 ? left[1] - left[0] : 0, 1, nullptr, fill, n, offset, last, rows, m, Into::cache, {});
  });
}

// out[i, j] = left[i] . right[j] for i < m, j < p. `many`: whether a call has so many rows of `left` in all that transposing `right` pays;
// the two ways round differently, so that this must not depend on how the rows are shared out. Here rows of `right` come in blocks that
// stay in the first-level cache.
template <class R>
void dot_products(const R* const* left, int64_t m, const R* const* right, int64_t p, int64_t n, R* out, int64_t stride, bool many) {
  if (many) return packed_dot_products<R>(left, m, right, p, n, out, stride);
  constexpr int kTile = kRegisters == 32 ? 4 : 2;
  constexpr int64_t kBlockBytes = 24 * 1024;
  int64_t block = kBlockBytes / (n * static_cast<int64_t>(sizeof(R)) + 1) / 4 * 4;
  block = block < 4 ? 4 : block;
  for (int64_t first = 0; first < p; first += block) {
    const int64_t end = first + block < p ? first + block : p;
    for (int64_t i = 0; i < m;) {
      const auto row_of_tiles = [&](auto rows) {
        constexpr int M = decltype(rows)::value;
        int64_t j = first;
        for (; j + 4 <= end; j += 4) dot_tile<R, M, 4>(left + i, right + j, n, out + i * stride + j, stride);
        for (; j < end; ++j) dot_tile<R, M, 1>(left + i, right + j, n, out + i * stride + j, stride);
        i += M;
      };
      if (m - i >= kTile) row_of_tiles(std::integral_constant<int, kTile>{});
      else if (m - i >= 2) row_of_tiles(std::integral_constant<int, 2>{});
      else row_of_tiles(std::integral_constant<int, 1>{});
    }
  }
}

}  // namespace onepass::ONEPASS_ISA
