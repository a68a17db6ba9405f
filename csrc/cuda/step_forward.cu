#include "kernel_table.cuh"
#include "step_forward.cuh"

#define KERNELS(MAKE) ONEPASS_STEPS(MAKE, forward, 1)

ONEPASS_KERNELS_OF(StepForward, KERNELS)
