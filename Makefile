# What people and CI type. `make demo` is the place to begin.

PYTHON ?=
PIP_ARGS ?=
CONFIG ?= serve_config.yaml
COVERAGE ?=

SHELL := bash
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOG := $(VENV)/install.log
LIBRARY := llava_serve deployments
BESIDE := tests benchmarks testbed examples
PYTEST := $(BIN)/python -m pytest -q

.PHONY: help setup demo serve test test-extended test-kernels test-faults test-slow check check-training docs eval-builtin clean
.DELETE_ON_ERROR:

help:
	@echo "make demo          a Ray Serve application answers a question about a picture"
	@echo "make serve         the same application, until Ctrl-C (PORT=, MODEL=, PROFILE=production.env, DASHBOARD=8265)"
	@echo "make test          the everyday tests, in two processes: below 8 minutes on two cores (COVERAGE=1 measures it, too)"
	@echo "make test-extended both profiles, killed replicas, commands, compiled decoders, benchmarks: below 40 minutes"
	@echo "make test-kernels  the GPU kernels without a GPU: interpreted and compiled, below 2 minutes (installs Triton, 0.7 GB)"
	@echo "make test-faults   processes that are killed under load, both profiles, a lost node: half an hour"
	@echo "make test-slow     installs, soaks, long fuzzing, real clients: as long as it takes"
	@echo "make check         format, lint, types, layers, dependencies, words, serve_config.yaml"
	@echo "make check-training  lint, types and dependencies of training/, which make check leaves out"
	@echo "make docs          builds the documentation strictly into build/site"
	@echo "make eval-builtin  measures the model that ships"
	@echo "make clean         removes $(VENV) and caches"
	@echo "PYTHON= chooses the interpreter (3.11 to 3.13), PIP_ARGS= say, a package index"

setup: $(STAMP)

# Prints the version of a Python of use. What pyenv's shims say of one that is not chosen there is for nobody.
PROBE := -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) and print(*v, sep=".")' 2>/dev/null

# A Python that is named, and not that of $(VENV): made anew.
ifneq ($(PYTHON),)
ifneq ($(shell $(PYTHON) $(PROBE)),$(shell $(BIN)/python $(PROBE)))
.PHONY: $(STAMP)
endif
endif

$(STAMP): pyproject.toml constraints.txt
	@for each in $(or $(PYTHON),python3.11 python3.13 python3.12); do \
		version=$$($$each $(PROBE)); test -z "$$version" || break; \
	done; \
	if [ -z "$$version" ]; then \
		said=$$($$each -V 2>/dev/null); \
		echo "Python 3.11, 3.12 or 3.13 is needed, and $$each is $${said:-not here}; name one: make PYTHON=/path/to/python3.11" >&2; \
		exit 1; \
	fi; \
	test "$$($(BIN)/python $(PROBE))" = "$$version" || $$each -m venv --clear $(VENV)
	@echo "Installing the pinned packages into $(VENV), some minutes the first time: 2.0 GB, or 5.9 GB with torch's CUDA build."
	@set -o pipefail; \
	$(BIN)/python -m pip install --disable-pip-version-check $(PIP_ARGS) -c constraints.txt -e ".[dev]" 2>&1 | tee $(LOG) | \
		sed -Eun 's/^ *Downloading ([^ ]+).* (\(([0-9]{2}[0-9.]* MB|[0-9.]+ GB)\))$$/  \1 \2/p' || \
		{ echo "The packages could not be installed: is the package index reachable? The end of $(LOG):" >&2; tail -n 3 $(LOG) >&2; exit 1; }
	@touch $@

demo: setup
	@$(BIN)/python -m deployments.tools.demo --config $(CONFIG)

serve: setup
	@$(BIN)/python -m deployments.tools.serve --config $(CONFIG) $(if $(PORT),--port $(PORT)) $(if $(MODEL),--model $(MODEL)) $(if $(PROFILE),--profile $(PROFILE)) $(if $(DASHBOARD),--dashboard $(DASHBOARD))

test: setup
	@$(PYTEST) -m "not slow and not extended" --numprocesses 2 $(if $(COVERAGE),--cov --cov-report=)

test-extended: setup
	@$(PYTEST) -m "extended and not slow"

# In a folder of its own: nothing else needs Triton, which torch's CUDA build brings.
test-kernels: setup
	@test -d build/triton/triton || $(BIN)/python -m pip install --disable-pip-version-check --quiet $(PIP_ARGS) --no-deps \
		-c constraints.txt --target build/triton triton
	@TRITON_INTERPRET=1 PYTHONPATH=build/triton $(PYTEST) tests/engine/kernels

test-faults: setup
	@$(PYTEST) tests/faults --log-cli-level=INFO

test-slow: setup
	@$(PYTEST) -m slow

check: setup
	$(BIN)/ruff format --check .
	$(BIN)/ruff check $(LIBRARY) $(BESIDE)
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/deptry llava_serve --optional-dependencies-dev-groups serve,data,demo,dev
	$(BIN)/deptry $(LIBRARY) --optional-dependencies-dev-groups dev
	$(BIN)/deptry $(LIBRARY) $(BESIDE)
	$(BIN)/python .ci/check_words.py
	$(BIN)/python -m deployments.tools.check_config --cpus 2 serve_config.yaml

check-training: setup
	$(BIN)/ruff check training
	$(BIN)/mypy training
	$(BIN)/deptry training --ignore DEP002

docs: setup
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet && echo "The documentation is in build/site/index.html."

eval-builtin: setup
	@$(BIN)/python -m training.evaluate

clean:
	rm -rf $(VENV) .mypy_cache .ruff_cache .pytest_cache .import_linter_cache .coverage *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
