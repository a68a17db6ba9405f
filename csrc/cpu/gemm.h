// The two matrix products that attention is made of, over rows given by pointers: strided, converted and gathered rows alike.
// Every element of a result is one sum in one order, whichever tile it falls into.
#pragma once

#include "simd.h"

namespace onepass::ONEPASS_ISA {

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

// out[i, j] = left[i] . right[j] for i < m, j < p. Rows of `right` in blocks that stay in the first-level cache.
template <class R>
void dot_products(const R* const* left, int64_t m, const R* const* right, int64_t p, int64_t n, R* out, int64_t stride) {
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

// out[i] = sum over j < n of weights[i * row + j * column] * rows[j], i < M, over N vectors of columns from `offset` on; the rows are
// packed, or behind pointers. Unless whole, the last vector has but `last` columns. Added to `out` if asked.
template <class R, int M, int N, bool Whole>
ONEPASS_INLINE void sum_tile(const R* weights, int64_t row, int64_t column, const R* packed, const R* const* rows, int64_t n,
                             int64_t offset, int64_t last, R* const* out, bool add) {
  constexpr int W = kWidth<R>;
  const auto in = [&](const R* p, int k) __attribute__((always_inline)) {
    return Whole || k < N - 1 ? load<R>(p + k * W) : load_first<R>(p + k * W, last);
  };
  Vec<R> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum[i][k] = add ? in(out[i] + offset, k) : Vec<R>{};
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
      if (Whole || k < N - 1) store<R>(out[i] + offset + k * W, sum[i][k]);
      else store_first<R>(out[i] + offset + k * W, sum[i][k], last);
    }
}

// N vectors of columns of weighted_sums. With more than one tile of results, rows are first packed: as they lie, a power of two apart,
// few of them fit into the first-level cache at once.
template <class R, int N, bool Whole>
void sum_columns(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t offset, int64_t last,
                 R* const* out, int64_t m, bool add) {
  constexpr int W = kWidth<R>, kRows = kRegisters == 32 ? 6 : 3, kPanel = 96;
  alignas(64) R panel[kPanel * N * W];
  for (int64_t first = 0; first == 0 || first < n; first += kPanel) {
    const int64_t count = n - first < kPanel ? n - first : kPanel;
    const R* packed = nullptr;
    if (m > kRows) {
      for (int64_t j = 0; j < count; ++j)
#pragma GCC unroll 4
        for (int k = 0; k < N; ++k) {
          const R* from = rows[first + j] + offset + k * W;
          store<R>(panel + (j * N + k) * W, Whole || k < N - 1 ? load<R>(from) : load_first<R>(from, last));
        }
      packed = panel;
    }
    const auto tile = [&](auto tile_rows, int64_t i) {
      constexpr int M = decltype(tile_rows)::value;
      const R* w = weights + i * row + first * column;
      if (packed != nullptr) sum_tile<R, M, N, Whole>(w, row, column, packed, nullptr, count, offset, last, out + i, add || first > 0);
      else sum_tile<R, M, N, Whole>(w, row, column, nullptr, rows + first, count, offset, last, out + i, add || first > 0);
    };
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows) tile(std::integral_constant<int, kRows>{}, i);
    if (m - i >= 4) tile(std::integral_constant<int, 4>{}, i), i += 4;
    if (m - i >= 2) tile(std::integral_constant<int, 2>{}, i), i += 2;
    if (m - i >= 1) tile(std::integral_constant<int, 1>{}, i);
  }
}

// out[i, 0:width] = sum over j < n of weights[i * row + j * column] * rows[j, 0:width], i < m; added to `out` if asked.
template <class R>
void weighted_sums(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t width, R* const* out,
                   int64_t m, bool add = false) {
  constexpr int W = kWidth<R>;
  int64_t offset = 0;
  for (; offset + 4 * W <= width; offset += 4 * W) sum_columns<R, 4, true>(weights, row, column, rows, n, offset, W, out, m, add);
  for (; offset + W <= width; offset += W) sum_columns<R, 1, true>(weights, row, column, rows, n, offset, W, out, m, add);
  if (offset < width) sum_columns<R, 1, false>(weights, row, column, rows, n, offset, width - offset, out, m, add);
}

}  // namespace onepass::ONEPASS_ISA
