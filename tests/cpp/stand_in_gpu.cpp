// A GPU where there is none. Tensors of device "cuda" lie in the host's memory, and torch's own ops run on them as they would on a CPU; the
// CUDA runtime hands each launch to a function of tests/stand_in_gpu.py. It is linked with csrc/cuda/ops.cpp and the objects that nvcc made
// of csrc/cuda/*.cu, and takes the place of onepass/_cuda: everything from the op on is what a GPU would be given.
#include <ATen/ATen.h>
#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <cuda_runtime_api.h>
#include <torch/library.h>

#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

const c10::Device kHost(c10::DeviceType::CPU), kGpu(c10::DeviceType::CUDA, 0);

// Memory of the GPU by address.
struct Block {
  size_t bytes;
  bool fresh;  // nothing has written it
};

std::mutex lock;
std::map<uintptr_t, Block> blocks;

uintptr_t address_of(const at::Tensor& tensor) { return reinterpret_cast<uintptr_t>(tensor.storage().data()); }

at::Tensor tensor_in(c10::Storage storage, const at::Tensor& like) {
  const auto key = storage.device().is_cuda() ? c10::DispatchKey::CUDA : c10::DispatchKey::CPU;
  at::Tensor made = at::detail::make_tensor<c10::TensorImpl>(std::move(storage), c10::DispatchKeySet(key), like.dtype());
  made.unsafeGetTensorImpl()->set_sizes_and_strides(like.sizes(), like.strides(), like.storage_offset());
  return made;
}

// The same memory as another device's, which lives as long as either.
c10::Storage shared_with(c10::Device device, const c10::Storage& storage) {
  struct Kept {
    c10::Storage storage;
    bool block;
  };
  const auto address = reinterpret_cast<uintptr_t>(storage.data());
  const bool block = device.is_cuda() && address != 0;
  if (block) {
    const std::lock_guard held(lock);
    blocks[address] = {storage.nbytes(), false};
  }
  c10::DataPtr data(const_cast<void*>(storage.data()), new Kept{storage, block}, [](void* given) {
    auto* kept = static_cast<Kept*>(given);
    if (kept->block) {
      const std::lock_guard held(lock);
      blocks.erase(reinterpret_cast<uintptr_t>(kept->storage.data()));
    }
    delete kept;
  }, device);
  c10::Allocator* allocator = device.is_cuda() ? nullptr : c10::GetCPUAllocator();
  return {c10::Storage::use_byte_size_t(), storage.nbytes(), std::move(data), allocator, allocator != nullptr};
}

at::Tensor on_host(const at::Tensor& tensor) { return tensor_in(shared_with(kHost, tensor.storage()), tensor); }

// The tensors of one call of an op: those of the GPU, each with the one of the host that goes in its place, and others.
class Borrowed {
 public:
  at::Tensor take(const at::Tensor& tensor) {
    if (!tensor.defined() || !tensor.is_cuda()) return others_.emplace_back(tensor);
    return pairs_.emplace_back(tensor, on_host(tensor)).host;
  }

  // A result as one of the GPU: an argument, a view of one, or a tensor of its own.
  at::Tensor give(const at::Tensor& result, bool allocated) {
    if (!result.defined()) return result;
    for (const at::Tensor& tensor : others_) {
      if (tensor.is_same(result)) return result;
    }
    for (const auto& [gpu, host] : pairs_) {
      if (host.is_same(result)) return written(gpu, host);
    }
    for (const auto& [gpu, host] : pairs_) {
      if (!host.storage().is_alias_of(result.storage())) continue;
      const c10::InferenceMode as_viewed(gpu.is_inference());
      views_ = true;
      return tensor_in(gpu.storage(), result);
    }
    at::Tensor made = tensor_in(shared_with(kGpu, result.storage()), result);
    if (allocated && result.storage().nbytes() > 0) {
      std::memset(result.storage().mutable_data(), 0xff, result.storage().nbytes());  // NaN of any dtype
      const std::lock_guard held(lock);
      blocks[address_of(made)].fresh = true;
    }
    return made;
  }

