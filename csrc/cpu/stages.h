// Work that comes in stages, each of which threads may share out: where there are fewer sources than threads, no thread is idle.
//
// A Work is what one source asks for. next(scratch) begins a block of queries, or returns false after the last one. stage(i, share), for
// i < stages(), is a share of the i-th stage of that block, which needs the stages before it whole.
#pragma once

#include <new>

#include "rows.h"
#include "scratch.h"

namespace onepass::ONEPASS_ISA {

// One of so many even parts.
struct Share {
  int64_t index, count;

  Range of(int64_t whole, int64_t unit) const {
    const int64_t units = (whole + unit - 1) / unit, begin = units * index / count * unit, end = units * (index + 1) / count * unit;
    return {begin, (end < whole ? end : whole) - begin};
  }
};

// Calls make(scratch, item) for each of the items and does the Work that it returns. Threads take whole items, but those that would leave
// some of them idle: these all threads do together, if there is more to do (`size` multiply-adds of a product in each) than they wait for
// each other. No result depends on it.
template <class E, class Make>
void by_stages(const E& executor, int64_t items, int64_t size, const Make& make) {
  constexpr int64_t kWorthwhile = 128 * 1024;
  using Work = decltype(make(Scratch::mine(), int64_t{0}));
  constexpr Share kAll{0, 1};
  const int64_t left = items % executor.threads;
  const int64_t together = size >= kWorthwhile && items < 4 * executor.threads && left <= Scratch::kShared ? left : 0;
  parallel(executor, items - together, [&](int64_t item) {
    Scratch& scratch = Scratch::mine();
    Work work = make(scratch, item);
    for (const auto before = scratch.mark(); work.next(scratch); scratch.rewind(before)) {
      const auto begun = scratch.mark();
      for (int stage = 0; stage < work.stages(); ++stage) {
        work.stage(stage, kAll);
        scratch.rewind(begun);
      }
    }
  });
  if (together == 0) return;
  const int64_t shares = (executor.threads + together - 1) / together;
  Work* works[Scratch::kShared];
  Scratch::Mark made[Scratch::kShared];
  parallel(executor, together, [&, all = &Scratch::shared(0)](int64_t i) {
    Scratch& scratch = all[i];
    scratch.reset();
    works[i] = new (scratch.take<Work>(1)) Work(make(scratch, items - together + i));
    made[i] = scratch.mark();
  });
  for (;;) {
    parallel(executor, together, [&, all = &Scratch::shared(0)](int64_t i) {
      all[i].rewind(made[i]);
      if (works[i] != nullptr && !works[i]->next(all[i])) works[i] = nullptr;
    });
    int stages = 0;
    for (int64_t i = 0; i < together; ++i)
      if (works[i] != nullptr && works[i]->stages() > stages) stages = works[i]->stages();
    if (stages == 0) return;
    for (int stage = 0; stage < stages; ++stage)
      parallel(executor, together * shares, [&](int64_t item) {
        const Work* work = works[item / shares];
        if (work != nullptr && stage < work->stages()) work->stage(stage, {item % shares, shares});
      });
  }
}

}  // namespace onepass::ONEPASS_ISA
