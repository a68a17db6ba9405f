// Every kernel over awkward shapes, on buffers of exactly the right size: built with AddressSanitizer and UndefinedBehaviorSanitizer,
// it fails on the first byte read or written outside. Results are checked for being finite; the Python tests check the values.
#include <cmath>
#include <cstdio>
#include <memory>
#include <vector>

#define ONEPASS_ISA tested
#include "../../csrc/cpu/isa.h"
#include "../../csrc/cpu/kernels.h"
#include "../../csrc/cpu/scratch.h"

using namespace onepass;

// Memory that is not there is refused, as it is without a sanitizer.
extern "C" const char* __asan_default_options() { return "allocator_may_return_null=1"; }

namespace {

uint32_t state = 1;
float uniform() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.f;
}

struct Buffers {
  std::vector<std::unique_ptr<char[]>> all;

  Tensor tensor(int64_t B, int64_t H, int64_t N, int64_t W, Dtype dtype, float scale = 1) {
    const int64_t count = B * H * N * W;
    all.emplace_back(new char[static_cast<size_t>(count * size_of(dtype))]);
    char* data = all.back().get();
    for (int64_t i = 0; i < count; ++i) {
      const float x = scale * uniform();
      uint32_t bits;
      __builtin_memcpy(&bits, &x, 4);
      const auto bf16 = static_cast<uint16_t>(bits >> 16);
      const auto f16 = static_cast<uint16_t>((state >> 1) & 0xbbffu);  // any finite number below 1
      const double wide = x;
      const void* from = dtype == Dtype::f32 ? static_cast<const void*>(&x) : dtype == Dtype::f64 ? &wide
                                                                          : dtype == Dtype::bf16  ? &bf16
                                                                                                  : static_cast<const void*>(&f16);
      __builtin_memcpy(data + i * size_of(dtype), from, static_cast<size_t>(size_of(dtype)));
    }
    return {data, H * N * W, N * W, W, dtype};
  }
};

const Executor serial{3, false, [](const Executor&, int64_t count, void (*task)(void*, int64_t), void* context) {
                        for (int64_t i = 0; i < count; ++i) task(context, i);
                      }};

bool finite(const Tensor& x, const Shape& s, int64_t N, int64_t W) {
  for (int64_t i = 0; i < s.B * s.H * N * W; ++i) {
    if (x.dtype == Dtype::f32 && !std::isfinite(static_cast<float*>(x.data)[i])) return false;
    if (x.dtype == Dtype::f64 && !std::isfinite(static_cast<double*>(x.data)[i])) return false;
  }
  return true;
}

