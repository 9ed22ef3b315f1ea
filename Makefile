# `make demo` and `make test` do everything from a fresh clone; see README.md.
PYTHON ?= python3
# Any torch from 2.6 on works; this one is what the numbers of this repository were measured with.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test gpu-test lint format bench cuda-resources clean

demo: $(READY)
	$(BIN)/python -m examples.demo

test: $(READY)
	$(BIN)/python -m pytest

# Plans against the product's own kernels; skipped where there is no GPU.
gpu-test: $(READY)
	$(BIN)/python -m pytest -rs tests/tensorrt/test_on_gpu.py

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

bench: $(READY)
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/latency.py --shape tiny

# Registers, shared memory and occupancy of the CUDA kernels; fails where registers are spilled.
cuda-resources: $(READY)
	$(BIN)/python cmake/cuda_resources.py

# The build tools live in the environment and the build is not isolated, so that an import can rebuild what changed.
$(READY): pyproject.toml CMakeLists.txt cmake/cpu_kernels.cmake cmake/cuda_kernels.cmake
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpn_rt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'scikit-build-core>=0.11' 'pybind11>=2.13' 'cmake>=3.24' ninja
	$(BIN)/python -m pip install --quiet --disable-pip-version-check '$(TORCH)'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-build-isolation -e '.[dev]'
	touch $(READY)

clean:
	rm -rf $(VENV) build dist
