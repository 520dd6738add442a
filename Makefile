# Two commands do everything on a fresh machine, set-up included: make demo, make test.
#
#   PYTHON=python3.12        interpreter for the virtual environment (3.11 to 3.13)
#   VENV=.venv               where that environment lives
#   CONSTRAINTS=FILE         versions to install (constraints.txt, constraints-oldest.txt)
#   PIP_ARGS=...             passed to pip, such as an index with CPU builds of torch
#   MODEL=DIR TEXT=FILE      what the demo and the benchmarks run on
#   ARGS=...                 passed to pytest
#   WORKERS=2                test files that run at a time
#   SEED=1 CASES=20000       what `make fuzz` runs: random calls of the CPU kernels under sanitizers
#   SEED=1 ONNX_CASES=100000 what `make fuzz-onnx` runs: damaged ONNX files

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
MODEL ?= examples/models/nano
TEXT ?= examples/data/walden.txt
SEED ?= 1
WORKERS ?= 2
CASES ?= 20000
ONNX_CASES ?= 100000

# Threads that spin for long while they wait make everything several times slower where other programs use the same
# cores; those that sleep at once are slow to come back, and a decode step has many short loops.
export OMP_WAIT_POLICY ?= PASSIVE
export GOMP_SPINCOUNT ?= 20000

BIN := $(VENV)/bin
STAMP := $(VENV)/.installed-$(notdir $(CONSTRAINTS))

.PHONY: demo test check format golden bench fuzz fuzz-onnx wheel clean help
.DEFAULT_GOAL := help

help:
	@sed -n '/^#/!q;s/^# \{0,1\}//p' Makefile

CORE := setup.py $(wildcard lamp_compile/runtime/kernels/cpu/core/*)

$(STAMP): pyproject.toml $(CONSTRAINTS) $(CORE)
	@$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(0 if (3, 11) <= v < (3, 14) else \
	    f"python {v.major}.{v.minor} found; lamp_compile needs 3.11 to 3.13: make PYTHON=python3.12 ...")'
	@echo "Setting up $(VENV), once; the download of torch takes most of the time."
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(PIP_ARGS) -c $(CONSTRAINTS) -e ".[dev,hf,onnx-cpu]"
	@touch $@

demo: $(STAMP)
	$(BIN)/python examples/demo.py --model $(MODEL) --text $(TEXT)

test: $(STAMP)
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile $(ARGS)

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Accept the graphs and tables that the tests compare with; read the diff before you commit it.
golden: $(STAMP)
	EXPECTTEST_ACCEPT=1 $(BIN)/python -m pytest tests/passes tests/backends $(ARGS)
	LAMP_ACCEPT=1 $(BIN)/python -m pytest tests/diff/test_own_snapshots.py $(ARGS)
	$(BIN)/python -m tests.models.table --write
	$(BIN)/python -m tests.project.operator_page --write
	$(BIN)/python -m tests.project.results_page --write
	$(BIN)/python -m tests.project.control_page --write

bench: $(STAMP)
	$(BIN)/python benchmarks/compile_time.py $(MODEL)

fuzz: $(STAMP)
	rm -rf build/fuzz
	$(BIN)/python -m tests.native.build build/fuzz address
	ASAN_OPTIONS=detect_leaks=0 build/fuzz/fuzz $(SEED) $(CASES)
	ASAN_OPTIONS=detect_leaks=0 build/fuzz/ort_fuzz $(SEED) $(CASES)

fuzz-onnx: $(STAMP)
	$(BIN)/python -m tests.onnx.fuzz $(SEED) $(ONNX_CASES)

wheel: $(STAMP)
	rm -rf build dist
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
