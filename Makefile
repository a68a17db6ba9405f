# Two commands do everything on a fresh machine: `make demo` and `make test`. Both first make .venv and install the package into it.
PYTHON ?= python3
TORCH ?= torch==2.13.0
ARCHS ?= 80
VENV := .venv
BIN := $(VENV)/bin

# The Triton that torch 2.13 brings where it is built for GPUs; the environment has the newest.
OLDER_TRITON := triton==3.7.1
OLDER := PYTHONPATH=$(VENV)/older-triton

# What goes before the tests on a GPU's stand-in (tests/stand_in_gpu.py), which needs nvcc.
STAND_IN := test "$$(uname)" != Linux || { ! command -v nvcc > /dev/null && echo "no nvcc: no tests on a GPU's stand-in"; } ||

# An environment under other conditions is made anew.
CONDITIONS := $(PYTHON) $(TORCH) $(ARCHS)
ifneq ($(shell cat $(VENV)/conditions 2> /dev/null),$(CONDITIONS))
  ANEW := anew
endif

SOURCES := setup.py pyproject.toml python/onepass/_version.py $(shell find csrc -type f)

.PHONY: demo test lint peers clean anew

demo: $(VENV)/installed
	$(BIN)/python -m onepass info
	$(BIN)/python -m onepass bench --family additive --family multiplicative --shapes NMT --shapes summarisation --rounds 3 --html benchmark.html
	$(BIN)/python -m onepass train examples/g2p/configs/demo.toml --output g2p-demo $(if $(wildcard g2p-demo/checkpoint.safetensors),--resume)
	$(BIN)/python -m onepass evaluate g2p-demo --json g2p-demo/result.json --picture g2p-demo/alignment.png

test: $(VENV)/installed $(VENV)/older-triton lint
	$(BIN)/python -m pytest -n 2 -q
	$(BIN)/python -m pytest -q benchmarks -k "small-float32 and not torch.compile" --benchmark-disable
	test "$$(uname)" != Linux || TRITON_INTERPRET=1 $(BIN)/python -m pytest -n 2 -q --backend triton
	test "$$(uname)" != Linux || $(OLDER) $(BIN)/python -m pytest -n 2 -q tests/test_triton_compile.py tests/test_triton_ptx.py
	$(STAND_IN) $(OLDER) STAND_IN_GPU=80 $(BIN)/python -m pytest -n 2 -q tests/gpu
	$(STAND_IN) STAND_IN_GPU=90 $(BIN)/python -m pytest -n 2 -q tests/gpu/test_stand_in.py

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/mypy python/onepass benchmarks --exclude '/(gpu|kernels)/|gpuless\.py|onepass/benchmarks/'
	MYPYPATH=benchmarks $(BIN)/mypy --explicit-package-bases benchmarks/gpuless.py benchmarks/gpu
	$(BIN)/mypy examples/g2p/results.py
	$(BIN)/mypy --strict tests/ptx tests/instructions.py

# The layers of other libraries, for `.venv-peers/bin/python -m onepass bench`. An environment of their own, for CPython 3.11.
peers:
	$(MAKE) VENV=.venv-peers .venv-peers/installed
	.venv-peers/bin/python -m pip install -q --no-deps -r benchmarks/peers.txt
	.venv-peers/bin/python -m onepass.benchmarks.check_peers

# torch first and by itself: the build takes its headers from the environment (see setup.py). CUDA kernels, where there is nvcc, are built for
# one architecture here, which newer GPUs translate.
$(VENV)/installed: $(SOURCES) $(ANEW)
	$(PYTHON) -m venv $(if $(ANEW),--clear) $(VENV)
	$(BIN)/python -m pip install -q "$(TORCH)"
	$(BIN)/python -m pip install -q "setuptools>=77" "pybind11>=2.13" wheel
	ONEPASS_CPU=1 ONEPASS_CUDA_ARCHS="$(ARCHS)" $(BIN)/python -m pip install -q --no-build-isolation -e ".[test,seq2seq]"
	echo "$(CONDITIONS)" > $(VENV)/conditions
	touch $@

$(VENV)/older-triton: $(VENV)/installed
	test "$$(uname)" != Linux || $(BIN)/python -m pip install -q --no-deps --upgrade --target $@ "$(OLDER_TRITON)"
	touch $@

clean:
	rm -rf $(VENV) .venv-peers build dist python/*.egg-info python/onepass/*.so
