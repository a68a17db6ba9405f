// The ops onepass_cuda::*: outputs, scratch and launches, on torch's current stream. Nothing here waits for the device.
#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <array>
#include <mutex>

#include "../ops/arguments.h"
#include "../ops/named.h"
#include "../ops/schemas.h"
#include "additive_backward.h"
#include "additive_forward.h"
#include "score_gradients.h"
#include "step_backward.h"
#include "step_forward.h"

namespace onepass::cuda {

cudaError_t launch(const AdditiveForward& args, const Launch& how, cudaStream_t stream);
cudaError_t launch(const AdditiveBackward& args, const Launch& how, cudaStream_t stream);
cudaError_t launch(const ScoreGradients& args, const Launch& how, cudaStream_t stream);
cudaError_t launch(const StepForward& args, const Launch& how, cudaStream_t stream);
cudaError_t launch(const StepBackward& args, const Launch& how, cudaStream_t stream);
cudaError_t compiled_for(int* capability);

namespace {

using Two = std::tuple<TorchTensor, TorchTensor>;
using Three = std::tuple<TorchTensor, TorchTensor, TorchTensor>;
using Four = std::tuple<TorchTensor, TorchTensor, TorchTensor, TorchTensor>;

void check(cudaError_t code, const char* what) {
  ONEPASS_CHECK(code == cudaSuccess, what, ": ", cudaGetErrorString(code));
}

// What torch gives its current stream by. It is looked up: a torch without CUDA, into which this library loads too, does not have it. Nor
// is the library that has it among those that everyone sees (RTLD_GLOBAL), so that it is asked for by name.
using GetStream = AOTITorchError (*)(int32_t, void**);
GetStream get_stream() {
  static const auto found = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<GetStream>(dlsym(library == nullptr ? RTLD_DEFAULT : library, "aoti_torch_get_current_cuda_stream"));
  }();
  return found;
}

bool finds_streams() { return get_stream() != nullptr; }

cudaStream_t current_stream(int32_t device) {
  ONEPASS_CHECK(finds_streams(), "this torch has no CUDA streams: it was built without CUDA");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get_stream()(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Of a device, which is the current one.
Device properties(int32_t device) {
  constexpr size_t kMost = 64;
  static std::array<Device, kMost> known;
  static std::array<std::once_flag, kMost> asked;
  const auto index = static_cast<size_t>(device);
  ONEPASS_CHECK(index < kMost, "device ", device, " is beyond the ", kMost, " that onepass knows");
  std::call_once(asked[index], [&] {
    int processors = 0, major = 0, minor = 0, clusters = 0, compiled = 0;
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device), "asking for the number of processors");
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "asking for the compute capability");
    check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "asking for the compute capability");
    check(cudaDeviceGetAttribute(&clusters, cudaDevAttrClusterLaunch, device), "asking for clusters");
    check(compiled_for(&compiled), "looking for kernels that the device runs");
    known[index] = {processors, 10 * major + minor, clusters != 0 && compiled >= 90};
  });
  return known[index];
}

TorchTensor empty(const TorchTensor& like, const Sizes& sizes, std::optional<ScalarType> dtype = std::nullopt) {
  return torch::stable::new_empty(like, sizes, dtype);
}

// A call's device, which is the current one while it lasts.
class Call {
 public:
  explicit Call(const TorchTensor& query)
      : query_(query), guard_(query.get_device_index()), device_(properties(query.get_device_index())) {}

  const Device& device() const { return device_; }

  void* scratch(int64_t bytes) {
    return bytes == 0 ? nullptr : kept_.emplace_back(empty(query_, {(bytes + 3) / 4}, ScalarType::Float)).mutable_data_ptr();
  }

  unsigned* counters(int64_t count) {
    if (count == 0) return nullptr;
    kept_.push_back(torch::stable::new_zeros(query_, {count}, ScalarType::Int));
    return static_cast<unsigned*>(kept_.back().mutable_data_ptr());
  }

