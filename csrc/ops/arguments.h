// From torch's tensors to the kernels' plain structs, with the checks that an op makes on its own: ops may be called directly.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "../tensors.h"
#include "sizes.h"

namespace onepass {

using TorchTensor = torch::stable::Tensor;
using OptionalTensor = std::optional<TorchTensor>;
using torch::headeronly::ScalarType;

#define ONEPASS_CHECK(condition, ...)                                                       \
  do {                                                                                      \
    if (!(condition)) throw std::runtime_error(::onepass::words("onepass: ", __VA_ARGS__)); \
  } while (0)

template <class... Parts>
std::string words(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

template <class Numbers>
std::string text_of(const Numbers& sizes) {
  std::string text = "[";
  for (const int64_t size : sizes) text += (text.size() > 1 ? ", " : "") + std::to_string(size);
  return text + "]";
}

inline std::string shape_of(const TorchTensor& x) { return text_of(x.sizes()); }

inline Dtype dtype_of(const char* name, ScalarType type) {
  switch (type) {
    case ScalarType::Float: return Dtype::f32;
    case ScalarType::Double: return Dtype::f64;
    case ScalarType::BFloat16: return Dtype::bf16;
    case ScalarType::Half: return Dtype::f16;
    default: throw std::runtime_error(words("onepass: ", name, " must be float32, float64, bfloat16 or float16"));
  }
}

inline Dtype dtype_of(const char* name, const TorchTensor& x) { return dtype_of(name, x.scalar_type()); }

// What a dtype accumulates in.
inline ScalarType accumulator(const TorchTensor& x) {
  return x.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// Views of freed storage have pointers too, and to a kernel a null pointer is a tensor that is not given.
inline void check_storage(const char* name, const TorchTensor& x) {
  int64_t bytes = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_storage_size(x.get(), &bytes));
  if (bytes > 0) return;
  const auto sizes = x.sizes();
  ONEPASS_CHECK(std::find(sizes.begin(), sizes.end(), 0) != sizes.end(), "the memory of ", name, " ", shape_of(x), " has been freed");
}

// Tensors of one call, which outlive it; copies that had to be made contiguous it keeps itself until the kernels have run.
class Arguments {
 public:
  explicit Arguments(const TorchTensor& query) : Arguments(query, query.dim(), false) {
    ONEPASS_CHECK(rank_ == 3 || rank_ == 4, "query must be [B, T, A] or [B, H, T, A]; got ", shape_of(query));
  }

  // Of queries over a memory with these keys: a query may have one dimension less, and is then one step.
  Arguments(const TorchTensor& query, const TorchTensor& keys) : Arguments(query, keys.dim(), query.dim() == keys.dim() - 1) {
    ONEPASS_CHECK((rank_ == 3 || rank_ == 4) && (one_step_ || query.dim() == rank_),
                  "query must be [B, A] or [B, T, A] for keys [B, S, A], [B, H, A] or [B, H, T, A] for keys [B, H, S, A]; got ",
                  shape_of(query), " for ", shape_of(keys));
  }

  // [B, (H,) N, W] of exactly these sizes, of the query's dtype or the one given.
  Tensor in(const char* name, const TorchTensor& given, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    ONEPASS_CHECK(is_here(given), name, " must be on the ", place());
    const ScalarType type = given.scalar_type();
    ONEPASS_CHECK(type == dtype.value_or(dtype_), name, " has another dtype than the query");
    ONEPASS_CHECK(has_sizes(given, sizes), name, " must be ", text_of(sizes), "; got ", shape_of(given));
    check_storage(name, given);
    const auto got = given.sizes();
    if (got.empty() || got.back() <= 1 || given.strides().back() == 1) return view(name, given, type);
    return view(name, kept_.emplace_back(torch::stable::contiguous(given)), type);
  }

  Tensor in(const char* name, const OptionalTensor& given, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
    return given.has_value() ? in(name, *given, sizes, dtype) : Tensor{};
  }

  // What the memory keeps in the query's dtype or, unless that is float64, in bfloat16.
  Tensor in_memory(const char* name, const TorchTensor& given, const Sizes& sizes, ScalarType dtype) {
    const bool half = given.scalar_type() == ScalarType::BFloat16 && dtype != ScalarType::Double;
    return in(name, given, sizes, half ? ScalarType::BFloat16 : dtype);
  }

  // A view of a contiguous tensor made for the kernels to write.
  Tensor view(const char* name, const TorchTensor& x) const { return view(name, x, x.scalar_type()); }

  // lengths: [B]; [B, T]; or [B, T, 2], spans: of each query the first position and the one after the last.
  Visibility visibility(const OptionalTensor& lengths, const OptionalTensor& mask, const Shape& shape) {
    Visibility v;
    ONEPASS_CHECK(shape.S <= INT32_MAX || !(mask.has_value() || (lengths.has_value() && lengths->dim() == 3)),
                  "with a mask or spans a source has at most ", INT32_MAX, " positions; got ", shape.S);
    if (lengths.has_value()) {
      ONEPASS_CHECK(lengths->scalar_type() == ScalarType::Long && is_here(*lengths), "lengths must be int64 on the ", place());
      const int64_t rank = lengths->dim();
      ONEPASS_CHECK(rank >= 1 && rank <= 3 && lengths->size(0) == shape.B && (rank < 2 || lengths->size(1) == shape.T) &&
                        (rank < 3 || lengths->size(2) == 2),
                    "lengths must be [B] = [", shape.B, "], [B, T] = [", shape.B, ", ", shape.T, "] or, as spans, [B, T, 2]; got ",
                    shape_of(*lengths));
      const auto* data = static_cast<const int64_t*>(lengths->const_data_ptr());
      check_storage("lengths", *lengths);
      v.lengths = rank == 3 ? data + lengths->stride(2) : data;
      v.firsts = rank == 3 ? data : nullptr;
      v.lengths_batch = lengths->stride(0);
      v.lengths_step = rank > 1 ? lengths->stride(1) : 0;
      const auto check = [&](const int64_t* numbers, const char* name) {
        if (!on_cpu_) return;  // kernels take the nearest number within
        for (int64_t b = 0; b < shape.B; ++b)
          for (int64_t t = 0; t < (rank > 1 ? shape.T : 1); ++t) {
            const int64_t n = numbers[b * v.lengths_batch + t * v.lengths_step];
            ONEPASS_CHECK(n >= 0 && n <= shape.S, name, " must lie in [0, ", shape.S, "], got ", n);
          }
      };
      if (rank == 3) check(v.firsts, "spans");
      check(v.lengths, rank == 3 ? "spans, and lengths beside them," : "lengths");
    }
    if (mask.has_value()) {
      Sizes sizes = with_heads(shape, shape.T, shape.S);
      const size_t step = sizes.size() - 2;
      const bool shared = mask->dim() == rank_ && mask->size(rank_ - 2) == 1;  // by all queries
      if (shared) sizes[step] = 1;
      const bool fits = mask->scalar_type() == ScalarType::Bool && is_here(*mask) && has_sizes(*mask, sizes);
      ONEPASS_CHECK(fits, "mask must be boolean ", text_of(sizes), " on the ", place(), "; got ", shape_of(*mask));
      v.mask = static_cast<const uint8_t*>(mask->const_data_ptr());
      check_storage("mask", *mask);
      v.mask_batch = mask->stride(0);
      v.mask_head = rank_ == 4 ? mask->stride(1) : 0;
      v.mask_step = shared ? 0 : mask->stride(rank_ - 2);
      v.mask_source = mask->stride(rank_ - 1);
    }
    return v;
  }

  // [B, (H,) rows, width]
  Sizes with_heads(const Shape& shape, int64_t rows, int64_t width) const {
    return rank_ == 4 ? Sizes{shape.B, shape.H, rows, width} : Sizes{shape.B, rows, width};
  }

  // Of a query's row: [B, (H,) T, width], without T for one step.
  Sizes per_query(const Shape& shape, int64_t width) const {
    if (!one_step_) return with_heads(shape, shape.T, width);
    return rank_ == 4 ? Sizes{shape.B, shape.H, width} : Sizes{shape.B, width};
  }

  Sizes width_of_v(const Shape& shape) const { return rank_ == 4 ? Sizes{shape.H, shape.A} : Sizes{shape.A}; }

 private:
  Arguments(const TorchTensor& query, int64_t rank, bool one_step)
      : dtype_(query.scalar_type()), rank_(rank), one_step_(one_step), on_cpu_(query.is_cpu()),
        device_(on_cpu_ ? 0 : query.get_device_index()) {
    dtype_of("query", dtype_);
  }

  static bool has_sizes(const TorchTensor& x, const Sizes& sizes) {
    const auto got = x.sizes();
    return std::equal(got.begin(), got.end(), sizes.begin(), sizes.end());
  }

  bool is_here(const TorchTensor& x) const { return x.is_cpu() == on_cpu_ && (on_cpu_ || x.get_device_index() == device_); }

  const char* place() const { return on_cpu_ ? "cpu" : "query's device"; }

  Tensor view(const char* name, const TorchTensor& x, ScalarType type) const {
    Tensor view;
    view.data = x.mutable_data_ptr();
    view.dtype = dtype_of(name, type);
    const auto strides = x.strides();
    const auto rank = static_cast<int64_t>(strides.size());
    if (one_step_ && rank == rank_ - 1 && rank >= 2) {  // [B, (H,) W]
      view.batch = strides[0];
      view.head = rank == 3 ? strides[1] : 0;
    } else if (rank >= 3) {
      view.batch = strides[0];
      view.head = rank == 4 ? strides[1] : 0;
      view.row = strides[strides.size() - 2];
    } else if (rank == 2) {
      view.head = strides[0];  // v [H, A]
    }
    return view;
  }

  ScalarType dtype_;  // of the query, like the rest
  int64_t rank_;
  bool one_step_, on_cpu_;
  int32_t device_;
  std::vector<TorchTensor> kept_;
};

// Sizes of a call; the ranks of keys and values are checked against them later.
inline Shape shape_of_call(const TorchTensor& query, const TorchTensor& keys, int64_t D) {
  const int64_t rank = query.dim();
  ONEPASS_CHECK(rank == keys.dim(), "query ", shape_of(query), " and keys ", shape_of(keys), " must have the same rank");
  return {query.size(0), rank == 4 ? query.size(1) : 1, query.size(rank - 2), keys.size(rank - 2), query.size(rank - 1), D};
}

// Of a step over a memory, whose query may be one.
inline Shape shape_of_step(const TorchTensor& query, const TorchTensor& keys, int64_t D) {
  const int64_t rank = keys.dim();
  const int64_t T = query.dim() == rank ? query.size(rank - 2) : 1;
  return {keys.size(0), rank == 4 ? keys.size(1) : 1, T, keys.size(rank - 2), keys.size(rank - 1), D};
}

// What additive scores are made of, into the arguments of kernels on any device.
template <class Args>
void set_scored(Arguments& in, Args& args, const TorchTensor& query, const TorchTensor& keys, const TorchTensor& v) {
  const Shape& s = args.shape;
  args.query = in.in("query", query, in.per_query(s, s.A));
  args.keys = in.in("keys", keys, in.with_heads(s, s.S, s.A));
  args.v = in.in("v", v, in.width_of_v(s));
}

}  // namespace onepass
