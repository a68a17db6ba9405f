// What a GPU would be given for a step, for the tests.
#include <cstring>

#include "../../csrc/cuda/step_backward.h"
#include "../../csrc/cuda/step_forward.h"

using namespace onepass;
using namespace onepass::cuda;

extern "C" void step_launch_of(int backward, int additive, const int64_t* sizes, int dtype, int processors, int capability, char* kernel,
                               int64_t* numbers, double* seconds) {
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  const Device device{processors, capability};
  const auto plan = backward ? step_backward_launch : step_forward_launch;
  const Launch launch = plan(shape, static_cast<Dtype>(dtype), additive != 0, device);
  std::strncpy(kernel, launch.kernel.c_str(), 63);
  const int64_t parts = (backward ? step_backward_parts : step_forward_parts)(shape, static_cast<Dtype>(dtype), launch);
  const int64_t found[] = {launch.blocks, launch.threads, launch.shared, launch.splits, launch.resident, parts};
  std::memcpy(numbers, found, sizeof found);
  *seconds = launch.seconds;
}
