# Two commands do all the set-up on a fresh machine: `make demo` runs the main job, `make test` the tests.
# Both make a virtual environment in .venv with the pinned packages first. PYTHON picks the interpreter (3.11 to 3.13).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
DEMO_DIR ?= demo
# Each takes about 2 GB and starts clusters of its own: more on a larger machine, 0 to see one test after the other.
TEST_PROCESSES ?= 2

.PHONY: demo test test-slow lint format benchmarks clean help

help:            ## list the targets
	@grep -E '^[a-z-]+: .*##|^[a-z-]+:  +##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/'

$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || \
	  { echo "braincensus needs Python 3.11, 3.12 or 3.13; found $$($(PYTHON) --version 2>&1). Try: make PYTHON=python3.12 $(MAKECMDGOALS)"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e ".[dev]"
	@touch $@

demo: $(VENV)/.installed  ## make a phantom, census it with WNet3D, compare with the truth, draw the picture
	$(BIN)/braincensus demo $(DEMO_DIR) --overwrite

test: $(VENV)/.installed  ## the tests and the examples in docstrings (not those marked slow or gpu)
	$(BIN)/python -m pytest -n $(TEST_PROCESSES) --dist loadfile -m "not slow and not gpu" --doctest-modules tests pipeline kernels

test-slow: $(VENV)/.installed  ## the slow tests
	$(BIN)/python -m pytest -m "slow and not gpu"

lint: $(VENV)/.installed  ## style, types, and the wall between kernels and pipeline
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(VENV)/.installed  ## rewrite the code in the project's style
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmarks: $(VENV)/.installed  ## every figure of benchmarks/RESULTS.md, on this machine
	$(BIN)/python benchmarks/segment.py
	$(BIN)/python benchmarks/train.py
	$(BIN)/python benchmarks/label.py
	$(BIN)/python benchmarks/scale.py
	$(BIN)/python benchmarks/scaling.py
	$(BIN)/python benchmarks/watch.py
	$(BIN)/python benchmarks/faults.py
	$(BIN)/python benchmarks/memory.py
	$(BIN)/python benchmarks/perturbations.py
	$(BIN)/python benchmarks/quality.py

clean:           ## remove the environment and the demo
	rm -rf $(VENV) $(DEMO_DIR)