  // What a profiler sees of the op, until the name goes out of scope; the current stream's kernels count as its own.
  Named named(const char* op, const Shape& shape, const Visibility& visibility, Dtype dtype) const {
    return {op, shape, visibility, dtype, dtype, "cuda"};
  }

  template <class Args>
  Named named(const char* op, const Args& args) const {
    return {op, args.shape, args.visibility, args.query.dtype, args.keys.dtype, "cuda"};
  }

  template <class Args>
  void run(const Args& args, const Launch& how) {
    const Shape& s = args.shape;
    ONEPASS_CHECK(!how.kernel.empty(), "no CUDA kernel of these dtypes takes T = ", s.T, " and widths of A = ", s.A, " and D = ", s.D,
                  "; backend 'triton' does");
    if (how.blocks > 0) check(launch(args, how, current_stream(query_.get_device_index())), how.kernel.c_str());
  }

 private:
  TorchTensor query_;
  torch::stable::accelerator::DeviceGuard guard_;
  Device device_;
  std::vector<TorchTensor> kept_;  // until the launches are on the stream, which orders what reuses their memory
};

template <class Args>
StepDtypes dtypes_of(const Args& args) {
  return {args.query.dtype, args.keys.dtype};
}

// Scores, softmax and context of a step, of both families.
void step(Call& call, StepForward& args, bool additive) {
  const Launch how = step_forward_launch(args.shape, dtypes_of(args), additive, call.device());
  args.splits = how.splits;
  args.cluster = how.cluster;
  args.parts = call.scratch(step_forward_parts(args.shape, args.query.dtype, how));
  args.counters = call.counters(how.splits > how.cluster ? how.blocks / how.splits : 0);
  call.run(args, how);
}

void attend(Call& call, const AdditiveForward& args) {
  const bool few = args.context.data != nullptr && args.shape.T <= kFewQueries;
  if (few && !step_forward_launch(args.shape, dtypes_of(args), true, call.device()).kernel.empty()) {
    StepForward taken{args.shape, args.query, args.keys, args.values, args.v, 1.0, args.visibility, args.context, args.weights};
    return step(call, taken, true);
  }
  const bool alike = args.keys.dtype == args.query.dtype;  // as the kernels of more queries take them
  call.run(args, alike ? additive_forward_launch(args.shape, args.query.dtype, call.device()) : Launch{});
}

Two forward(TorchTensor query, TorchTensor keys, TorchTensor values, TorchTensor v, OptionalTensor lengths, OptionalTensor mask) {
  Call call(query);
  Arguments in(query);
  AdditiveForward args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  TorchTensor context = empty(query, in.with_heads(s, s.T, s.D));
  TorchTensor weights = empty(query, in.with_heads(s, s.T, s.S), accumulator(query));
  set_scored(in, args, query, keys, v);
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.visibility = in.visibility(lengths, mask, s);
  args.context = in.view("context", context);
  args.weights = in.view("weights", weights);
  if (args.context.data == nullptr) args.context.data = args.weights.data;  // D = 0, but weights are asked for
  const Named named = call.named("additive_forward", args);
  attend(call, args);
  return {context, weights};
}

TorchTensor scores(TorchTensor query, TorchTensor keys, TorchTensor v, OptionalTensor lengths, OptionalTensor mask) {
  Call call(query);
  Arguments in(query);
  AdditiveForward args;
  args.shape = shape_of_call(query, keys, 0);
  const Shape& s = args.shape;
  TorchTensor scores = empty(query, in.with_heads(s, s.T, s.S));
  set_scored(in, args, query, keys, v);
  args.visibility = in.visibility(lengths, mask, s);
  args.weights = in.view("scores", scores);
  const Named named = call.named("additive_scores", args);
  attend(call, args);
  return scores;
}

