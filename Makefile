# `make demo` and `make test` work from a fresh clone; what is already done is not done again.
#
#   make PYTHON=python3.12      another interpreter for a new .venv
#   make TORCH=torch==2.9.1     another torch
#   make TORCH_INDEX=           torch from the package index alone (on Linux that build carries CUDA, gigabytes of it)
#   make MAX_JOBS=1             fewer compilers at once (each needs about 1 GB)
#   make test PYTEST="-k mnist" options for pytest

PYTHON ?= python3
VENV ?= .venv
TORCH ?= torch==2.13.0
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
MAX_JOBS ?= $(shell getconf _NPROCESSORS_ONLN 2>/dev/null || echo 2)
PYTEST ?=
# test files for `make asan`; all that drive the kernels if empty
ASAN ?=

export MAX_JOBS PIP_DISABLE_PIP_VERSION_CHECK = 1

PY := $(VENV)/bin/python
STAMPS := $(VENV)/.l2l_fast
SOURCES := $(shell find csrc -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) 2>/dev/null)
FORMATTED := $(shell find csrc tests bench -type f \( -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu' \) 2>/dev/null)
# What `git clean` or a copy of the folder may have taken away while the stamps stayed.
ifeq ($(wildcard l2l_fast/_C*.so),)
REBUILD := missing-extension
endif

.DEFAULT_GOAL := help
.PHONY: help setup test demo examples docs bench-page lint format bench sass sdist wheel asan cuda-build clean missing-extension
.DELETE_ON_ERROR:

help:
	@echo "make demo    set up, meta-train on real digits, compare with tuned baselines, plot"
	@echo "make test    set up, run all tests"
	@echo "make examples    set up, install the trainers people use, run every script in examples/"
	@echo "make docs    build the documentation into build/site (no torch, no compiler); a warning is an error"
	@echo "make setup   only set up: $(VENV) with torch and the compiled package"
	@echo "make cuda-build   build with nvcc and a torch with CUDA, import, run the tests; no GPU needed"
	@echo "make lint | format | bench | sass | sdist | wheel | asan | clean"

setup: $(STAMPS)/built

$(STAMPS)/venv: scripts/setup_venv.sh
	@bash scripts/setup_venv.sh "$(PYTHON)" "$(VENV)" "$(TORCH)" "$(TORCH_INDEX)"
	@mkdir -p $(STAMPS) && touch $@

# The first installation compiles everything; afterwards only what changed is compiled, in build/.
$(STAMPS)/installed: $(STAMPS)/venv setup.py cuda_build.py pyproject.toml l2l_fast/kernels/version.py
	@echo "== building and installing l2l_fast ($(MAX_JOBS) compilers at once; a minute or two)"
	@$(PY) -m pip install --quiet --no-build-isolation -e '.[train,tensorboard,test,bench,dev]'
	@touch $@

$(STAMPS)/built: $(STAMPS)/installed $(SOURCES) $(REBUILD)
	@if [ -n "$(REBUILD)" ] && ! ls l2l_fast/_C*.so >/dev/null 2>&1 || \
	    [ -n "$$(find csrc -type f -newer $(STAMPS)/installed)" ]; then \
	  echo "== compiling what changed" && $(PY) setup.py --quiet build_ext --inplace; fi
	@$(PY) -c "import l2l_fast._C as C; print('== l2l_fast is ready: instruction sets', *C.isa_available())"
	@touch $@

test: setup
	$(PY) -m pytest $(PYTEST)

demo: setup
	$(PY) -m l2l_fast demo

# The trainers that the examples show, at the versions that pyproject.toml allows; torch stays the one that is there.
$(STAMPS)/examples: $(STAMPS)/installed
	@echo "== installing what the examples need"
	@$(PY) -c 'import importlib.metadata as m, torch; needed = [r.split(";")[0] for r in m.requires("l2l_fast") \
	  if "extra == \"examples\"" in r]; print("torch==" + torch.__version__, *needed, sep="\n")' >$@.txt
	@$(PY) -m pip install --quiet -r $@.txt
	@touch $@

examples: setup $(STAMPS)/examples
	L2L_FAST_FULL=1 $(PY) -m pytest -v -s tests/test_examples.py

# The site. Docstrings are read, not imported, so neither torch nor a compiler is needed: an environment of its own.
build/docs/ready: pyproject.toml
	@echo "== installing what the documentation needs into build/docs"
	@$(PYTHON) -m venv build/docs
	@$(PYTHON) -c 'import ast, re; print(*ast.literal_eval(re.search(r"^docs = (\[.*\])", \
	  open("pyproject.toml").read(), re.M)[1]), sep="\n")' >build/docs/requirements.txt
	@build/docs/bin/python -m pip install --quiet -r build/docs/requirements.txt
	@touch $@

docs: build/docs/ready
	@NO_MKDOCS_2_WARNING=1 build/docs/bin/python -m mkdocs build --clean
	@echo "== build/site/index.html; with search: $(PYTHON) -m http.server -d build/site"

bench: setup
	$(PY) -m l2l_fast bench

# Tables and plot of docs/performance.md from a run of `bench --json`, RUN=run.json; without, from the run they show.
RUN ?=
bench-page: setup
	$(PY) -m bench.page $(RUN)

lint: setup
	$(PY) -m ruff check .
	$(PY) -m mypy
	$(VENV)/bin/lint-imports --no-logo
	$(VENV)/bin/clang-format --dry-run -Werror $(FORMATTED)

format: setup
	$(PY) -m ruff check --fix .
	$(VENV)/bin/clang-format -i $(FORMATTED)

# The source distribution, built and installed into an environment of its own.
sdist: setup
	@bash scripts/check_sdist.sh "$(VENV)"

# The source distribution, and the wheel for this Python made of it, into dist/: given its manylinux tag, installed into
# an environment of its own and used.
wheel: setup
	@bash scripts/check_wheel.sh "$(VENV)"

# The kernels' tests under AddressSanitizer and UndefinedBehaviorSanitizer.
asan: setup
	@bash scripts/asan.sh "$(VENV)" $(ASAN)

# The CUDA kernels for every architecture: warnings, spills, instruction counts (bench/sass.py).
sass: setup
	@bash scripts/check_sass.sh "$(VENV)"

# The extension with its CUDA kernels, in an environment of its own under build/; TORCH_CUDA_ARCH_LIST="8.0 9.0" and
# CUDA_VENV=folder are honoured.
cuda-build:
	@bash scripts/check_cuda_build.sh $(PYTEST)

clean:
	rm -rf $(VENV) build dist *.egg-info l2l_fast/_C*.so .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find l2l_fast tests bench examples -name __pycache__ -type d -prune -exec rm -rf {} + 2>/dev/null || true
