// The two matrix products that attention is made of, over rows given by pointers: strided, converted and gathered rows alike.
// Every element of a result is one sum in one order, whichever tile it falls into.
#pragma once

#include "simd.h"

namespace onepass::ONEPASS_ISA {

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
  if constexpr (M * N <= W) {
    const Vec<R> sums = sum_lanes<R, M * N>(sum);
    for (int i = 0; i < M; ++i)
      for (int j = 0; j < N; ++j) out[i * stride + j] = sums[i * N + j];
  } else {
    for (int k = 0; k < M * N; k += W) {
      Vec<R> part[W];
      for (int l = 0; l < W; ++l) part[l] = sum[k + l];
      const Vec<R> sums = sum_lanes<R, W>(part);
      for (int l = 0; l < W; ++l) out[(k + l) / N * stride + (k + l) % N] = sums[l];
    }
  }
}

// out[i, j] = left[i] . right[j] for i < m, j < p.
template <class R>
void dot_products(const R* const* left, int64_t m, const R* const* right, int64_t p, int64_t n, R* out, int64_t stride) {
  constexpr int kTile = kRegisters == 32 ? 4 : 2;
  for (int64_t i = 0; i < m;) {
    const auto column = [&](auto rows) {
      constexpr int M = decltype(rows)::value;
      int64_t j = 0;
      for (; j + 4 <= p; j += 4) dot_tile<R, M, 4>(left + i, right + j, n, out + i * stride + j, stride);
      for (; j < p; ++j) dot_tile<R, M, 1>(left + i, right + j, n, out + i * stride + j, stride);
      i += M;
    };
    if (m - i >= kTile) column(std::integral_constant<int, kTile>{});
    else if (m - i >= 2) column(std::integral_constant<int, 2>{});
    else column(std::integral_constant<int, 1>{});
  }
}

// out[i] = sum over j of weights[i * row + j * column] * rows[j], i < M, over N vectors of columns; added to `out` if asked.
template <class R, int M, int N>
ONEPASS_INLINE void sum_tile(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t offset,
                             R* const* out, bool add) {
  constexpr int W = kWidth<R>;
  Vec<R> sum[M][N];
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) sum[i][k] = add ? load<R>(out[i] + offset + k * W) : Vec<R>{};
  for (int64_t j = 0; j < n; ++j) {
    const R* source = rows[j] + offset;
    Vec<R> x[N];
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) x[k] = load<R>(source + k * W);
#pragma GCC unroll 8
    for (int i = 0; i < M; ++i) {
      const Vec<R> w = splat<R>(weights[i * row + j * column]);
#pragma GCC unroll 4
      for (int k = 0; k < N; ++k) sum[i][k] = fma<R>(w, x[k], sum[i][k]);
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < M; ++i)
#pragma GCC unroll 4
    for (int k = 0; k < N; ++k) store<R>(out[i] + offset + k * W, sum[i][k]);
}

// The same for the last columns, fewer than a vector.
template <class R>
void sum_edge(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t offset, int64_t width,
              R* const* out, int64_t m, bool add) {
  for (int64_t i = 0; i < m; ++i) {
    Vec<R> sum = add ? load_first<R>(out[i] + offset, width) : Vec<R>{};
    for (int64_t j = 0; j < n; ++j)
      sum = fma<R>(splat<R>(weights[i * row + j * column]), load_first<R>(rows[j] + offset, width), sum);
    store_first<R>(out[i] + offset, sum, width);
  }
}

// out[i, 0:width] = sum over j < n of weights[i * row + j * column] * rows[j, 0:width], i < m; added to `out` if asked.
template <class R>
void weighted_sums(const R* weights, int64_t row, int64_t column, const R* const* rows, int64_t n, int64_t width, R* const* out,
                   int64_t m, bool add = false) {
  constexpr int W = kWidth<R>, kRows = kRegisters == 32 ? 6 : 3, kVectors = 4;
  int64_t offset = 0;
  const auto block = [&](auto vectors) {
    constexpr int N = decltype(vectors)::value;
    const auto tile = [&](auto rows_of_tile, int64_t i) {
      sum_tile<R, decltype(rows_of_tile)::value, N>(weights + i * row, row, column, rows, n, offset, out + i, add);
    };
    int64_t i = 0;
    for (; i + kRows <= m; i += kRows) tile(std::integral_constant<int, kRows>{}, i);
    if (m - i >= 4) tile(std::integral_constant<int, 4>{}, i), i += 4;
    if (m - i >= 2) tile(std::integral_constant<int, 2>{}, i), i += 2;
    if (m - i >= 1) tile(std::integral_constant<int, 1>{}, i);
    offset += N * W;
  };
  while (offset + kVectors * W <= width) block(std::integral_constant<int, kVectors>{});
  while (offset + W <= width) block(std::integral_constant<int, 1>{});
  if (offset < width) sum_edge<R>(weights, row, column, rows, n, offset, width - offset, out, m, add);
}

}  // namespace onepass::ONEPASS_ISA
