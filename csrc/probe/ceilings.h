// Loops whose rate no kernel can exceed; each returns how many operations (or bytes) it did.
#pragma once

#include <cstdint>

namespace onepass {

struct Ceilings {
  double (*fused_multiply_adds)(int64_t rounds);
  double (*reciprocals)(int64_t rounds);
  double (*read)(const float* data, int64_t count);
};

extern const Ceilings ceilings_baseline;
extern const Ceilings ceilings_avx2;
extern const Ceilings ceilings_avx512;

}  // namespace onepass
