// Kernels by their symbols. A file lists its own, KERNELS(MAKE) as MAKE(symbol, (launch bounds), function) ..., and ONEPASS_KERNELS_OF
// makes the entry points and the launch that finds them.
#pragma once

#include <cuda_runtime.h>

#include "launch.h"

namespace onepass::cuda {

struct NamedKernel {
  const char* name;
  const void* kernel;
};

template <class Args, int Count>
cudaError_t launch_named(const NamedKernel (&kernels)[Count], const Args& args, const Launch& launch, cudaStream_t stream) {
  for (const auto& [name, kernel] : kernels) {
    if (launch.kernel != name) continue;
    if (launch.shared > 48 * 1024) {
      const cudaError_t refused = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, launch.shared);
      if (refused != cudaSuccess) return refused;
    }
    void* arguments[] = {const_cast<Args*>(&args)};
    cudaLaunchConfig_t how{dim3(static_cast<unsigned>(launch.blocks)), dim3(launch.threads), static_cast<size_t>(launch.shared), stream};
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim = {static_cast<unsigned>(launch.cluster), 1, 1};
    how.attrs = &cluster;
    how.numAttrs = launch.cluster > 1;
    return cudaLaunchKernelExC(&how, kernel, arguments);
  }
  return cudaErrorInvalidDeviceFunction;
}

}  // namespace onepass::cuda

#define ONEPASS_ENTRY(symbol, bounds, ...) \
  extern "C" __global__ void __launch_bounds__ bounds symbol(const __grid_constant__ KernelArguments args) { __VA_ARGS__(args); }
#define ONEPASS_NAME(symbol, bounds, ...) {#symbol, reinterpret_cast<const void*>(&symbol)},
#define ONEPASS_KERNELS_OF(Args, KERNELS) \
  namespace onepass::cuda { \
  using KernelArguments = Args; \
  KERNELS(ONEPASS_ENTRY) \
  cudaError_t launch(const Args& args, const Launch& launch, cudaStream_t stream) { \
    static const NamedKernel kernels[] = {KERNELS(ONEPASS_NAME)}; \
    return launch_named(kernels, args, launch, stream); \
  } \
  }
