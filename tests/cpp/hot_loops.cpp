// Runs each kernel of the AVX2 path on one batch entry and on two, and has callgrind write what each took: the difference is what an entry
// costs, set-up left out. Prints the compiler, then a line for each dump: its number, the kernel, entries, elements.
#include <valgrind/callgrind.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <vector>

#include "../../csrc/cpu/kernels.h"

using namespace onepass;

namespace {

const Executor serial{1, false, [](const Executor&, int64_t count, void (*task)(void*, int64_t), void* context) {
                        for (int64_t i = 0; i < count; ++i) task(context, i);
                      }};
const Kernels& kernels = kernels_avx2;

// Numbers in (-0.5, 0.5), aligned as torch's are: all pairs take the way that a trained model's take.
struct Buffers {
  std::vector<std::unique_ptr<void, decltype(&std::free)>> all;
  uint32_t state = 1;

  Tensor operator()(int64_t B, int64_t N, int64_t W) {
    const int64_t count = B * N * W;
    auto* data = static_cast<float*>(std::aligned_alloc(64, static_cast<size_t>(count * 4 + 63) / 64 * 64));
    all.emplace_back(data, &std::free);
    for (int64_t i = 0; i < count; ++i) {
      state = state * 1664525u + 1013904223u;
      data[i] = static_cast<float>(static_cast<int32_t>(state)) / 4294967296.f;
    }
    return {data, N * W, N * W, W, Dtype::f32};
  }
};

int dumps = 0;

template <class Kernel>
void count(const char* name, int64_t B, int64_t elements, const Kernel& kernel) {
  kernel();  // scratch grows in the first call
  CALLGRIND_ZERO_STATS;
  kernel();
  CALLGRIND_DUMP_STATS;
  std::printf("%d %s %ld %ld\n", ++dumps, name, static_cast<long>(B), static_cast<long>(elements));
}

void run(int64_t B) {
  constexpr int64_t T = 32, S = 48, A = 512, D = 512;
  Buffers tensor;
  const Shape s{B, 1, T, S, A, D}, one{B, 1, 1, S, A, D};
  const Tensor query = tensor(B, T, A), keys = tensor(B, S, A), values = tensor(B, S, D), context = tensor(B, T, D);
  const Tensor weights = tensor(B, T, S), scores = tensor(B, T, S), upstream = tensor(B, T, D);
  const Tensor grad_query = tensor(B, T, A), grad_keys = tensor(B, S, A), grad_values = tensor(B, S, D), partial = tensor(B, 1, A);
  const Tensor v = tensor(1, 1, A), grad_v = tensor(1, 1, A);
  const Prepared memory{tensor(B, S, A), tensor(B, S, 2), tensor(1, 1, 3 * A + 8), A};

  const int64_t all = B * T * S * A, step = B * S * A;
  count("additive_scores", B, all, [&] { kernels.additive_forward({s, query, keys, {}, v, {}, {}, {}, scores, true}, serial); });
  count("additive_forward", B, all, [&] { kernels.additive_forward({s, query, keys, values, v, {}, {}, context, weights}, serial); });
  count("additive_backward", B, all, [&] {
    kernels.additive_backward(
        {s, query, keys, values, v, {}, weights, upstream, {}, scores, partial, grad_query, grad_keys, grad_values, grad_v}, serial);
  });
  count("multiplicative_forward", B, all,
        [&] { kernels.multiplicative_forward({s, 1.0, query, keys, values, {}, context, weights}, serial); });
  count("multiplicative_backward", B, all, [&] {
    kernels.multiplicative_backward(
        {s, 1.0, query, keys, values, {}, weights, upstream, {}, grad_query, grad_keys, grad_values}, serial);
  });
  count("additive_prepare", B, step, [&] { kernels.additive_prepare({one, keys, v, {}, memory}, serial); });
  count("additive_step", B, step, [&] { kernels.additive_forward({one, query, keys, values, v, memory, {}, context, weights}, serial); });
  count("additive_step_backward", B, step, [&] {
    kernels.additive_step_backward({one, 1.0, query, keys, values, memory, {}, weights, upstream, {}, grad_query, scores}, serial);
  });
  count("multiplicative_step", B, step,
        [&] { kernels.multiplicative_forward({one, 1.0, query, keys, values, {}, context, weights}, serial); });
  count("multiplicative_step_backward", B, step, [&] {
    kernels.multiplicative_step_backward({one, 1.0, query, keys, values, {}, {}, weights, upstream, {}, grad_query, scores}, serial);
  });
  count("source_sums", B, all, [&] { kernels.source_sums({s, {}, weights, upstream, grad_values}, serial); });
}

}  // namespace

int main() {
#if defined(__clang__)
  std::printf("clang %d\n", __clang_major__);
#else
  std::printf("gcc %d\n", __GNUC__);
#endif
  run(1);
  run(2);
  return 0;
}
