# make help lists the targets. Everything runs inside .venv, which `make setup` fills; nothing else is touched.
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules --no-print-directory

PYTHON ?= python3
WORKERS ?= 2
ARGS ?=
PINNED_TORCH := $(shell grep -E '^torch==' constraints.txt)
TORCH ?= $(PINNED_TORCH)

VENV := .venv
STAMP := $(VENV)/.installed
PIP := $(VENV)/bin/python -m pip --disable-pip-version-check
# The editable build runs without isolation: later builds need the torch that is installed, not a second copy.
BUILD_REQUIRES := hatchling editables
KERNELS := src/dynaconv/lib/libdynaconv_kernels.so
OPS := src/dynaconv/lib/libdynaconv_ops.so
CXX ?= g++
KERNEL_FLAGS := -std=c++17 -O3 -fPIC -fopenmp -Wall -Wextra -Wno-psabi
# Built against torch 2.11's stable ABI, so that the library serves every later torch too.
OPS_FLAGS := -std=c++17 -O2 -fPIC -Wall -Wextra -fvisibility=hidden -DTORCH_TARGET_VERSION=0x020b000000000000
# Another torch than the pinned one chooses its own torchvision.
UNPINNED := $(if $(filter $(PINNED_TORCH),$(TORCH)),^torch==,^torch(vision)?==)

# A torch asked for by name is installed even where an older set-up is up to date.
ifneq ($(origin TORCH),file)
ifneq ($(TORCH),$(shell cat $(STAMP) 2>/dev/null))
.PHONY: $(STAMP)
endif
endif

.PHONY: help setup demo test lint format bench clean

help: ## list the targets
	@grep -hE '^[a-z]+:.*## ' $(MAKEFILE_LIST) | awk -F ':.*## ' '{printf "  make %-8s %s\n", $$1, $$2}'
	@echo '  Variables: PYTHON=python3.12 (set-up), TORCH="torch==2.12.0" (set-up), WORKERS=8 (test), ARGS="--help" (demo, test, bench)'

setup: $(STAMP) $(KERNELS) ## make .venv, install everything, build the kernels; instant when nothing changed
	@$(MAKE) $(OPS)

# Linked against no OpenMP runtime: the kernels use the one that torch has loaded. Without a compiler the package runs on
# PyTorch operations alone, so a failed build is told and does not stop the set-up.
OBJECTS := $(patsubst csrc/%.cpp,build/native/%.o,$(wildcard csrc/kernels/*.cpp csrc/plan/*.cpp))
HEADERS := $(wildcard csrc/kernels/*.h csrc/plan/*.h)

$(KERNELS): $(wildcard csrc/kernels/* csrc/plan/*)
	@mkdir -p $(@D)
	@if ! command -v $(CXX) >/dev/null; then echo "no C++ compiler ($(CXX)): using PyTorch operations instead of compiled kernels"; \
	else $(MAKE) -j$(WORKERS) $(OBJECTS) && $(CXX) -shared -o $@.new $(OBJECTS) && mv $@.new $@ || \
	    echo "the compiled kernels do not build here: using PyTorch operations instead"; fi

build/native/%.o: csrc/%.cpp $(HEADERS)
	@mkdir -p $(@D)
	@$(CXX) $(KERNEL_FLAGS) -c $< -o $@

include csrc/tests/rules.mk

# The kernels as torch operators; finds them beside itself, and torch where Python has loaded it.
$(OPS): $(wildcard csrc/torch/*) csrc/kernels/api.h $(KERNELS)
	@if [ -f $(KERNELS) ]; then \
	torch=$$($(VENV)/bin/python -c 'from importlib.util import find_spec; print(find_spec("torch").submodule_search_locations[0])') && \
	$(CXX) $(OPS_FLAGS) -Icsrc -isystem "$$torch/include" -shared $(wildcard csrc/torch/*.cpp) -o $@.new -L"$$torch/lib" -ltorch_cpu \
	    -L$(@D) -ldynaconv_kernels -Wl,-rpath,'$$ORIGIN' && mv $@.new $@ || \
	    { rm -f $@; echo "the torch operators do not build here: using PyTorch operations instead"; }; fi

# torch goes first, by itself; what follows is told to keep it, or pip would fetch another build of it.
$(STAMP): pyproject.toml constraints.txt
	@rm -f $(STAMP)
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 10))' || \
	    { echo 'dynaconv needs Python 3.10 or newer: make setup PYTHON=python3.12' >&2; exit 1; }
	@$(PIP) --version > /dev/null 2>&1 || $(PYTHON) -m venv --clear $(VENV)
	@echo 'Installing $(TORCH) ...'
	@$(PIP) install --quiet -c <(grep -vE '^torch' constraints.txt) $(TORCH)
	@{ grep -vE '$(UNPINNED)' constraints.txt; \
	   $(VENV)/bin/python -c 'from importlib.metadata import version; print("torch==" + version("torch"))'; \
	 } > $(VENV)/constraints.txt
	@echo 'Installing dynaconv and the rest ...'
	@$(PIP) install --quiet -c $(VENV)/constraints.txt $(BUILD_REQUIRES)
	@$(PIP) install --quiet -c $(VENV)/constraints.txt --no-build-isolation --editable '.[all,dev]'
	@echo '$(TORCH)' > $(STAMP)
	@echo 'Ready in $(VENV).'

demo: setup ## train, calibrate, time and report on the embedded data set
	@$(VENV)/bin/dynaconv demo $(ARGS)

test: setup ## run the tests, warnings as errors
	@OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n $(WORKERS) $(ARGS)

# The last check keeps one machine's folders out of everybody's text.
lint: setup ## check style, formatting and that no machine's paths are in the text
	@$(VENV)/bin/ruff check
	@$(VENV)/bin/ruff format --check
	@! git grep -nIE '(^|[^[:alnum:]_./-])/(home|root|Users|work)/[[:alnum:]]' -- . || \
	    { echo 'The lines above name folders of one machine; use paths relative to the repository.' >&2; exit 1; }

format: setup ## mend what lint finds, where that can be done by machine
	@$(VENV)/bin/ruff check --fix --exit-zero --quiet
	@$(VENV)/bin/ruff format

bench: setup ## time whole networks with every engine, interleaved
	@$(VENV)/bin/python benchmarks/engine.py $(ARGS)

clean: ## remove .venv and all caches; runs stay
	@rm -rf $(VENV) build dist .pytest_cache .ruff_cache .hypothesis
	@find . -name __pycache__ -type d -prune -exec rm -rf {} +
