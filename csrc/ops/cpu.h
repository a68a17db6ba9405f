// What the ops on the CPU share: which kernels run, on which threads.
#pragma once

#include <atomic>

#include "../cpu/isa.h"
#include "../cpu/kernels.h"
#include "arguments.h"
#include "blocks.h"

namespace onepass {

// Where an empty tensor lies whose pointer is null but must not be: without a context, the additive forward gives scores alone.
inline char nothing;

inline const Kernels& kernels() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512: return kernels_avx512;
    case Isa::avx2: return kernels_avx2;
    case Isa::baseline: break;
  }
#endif
  return kernels_baseline;
}

// torch's own threads. Tasks are taken one by one, so that uneven ones spread evenly; no result depends on who takes which.
inline Executor executor() {
  return {static_cast<int>(torch::stable::get_num_threads()), [](int64_t count, void (*task)(void*, int64_t), void* context) {
            const auto threads = static_cast<int64_t>(torch::stable::get_num_threads());
            const int64_t workers = threads < count ? threads : count;
            if (workers <= 1) {
              for (int64_t i = 0; i < count; ++i) task(context, i);
              return;
            }
            std::atomic<int64_t> next{0};
            torch::stable::parallel_for(0, workers, 1, [&](int64_t, int64_t) {
              for (int64_t i = next++; i < count; i = next++) task(context, i);
            });
          }};
}

}  // namespace onepass
