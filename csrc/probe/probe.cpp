// onepass._probe: which instruction set is in use, how the build was made, and what the machine can do at most. Free of torch.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <atomic>
#include <chrono>
#include <cstdlib>
#include <map>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "../cpu/isa.h"
#include "../cuda/additive_backward.h"
#include "../cuda/additive_forward.h"
#include "../cuda/score_gradients.h"
#include "../cuda/step_backward.h"
#include "../cuda/step_forward.h"
#include "ceilings.h"

namespace py = pybind11;

namespace onepass {
namespace {

const Ceilings& loops() {
#if defined(__x86_64__)
  switch (active_isa()) {
    case Isa::avx512: return ceilings_avx512;
    case Isa::avx2: return ceilings_avx2;
    case Isa::baseline: break;
  }
#endif
  return ceilings_baseline;
}

std::vector<std::string> isas() {
  return {isa_names, isa_names + static_cast<int>(best_isa()) + 1};
}

std::string isa() {
  return isa_names[static_cast<int>(active_isa())];
}

void force_isa(const std::string& name) {
  for (const std::string& known : isas())
    if (known == name) {
      setenv("ONEPASS_ISA", name.c_str(), 1);
      return;
    }
  std::string all;
  for (const std::string& known : isas()) all += (all.empty() ? "" : ", ") + known;
  throw py::value_error("this machine runs " + all + "; got '" + name + "'");
}

// Operations per second of `threads` threads at once: the best of several trials.
template <class Loop>
double rate(int threads, double seconds, const Loop& loop) {
  using Clock = std::chrono::steady_clock;
  const auto since = [](Clock::time_point start) { return std::chrono::duration<double>(Clock::now() - start).count(); };
  int64_t rounds = 1;
  for (auto start = Clock::now(); loop(rounds) > 0 && since(start) < seconds / 16; start = Clock::now()) rounds *= 2;
  double best = 0;
  for (int trial = 0; trial < 9; ++trial) {
    std::vector<double> done(static_cast<size_t>(threads));
    std::vector<std::thread> workers;
    const auto start = Clock::now();
    for (double& d : done) workers.emplace_back([&loop, &d, rounds] { d = loop(rounds); });
    for (std::thread& worker : workers) worker.join();
    const double elapsed = since(start);
    double total = 0;
    for (const double d : done) total += d;
    best = total / elapsed > best ? total / elapsed : best;
  }
  return best;
}

std::map<std::string, double> ceilings(int threads, double seconds, int64_t bytes) {
  if (threads < 1 || seconds <= 0 || bytes < 4096) throw py::value_error("ceilings needs threads >= 1, seconds > 0, bytes >= 4096");
  const py::gil_scoped_release release;
  const Ceilings& c = loops();
  const int64_t count = bytes / threads / static_cast<int64_t>(sizeof(float));
  const std::vector<float> data(static_cast<size_t>(count) * static_cast<size_t>(threads), 1.f);
  std::atomic<int> next{0};
  return {{"fma", rate(threads, seconds, c.fused_multiply_adds)},
          {"reciprocal", rate(threads, seconds, c.reciprocals)},
          {"read", rate(threads, seconds, [&](int64_t rounds) {
             const float* part = data.data() + next++ % threads * count;
             double total = 0;
             for (int64_t i = 0; i < rounds; ++i) total += c.read(part, count);
             return total;
           })}};
}

std::map<std::string, std::string> build() {
  return {{"compiler", __VERSION__}, {"flags", ONEPASS_FLAGS}, {"torch", ONEPASS_TORCH}, {"version", ONEPASS_VERSION},
          {"cuda", ONEPASS_CUDA}};
}

// The launches of an op of CUDA kernels, as a GPU would be given them; none where no kernel takes these sizes.
py::list cuda_launches(const std::string& op, const std::vector<int64_t>& sizes, int dtype, int processors, int capability, int queries,
                       std::optional<int> kept, bool of_query) {
  if (sizes.size() != 6 || dtype < 0 || dtype > 3 || kept.value_or(0) < 0 || kept.value_or(0) > 3)
    throw py::value_error("cuda_launches needs sizes B, H, T, S, A, D and a dtype from 0 to 3");
  const Shape shape{sizes[0], sizes[1], sizes[2], sizes[3], sizes[4], sizes[5]};
  const cuda::Device device{processors, capability};
  const auto type = static_cast<Dtype>(dtype);
  const cuda::StepDtypes dtypes{type, static_cast<Dtype>(kept.value_or(dtype))};
  std::vector<cuda::Launch> found;
  std::vector<int64_t> scratch, cut;
  if (op == "additive_forward") {
    found = {cuda::additive_forward_launch(shape, type, device, queries)};
  } else if (op == "additive_backward") {
    const auto how = cuda::additive_backward_launch(shape, type, device, of_query);
    found = {how.gradients, how.sums};
    scratch = {how.query_parts, how.key_parts, how.v_parts};
    cut = {how.parts.splits, how.parts.query_splits, how.parts.positions, how.parts.queries};
  } else if (op == "score_gradients") {
    const auto how = cuda::score_gradients_launch(shape, type, device);
    found = {how.products, how.softmax};
    scratch = {how.inner};
  } else if (op == "additive_step_forward" || op == "multiplicative_step_forward") {
    found = {cuda::step_forward_launch(shape, dtypes, op[0] == 'a', device)};
    scratch = {cuda::step_forward_parts(shape, type, found[0])};
  } else if (op == "additive_step_backward" || op == "multiplicative_step_backward") {
    found = {cuda::step_backward_launch(shape, dtypes, op[0] == 'a', device)};
    scratch = {cuda::step_backward_parts(shape, type, found[0])};
  } else {
    throw py::value_error("no CUDA kernels of '" + op + "'");
  }
  py::list launches;
  for (const cuda::Launch& launch : found) {
    if (launch.kernel.empty()) continue;
    using namespace py::literals;
    launches.append(py::dict("kernel"_a = launch.kernel, "blocks"_a = launch.blocks, "threads"_a = launch.threads,
                             "shared"_a = launch.shared, "splits"_a = launch.splits, "cluster"_a = launch.cluster,
                             "resident"_a = launch.resident, "seconds"_a = launch.seconds, "scratch"_a = scratch, "cut"_a = cut));
  }
  return launches;
}

}  // namespace

PYBIND11_MODULE(_probe, m) {
  m.doc() = "Instruction set, build and measured ceilings of the CPU kernels; free of torch.";
  m.def("isa", &isa, "The instruction set in use.");
  m.def("isas", &isas, "Those that this machine runs, lowest first.");
  m.def("force_isa", &force_isa, py::arg("name"), "Use this instruction set from now on (sets ONEPASS_ISA for the process).");
  m.def("ceilings", &ceilings, py::arg("threads") = 1, py::arg("seconds") = 0.1, py::arg("bytes") = int64_t{1} << 28,
        "Measured: float32 multiply-adds per second ('fma'), accurate float32 reciprocals per second ('reciprocal') and bytes read per "
        "second from `bytes` of memory ('read'), all threads together.");
  m.def("cuda_launches", &cuda_launches, py::arg("op"), py::arg("sizes"), py::arg("dtype"), py::arg("processors"), py::arg("capability"),
        py::arg("queries") = 0, py::arg("kept") = py::none(), py::arg("of_query") = true,
        "The launches of an op's CUDA kernels for sizes B, H, T, S, A, D; none where no kernel takes them. `kept`: the dtype of a step's "
        "memory, if another. `of_query`: whether additive_backward is asked for the query's gradient.");
  m.def("build", &build,
        "Compiler, flags, the torch built against, the version, and the compute capabilities built for or why there are none.");
}

}  // namespace onepass
