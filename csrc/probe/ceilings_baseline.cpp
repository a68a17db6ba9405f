// Ceilings for baseline.
#define ONEPASS_ISA baseline
#define ONEPASS_CEILINGS ceilings_baseline
#define ONEPASS_VECTOR_BYTES 16
#include "ceilings.inc"