bool run(const Kernels& kernels, const Shape& s, Dtype dtype, int visibility, float scale) {
  Buffers b;
  const Dtype sum = dtype == Dtype::f64 ? Dtype::f64 : Dtype::f32;
  std::vector<int64_t> lengths, firsts;
  std::vector<uint8_t> mask;
  Visibility v;
  if (visibility & 1) {
    for (int64_t i = 0; i < s.B * s.T; ++i) lengths.push_back((i * 5) % (s.S + 1));
    v.lengths = lengths.data();
    v.lengths_batch = s.T;
    v.lengths_step = 1;
  }
  if (visibility & 4) {  // spans: empty, moving, jumping
    for (int64_t i = 0; i < s.B * s.T; ++i) {
      firsts.push_back((i * 3 + (i % 5 == 4 ? 7 : 0)) % (s.S + 1));
      if (!(visibility & 1)) lengths.push_back(i % 7 == 6 ? 0 : (firsts.back() + 4) % (s.S + 1));
    }
    v.lengths = lengths.data();
    v.firsts = firsts.data();
    v.lengths_batch = s.T;
    v.lengths_step = 1;
  }
  if (visibility & 2) {
    for (int64_t i = 0; i < s.B * s.H * s.T * s.S; ++i) mask.push_back(uniform() > -0.3f);
    v.mask = mask.data();
    v.mask_batch = s.H * s.T * s.S;
    v.mask_head = s.T * s.S;
    v.mask_step = s.S;
    v.mask_source = 1;
  }
  const Tensor query = b.tensor(s.B, s.H, s.T, s.A, dtype, scale), keys = b.tensor(s.B, s.H, s.S, s.A, dtype, scale);
  const Tensor values = b.tensor(s.B, s.H, s.S, s.D, dtype), context = b.tensor(s.B, s.H, s.T, s.D, dtype);
  const Tensor weights = b.tensor(s.B, s.H, s.T, s.S, sum), scores = b.tensor(s.B, s.H, s.T, s.S, dtype);
  const Tensor scratch = b.tensor(s.B, s.H, s.T, s.S, sum);
  const Tensor grad_context = b.tensor(s.B, s.H, s.T, s.D, dtype), grad_weights = b.tensor(s.B, s.H, s.T, s.S, sum);
  const Tensor grad_query = b.tensor(s.B, s.H, s.T, s.A, dtype), grad_keys = b.tensor(s.B, s.H, s.S, s.A, dtype);
  const Tensor grad_values = b.tensor(s.B, s.H, s.S, s.D, dtype), partial = b.tensor(s.B, s.H, 1, s.A, sum);
  Tensor vector = b.tensor(1, s.H, 1, s.A, dtype), grad_v = b.tensor(1, s.H, 1, s.A, dtype);
  vector.head = grad_v.head = s.A;
  const auto all_finite = [&] {
    return finite(context, s, s.T, s.D) && finite(grad_query, s, s.T, s.A) && finite(grad_keys, s, s.S, s.A) &&
           finite(grad_values, s, s.S, s.D);
  };
  kernels.additive_forward({s, query, keys, values, vector, {}, v, context, weights}, serial);
  kernels.additive_forward({s, query, keys, {}, vector, {}, v, {}, scores, true}, serial);
  kernels.additive_backward({s, query, keys, values, vector, v, weights, grad_context, grad_weights, scratch, partial, grad_query,
                             grad_keys, grad_values, grad_v},
                            serial);
  bool ok = all_finite();
  kernels.multiplicative_forward({s, 0.5, query, keys, values, v, context, weights}, serial);
  kernels.multiplicative_backward(
      {s, 0.5, query, keys, values, v, {}, grad_context, grad_weights, grad_query, grad_keys, grad_values}, serial);
  ok = ok && all_finite();
  kernels.multiplicative_backward(
      {s, 0.5, query, keys, values, v, weights, grad_context, {}, grad_query, grad_keys, grad_values}, serial);
  ok = ok && all_finite();

  // Steps over a memory, which all queries see alike; its exponentials in either width.
  const int64_t stride = (s.A + 15) / 16 * 16;
  v.mask_step = 0;
  Visibility own = v;  // the memory's: without spans
  own.firsts = nullptr;
  own.lengths_step = 0;
  if (v.firsts == nullptr) v = own;
  for (const Dtype kept : {sum, Dtype::bf16}) {
    if (dtype == Dtype::f64 && kept == Dtype::bf16) continue;
    const Dtype as_kept = kept == Dtype::bf16 ? kept : dtype;
    const Tensor rows = b.tensor(s.B, s.H, s.S, s.D, as_kept), others = b.tensor(s.B, s.H, s.S, s.A, as_kept, scale);
    Prepared memory{b.tensor(s.B, s.H, s.S, stride, kept), b.tensor(s.B, s.H, s.S, 2, sum), b.tensor(1, s.H, 1, 3 * stride + 8, sum), stride};
    memory.weighting.head = 3 * stride + 8;
    Shape one = s;
    one.T = 1;
    kernels.additive_prepare({one, keys, vector, visibility & 4 ? Visibility{} : own, memory}, serial);
    kernels.additive_forward({s, query, keys, rows, vector, memory, v, context, weights}, serial);
    kernels.additive_step_backward({s, 1.0, query, keys, rows, memory, v, weights, grad_context, grad_weights, grad_query, scratch}, serial);
    ok = ok && all_finite();
    kernels.multiplicative_forward({s, 0.5, query, others, rows, v, context, weights}, serial);
    kernels.multiplicative_step_backward({s, 0.5, query, others, rows, {}, v, weights, grad_context, {}, grad_query, scratch}, serial);
    const Tensor raw = b.tensor(s.B, s.H, s.T, s.S, dtype);
    kernels.additive_forward({s, query, keys, {}, vector, memory, v, {}, raw, true}, serial);
    kernels.multiplicative_forward({s, 0.5, query, others, {}, v, {}, raw, true}, serial);
    kernels.additive_step_backward({s, 1.0, query, keys, rows, memory, v, {}, {}, grad_weights, grad_query, scratch}, serial);
    kernels.source_sums({s, v, weights, grad_context, grad_values}, serial);
    const Tensor given = b.tensor(s.B, s.H, s.T, s.S, dtype);
    kernels.weighted_values({s, given, rows, v, context}, serial);
    kernels.weighted_values_backward({s, given, rows, v, grad_context}, serial);
    ok = ok && all_finite();
    __builtin_memset(rows.data, 0xff, static_cast<size_t>(s.D * size_of(rows.dtype)));  // a row of NaN, that some see
    kernels.weighted_values({s, given, rows, v, context}, serial);
  }
  return ok;
}

