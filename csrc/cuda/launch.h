// How kernels are launched: pure functions of shape, dtype and device in plain C++, so that tests and tables see what a GPU would be given.
#pragma once

#include <string>

#include "../tensors.h"

namespace onepass::cuda {

constexpr int64_t kFewQueries = 16;  // queries up to which the kernels of steps are taken

struct Device {
  int processors = 132;
  int capability = 90;  // 90 for 9.0
};

struct Launch {
  std::string kernel;  // its symbol
  int64_t blocks = 0;
  int threads = 0, shared = 0;  // shared: bytes of dynamic shared memory
  int splits = 1;               // parts of the source, each a block's
  int resident = 1;             // blocks that a processor is meant to hold at once
  double seconds = 0;           // predicted: the largest of issue slots, special functions and bytes over their rates
};

}  // namespace onepass::cuda
