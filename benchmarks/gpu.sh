#!/usr/bin/env bash
# What only a GPU can show: the tests on it, its sanitizer over a small case, and the side-by-side table. Where there is none it says so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python}

if ! "$python" -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then
  echo "no GPU here: nothing was run ($("$python" -c 'import torch; print("torch", torch.__version__)'))"
  exit 0
fi
"$python" -m pytest -q tests/gpu

small='import torch, onepass
query, keys, values = (torch.randn(2, length, 16, device="cuda", requires_grad=True) for length in (3, 5, 5))
v = torch.randn(16, device="cuda", requires_grad=True)
for context, _ in (onepass.additive_attention(query, keys, values, v), onepass.multiplicative_attention(query, keys, values)):
    context.sum().backward()
torch.cuda.synchronize()'
if command -v compute-sanitizer > /dev/null; then
  for tool in memcheck racecheck; do
    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool "$tool" --error-exitcode 1 "$python" -c "$small"
  done
else
  echo "compute-sanitizer is not on the PATH (it comes with the CUDA toolkit): memcheck and racecheck were not run"
fi

name=$("$python" -c 'import re, torch; print(re.sub(r"\W+", "-", torch.cuda.get_device_name()).strip("-"))')
"$python" -m onepass bench --device cuda --dtype float32 --dtype bfloat16 --json "bench-$name.json" --html "bench-$name.html"
echo "in bench-$name.json and bench-$name.html"