  // Views apart, an op may have written what it was given.
  void note_written(bool in_place) const {
    if (views_ && !in_place) return;
    const std::lock_guard held(lock);
    for (const auto& [gpu, host] : pairs_) {
      if (const auto found = blocks.find(address_of(gpu)); found != blocks.end()) found->second.fresh = false;
    }
  }

 private:
  struct Pair {
    at::Tensor gpu, host;
  };

  // What the op has given the host's tensor: perhaps other sizes, and memory for them.
  static at::Tensor written(const at::Tensor& gpu, const at::Tensor& host) {
    c10::TensorImpl* own = gpu.unsafeGetTensorImpl();
    if (address_of(gpu) != address_of(host)) own->set_storage_keep_dtype(shared_with(kGpu, host.storage()));
    own->set_sizes_and_strides(host.sizes(), host.strides(), host.storage_offset());
    return gpu;
  }

  std::vector<Pair> pairs_;
  std::vector<at::Tensor> others_;
  bool views_ = false;
};

// Each tensor of an argument or of a result by another.
template <class F>
void replace(c10::IValue& value, const F& by) {
  if (value.isTensor()) {
    value = by(value.toTensor());
  } else if (value.isTensorList()) {
    c10::List<at::Tensor> list;
    for (const at::Tensor& tensor : value.toTensorVector()) list.push_back(by(tensor));
    value = list;
  } else if (value.isOptionalTensorList()) {
    c10::List<std::optional<at::Tensor>> list;
    for (const auto& tensor : value.toOptionalTensorVector()) list.push_back(tensor ? std::optional(by(*tensor)) : std::nullopt);
    value = list;
  }
}

// Any op of torch on tensors of the GPU, by the one of the CPU.
void by_host(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
  Borrowed borrowed;
  for (size_t i = stack->size() - op.schema().arguments().size(); i < stack->size(); ++i) {
    c10::IValue& value = (*stack)[i];
    if (value.isDevice()) value = kHost;
    replace(value, [&](const at::Tensor& tensor) { return borrowed.take(tensor); });
  }
  {
    const at::AutoDispatchBelowADInplaceOrView below;
    op.redispatchBoxed(c10::DispatchKeySet(c10::DispatchKey::CPU), stack);
  }
  const bool allocates = op.schema().name().rfind("aten::empty", 0) == 0;
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); ++i) {
    replace((*stack)[i], [&](const at::Tensor& result) { return borrowed.give(result, allocates); });
  }
  borrowed.note_written(op.schema().is_mutable());
}

// What tests/stand_in_gpu.py says of the GPU, and its function that runs a kernel; 0 where that went well.
using Launched = int (*)(const char* kernel, int blocks, int threads, int shared, int cluster, const void* argument);

Launched launched = nullptr;
int processors = 0, capability = 0;

std::map<const void*, std::string>& kernels() {
  static std::map<const void*, std::string> known;
  return known;
}

std::map<const void*, int>& shared_limits() {
  static std::map<const void*, int> known;
  return known;
}

}  // namespace

#pragma GCC visibility push(default)
extern "C" {

void stand_in_set(Launched function, int of_processors, int of_capability) {
  launched = function;
  processors = of_processors;
  capability = of_capability;
}

// The block in which an address lies; whether there is one. It counts as written from then on.
int stand_in_block(uintptr_t address, uintptr_t* base, int64_t* bytes, int* fresh) {
  const std::lock_guard held(lock);
  auto found = blocks.upper_bound(address);
  if (found == blocks.begin()) return 0;
  --found;
  if (address >= found->first + found->second.bytes) return 0;
  *base = found->first;
  *bytes = static_cast<int64_t>(found->second.bytes);
  *fresh = found->second.fresh;
  found->second.fresh = false;
  return 1;
}

// What nvcc's objects ask of the CUDA runtime when they are loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*, int*) {
  kernels()[function] = name;
}
cudaError_t __cudaGetKernel(cudaKernel_t*, const void*) { return cudaErrorNotSupported; }
cudaError_t __cudaLaunchKernel(cudaKernel_t, dim3, dim3, void**, size_t, cudaStream_t) { return cudaErrorNotSupported; }
cudaError_t __cudaPopCallConfiguration(dim3*, dim3*, size_t*, void*) { return cudaErrorNotSupported; }

