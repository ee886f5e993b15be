# Two commands for a fresh machine with Python >= 3.11, git and make:
#   make demo   set everything up and run a whole small study, from text to multiplier table
#   make test   set everything up and run the test suite
# PYTHON names the interpreter. pip's own settings apply: on a machine without a GPU, PIP_EXTRA_INDEX_URL set to
# PyTorch's index of CPU wheels saves gigabytes.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
SNAKEMAKE := $(BIN)/snakemake --profile profiles/local
PYTEST := $(BIN)/python -m pytest -n 2 --no-loadscope-reorder
export PYTHONUNBUFFERED := 1

.PHONY: help setup demo test slow slurm check format clean

help:
	@sed -n '2,5s/^# *//p' Makefile
	@echo "  make slow   the long proofs too; make slurm  all tests on a throw-away Slurm (root, Debian); make check  format, lint,"
	@echo "              types, workflow; make clean  remove the demo's results"

$(VENV)/.runtime: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "qpipe needs Python >= 3.11, $(PYTHON) is older: make PYTHON=python3.12 ..."; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --constraint constraints.txt --editable .
	touch $@

$(VENV)/.development: $(VENV)/.runtime
	$(BIN)/python -m pip install --constraint constraints.txt --editable '.[dev]'
	touch $@

setup: $(VENV)/.runtime

demo: $(VENV)/.runtime
	$(SNAKEMAKE) --configfile config/demo.yaml

test: $(VENV)/.development
	$(PYTEST) -m "not slow and not slurm"

slow: $(VENV)/.development
	$(PYTEST) -m "not slurm"

slurm: $(VENV)/.development
	bash tests/slurm/install.sh
	$(BIN)/python -m pytest -m slurm

check: $(VENV)/.development
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	$(BIN)/snakefmt --check Snakefile workflow
	$(BIN)/codespell
	$(SNAKEMAKE) --configfile config/demo.yaml --lint 2>&1 | $(BIN)/python tests/lint_filter.py
	$(BIN)/qpipe schema | cmp - config/study.schema.json

format: $(VENV)/.development
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .
	$(BIN)/snakefmt Snakefile workflow
	$(BIN)/qpipe schema --out config/study.schema.json

clean:
	rm -rf results/demo results/tokens logs benchmarks/workflow
