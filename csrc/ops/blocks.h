// Memory of large results, kept for later calls. A fresh block costs the system more to clear, page by page, than the kernels need to
// fill it, and malloc gives large blocks back at once; so results of a call's size use the memory of the call before.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <string>
#include <vector>

#include "sizes.h"

// Part of torch's C interface from 2.11 on; this library also loads into 2.10, where the name is null.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(
    void* data, int64_t dims, const int64_t* sizes, const int64_t* strides, int64_t offset, int32_t dtype, int32_t device_type,
    int32_t device_index, AtenTensorHandle* result, int32_t layout, const uint8_t* metadata, int64_t metadata_size,
    void (*deleter)(void* data, void* context), void* context);

namespace onepass {

class Blocks {
 public:
  static constexpr size_t kLeast = size_t{1} << 16;  // bytes from which a result lies in a block

  // Never destroyed: a result may outlive everything else.
  static Blocks& shared() {
    static auto* blocks = new Blocks;
    return *blocks;
  }

  bool serve(size_t bytes) const { return torch_from_blob != nullptr && bytes >= kLeast && bytes <= limit_; }

  // At least `bytes`, which become the block's size: the newest that fits, of which at most a fifth is left unused. A new one of several
  // huge pages has room for another, as results grow; its end is of small pages, which take no memory before they are used.
  void* take(size_t& bytes) {
    const size_t unit = bytes >= 2 * kHuge ? kHuge : kPage, huge = unit == kHuge ? bytes / kHuge * kHuge : 0;
    bytes = (bytes + unit - 1) / unit * unit;
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);  // a fork may have left it locked for good
    if (lock) {
      for (size_t i = kept_.size(); i-- > 0;) {
        const Block block = kept_[i];
        if (block.bytes < bytes || block.bytes > bytes + bytes / 4) continue;
        kept_.erase(kept_.begin() + static_cast<std::ptrdiff_t>(i));
        total_ -= block.bytes;
        bytes = block.bytes;
        return block.data;
      }
    }
    void* data = nullptr;
    if (posix_memalign(&data, unit, bytes) != 0) throw std::bad_alloc();
#if defined(__linux__)
    if (huge > 0) madvise(data, huge, MADV_HUGEPAGE);
#endif
    return data;
  }

  // Keep a block; what has lain here longest goes where that makes too much.
  void give(void* data, size_t bytes) {
    const std::unique_lock<std::mutex> lock(mutex_, std::try_to_lock);
    if (!lock || bytes > limit_) return std::free(data);
    kept_.push_back({data, bytes});
    total_ += bytes;
    while (total_ > limit_) {
      std::free(kept_.front().data);
      total_ -= kept_.front().bytes;
      kept_.erase(kept_.begin());
    }
  }

 private:
  static constexpr size_t kPage = size_t{1} << 12, kHuge = size_t{1} << 21;
  struct Block {
    void* data;
    size_t bytes;
  };

  Blocks() {
    const char* given = std::getenv("ONEPASS_KEEP_MIB");
    const std::string mebibytes = given == nullptr || *given == '\0' ? "256" : given;
    if (mebibytes.size() > 9 || mebibytes.find_first_not_of("0123456789") != std::string::npos)
      throw std::invalid_argument("onepass: ONEPASS_KEEP_MIB must be a number of mebibytes; got '" + mebibytes + "'");
    limit_ = static_cast<size_t>(std::stoull(mebibytes)) << 20;
  }

  std::mutex mutex_;
  std::vector<Block> kept_;  // oldest first
  size_t total_ = 0, limit_;
};

// An uninitialised tensor.
inline torch::stable::Tensor empty(const torch::stable::Tensor& like, const Sizes& sizes,
                                   std::optional<torch::headeronly::ScalarType> dtype = std::nullopt) {
  using torch::headeronly::ScalarType;
  const auto type = dtype.value_or(like.scalar_type());
  Sizes strides = sizes;  // as many
  int64_t count = type == ScalarType::Double ? 8 : type == ScalarType::Float ? 4 : 2;
  const int64_t itemsize = count;
  bool can_be = true;  // else torch says that it cannot
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = count / itemsize;
    can_be = can_be && !__builtin_mul_overflow(count, sizes[i], &count);
  }
  auto bytes = static_cast<size_t>(count);
  const auto dims = static_cast<int64_t>(sizes.size());
  const auto shim_type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  Blocks& blocks = Blocks::shared();
  AtenTensorHandle handle;
  if (can_be && blocks.serve(bytes)) {
    void* data = blocks.take(bytes);
    TORCH_ERROR_CODE_CHECK(torch_from_blob(
        data, dims, sizes.data(), strides.data(), 0, shim_type, aoti_torch_device_type_cpu(), -1, &handle, aoti_torch_layout_strided(),
        nullptr, 0, [](void* block, void* size) { Blocks::shared().give(block, reinterpret_cast<size_t>(size)); },
        reinterpret_cast<void*>(bytes)));
    return torch::stable::Tensor(handle);
  }
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dims, sizes.data(), strides.data(), shim_type, aoti_torch_device_type_cpu(), -1, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace onepass
