"""Kernels as nvcc compiles them for sm_80, run on the PTX machine against numpy; and their bugs, seeded into the compiled text."""

import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from ptx import Fault, Machine, Output, Struct, Traffic, parse
from ptx.machine import Argument
from ptx.rounding import Array

NVCC = shutil.which("nvcc")
pytestmark = pytest.mark.skipif(NVCC is None, reason="needs nvcc, to compile kernels to PTX")

SOURCE = r"""
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cassert>

template <typename F> __device__ float warp_reduce(float value, F combine) {
  for (int distance = 16; distance; distance /= 2) value = combine(value, __shfl_xor_sync(~0u, value, distance));
  return value;
}

extern "C" __global__ void matmul(const float* a, const float* b, float* c, int m, int n, int k) {
  __shared__ float tile_a[16][16], tile_b[16][16];
  int x = threadIdx.x, y = threadIdx.y, row = blockIdx.y * 16 + y, column = blockIdx.x * 16 + x;
  float sum = 0;
  for (int start = 0; start < k; start += 16) {
    tile_a[y][x] = row < m && start + x < k ? a[row * k + start + x] : 0;
    tile_b[y][x] = start + y < k && column < n ? b[(start + y) * n + column] : 0;
    __syncthreads();
    for (int i = 0; i < 16; ++i) sum += tile_a[y][i] * tile_b[i][x];
    __syncthreads();
  }
  if (row < m && column < n) c[row * n + column] = sum;
}

extern "C" __global__ void total(const float* values, float* sum, int count) {
  __shared__ float warps[4];
  float own = 0;
  for (int i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) own += values[i];
  own = warp_reduce(own, [](float x, float y) { return x + y; });
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = own;
  __syncthreads();
  if (threadIdx.x < 32) {
    own = warp_reduce(threadIdx.x < 4 ? warps[threadIdx.x] : 0.0f, [](float x, float y) { return x + y; });
    if (threadIdx.x == 0) atomicAdd(sum, own);
  }
}

extern "C" __global__ void softmax(const __nv_bfloat16* scores, __nv_bfloat16* weights, int columns) {
  __shared__ float highest[4], sums[4];
  const __nv_bfloat16* row = scores + blockIdx.x * columns;
  float most = -INFINITY, sum = 0;
  for (int i = threadIdx.x; i < columns; i += 128) most = fmaxf(most, __bfloat162float(row[i]));
  most = warp_reduce(most, [](float x, float y) { return fmaxf(x, y); });
  if (threadIdx.x % 32 == 0) highest[threadIdx.x / 32] = most;
  __syncthreads();
  most = fmaxf(fmaxf(highest[0], highest[1]), fmaxf(highest[2], highest[3]));
  for (int i = threadIdx.x; i < columns; i += 128) sum += expf(__bfloat162float(row[i]) - most);
  sum = warp_reduce(sum, [](float x, float y) { return x + y; });
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = sums[0] + sums[1] + sums[2] + sums[3];
  for (int i = threadIdx.x; i < columns; i += 128)
    weights[blockIdx.x * columns + i] = __float2bfloat16(expf(__bfloat162float(row[i]) - most) / sum);
}

// Column sums of tiles of 64 float4, each turned round in shared memory while the next is on its way.
extern "C" __global__ void pipeline(const float4* values, float4* sums, int tiles) {
  extern __shared__ float4 stages[];
  int t = threadIdx.x;
  float4 sum = {0, 0, 0, 0};
  __pipeline_memcpy_async(&stages[t], &values[t], 16);
  __pipeline_commit();
#pragma unroll 1
  for (int i = 0; i < tiles; ++i) {
    if (i + 1 < tiles) __pipeline_memcpy_async(&stages[(i + 1) % 2 * 64 + t], &values[(i + 1) * 64 + t], 16);
    __pipeline_commit();
    __pipeline_wait_prior(1);
    __syncthreads();
    float4 other = stages[i % 2 * 64 + 63 - t];
    sum.x += other.x; sum.y += other.y; sum.z += other.z; sum.w += other.w;
    __syncthreads();
  }
  sums[t] = sum;
}

struct Row { const float* data; long long stride; int count; };
struct Sum { Row row; float* total; short weight; };

extern "C" __global__ void weighted_sum(const __grid_constant__ Sum args) {
  float sum = 0;
  for (int i = 0; i < args.row.count; ++i) sum += args.row.data[i * args.row.stride];
  *args.total = sum * args.weight;
}

// What compilers do with stacks, tables, integer division, half precision and asserts.
extern "C" __global__ void mixed(const float* values, float* results, int count, int divisor) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  assert(divisor != 0);
  if (i >= count) return;
  float stack[8];
  for (int j = 0; j < 8; ++j) stack[(j * 5 + i) % 8] = values[i] * j;
  __half2 pair = __hfma2(__float2half2_rn(values[i]), __floats2half2_rn(2.0f, 3.0f), __float2half2_rn(1.0f));
  float sum = stack[i / divisor % 8] + __low2float(pair) + __high2float(pair);
  results[i] = sum + sinf(values[i] * 1e6f) + tanhf(values[i]) + logf(1 + fabsf(values[i])) + float(double(i) / divisor);
}
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("nvcc")
    (folder / "kernels.cu").write_text(SOURCE)
    command = [str(NVCC), "-ptx", "-arch=sm_80", "-lineinfo", "kernels.cu", "-o", "kernels.ptx"]
    subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True)
    return (folder / "kernels.ptx").read_text()


def seeded(text: str, name: str, pattern: str, number: int, replacement: str = "") -> str:
    """The module with the occurrence ``number`` of a pattern within a kernel replaced."""
    start = text.index(f".entry {name}(")
    found = list(re.finditer(pattern, text[start:]))[number]
    return text[: start + found.start()] + replacement + text[start + found.end() :]


def matmul(text: str, rows: int, columns: int, depth: int) -> tuple[Machine, Array, Array]:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((rows, depth)).astype(np.float32), rng.standard_normal((depth, columns)).astype(np.float32)
    c = np.empty((rows, columns), np.float32)
    machine = Machine(parse(text, "matmul"))
    machine.launch((-(-columns // 16), -(-rows // 16)), (16, 16), [a, b, Output(c), rows, columns, depth])
    return machine, c, a.astype(np.float64) @ b


def test_matmul(compiled: str) -> None:
    machine, c, exact = matmul(compiled, 21, 35, 40)
    assert not machine.findings
    np.testing.assert_allclose(c, exact, atol=1e-5)
    assert machine.global_bytes["matmul_param_0"] == Traffic(21 * 40 * 4 * 3, 0)  # once for each block of columns
    assert machine.global_bytes["matmul_param_2"] == Traffic(0, 21 * 35 * 4)
    assert machine.counts["fma.f32"] == 6 * 8 * 48  # blocks, warps, depth rounded up


@pytest.mark.parametrize("number", [0, 1])
def test_matmul_without_a_barrier(compiled: str, number: int) -> None:
    machine, _, _ = matmul(seeded(compiled, "matmul", r"bar\.sync\s+0;", number), 16, 16, 32)
    assert {finding.kind for finding in machine.findings} == {"shared race"}
    assert all(finding.line.startswith("kernels.cu:") and "kernels.cu:" in finding.other for finding in machine.findings)


def test_matmul_without_its_bounds(compiled: str) -> None:
    """The comparison of rows in front of the store is always true."""
    start = compiled.index(".entry matmul(")
    store = compiled.index("st.global.f32", start)
    branch = list(re.finditer(r"@%p\d+ bra", compiled[start:store]))[-1]
    broken = compiled[: start + branch.start()] + "// " + compiled[start + branch.start() :]
    with pytest.raises(Fault, match="global access out of bounds"):
        matmul(broken, 20, 16, 16)


def test_reduction(compiled: str) -> None:
    """Blocks add to one cell by atomics."""
    values = np.random.default_rng(1).standard_normal(1000).astype(np.float32)
    result = np.zeros(1, np.float32)
    machine = Machine(parse(compiled, "total"))
    machine.launch(3, 128, [values, result, 1000])
    assert not machine.findings
    np.testing.assert_allclose(result, values.astype(np.float64).sum(keepdims=True), atol=1e-5)
    assert machine.counts["shfl"] == 3 * (4 + 1) * 5
    assert machine.global_bytes["total_param_0"] == Traffic(4000, 0)
    with pytest.raises(Fault, match="global access out of bounds"):
        machine.launch(3, 128, [values, result, 1001])
    broken = Machine(parse(seeded(compiled, "total", r"bar\.sync\s+0;", 0), "total"))
    broken.launch(3, 128, [values, result, 1000])
    assert {finding.kind for finding in broken.findings} == {"shared race"}
    start = compiled.index(".entry total(")
    added = re.search(r"(?:atom|red)\.global\.add\.f32\s+(?:%f\d+, )?(\[.*?\], %f\d+);", compiled[start:])
    assert added is not None
    plain = compiled[: start + added.start()] + f"st.global.f32 {added[1]};" + compiled[start + added.end() :]
    broken = Machine(parse(plain, "total"))
    broken.launch(3, 128, [values, result, 1000])
    assert [finding.kind for finding in broken.findings] == ["race between blocks"]


def softmax(text: str, approximate: bool = False) -> tuple[Machine, Array, Array]:
    scores = torch.randn(3, 200, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = np.empty((3, 200), np.int16)
    machine = Machine(parse(text, "softmax"), approximate=approximate)
    machine.launch(3, 128, [scores.view(torch.int16).numpy(), Output(weights), 200])
    return machine, torch.from_numpy(weights).view(torch.bfloat16).double().numpy(), scores.double().softmax(1).numpy()


def test_softmax(compiled: str) -> None:
    """In bf16, exactly and with approximate instructions that are off."""
    for approximate in (False, True):
        machine, weights, exact = softmax(compiled, approximate)
        assert not machine.findings
        np.testing.assert_allclose(weights, exact, rtol=2**-8)
    for number in range(2):
        machine, _, _ = softmax(seeded(compiled, "softmax", r"bar\.sync\s+0;", number))
        assert {finding.kind for finding in machine.findings} <= {"shared race", "uninitialised shared read"}
        assert machine.findings


def pipeline(text: str) -> tuple[Machine, Array, Array]:
    values = np.random.default_rng(2).standard_normal((5, 64, 4)).astype(np.float32)
    sums = np.empty((64, 4), np.float32)
    machine = Machine(parse(text, "pipeline"))
    machine.launch(1, 64, [values, Output(sums), 5], dynamic_shared=2048)
    return machine, sums, values.astype(np.float64).sum(0)[::-1]


def test_double_buffering(compiled: str) -> None:
    machine, sums, exact = pipeline(compiled)
    assert not machine.findings
    np.testing.assert_allclose(sums, exact, atol=1e-5)
    for number in range(2):
        machine, _, _ = pipeline(seeded(compiled, "pipeline", r"bar\.sync\s+0;", number))
        assert {finding.kind for finding in machine.findings} == {"shared race"}
    machine, _, _ = pipeline(seeded(compiled, "pipeline", r"wait_group\s+1;", 0, "wait_group 2;"))
    assert "shared access during a copy" in {finding.kind for finding in machine.findings}


def test_structs_by_value(compiled: str) -> None:
    """Laid out as C++ does, with pointers into buffers."""
    values, total = np.arange(10, dtype=np.float32), np.empty(1, np.float32)
    row = Struct({"data": (values, 4), "stride": np.int64(3), "count": np.int32(3)})
    machine = Machine(parse(compiled, "weighted_sum"))
    machine.launch(1, 1, [Struct({"row": row, "total": Output(total), "weight": np.int16(2)})])
    assert not machine.findings
    assert total[0] == 2 * (1 + 4 + 7)
    assert machine.global_bytes["weighted_sum_param_0.row.data"] == Traffic(12, 0)


def test_what_else_compilers_emit(compiled: str) -> None:
    values = np.random.default_rng(3).standard_normal(70).astype(np.float32)
    results = np.empty(70, np.float32)
    arguments: list[Argument] = [values, Output(results), 70, 3]
    machine = Machine(parse(compiled, "mixed"))
    machine.launch(2, 64, arguments)
    assert not machine.findings
    i = np.arange(70)
    inverse = np.array([next(j for j in range(8) if (j * 5 + lane) % 8 == lane // 3 % 8) for lane in i])
    half = values.astype(np.float16).astype(np.float64)
    pair = sum((half * factor + 1).astype(np.float16).astype(np.float64) for factor in (2, 3))
    big = (values * np.float32(1e6)).astype(np.float64)
    expected = values.astype(np.float64) * inverse + pair + np.sin(big) + np.tanh(values) + np.log1p(np.abs(values)) + i / 3
    np.testing.assert_allclose(results, expected, rtol=1e-5, atol=1e-5)
    assert machine.counts["ld.local"] or machine.counts["st.local"]
