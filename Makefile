# `make demo` and `make test` are all that a fresh clone needs: Python 3.11, make and a C/C++ compiler.
PYTHON ?= $(shell command -v python3.11 || command -v python3)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed

DOCS_STAMP := $(VENV)/.installed-docs
LOWEST := .venv-lowest
# What the tests import beside Denim's own dependencies; their newest releases serve.
TEST_TOOLS := pytest pytest-benchmark hypothesis foolbox pyautoattack adversarial-robustness-toolbox statsmodels pytest-cov pytest-xdist import-linter

.PHONY: help demo quick test test-lowest coverage lint format types layers docs bench gpu-check kernels mutants noise-statistics package-check faults clean

help:
	@echo "make demo | quick | test | test-lowest | coverage | lint | format | docs | bench | gpu-check | kernels | mutants | noise-statistics | package-check | faults | clean"

# Installed once; again only when pyproject.toml changes.
$(STAMP): pyproject.toml
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade "pip>=25.1"
	$(BIN)/python -m pip install --quiet --editable . --group dev
	touch $@

demo: $(STAMP)
	$(BIN)/denim demo

# Two processes of one thread each: most tests are too small for two threads.
PYTEST := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n 2 --dist loadfile

# What is not marked slow.
quick: $(STAMP)
	$(PYTEST) -m "not slow" --durations=10 --durations-min=2

test: $(STAMP)
	$(PYTEST)

# The quick tests on the lowest release of every package that pyproject.toml allows, installed into $(LOWEST) and not into
# $(VENV): minutes, and gigabytes of downloads. pip cannot resolve to the lowest releases; uv can.
test-lowest:
	test -x $(LOWEST)/bin/python || $(PYTHON) -m venv $(LOWEST)
	$(LOWEST)/bin/python -m pip install --quiet "uv>=0.9"
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python --resolution lowest-direct --editable .
	$(LOWEST)/bin/uv pip install --quiet --python $(LOWEST)/bin/python $(TEST_TOOLS)
	OMP_NUM_THREADS=1 $(LOWEST)/bin/python -m pytest -m "not slow" -n 2 --dist loadfile

coverage: $(STAMP)
	$(PYTEST) --cov --cov-report=term --cov-report=html:build/coverage

# The site is build/site. Only this target needs the packages of the group `docs`.
docs: $(DOCS_STAMP)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

$(DOCS_STAMP): $(STAMP)
	$(BIN)/python -m pip install --quiet --group docs
	touch $@

bench: $(STAMP)
	$(BIN)/python -m pytest benchmarks/suites --benchmark-only

# Installs nothing: a machine with a GPU may have torch, triton and timm, and no network.
gpu-check:
	$(or $(wildcard $(BIN)/python),$(PYTHON)) -m benchmarks.gpu_check

noise-statistics: $(STAMP)
	$(BIN)/python -m benchmarks.noise_statistics

kernels: $(STAMP)
	$(BIN)/denim kernels

# Minutes: every kernel with a mistake of `benchmarks/machine_code/mistakes.py` through the proofs that need no GPU.
mutants: $(STAMP)
	$(BIN)/python -m denim.benchmarks.machine_code.mutants --page docs/kernels-mutants.md

# Minutes, and gigabytes of downloads: what a user's pip installs.
package-check: $(STAMP)
	.ci/package-check $(BIN)/python

# Kills, also of one rank of two, damaged images and tampered checkpoints; SCALE=0.05 takes a few minutes.
SCALE ?= 1
faults: $(STAMP)
	$(BIN)/python tests/faults.py --scale $(SCALE)

lint: $(STAMP) types layers
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

types: $(STAMP)
	MYPYPATH=.typing $(BIN)/mypy -p denim.kernels -p denim.nim -p denim.defense -p denim.benchmarks -p denim.cli

layers: $(STAMP)
	$(BIN)/lint-imports

clean:
	rm -rf build dist .coverage .coverage.* *.egg-info .pytest_cache .mypy_cache .ruff_cache .import_linter_cache .hypothesis
