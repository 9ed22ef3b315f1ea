# `make demo` and `make test` do everything from a fresh clone; see README.md.
PYTHON ?= python3
# Any torch from 2.6 on works; this one is what the numbers of this repository were measured with.
TORCH ?= torch==2.13.0
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_READY := $(VENV)/.demo-ready
READY := $(VENV)/.ready

.PHONY: demo test seeds test-harnesses sanitize fuzz gpu-quick gpu-quick-stand-in gpu-build gpu-test gpu-sanitize gpu-sanitize-all gpu-bench gpu-bench-ops gpu-bench-7b gpu-bench-13b lint format bench bench-peers soak cuda-resources clean

demo: $(DEMO_READY)
	$(BIN)/python -m examples.demo

# Two processes share the cores, so threads that wait must not spin. Modules are compiled once, not in each of some
# hundred processes, and pytest leaves out plugins of other packages, which it would compile and import in each.
TEST_PROCESSES ?= 2
test: $(READY)
	OMP_WAIT_POLICY=passive PYTHONDONTWRITEBYTECODE= PYTEST_DISABLE_PLUGIN_AUTOLOAD=1 $(BIN)/python -m pytest \
	  -p xdist.plugin -p _hypothesis_pytestplugin -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder \
	  $(PYTEST_OPTIONS)

# Every random test function of TESTS with SEEDS seeds, at most SECONDS_PER_FUNCTION for each.
SEEDS ?= 200
TESTS ?= tests
SECONDS_PER_FUNCTION ?= 60
seeds: $(READY)
	OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -p tests.seed_runs -n $(TEST_PROCESSES) --dist worksteal --tb=no \
	  -o tmp_path_retention_policy=failed --seeds $(SEEDS) --seconds-per-function $(SECONDS_PER_FUNCTION) \
	  $(PYTEST_OPTIONS) $(TESTS)

# Evaluation harnesses and clients that are large or want other versions than the other tests, in an environment of its
# own (0.8 GB) on top of theirs. torchvision is taken out again: PyPI's build does not fit torch's for CPUs.
HARNESSES := .venv-harnesses
test-harnesses: $(HARNESSES)/.ready
	DPN_RT_HARNESSES=1 OMP_WAIT_POLICY=passive $(HARNESSES)/bin/python -m pytest tests/harnesses \
	  -n $(TEST_PROCESSES) --dist loadfile --no-loadscope-reorder $(PYTEST_OPTIONS)

SITE_PACKAGES := -c 'import sysconfig; print(sysconfig.get_path("purelib"))'
$(HARNESSES)/.ready: $(READY)
	$(BIN)/python -m venv --clear --without-pip $(HARNESSES)
	echo "import site; site.addsitedir('$$($(BIN)/python $(SITE_PACKAGES))')" \
	  > "$$($(HARNESSES)/bin/python $(SITE_PACKAGES))/tests.pth"
	$(HARNESSES)/bin/python -m pip install --disable-pip-version-check --no-compile --prefer-binary \
	  '$(TORCH)' 'dpn_rt[harnesses]' || { echo "test-harnesses: the packages cannot be installed, see above" && exit 1; }
	$(HARNESSES)/bin/python -m pip uninstall --quiet --yes torchvision
	touch $@

# The CPU kernels under AddressSanitizer and UndefinedBehaviorSanitizer, with every instruction set of this processor.
sanitize: $(READY)
	$(BIN)/python cmake/sanitize.py

# Random changes of real inputs, SECONDS for each surface; `make test` does it for a second or two.
SECONDS ?= 60
fuzz: $(READY)
	DPN_RT_FUZZ_SECONDS=$(SECONDS) $(BIN)/python -m pytest $(PYTEST_OPTIONS) tests/fuzz

# The GPU targets use the Python, torch and CUDA that the machine has and download nothing: PYTHON is the one to use. Each
# ends within ten minutes: those of gpu-bench one by one, as their parts.
GPU_TESTS := tests/ops tests/device tests/backends/kernels tests/engine tests/sampling tests/backends/tensorrt/test_on_gpu.py
RESULTS := benchmarks/results
WITHIN_TIME := timeout 560

# Everything that can be learnt in nine minutes, written to the directory OUT; see docs/cuda.md.
OUT ?= build/gpu-quick
gpu-quick:
	$(PYTHON) -m benchmarks.gpu_quick --out $(OUT) $(GPU_OPTIONS)

# The same on the CPU with tiny sizes.
gpu-quick-stand-in: $(READY)
	$(BIN)/python -m benchmarks.gpu_quick --out $(OUT) --stand-in

gpu-build:
	$(PYTHON) cmake/build_in_place.py -D DPN_RT_CUDA=ON -D DPN_RT_WARNINGS_AS_ERRORS=OFF
	$(PYTHON) -c 'import torch; assert torch.cuda.is_available(), "torch sees no GPU"; print(torch.cuda.get_device_name())'

gpu-test: gpu-build
	$(PYTHON) -m benchmarks.gpu_quick.pytest_files -m gpu --seconds 540 $(GPU_TESTS)

# memcheck and racecheck of a chosen list; gpu-sanitize-all: TOOL (memcheck or racecheck) of all tests of kernels.
gpu-sanitize: gpu-build
	$(PYTHON) -m benchmarks.gpu_quick --out $(OUT) --steps sanitize