int64_t bytes_of(Dtype dtype) { return dtype == Dtype::f64 ? 8 : 4; }  // of a number that it is computed in

// From gradients of scores on.
Three tanh_gradients(Call& call, Arguments& in, const Shape& s, const Tensor& grad_scores, const TorchTensor& query,
                     const TorchTensor& keys, const TorchTensor& v, const Visibility& visibility, bool of_query = true) {
  AdditiveBackward args;
  args.shape = s;
  TorchTensor grad_query = empty(query, of_query ? in.with_heads(s, s.T, s.A) : Sizes{0});
  TorchTensor grad_keys = empty(query, in.with_heads(s, s.S, s.A));
  TorchTensor grad_v = empty(query, in.width_of_v(s));
  set_scored(in, args, query, keys, v);
  args.grad_scores = grad_scores;
  args.visibility = visibility;
  if (of_query) args.grad_query = in.view("grad_query", grad_query);
  args.grad_keys = in.view("grad_keys", grad_keys);
  args.grad_v = in.view("grad_v", grad_v);
  const BackwardLaunch how = additive_backward_launch(s, args.query.dtype, call.device(), of_query);
  args.parts = how.parts;
  args.query_parts = call.scratch(how.query_parts * bytes_of(args.query.dtype));
  args.key_parts = call.scratch(how.key_parts * bytes_of(args.query.dtype));
  args.v_parts = call.scratch(how.v_parts * bytes_of(args.query.dtype));
  call.run(args, how.gradients);
  call.run(args, how.sums);
  return {grad_query, grad_keys, grad_v};
}

Three scores_backward(TorchTensor grad_scores, TorchTensor query, TorchTensor keys, TorchTensor v, OptionalTensor lengths,
                      OptionalTensor mask, bool of_query) {
  Call call(query);
  Arguments in(query);
  const Shape s = shape_of_call(query, keys, 0);
  const Visibility visibility = in.visibility(lengths, mask, s);
  const ScalarType summed = accumulator(query);
  const TorchTensor wide = grad_scores.scalar_type() == summed ? grad_scores : torch::stable::to(grad_scores, summed);
  const Tensor gradients = in.in("grad_scores", wide, in.with_heads(s, s.T, s.S), summed);
  const Named named = call.named("additive_scores_backward", s, visibility, dtype_of("query", query));
  return tanh_gradients(call, in, s, gradients, query, keys, v, visibility, of_query);
}

Four backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys, TorchTensor values,
              TorchTensor v, TorchTensor weights, OptionalTensor lengths, OptionalTensor mask) {
  Call call(query);
  Arguments in(query);
  ScoreGradients args;
  args.shape = shape_of_call(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  TorchTensor grad_scores = empty(query, in.with_heads(s, s.T, s.S), accumulator(query));
  TorchTensor grad_values = empty(query, in.with_heads(s, s.S, s.D));
  args.weights = in.in("weights", weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D));
  args.grad_context = in.in("grad_context", grad_context, in.with_heads(s, s.T, s.D));
  args.grad_weights = in.in("grad_weights", grad_weights, in.with_heads(s, s.T, s.S), accumulator(query));
  args.visibility = in.visibility(lengths, mask, s);
  args.grad_scores = in.view("grad_scores", grad_scores);
  args.grad_values = in.view("grad_values", grad_values);
  const Named named = call.named("additive_backward", s, args.visibility, args.values.dtype);
  const ScoreGradientsLaunch how = score_gradients_launch(s, args.values.dtype, call.device());
  args.inner = call.scratch(how.inner * bytes_of(args.values.dtype));
  call.run(args, how.products);
  call.run(args, how.softmax);
  auto [grad_query, grad_keys, grad_v] = tanh_gradients(call, in, s, args.grad_scores, query, keys, v, args.visibility);
  return {grad_query, grad_keys, grad_values, grad_v};
}

