// The kernels for baseline: 16-byte vectors. setup.py adds the compiler flags of this file.
#define ONEPASS_ISA baseline
#define ONEPASS_TABLE kernels_baseline
#define ONEPASS_VECTOR_BYTES 16
#include "kernels.inc"
