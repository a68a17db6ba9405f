// Ceilings for avx512.
#if defined(__x86_64__)
#define ONEPASS_ISA avx512
#define ONEPASS_CEILINGS ceilings_avx512
#define ONEPASS_VECTOR_BYTES 64
#include "ceilings.inc"
#endif
