// Which source positions a block of queries sees, as a list: work follows the list, and what is not on it is never read.
#pragma once

#include "kernels.h"
#include "scratch.h"

namespace onepass::ONEPASS_ISA {

struct Visible {
  int64_t count;              // positions that some query of the block sees
  const int32_t* index;       // them, ascending; null if they are 0, 1, ..., count - 1
  const uint8_t* seen;        // [queries, count], non-zero where the query sees the position; null if all do

  int64_t position(int64_t i) const { return index != nullptr ? index[i] : i; }
  bool sees(int64_t query, int64_t i) const { return seen == nullptr || seen[query * count + i] != 0; }
  bool sees_any(int64_t query) const {
    if (seen == nullptr) return count > 0;
    for (int64_t i = 0; i < count; ++i)
      if (seen[query * count + i]) return true;
    return false;
  }
  bool mixed(int64_t queries, int64_t i) const {
    for (int64_t t = 0; t < queries; ++t)
      if (!sees(t, i)) return true;
    return false;
  }
};

inline Visible visible_to(Scratch& scratch, const Visibility& v, int64_t S, int64_t b, int64_t h, int64_t t0, int64_t queries) {
  const auto limit = [&](int64_t t) {
    if (v.lengths == nullptr) return S;
    const int64_t n = v.lengths[b * v.lengths_batch + (t0 + t) * v.lengths_step];
    return n < 0 ? 0 : n > S ? S : n;
  };
  // One query stands for all where they see the same.
  const bool alike = (v.lengths == nullptr || v.lengths_step == 0) && (v.mask == nullptr || v.mask_step == 0);
  const int64_t kinds = alike && queries > 1 ? 1 : queries;
  int64_t longest = 0, shortest = S;
  for (int64_t t = 0; t < kinds; ++t) {
    const int64_t n = limit(t);
    longest = n > longest ? n : longest;
    shortest = n < shortest ? n : shortest;
  }
  if (v.mask == nullptr && longest == shortest) return {longest, nullptr, nullptr};

  const auto sees = [&](int64_t t, int64_t s) {
    if (s >= limit(t)) return false;
    return v.mask == nullptr || v.mask[b * v.mask_batch + h * v.mask_head + (t0 + t) * v.mask_step + s * v.mask_source] != 0;
  };
  auto* index = scratch.take<int32_t>(longest);
  int64_t count = 0;
  bool all = true;
  for (int64_t s = 0; s < longest; ++s) {
    int64_t seers = 0;
    for (int64_t t = 0; t < kinds; ++t) seers += sees(t, s);
    if (seers == 0) continue;
    all = all && seers == kinds;
    index[count++] = static_cast<int32_t>(s);
  }
  if (all) return {count, count == longest ? nullptr : index, nullptr};
  auto* seen = scratch.take<uint8_t>(queries * count);
  for (int64_t t = 0; t < queries; ++t)
    for (int64_t i = 0; i < count; ++i) seen[t * count + i] = sees(t, index[i]);
  return {count, index, seen};
}

}  // namespace onepass::ONEPASS_ISA
