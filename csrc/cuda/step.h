// What the kernels of decoding steps and their hosts agree on: few queries (T <= 16) over one source, bound by its bytes.
//
// A block has a group of up to W queries and a piece of the source, of whose positions it keeps a few numbers a query in shared memory.
// A thread has Q of the queries, one or four; neighbours with the others load the same bytes. Where a device has clusters, the blocks of
// one share the reading of queries, and put together what they found, through their shared memories. What is one block's or cluster's is a
// part; where there are several parts, the last block of a group to finish combines them, through global memory.
#pragma once

#include "launch.h"

namespace onepass::cuda {

constexpr int kStepThreads = 256, kStepWarps = kStepThreads / 32, kMostQueries = kFewQueries;
constexpr int kCluster = 8;      // blocks that every device with clusters takes
constexpr int kFewestRows = 24;  // of a block where one more makes up a cluster
constexpr int kMore = 4;         // numbers that a block leaves for its cluster behind a row of sums
constexpr int kReserved = 1152;  // bytes of a processor's shared memory that are the system's and, of a kernel, not dynamic

ONEPASS_ANYWHERE constexpr int64_t up_to(int64_t x, int64_t unit) { return ceil_div(x, unit) * unit; }
ONEPASS_ANYWHERE constexpr int64_t step_padded(int64_t width) { return up_to(width, 8); }  // a row of parts: whole vectors of any dtype

// Blocks that a processor is to hold, which bounds their registers.
ONEPASS_ANYWHERE constexpr int step_resident(int Q, int each, int size) {
  return Q * each == 1 && size == 4 ? 3 : Q == 4 && size == 8 ? 1 : 2;
}

ONEPASS_ANYWHERE constexpr int step_queries(int64_t T) { return T <= 1 ? 1 : T <= 4 ? 4 : T <= 8 ? 8 : kMostQueries; }  // W: a power of 2
ONEPASS_ANYWHERE constexpr int wide_size(int size) { return size == 8 ? 8 : 4; }

// How the numbers of a position lie in shared memory: `each` for every query, then a gap that keeps neighbours in other banks.
ONEPASS_ANYWHERE constexpr int step_stride(int W, int each) { return W * each + (W * each > 4 ? 4 : 0); }

// Numbers that sums over rows of `width` elements read beside them: W queries and, for additive scores, v with what merging needs of it.
ONEPASS_ANYWHERE constexpr int64_t step_factors(int64_t width, int W, int size, bool additive) {
  const int64_t padded = up_to(width, 16 / size);
  return size == 8 && additive ? 0 : padded * W + (additive ? padded + padded / 2 : 0);
}

// Bytes of dynamic shared memory, by what is kept there. `left`: numbers that a block leaves of each query for its cluster, 0 without one.
struct StepLayout {
  int64_t numbers, exchange, seen, windows, rows_left, total;  // the factors come first, in whose place sums are folded later

  ONEPASS_ANYWHERE constexpr StepLayout(int64_t rows, int W, int each, int64_t factors, int size, int64_t left) {
    const int64_t fold = kStepThreads * 16 / size, wide = wide_size(size);
    numbers = up_to((factors > fold ? factors : fold) * wide, 16);
    exchange = numbers + up_to(rows * step_stride(W, each) * wide, 16);
    seen = exchange + (kStepWarps + 2) * kMostQueries * wide;
    windows = seen + up_to(rows * 2, 16);
    rows_left = up_to(windows + W * 8, 16);
    total = left == 0 ? windows + W * 8 : rows_left + W * left * wide;
  }
};

// What a kernel of a step does: sums over the width of rows, then over rows. `each`: numbers of a position and query.
struct StepWork {
  std::string family;
  int each;
  bool additive;                     // the sums over the width
  int64_t row_width, column_width;
  double row_slots, column_slots;    // issue slots of an element and thread, as compiled for sm_90
};

// Of queries and, as `kept`, of keys and values, which a memory of float32 may keep in bf16.
struct StepDtypes {
  Dtype queries, kept;

