# `make` installs, `make test` tests, on a machine with nothing but Python >= 3.10 and a C++ compiler. The second time is quick.
#
#   VENV=DIR       the environment, created if it is not there; PyTorch in it is used as it is
#   PYTHON=python  the interpreter that creates it
#   TORCH=...      which PyTorch to install if there is none
#   ARGS=...       options for pytest, the demo or the benchmarks
#   TAPS_FAST_EXT  require (here, the default), or auto: go on without the C++ kernels if they cannot be built

VENV   ?= .venv
PYTHON ?= python3
TORCH  ?= torch==2.13.0
export TAPS_FAST_EXT ?= require

PY      := $(VENV)/bin/python
PIP     := $(PY) -m pip --disable-pip-version-check
EXT     := taps_fast/_C.abi3.so
SOURCES := $(wildcard csrc/* csrc/*/*)
# Oldest and newest, both tested; pyproject.toml's range is theirs.
TRITONS := 3.6.0 3.9.0

install: $(VENV)/.taps_fast_test $(EXT)

$(PY):
	$(PYTHON) -m venv $(VENV)

$(VENV)/.torch: | $(PY)
	@$(PY) -c "import torch" 2>/dev/null || $(PIP) install "$(TORCH)"
	@touch $@

# The extra named %. The extension is built apart, because pip would compile all of it again each time.
$(VENV)/.taps_fast_%: pyproject.toml | $(VENV)/.torch
	TAPS_FAST_EXT=off $(PIP) install -e ".[$*]"
	@touch $@

$(EXT): setup.py $(SOURCES) | $(VENV)/.torch
	$(PY) setup.py -q build_ext --inplace

# In two processes, as most tests keep one core busy. Each has OpenMP's threads for all cores, so that what runs on
# several threads is tested so; they must sleep while they wait, or they spin on the core that the other works on.
# ARGS="-n 0" runs one process, as plain pytest does, for a debugger.
test: install
	OMP_WAIT_POLICY=passive $(PY) -m pytest -n 2 --dist worksteal $(ARGS)

demo: $(VENV)/.taps_fast_demo $(EXT)
	$(PY) -m taps_fast demo $(ARGS)

bench: install
	$(PY) -m benchmarks.run $(ARGS)

# On a CUDA machine, with the Python that holds its PyTorch, and without a network; see benchmarks/gpu.py.
gpu:
	$(PYTHON) -m benchmarks.gpu $(ARGS)

lint: install $(VENV)/.taps_fast_dev
	$(PY) -m ruff format --check
	$(PY) -m ruff check
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run --Werror $(filter %.h %.cpp %.cu %.cuh,$(SOURCES))

# The CPU kernels' tests, on kernels that check every address and every undefined operation.
asan: SANITIZE := -fsanitize=address,undefined -fno-sanitize-recover=undefined
asan: $(VENV)/.taps_fast_test
	CXXFLAGS="-O1 -g -fno-omit-frame-pointer $(SANITIZE)" LDFLAGS="$(SANITIZE)" \
	  $(PY) setup.py -q build --build-base build/asan --build-lib build/asan/lib
	ASAN_OPTIONS=detect_leaks=0:alloc_dealloc_mismatch=0 UBSAN_OPTIONS=print_stacktrace=1 \
	  LD_PRELOAD="$$($(CXX) -print-file-name=libasan.so) $$($(CXX) -print-file-name=libubsan.so)" \
	  PYTHONPATH=build/asan/lib $(VENV)/bin/pytest $(or $(ARGS),tests/test_ops.py $(wildcard tests/test_cpu*.py))

# The Triton tests and every kernel compiled for every chip, under each supported Triton, which is put in front of the
# environment's own. Compiling takes minutes.
test-triton: $(TRITONS:%=test-triton-%)

build/triton-%: | $(PY)
	$(PIP) install -q --no-deps --target $@ triton==$*

test-triton-%: install build/triton-%
	PYTHONPATH=build/triton-$* $(PY) -m pytest $(or $(ARGS),$(wildcard tests/test_triton*.py))
	PYTHONPATH=build/triton-$*:. $(PY) tests/aot.py

clean:
	rm -rf build *.egg-info taps_fast/*.so taps_fast/*_error.txt $(VENV)/.taps_fast_*

.PHONY: install test demo bench gpu lint asan test-triton clean
.DELETE_ON_ERROR:
.PRECIOUS: build/triton-% $(VENV)/.taps_fast_%