// Arguments of a step over a memory.
struct Step {
  Call call;
  Arguments in;
  StepForward args;
  TorchTensor context, weights;

  Step(const TorchTensor& query, const TorchTensor& keys, const TorchTensor& values, const OptionalTensor& lengths,
       const OptionalTensor& mask)
      : call(query), in(query, keys) {
    args.shape = shape_of_step(query, keys, values.size(values.dim() - 1));
    const Shape& s = args.shape;
    context = empty(query, in.per_query(s, s.D));
    weights = empty(query, in.per_query(s, s.S), accumulator(query));
    args.query = in.in("query", query, in.per_query(s, s.A));
    args.keys = in.in_memory("keys", keys, in.with_heads(s, s.S, s.A), query.scalar_type());
    args.values = in.in("values", values, in.with_heads(s, s.S, s.D), keys.scalar_type());
    args.visibility = in.visibility(lengths, mask, s);
    args.context = in.view("context", context);
    args.weights = in.view("weights", weights);
  }
};

Two additive_step(TorchTensor query, TorchTensor keys, TorchTensor values, TorchTensor v, TorchTensor, TorchTensor, TorchTensor,
                  OptionalTensor lengths, OptionalTensor mask) {
  Step step(query, keys, values, lengths, mask);
  StepForward& args = step.args;
  args.v = step.in.in("v", v, step.in.width_of_v(args.shape));
  if (args.context.data == nullptr) args.context.data = args.weights.data;
  const Named named = step.call.named("additive_step", args);
  attend(step.call, {args.shape, args.query, args.keys, args.values, args.v, args.visibility, args.context, args.weights});
  return {step.context, step.weights};
}

Two few_queries(const char* op, const TorchTensor& query, const TorchTensor& keys, const TorchTensor& values, double scale,
                const OptionalTensor& lengths, const OptionalTensor& mask) {
  Step taken(query, keys, values, lengths, mask);
  ONEPASS_CHECK(taken.args.shape.T <= kFewQueries, "the CUDA kernels of multiplicative attention take up to ", kFewQueries,
                " queries; got ", taken.args.shape.T);
  taken.args.scale = scale;
  const Named named = taken.call.named(op, taken.args);
  step(taken.call, taken.args, false);
  return {taken.context, taken.weights};
}

Two multiplicative_step(TorchTensor query, TorchTensor keys, TorchTensor values, double scale, OptionalTensor lengths,
                        OptionalTensor mask) {
  return few_queries("multiplicative_step", query, keys, values, scale, lengths, mask);
}

Two multiplicative_forward(TorchTensor query, TorchTensor keys, TorchTensor values, double scale, OptionalTensor lengths,
                           OptionalTensor mask, bool keep_weights) {
  ONEPASS_CHECK(query.dim() == keys.dim(), "query ", shape_of(query), " and keys ", shape_of(keys), " must have the same rank");
  ONEPASS_CHECK(query.scalar_type() == keys.scalar_type(), "keys has another dtype than the query");
  auto [context, weights] = few_queries("multiplicative_forward", query, keys, values, scale, lengths, mask);
  return {context, keep_weights ? weights : empty(query, {0}, accumulator(query))};
}

