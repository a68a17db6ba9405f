// The kernels for avx2: 32-byte vectors. setup.py adds the compiler flags of this file.
#if defined(__x86_64__)
#define ONEPASS_ISA avx2
#define ONEPASS_TABLE kernels_avx2
#define ONEPASS_VECTOR_BYTES 32
#include "kernels.inc"
#endif
