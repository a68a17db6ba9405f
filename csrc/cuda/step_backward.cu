#include "kernel_table.cuh"
#include "step_backward.cuh"

#define KERNELS(MAKE) ONEPASS_STEPS(MAKE, backward, 2)

ONEPASS_KERNELS_OF(StepBackward, KERNELS)
