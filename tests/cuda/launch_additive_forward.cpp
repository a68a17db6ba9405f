// What a test asks of csrc/cuda/additive_forward.h by way of ctypes.
#include "additive_forward.h"

#include <cstring>

extern "C" void launch(const int64_t* sizes, int dtype, int processors, int capability, int queries, char* kernel,
                       int64_t* numbers, double* seconds) {
  using namespace onepass;
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  const cuda::Launch found = cuda::additive_forward_launch(shape, static_cast<Dtype>(dtype), {processors, capability}, queries);
  std::strcpy(kernel, found.kernel.c_str());
  numbers[0] = found.blocks, numbers[1] = found.threads, numbers[2] = found.shared, numbers[3] = found.resident;
  *seconds = found.seconds;
}
