// Kernels by their symbols. A file lists its own, KERNELS(MAKE) as MAKE(symbol, (launch bounds), function) ..., and ONEPASS_KERNELS_OF
// makes the entry points and the launch that finds them.
#pragma once

#include <cuda_runtime.h>

#include <atomic>

#include "launch.h"

namespace onepass::cuda {

constexpr int kAnywhere = 44 << 10;  // bytes of dynamic shared memory that no kernel must be allowed: 48 KiB with the static ones

struct NamedKernel {
  const char* name;
  const void* kernel;
  std::atomic<uint64_t> allowed{};  // devices on which it may have all of a block's shared memory
};

// Once for each device: what one launch is allowed must not take from another's that is under way.
inline cudaError_t allow_shared(const void* kernel, std::atomic<uint64_t>& allowed) {
  int device = 0, most = 0;
  cudaError_t code = cudaGetDevice(&device);
  const uint64_t bit = uint64_t{1} << (device % 64);
  if (code != cudaSuccess || (allowed & bit) != 0) return code;
  cudaFuncAttributes is{};
  code = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (code == cudaSuccess) code = cudaFuncGetAttributes(&is, kernel);
  if (code != cudaSuccess) return code;
  const int left = most - static_cast<int>(is.sharedSizeBytes);
  code = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, left);
  if (code == cudaSuccess) allowed |= bit;
  return code;
}

template <class Args, int Count>
cudaError_t launch_named(NamedKernel (&kernels)[Count], const Args& args, const Launch& launch, cudaStream_t stream) {
  for (auto& [name, kernel, allowed] : kernels) {
    if (launch.kernel != name) continue;
    if (launch.shared > kAnywhere) {
      const cudaError_t refused = allow_shared(kernel, allowed);
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
    static NamedKernel kernels[] = {KERNELS(ONEPASS_NAME)}; \
    return launch_named(kernels, args, launch, stream); \
  } \
  }
