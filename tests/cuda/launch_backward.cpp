// The launches of the backward kernels, for tests to read.
#include "../../csrc/cuda/additive_backward.h"
#include "../../csrc/cuda/score_gradients.h"

using namespace onepass;
using namespace onepass::cuda;

struct Plain {
  char kernel[64];
  int64_t blocks;
  int32_t threads, shared, resident;
  double seconds;
};

static Plain plain(const Launch& launch) {
  Plain found{{}, launch.blocks, launch.threads, launch.shared, launch.resident, launch.seconds};
  launch.kernel.copy(found.kernel, sizeof found.kernel - 1);
  return found;
}

extern "C" void additive_backward(
    const Shape* shape, int dtype, int processors, int capability, Plain* launches, BackwardParts* parts, int64_t* scratch) {
  const auto found = additive_backward_launch(*shape, static_cast<Dtype>(dtype), {processors, capability});
  launches[0] = plain(found.gradients);
  launches[1] = plain(found.sums);
  *parts = found.parts;
  scratch[0] = found.query_parts;
  scratch[1] = found.key_parts;
  scratch[2] = found.v_parts;
}

extern "C" void score_gradients(const Shape* shape, int dtype, int processors, int capability, Plain* launches, int64_t* inner) {
  const auto found = score_gradients_launch(*shape, static_cast<Dtype>(dtype), {processors, capability});
  launches[0] = plain(found.products);
  launches[1] = plain(found.softmax);
  *inner = found.inner;
}
