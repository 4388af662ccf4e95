# Every target sets itself up: a .venv in this folder, from requirements.lock. Nothing global is touched.
# PYTHON=/path/to/python3.12 chooses the interpreter; otherwise PATH and pyenv's versions are searched.
SHELL := /bin/bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
PYTHON ?=
NO_PYTHON = $(if $(PYTHON),PYTHON=$(PYTHON) is not a,No) Python >= 3.12 with venv and ensurepip$(if $(PYTHON),, was found on PATH or among pyenv's versions): \
	install one (for example 'pyenv install 3.12', or python3-venv on Debian) or name it with 'make PYTHON=/path/to/python3.12'.

.PHONY: help env demo demo-seeds test test-slow test-slurm test-harness lint format bench clean

help:
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 14

env: $(STAMP) ## make .venv with everything pinned in requirements.lock

$(STAMP): requirements.lock pyproject.toml
	@python=$$(tools/find_python.sh "$(PYTHON)"); \
	test -n "$$python" || { echo "$(NO_PYTHON)" >&2; exit 2; }; \
	echo "$$python -m venv $(VENV)"; "$$python" -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements.lock
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-deps --no-build-isolation -e .
	@touch $@

demo: env ## the whole method on text this machine already has (about ten minutes on two cores)
	$(BIN)/megatron-bliss demo $(ARGS)

demo-seeds: env ## the demo with three seeds, one after the other: build/demo-seeds.json
	$(BIN)/python tools/demo_seeds.py $(ARGS)

test: env lint ## lint, types and all tests that are not slow
	$(BIN)/python -m pytest $(ARGS)

test-slow: env ## the long proofs: kills and resumes, larger sizes
	$(BIN)/python -m pytest -m slow $(ARGS)

test-slurm: env ## jobs on a real Slurm, with every fault made and looked at; needs root, slurm-wlm, munge, iproute2
	$(BIN)/python -m pytest -m slurm tests/slurm
	$(BIN)/python -m tests.slurm.faults
	$(BIN)/python -m tests.slurm.faults --net veth none

test-harness: env ## benchmarks with a real lm-evaluation-harness, which this installs (requirements-eval.lock)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -r requirements-eval.lock
	$(BIN)/python -m pytest -m harness $(ARGS)

lint: env ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: env ## let ruff rewrite the files
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: env ## all benchmarks, or one: make bench NAME=topk
	$(BIN)/python -m tests.benchmarks $(NAME)

clean:
	rm -rf $(VENV) build .pytest_cache .mypy_cache .ruff_cache *.egg-info