Two step_backward(const OptionalTensor& grad_context, const OptionalTensor& grad_weights, const TorchTensor& query,
                  const TorchTensor& keys, const TorchTensor& values, const TorchTensor* v, double scale, const OptionalTensor& weights,
                  const OptionalTensor& lengths, const OptionalTensor& mask) {
  ONEPASS_CHECK(weights.has_value(), "the CUDA kernels of steps have no backward of raw scores");
  Call call(query);
  Arguments in(query, keys);
  StepBackward args;
  args.shape = shape_of_step(query, keys, values.size(values.dim() - 1));
  const Shape& s = args.shape;
  ONEPASS_CHECK(s.T <= kFewQueries, "the CUDA kernels of steps take up to ", kFewQueries, " queries; got ", s.T);
  TorchTensor grad_query = empty(query, in.per_query(s, s.A));
  TorchTensor grad_scores = empty(query, in.per_query(s, s.S), accumulator(query));
  args.query = in.in("query", query, in.per_query(s, s.A));
  args.keys = in.in_memory("keys", keys, in.with_heads(s, s.S, s.A), query.scalar_type());
  args.values = in.in("values", values, in.with_heads(s, s.S, s.D), keys.scalar_type());
  if (v != nullptr) args.v = in.in("v", *v, in.width_of_v(s));
  args.scale = scale;
  args.visibility = in.visibility(lengths, mask, s);
  args.weights = in.in("weights", weights, in.per_query(s, s.S), accumulator(query));
  args.grad_context = in.in("grad_context", grad_context, in.per_query(s, s.D));
  args.grad_weights = in.in("grad_weights", grad_weights, in.per_query(s, s.S), accumulator(query));
  args.grad_query = in.view("grad_query", grad_query);
  args.grad_scores = in.view("grad_scores", grad_scores);
  const Named named = call.named(v != nullptr ? "additive_step_backward" : "multiplicative_step_backward", args);
  const Launch how = step_backward_launch(s, dtypes_of(args), v != nullptr, call.device());
  args.splits = how.splits;
  args.cluster = how.cluster;
  args.parts = call.scratch(step_backward_parts(s, args.query.dtype, how));
  args.counters = call.counters(how.splits > how.cluster ? how.blocks / how.splits : 0);
  call.run(args, how);
  return {grad_query, grad_scores};
}

Two additive_step_backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys,
                           TorchTensor values, TorchTensor, TorchTensor, TorchTensor v, OptionalTensor weights,
                           OptionalTensor lengths, OptionalTensor mask) {
  return step_backward(grad_context, grad_weights, query, keys, values, &v, 1.0, weights, lengths, mask);
}

Two multiplicative_step_backward(OptionalTensor grad_context, OptionalTensor grad_weights, TorchTensor query, TorchTensor keys,
                                 TorchTensor values, double scale, OptionalTensor weights, OptionalTensor lengths, OptionalTensor mask) {
  return step_backward(grad_context, grad_weights, query, keys, values, nullptr, scale, weights, lengths, mask);
}

std::tuple<int64_t, int64_t> versions() {
  int runtime = 0, driver = 0;
  check(cudaRuntimeGetVersion(&runtime), "asking for the runtime's version");
  check(cudaDriverGetVersion(&driver), "asking for the driver's version");
  return {runtime, driver};
}

}  // namespace

STABLE_TORCH_LIBRARY(onepass_cuda, library) {
  for (const char* schema : kSchemas) library.def(schema);
  library.def("versions() -> (int runtime, int driver)");
  library.def("finds_streams() -> bool");
}

STABLE_TORCH_LIBRARY_IMPL(onepass_cuda, CUDA, library) {
  library.impl("additive_forward", TORCH_BOX(&forward));
  library.impl("additive_backward", TORCH_BOX(&backward));
  library.impl("additive_scores", TORCH_BOX(&scores));
  library.impl("additive_scores_backward", TORCH_BOX(&scores_backward));
  library.impl("additive_step", TORCH_BOX(&additive_step));
  library.impl("additive_step_backward", TORCH_BOX(&additive_step_backward));
  library.impl("multiplicative_forward", TORCH_BOX(&multiplicative_forward));
  library.impl("multiplicative_step", TORCH_BOX(&multiplicative_step));
  library.impl("multiplicative_step_backward", TORCH_BOX(&multiplicative_step_backward));
}

STABLE_TORCH_LIBRARY_IMPL(onepass_cuda, CompositeExplicitAutograd, library) {
  library.impl("versions", TORCH_BOX(&versions));
  library.impl("finds_streams", TORCH_BOX(&finds_streams));
}

}  // namespace onepass::cuda