TOOL ?= memcheck
gpu-sanitize-all: gpu-build
	$(PYTHON) -m benchmarks.gpu_quick.pytest_files -m 'gpu and not hypothesis' --sanitizer $(TOOL) --seconds 540 tests/ops

gpu-bench: gpu-bench-ops gpu-bench-7b gpu-bench-13b
	$(PYTHON) benchmarks/document.py

gpu-bench-ops: gpu-build
	$(WITHIN_TIME) $(PYTHON) benchmarks/ops.py --device cuda --json $(RESULTS)/ops-cuda.json

# GPU_OPTIONS adds what takes longer: --compile, --tensorrt, --eager-batch 32.
GPU_LATENCY := $(WITHIN_TIME) $(PYTHON) benchmarks/latency.py --device cuda --batch 1 8 32 --mix 40-40-20 --eager-batch 8

gpu-bench-7b: gpu-build
	$(GPU_LATENCY) --shape llava-1.5-7b --json $(RESULTS)/llava-1.5-7b-cuda.json $(GPU_OPTIONS)

gpu-bench-13b: gpu-build
	$(GPU_LATENCY) --shape llava-1.5-13b --repeats 3 --json $(RESULTS)/llava-1.5-13b-cuda.json $(GPU_OPTIONS)

# mypy sees the package as the build lays it out, with builders/ as dpn_rt.builders.
TYPECHECK := rm -rf build/typecheck && mkdir -p build/typecheck && cp -r dpn_rt benchmarks examples pyproject.toml build/typecheck && \
  cp -r builders build/typecheck/dpn_rt && (cd build/typecheck && $(abspath $(BIN))/mypy --cache-dir ../mypy-cache)

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(TYPECHECK)
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format --dry-run --Werror

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	git ls-files '*.h' '*.cpp' '*.cu' '*.cuh' | xargs $(BIN)/clang-format -i

# Load, hostile clients, answers under tight caches and memory, against servers of the small trained model; about an hour.
SOAK_ENGINE := build/soak/tiny
soak: $(READY)
	$(BIN)/python -m dpn_rt.build --checkpoint examples/tiny_dpn/checkpoint --output $(SOAK_ENGINE) --dtype float32 --force
	$(BIN)/python -m benchmarks.soak --engine $(SOAK_ENGINE) --clients 64 --requests 2000
	$(BIN)/python -m benchmarks.hostile --engine $(SOAK_ENGINE) --json $(RESULTS)/hostile-tiny.json
	$(BIN)/python -m benchmarks.identity --engine $(SOAK_ENGINE) --clients 32 --requests 5000
	$(BIN)/python -m benchmarks.growth --engine $(SOAK_ENGINE) --json $(RESULTS)/growth-tiny.json

bench: $(READY)
	$(BIN)/python benchmarks/ops.py
	$(BIN)/python benchmarks/latency.py --shape tiny

# Other engines on the same weights, in an environment of its own (1.6 GB), and 12 GB of files beside it. torchvision is
# taken out again: PyPI's build does not fit torch's for CPUs, and the export does without.
PEERS := .venv-peers
bench-peers: $(READY)
	$(PYTHON) -m venv $(PEERS)
	$(PEERS)/bin/python -m pip install --disable-pip-version-check -r benchmarks/peers/requirements.txt
	$(PEERS)/bin/python -m pip uninstall --quiet --yes torchvision
	$(BIN)/python benchmarks/latency.py --shape llava-1b --routes 222 --batch 1 8 --subjects transformers dpn_rt \
	  --quantize int8 int4 --peers $(PEERS)/bin/python --cache build/peers --json $(RESULTS)/llava-1b-cpu-peers.json

# Registers, shared memory and occupancy of the CUDA kernels; fails where registers are spilled.
cuda-resources: $(READY)
	$(BIN)/python cmake/cuda_resources.py

# The demo needs no extra packages, and CUDA kernels, which take minutes to compile, only where there is a GPU.
$(DEMO_READY): PACKAGE = .
$(DEMO_READY): DPN_RT_CUDA = $(shell nvidia-smi > /dev/null 2>&1 && echo AUTO || echo OFF)
$(READY): PACKAGE = .[dev]
$(READY): DPN_RT_CUDA = AUTO

# The build tools live in the environment and the build is not isolated, so that an import can rebuild what changed.
$(DEMO_READY) $(READY): pyproject.toml CMakeLists.txt cmake/cpu_kernels.cmake cmake/cuda_kernels.cmake
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "dpn_rt needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check 'scikit-build-core>=0.11' 'pybind11>=2.13' 'cmake>=3.24' ninja
	$(BIN)/python -m pip install --disable-pip-version-check '$(TORCH)'
	@echo "compiling the kernels, a line for each file: about a minute on two cores, a few more with CUDA kernels"
	SKBUILD_CMAKE_DEFINE='DPN_RT_CUDA=$(DPN_RT_CUDA)' \
	  $(BIN)/python -m pip install --verbose --disable-pip-version-check --no-build-isolation -e '$(PACKAGE)'
	touch $(DEMO_READY) $@

# Only what this Makefile makes by default: VENV may be a directory that serves other projects too.
clean:
	rm -rf .venv build dist dpn_rt/_kernels.*.so
