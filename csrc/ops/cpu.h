// What the ops on the CPU share: which kernels run, on which threads.
#pragma once

#include <atomic>
#include <new>

#include "../cpu/isa.h"
#include "../cpu/kernels.h"
#include "arguments.h"
#include "blocks.h"

namespace onepass {

inline const Kernels& kernels() {
  [[maybe_unused]] const Isa isa = active_isa();  // says what is wrong with ONEPASS_ISA, everywhere
#if defined(__x86_64__)
  switch (isa) {
    case Isa::avx512: return kernels_avx512;
    case Isa::avx2: return kernels_avx2;
    case Isa::baseline: break;
  }
#endif
  return kernels_baseline;
}

// The tasks of one call, in a run for each thread, the same run in every call: what a core has read stays in its cache. A thread that is
// done with its own goes on with another's, so that uneven tasks spread evenly. No result depends on who takes which task when.
class Tasks {
 public:
  Tasks(int64_t count, int64_t threads, bool backwards) : count_(count), runs_(threads < kMost ? threads : kMost), backwards_(backwards) {}

  template <class F>
  void work(int64_t thread, const F& f) {
    for (int64_t turn = 0; turn < runs_; ++turn) {
      const int64_t run = (thread + turn) % runs_, first = count_ * run / runs_, end = count_ * (run + 1) / runs_;
      for (int64_t i = taken_[run].count++; i < end - first; i = taken_[run].count++) f(backwards_ ? end - 1 - i : first + i);
    }
  }

 private:
  static constexpr int64_t kMost = 64;
  struct alignas(64) Taken {
    std::atomic<int64_t> count{0};
  };

  int64_t count_, runs_;
  bool backwards_;
  Taken taken_[kMost];
};

// torch's own threads, for one op. Every other op goes backwards, and so begins with what the last one read last, where going round again
// would find nothing of it in a cache. Torch would pass on what a task throws as an error of its own: that there is no memory is said after
// it.
inline Executor executor() {
  static thread_local bool backwards = true;
  backwards = !backwards;
  const auto run = [](const Executor& self, int64_t count, void (*task)(void*, int64_t), void* context) {
    const int64_t workers = self.threads < count ? self.threads : count;
    const auto one = [&](int64_t i) { task(context, i); };
    if (workers <= 1) {
      for (int64_t i = 0; i < count; ++i) one(self.backwards ? count - 1 - i : i);
      return;
    }
    Tasks tasks(count, workers, self.backwards);
    std::atomic<bool> no_memory{false};
    torch::stable::parallel_for(0, workers, 1, [&](int64_t first, int64_t end) {
      try {
        for (int64_t worker = first; worker < end; ++worker) tasks.work(worker, one);
      } catch (const std::bad_alloc&) {
        no_memory = true;
      }
    });
    if (no_memory) throw std::bad_alloc();
  };
  return {static_cast<int>(torch::stable::get_num_threads()), backwards, run};
}

}  // namespace onepass
