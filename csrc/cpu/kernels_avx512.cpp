// The kernels for avx512: 64-byte vectors. setup.py adds the compiler flags of this file.
#if defined(__x86_64__)
#define ONEPASS_ISA avx512
#define ONEPASS_TABLE kernels_avx512
#define ONEPASS_VECTOR_BYTES 64
#include "kernels.inc"
#endif
