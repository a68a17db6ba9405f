// How kernels are launched: pure functions of shape, dtype and device in plain C++, so that tests and tables see what a GPU would be given.
#pragma once

#include <string>

#include "../tensors.h"

namespace onepass::cuda {

constexpr int64_t kFewQueries = 16;  // queries up to which the kernels of steps are taken

ONEPASS_ANYWHERE constexpr int64_t ceil_div(int64_t x, int64_t y) { return (x + y - 1) / y; }

// What a dtype is called in a kernel's symbol.
inline const char* symbol_of(Dtype dtype) {
  static constexpr const char* names[] = {"f32", "f64", "bf16", "f16"};
  return names[static_cast<int>(dtype)];
}

struct Device {
  int processors = 132;
  int capability = 90;  // 90 for 9.0
  bool clusters = capability >= 90;  // and kernels that use them
};

// What the products of a capability can do at most; of those that it does not know, what the one before it can.
struct Rates {
  double clock, bandwidth;  // per second: cycles, bytes of device memory
  double fp32;              // multiply-adds of a scheduler and cycle, in warps; special functions are 1/8
  int shared;               // bytes of a processor's shared memory
};

inline Rates rates(const Device& device) {
  if (device.capability >= 120) return {2.407e9, 1.792e12, 1, 100 << 10};  // RTX 5090
  if (device.capability >= 100) return {1.965e9, 7.672e12, 1, 228 << 10};  // B200
  if (device.capability >= 90) return {1.98e9, 3.352e12, 1, 228 << 10};    // H100
  if (device.capability >= 89) return {2.49e9, 0.864e12, 1, 100 << 10};    // L40
  if (device.capability >= 86) return {1.695e9, 0.6e12, 1, 100 << 10};     // A10
  return {1.41e9, 2.039e12, 0.5, 164 << 10};                               // A100
}

// Whether two multiply-adds of float32 are one instruction, as fast as one.
inline bool packs(const Device& device) { return device.capability >= 100 && device.capability < 120; }

struct Launch {
  std::string kernel;  // its symbol
  int64_t blocks = 0;
  int threads = 0, shared = 0;  // shared: bytes of dynamic shared memory
  int splits = 1;               // pieces of the source, each a block's
  int cluster = 1;              // blocks that run side by side, on neighbouring pieces
  int resident = 1;             // blocks that a processor is meant to hold at once
  double seconds = 0;           // predicted: the largest of issue slots, special functions and bytes over their rates
};

}  // namespace onepass::cuda
