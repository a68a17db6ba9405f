// Kernels by their symbols, for launches that name them.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace onepass::cuda {

struct NamedKernel {
  const char* name;
  const void* kernel;
};

#define ONEPASS_KERNEL(symbol) {#symbol, reinterpret_cast<const void*>(&symbol)}

template <class Args, int Count>
cudaError_t launch_named(const NamedKernel (&kernels)[Count], const Args& args, const Launch& launch, cudaStream_t stream) {
  for (const auto& [name, kernel] : kernels) {
    if (launch.kernel != name) continue;
    if (launch.shared > 48 * 1024) {
      const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
      if (refused != cudaSuccess) return refused;
    }
    void* arguments[] = {const_cast<Args*>(&args)};
    return cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads), arguments, launch.shared, stream);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace onepass::cuda
