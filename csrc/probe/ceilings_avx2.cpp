// Ceilings for avx2.
#if defined(__x86_64__)
#define ONEPASS_ISA avx2
#define ONEPASS_CEILINGS ceilings_avx2
#define ONEPASS_VECTOR_BYTES 32
#include "ceilings.inc"
#endif