// What could not be had leaves working memory as it was: the next call, even a larger one, gets all that it asks for.
bool scratch_outlives_a_failure() {
  for (const int64_t before : {0, 1000, 3 << 20}) {
    tested::Scratch scratch;
    if (before > 0) scratch.take<char>(before);
    try {
      scratch.take<char>(int64_t{1} << 60);
      return false;
    } catch (const std::bad_alloc&) {
    }
    scratch.reset();
    for (int64_t bytes : {100, 8 << 20, 1 << 20}) __builtin_memset(scratch.take<char>(bytes), 1, static_cast<size_t>(bytes));
  }
  return true;
}

}  // namespace

int main() {
  if (!scratch_outlives_a_failure()) return std::printf("no memory was refused\n"), 1;
  const Kernels* tables[] = {&kernels_baseline,
#if defined(__x86_64__)
                             &kernels_avx2, &kernels_avx512
#endif
  };
  const Shape shapes[] = {{1, 1, 1, 1, 1, 1},  {2, 1, 5, 7, 33, 9},    {1, 2, 9, 13, 130, 17}, {2, 1, 1, 37, 64, 65},
                          {1, 1, 6, 3, 16, 1}, {1, 1, 35, 101, 20, 70}, {2, 1, 1, 101, 20, 1030}, {1, 1, 3, 5, 257, 130}, {1, 3, 2, 4, 1, 3},
                          {1, 1, 5, 300, 20, 3}, {1, 1, 3, 701, 20, 50}};  // the last and the one of 35 queries are shared out
  int runs = 0;
  for (int isa = 0; isa <= static_cast<int>(best_isa()); ++isa)
    for (const Shape& shape : shapes)
      for (const Dtype dtype : {Dtype::f32, Dtype::f64, Dtype::bf16, Dtype::f16})
        for (const int visibility : {0, 1, 2, 3, 4, 7})
          for (const float scale : {0.001f, 1.f, 20.f, 1000.f}) {
            if (!run(*tables[isa], shape, dtype, visibility, scale)) {
              std::printf("not finite: %s, dtype %d, visibility %d, scale %g, B %ld H %ld T %ld S %ld A %ld D %ld\n", isa_names[isa],
                          static_cast<int>(dtype), visibility, static_cast<double>(scale), static_cast<long>(shape.B),
                          static_cast<long>(shape.H), static_cast<long>(shape.T), static_cast<long>(shape.S),
                          static_cast<long>(shape.A), static_cast<long>(shape.D));
              return 1;
            }
            ++runs;
          }
  std::printf("%d runs clean\n", runs);
  return 0;
}
