// What a profiler sees of a call: an event named after the op, its sizes, dtype and device, for as long as the kernels run.
//
//   onepass::additive_forward [B 32, T 32, S 48, A 512, D 1024] float32 cpu
//
// Where lengths, spans or a mask hide positions, `pairs` says how many (b, h, t, s) are visible, or ? where only the GPU knows. Sizes that
// an op lacks are left out, and one head. A memory that is kept in another dtype than its queries is `float32 over bfloat16`.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include <sstream>
#include <string>
#include <string_view>

#include "../tensors.h"

// Where torch lacks one of these, its name is null and calls stay unnamed. hasCallbacks, two comparisons of counters, is the only part that
// an unprofiled call meets.
namespace at {
__attribute__((weak)) bool hasCallbacks();
}
extern "C" __attribute__((weak)) AOTITorchError aoti_record_function_start(const char* name, IValueMapHandle kwargs,
                                                                           const C10IValueHandle* inputs, const uint64_t count,
                                                                           AtenRecordFunctionHandle* event);
extern "C" __attribute__((weak)) AOTITorchError aoti_record_function_end(AtenRecordFunctionHandle event);

namespace onepass {

class Named {
 public:
  Named(const char* op, const Shape& shape, const Visibility& visibility, Dtype dtype, Dtype kept, const char* device = "cpu") {
    if (at::hasCallbacks != nullptr && at::hasCallbacks()) start(op, shape, visibility, dtype, kept, device);
  }
  Named(const char* op, const Shape& shape, const Visibility& visibility, Dtype dtype) : Named(op, shape, visibility, dtype, dtype) {}
  Named(const Named&) = delete;
  Named& operator=(const Named&) = delete;
  ~Named() {
    if (event_ != nullptr) aoti_record_function_end(event_);
  }

 private:
  __attribute__((cold, noinline)) void start(const char* op, const Shape& s, const Visibility& v, Dtype dtype, Dtype kept,
                                             const char* device) {
    if (aoti_record_function_start == nullptr) return;
    constexpr const char* dtypes[] = {"float32", "float64", "bfloat16", "float16"};
    std::ostringstream name;
    name << "onepass::" << op << " [B " << s.B;
    if (s.H != 1) name << ", H " << s.H;
    const auto size = [&](const char* of, int64_t n) {
      if (n != 0) name << ", " << of << ' ' << n;
    };
    size("T", s.T);
    size("S", s.S);
    size("A", s.A);
    size("D", s.D);
    if (v.lengths != nullptr || v.mask != nullptr) {
      const bool here = std::string_view(device) == "cpu";
      name << ", pairs " << (here ? std::to_string(visible_pairs(s, v)) : "?");
    }
    name << "] " << dtypes[static_cast<int>(dtype)];
    if (kept != dtype) name << " over " << dtypes[static_cast<int>(kept)];
    name << ' ' << device;
    aoti_record_function_start(name.str().c_str(), nullptr, nullptr, 0, &event_);
  }

  static int64_t visible_pairs(const Shape& shape, const Visibility& v) {
    int64_t pairs = 0;
    for (int64_t b = 0; b < shape.B; ++b)
      for (int64_t t = 0; t < shape.T; ++t) {
        const int64_t at = b * v.lengths_batch + t * v.lengths_step;
        const int64_t first = v.firsts == nullptr ? 0 : v.firsts[at], last = v.lengths == nullptr ? shape.S : v.lengths[at];
        if (v.mask == nullptr) {
          pairs += last > first ? (last - first) * shape.H : 0;
          continue;
        }
        for (int64_t h = 0; h < shape.H; ++h)
          for (int64_t s = first; s < last; ++s)
            pairs += v.mask[b * v.mask_batch + h * v.mask_head + t * v.mask_step + s * v.mask_source];
      }
    return pairs;
  }

  AtenRecordFunctionHandle event_ = nullptr;
};

}  // namespace onepass
