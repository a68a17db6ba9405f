#include "schemas.h"

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(onepass, library) {
  for (const char* schema : onepass::kSchemas) library.def(schema);
}
