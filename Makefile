# make demo, make test, ...: a Linux machine with Python 3.10 to 3.13 and a C++ compiler is all they need. Each target makes
# what it misses (.venv, the pinned packages, the compiled modules) and does no work twice.

VENV ?= .venv
ARGS ?=
OUT ?= bench/out
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SOURCES := $(wildcard csrc/*) setup.py llmkern/_library.py $(shell find llmkern/ops -name '*.py')

# Good for us: a supported version that can make environments. An explicit PYTHON is the only candidate.
CANDIDATES := $(or $(PYTHON),python3.11 python3.12 python3.10 python3.13 python3)
CHECK_PYTHON := import ensurepip, sys, venv; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))

# Tests that run kernels; they run once for each module that this machine can run, and once for the references.
KERNEL_TESTS := $(wildcard tests/test_ops.py $(patsubst csrc/%.cpp,tests/test_%.py,$(wildcard csrc/*.cpp)))
RUNNABLE := from llmkern._library import supported_isas; print(*supported_isas())

.PHONY: help demo test bench lint sanitize sanitize-address sanitize-thread gpu wheel clean install build

help:
	@echo 'make demo              train, tune and decode on real text; report in report/index.html'
	@echo 'make test              the whole suite, on every CPU module that this machine can run'
	@echo 'make bench [ARGS=...]  benchmarks against their peers; rows in bench/results.csv'
	@echo 'make lint              ruff, clang-format, mypy'
	@echo 'make sanitize          the kernel tests under AddressSanitizer with UndefinedBehaviorSanitizer, then ThreadSanitizer'
	@echo 'make gpu [OUT=folder]  build, suite and benchmarks on a CUDA machine without network'
	@echo 'make wheel             sdist and wheel in dist/'
	@echo 'make clean             removes all that the other targets made'

demo: $(VENV)/built-native
	$(BIN)/llmkern demo $(ARGS)

# The whole suite on the best module, and beside it, since most tests keep one core busy, the kernel tests on the others;
# what those printed comes last. References promise less than kernels, see the mark.
test: $(VENV)/built-all
	@set -e; export OMP_WAIT_POLICY=passive; isas=$$(LLMKERN_CPU=off $(BIN)/python -c '$(RUNNABLE)'); \
	if ! ls llmkern/_cpu_*.so >/dev/null 2>&1; then isas=; fi; \
	suite() { isa=$$1; shift; marks=; if [ $$isa = off ]; then marks='not kernel'; fi; \
	    LLMKERN_CPU=$$isa $(BIN)/pytest -q -m "$$marks" "$$@" $(ARGS); }; \
	others() { for isa in "$$@"; do echo "The kernel tests on LLMKERN_CPU=$$isa:"; suite $$isa $(KERNEL_TESTS); done; }; \
	set -- $$isas off; best=$$1; shift; log=$$(mktemp); (others "$$@") >$$log 2>&1 & side=$$!; status=0; \
	echo "The whole suite on LLMKERN_CPU=$$best:"; suite $$best || status=1; \
	wait $$side || status=1; cat $$log; rm -f $$log; exit $$status

bench: $(VENV)/built-native
	$(BIN)/pytest bench $(ARGS)

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(wildcard csrc/*.cpp csrc/*.h tests/*.cpp)
	$(BIN)/mypy

# Packages of their own in build/, so that the normal modules stay. Only our kernels are instrumented. Leaks are not looked
# for, since Python and torch keep memory until the end. ThreadSanitizer gets an OpenMP runtime that it can see through,
# and no randomised addresses, which GCC's version cannot bear. What torch compiles itself is left out.
TSAN_RUNNER = $(shell setarch -R true 2>/dev/null && echo setarch -R)
runtimes = $(foreach name,$(1),$(shell $(CXX) -print-file-name=$(name).so))
address_preload = $(call runtimes,libasan libubsan libstdc++)
thread_preload = $(call runtimes,libtsan libstdc++) $(CURDIR)/build/thread/openmp.so

sanitize: sanitize-address sanitize-thread

build/thread/openmp.so: tests/sanitizer_openmp.cpp
	mkdir -p $(@D)
	$(CXX) -std=c++20 -O1 -g -fPIC -shared -fsanitize=thread $< -o $@

sanitize-thread: build/thread/openmp.so

sanitize-address sanitize-thread: sanitize-%: $(VENV)/installed
	LLMKERN_SANITIZE=$* LLMKERN_BUILD_ISA=native $(BIN)/python setup.py --quiet \
	    build --build-base build/$* --build-lib build/$*/lib
	@set -e; export PYTHONPATH=$(CURDIR)/build/$*/lib LLMKERN_CPU=; \
	export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1; \
	export TSAN_OPTIONS=suppressions=$(CURDIR)/tests/sanitizer_thread.supp; \
	sanitized() { $(if $(filter thread,$*),$(TSAN_RUNNER)) env LD_PRELOAD="$($*_preload)" "$$@"; }; \
	(cd build/$*/lib && sanitized $(abspath $(BIN))/python -c 'import llmkern._library as loaded; \
	    assert loaded.cpu_build.isa; print("With the $* sanitizer:", loaded.cpu_build.isa, "in", loaded.__file__)'); \
	sanitized $(BIN)/pytest -q -s -p no:cacheprovider -k 'not compile' $(KERNEL_TESTS) $(ARGS)

# For a machine with a GPU but no network: the system's Python with its torch, Triton and pytest, and nothing installed.
# Every part has its limit, ten minutes in all; what is slow or fails does not keep the next part from running. Of the
# suite it runs the cases on the GPU: the others are those of `make test`, and would take more time than there is. Most
# of their time goes into compiling kernels, which several processes do at once where pytest-xdist is installed.
GPU_PYTHON ?= python3
SEES_A_GPU := import sys, torch; sys.exit(not torch.cuda.is_available())
WORKERS = $(shell $(GPU_PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses 8)

gpu:
	@$(GPU_PYTHON) -c '$(SEES_A_GPU)' || { echo 'make gpu: expected a GPU that the torch of $(GPU_PYTHON) sees, got none;' \
	    'name the Python whose torch was built for it: make gpu GPU_PYTHON=...' >&2; exit 1; }
	@mkdir -p $(OUT); export PYTHONPATH=$(CURDIR) PYTHONUNBUFFERED=1; status=0; \
	part() { log=$(OUT)/$$1.log; limit=$$2; lines=$$3; shift 3; echo "$$*"; \
	    timeout --signal=INT --kill-after=5 $$limit "$$@" >$$log 2>&1 || \
	        { echo "failed, or took more than $$limit s; $$log:"; status=1; }; \
	    tail -n $$lines $$log; }; \
	part build 120 3 env LLMKERN_BUILD_ISA=native $(GPU_PYTHON) setup.py --quiet build_ext --inplace; \
	part doctor 30 40 $(GPU_PYTHON) -m llmkern doctor; \
	part tests 270 30 $(GPU_PYTHON) -m pytest -q $(WORKERS) -k cuda $(ARGS); \
	part bench 150 80 $(GPU_PYTHON) -m pytest -q bench --device cuda --seconds 0.5 --no-plots \
	    --results $(OUT)/results.csv $(ARGS); \
	exit $$status

wheel: $(VENV)/installed
	$(BIN)/python -m build --no-isolation

clean:
	rm -rf $(VENV) build dist *.egg-info bench/out report llmkern/_cpu_*.so
	rm -rf .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks .cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# What the targets above need ------------------------------------------------------------------------------------------

install: $(VENV)/installed
build: $(VENV)/built-all

$(BIN)/python:
	@for python in $(CANDIDATES); do \
	    if "$$python" -c '$(CHECK_PYTHON)' 2>/dev/null; then "$$python" -m venv $(VENV) && exit; fi; \
	done; \
	echo 'make: expected Python 3.10 to 3.13 with its venv module, got none among: $(CANDIDATES); install one (Debian and' \
	    'Ubuntu: python3-venv) or name it: make PYTHON=...' >&2; exit 1

# torch comes before the modules that are built against it, hence two steps: packages here, compiled modules below.
$(VENV)/installed: constraints.txt setup.py pyproject.toml | $(BIN)/python
	@echo 'Installing the pinned packages into $(VENV), once (where torch comes with CUDA this is some gigabytes)'
	$(PIP) install --quiet -c constraints.txt pip setuptools wheel ninja
	LLMKERN_BUILD_ISA=none $(PIP) install -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

# Without a compiler nothing is built and there is no stamp, so that a later call builds once there is one.
STAMP = if ls llmkern/_cpu_*.so >/dev/null 2>&1; then touch

$(VENV)/built-all: $(VENV)/installed $(SOURCES)
	LLMKERN_BUILD_ISA=all $(BIN)/python setup.py --quiet build_ext --inplace
	@$(STAMP) $@ $(VENV)/built-native; fi

$(VENV)/built-native: $(VENV)/installed $(SOURCES)
	@$(MAKE) --question $(VENV)/built-all >/dev/null 2>&1 || \
	    LLMKERN_BUILD_ISA=native $(BIN)/python setup.py --quiet build_ext --inplace
	@$(STAMP) $@; fi
