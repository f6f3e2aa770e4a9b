# What people and CI type. `make demo` is the place to begin.

PYTHON ?= python3.11
PIP_ARGS ?=
CONFIG ?= serve_config.yaml

VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
LIBRARY := llava_serve deployments
BESIDE := tests benchmarks examples
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup demo serve test test-extended test-slow check check-training eval-builtin clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          a Ray Serve application answers a question about a picture"
	@echo "make serve         the same application, until Ctrl-C (PORT=, MODEL=, PROFILE=production.env)"
	@echo "make test          the everyday tests: some minutes on two cores; measures coverage"
	@echo "make test-extended both profiles, killed replicas, commands, compiled decoders, benchmarks: below 40 minutes"
	@echo "make test-slow     installs, soaks, long fuzzing, real clients: as long as it takes"
	@echo "make check         format, lint, types, layers, dependencies, words, serve_config.yaml"
	@echo "make check-training  lint, types and dependencies of training/, which make check leaves out"
	@echo "make eval-builtin  measures the model that ships"
	@echo "make clean         removes $(VENV) and caches"
	@echo "PYTHON=, PIP_ARGS= choose the interpreter and, say, a package index"

setup: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@command -v $(PYTHON) >/dev/null || { echo "Python 3.11 is needed, and $(PYTHON) is not here; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' || { echo "Python 3.11 is needed, and $(PYTHON) is `$(PYTHON) -V 2>&1`; name one: make PYTHON=/path/to/python3.11" >&2; exit 1; }
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@echo "Installing the pinned packages into $(VENV); the first time takes some minutes."
	@$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]" >$(LOG) 2>&1 || \
		{ echo "The packages could not be installed: is the package index reachable? The end of $(LOG):" >&2; tail -n 3 $(LOG) >&2; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/python -m deployments.tools.demo --config $(CONFIG)

serve: setup
	@$(BIN)/python -m deployments.tools.serve --config $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL)) $(if $(PROFILE),--profile $(PROFILE))

test: setup
	@$(PYTEST) -m "not slow and not extended" --cov --cov-report=

test-extended: setup
	@$(PYTEST) -m "extended and not slow"

test-slow: setup
	@$(PYTEST) -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check $(LIBRARY) $(BESIDE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry $(LIBRARY) --optional-dependencies-dev-groups dev
	$(BIN)/deptry $(LIBRARY) $(BESIDE)
	$(BIN)/python .ci/check_words.py
	$(BIN)/python -m deployments.tools.check_config --cpus 2 serve_config.yaml

check-training: setup
	$(BIN)/ruff check training
	$(BIN)/mypy training
	$(BIN)/deptry training --ignore DEP002

eval-builtin: setup
	@$(BIN)/python -m training.evaluate

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