// What the library asks of it.
const char* cudaGetErrorString(cudaError_t code) { return code == cudaSuccess ? "no error" : "refused by the GPU's stand-in"; }

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaDriverGetVersion(int* version) { return cudaRuntimeGetVersion(version); }

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int device) {
  if (device != 0) return cudaErrorInvalidDevice;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount: *value = processors; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; return cudaSuccess;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = (capability >= 90 ? 227 : 163) << 10; return cudaSuccess;
    case cudaDevAttrClusterLaunch: *value = capability >= 90; return cudaSuccess;
    default: return cudaErrorInvalidValue;
  }
}

cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void* function) {
  if (!kernels().contains(function)) return cudaErrorInvalidDeviceFunction;
  attributes->ptxVersion = capability;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (!kernels().contains(function) || attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaErrorInvalidValue;
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (value > most || shared_limits().contains(function)) return cudaErrorInvalidValue;  // a limit that moves would fail other threads
  shared_limits()[function] = value;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* how, const void* function, void** arguments) {
  if (!kernels().contains(function)) return cudaErrorInvalidDeviceFunction;
  const auto limit = shared_limits().contains(function) ? shared_limits()[function] : 46 << 10;  // 48 KiB with static memory, some of it
  int cluster = 1;
  for (unsigned i = 0; i < how->numAttrs; ++i) {
    if (how->attrs[i].id != cudaLaunchAttributeClusterDimension || capability < 90) return cudaErrorInvalidValue;
    cluster = static_cast<int>(how->attrs[i].val.clusterDim.x);
  }
  const bool flat = how->gridDim.y == 1 && how->gridDim.z == 1 && how->blockDim.y == 1 && how->blockDim.z == 1;
  if (!flat || how->gridDim.x == 0 || how->gridDim.x % cluster != 0 || how->blockDim.x > 1024) return cudaErrorInvalidConfiguration;
  if (how->dynamicSmemBytes > static_cast<size_t>(limit)) return cudaErrorInvalidValue;
  const int failed = launched(kernels()[function].c_str(), static_cast<int>(how->gridDim.x), static_cast<int>(how->blockDim.x),
                              static_cast<int>(how->dynamicSmemBytes), cluster, arguments[0]);
  return failed ? cudaErrorLaunchFailure : cudaSuccess;
}

// What torch has where it was built with CUDA, beside torch_cuda.cpp.
int32_t aoti_torch_create_device_guard(int32_t, void** guard) {
  *guard = nullptr;
  return 0;
}
int32_t aoti_torch_delete_device_guard(void*) { return 0; }

}  // extern "C"
#pragma GCC visibility pop

namespace {

// For autograd: one device, one stream, on which all is done once it is asked for.
struct OneStream final : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  c10::Device getDevice() const override { return kGpu; }
  c10::Device exchangeDevice(c10::Device) const override { return kGpu; }
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kGpu); }
  c10::Stream exchangeStream(c10::Stream stream) const noexcept override { return stream; }
  void record(void**, const c10::Stream&, c10::DeviceIndex, c10::EventFlag) const override {}
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};

struct Hooks final : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs) {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  void init() const override {}
  int getNumGPUs() const override { return 1; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex current_device() const override { return 0; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
};

const c10::impl::DeviceGuardImplRegistrar guard(c10::DeviceType::CUDA, new OneStream);

}  // namespace

namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}  // namespace at

TORCH_LIBRARY_IMPL(_, CUDA, library) { library.fallback(torch::CppFunction::makeFromBoxedFunction<&by_host>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, library) {  // one implementation for all devices, which asks for the device's own loop
  library.impl("copy_", torch::CppFunction::makeFromBoxedFunction<&by_host>());
}

TORCH_LIBRARY(stand_in_gpu, library) {
  library.def("on_host(Tensor tensor) -> Tensor", [](const at::Tensor& tensor) { return on_host(tensor); });
}