  std::string symbol() const {
    return symbol_of(queries) + (kept == queries ? std::string() : std::string("_over_") + symbol_of(kept));
  }
};

inline bool has_steps(const StepDtypes& dtypes) {
  return dtypes.kept == dtypes.queries || (dtypes.queries == Dtype::f32 && dtypes.kept == Dtype::bf16);
}

// Where a row of queries is too wide for shared memory, or the dtypes are others, there is no kernel: no blocks and no name.
inline Launch step_launch(const Shape& shape, const StepDtypes& dtypes, const StepWork& work, const Device& device) {
  const int size = size_of(dtypes.kept), W = step_queries(shape.T), Q = W == 1 ? 1 : 4;
  const int64_t factors = step_factors(work.row_width, W, size, work.additive), per_row = step_stride(W, work.each) * wide_size(size);
  const int64_t most = 16 * 1024 / per_row;  // positions of a piece
  Launch launch;
  if (!has_steps(dtypes) || StepLayout(most, W, work.each, factors, size, 0).total > 100 * 1024 - kReserved) return launch;
  const int64_t groups = shape.B * shape.H * ceil_div(shape.T, W);
  const int64_t wanted = ceil_div(2 * device.processors, groups > 0 ? groups : 1), useful = shape.S / 32 < 64 ? shape.S / 32 : 64;
  const int64_t fewest = ceil_div(shape.S, most), splits = wanted < useful ? wanted : useful;
  launch.kernel = work.family + "_" + dtypes.symbol() + "_" + std::to_string(Q);
  launch.splits = static_cast<int>(splits > fewest ? splits : fewest > 1 ? fewest : 1);
  const Rates rate = rates(device);
  const auto shared = [&](int64_t splits, int cluster) {
    const int64_t left = cluster == 1 ? 0 : work.each * step_padded(work.column_width) + kMore;
    return StepLayout(ceil_div(shape.S, splits), W, work.each, factors, size, left).total;
  };
  // Clusters that leave most blocks, of those that move at most a 25th beside keys and values: the queries and, to and from global memory,
  // the scores and rows that several parts leave. Where that takes more than half of the blocks from work, whatever they move.
  const int64_t T = shape.T < W ? shape.T : W, left = 2 * T * wide_size(size), pieces = launch.splits;
  const int64_t rows = T * (work.row_width + (work.each - 1) * work.column_width) + (work.additive ? work.row_width : 0);
  const int64_t beside = rows * size_of(dtypes.queries);
  const int64_t limit = shape.S * (work.row_width + work.column_width) * size / 25;
  bool frugal = false;
  for (int cluster = kCluster; device.clusters && cluster > 1; cluster /= 2)
    for (int64_t parts = ceil_div(pieces, cluster); parts > 0 && parts * cluster >= fewest; --parts) {
      const int64_t blocks = parts * cluster, between = parts > 1 ? left * (shape.S + parts * work.each * work.column_width) : 0;
      if (blocks > pieces && shape.S < kFewestRows * blocks) continue;
      if (blocks > pieces && pieces > fewest && groups * blocks > 2 * device.processors) continue;
      if (shared(blocks, cluster) > rate.shared - kReserved) continue;
      const bool little = (parts == 1 || (Q == 1 ? blocks : parts) * beside + between <= limit) && 2 * blocks >= pieces;
      if (launch.cluster > 1 && (little == frugal ? blocks <= launch.splits : frugal)) continue;
      launch.splits = static_cast<int>(blocks);
      launch.cluster = cluster;
      frugal = little;
    }
  launch.blocks = groups * launch.splits;
  launch.threads = kStepThreads;
  launch.shared = static_cast<int>(shared(launch.splits, launch.cluster));
  const int fit = rate.shared / (launch.shared + 1024), meant = step_resident(Q, work.each, size);
  launch.resident = fit < meant ? fit : meant;
  const double positions = static_cast<double>(shape.B * shape.H * shape.S), wide = static_cast<double>(work.row_width);
  const double across = static_cast<double>(work.column_width), busy = 0.5 * static_cast<double>(launch.blocks) / device.processors;
  const double bytes = positions * (wide + across) * size / rate.bandwidth;
  const double slots = positions * (wide * work.row_slots + across * work.column_slots) * (W / Q) / (128 * rate.clock * device.processors);
  launch.seconds = (bytes > slots ? bytes : slots) / (busy < 1 ? busy : 1);  // two blocks keep a processor's share of memory busy
  return launch;
}

}  // namespace onepass::cuda
