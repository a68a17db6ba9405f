// The ops onepass_cuda::*, and what the library tells of itself.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include "../ops/arguments.h"

namespace onepass::cuda {
namespace {

std::tuple<int64_t, int64_t> versions() {
  int runtime = 0, driver = 0;
  cudaRuntimeGetVersion(&runtime);
  cudaDriverGetVersion(&driver);
  return {runtime, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(onepass_cuda, CompositeExplicitAutograd, library) { library.impl("versions", TORCH_BOX(&versions)); }

}  // namespace onepass::cuda
