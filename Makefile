# Every target does its own set-up in .venv: Python >= 3.11, pip and make are all it takes.

PYTHON ?= python3
# Further arguments for pytest, such as PYTEST_ARGS="-k newton -x", and how many processes share the tests: 0 for
# none but pytest's own, as a debugger needs it.
PYTEST_ARGS ?=
PYTEST_WORKERS ?= 2
# The tox environments of `make matrix`, comma-separated.
MATRIX ?= core,scipy,casadi,cvxpy,qpsolvers,all

VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
PLUGINS := $(wildcard plugins/*/pyproject.toml)

# A stamp under .venv tells what is installed there; it is out of date when one of these files changes.
INPUTS := constraints.txt pyproject.toml $(PLUGINS)
INSTALLED := $(VENV)/.installed-
group = $(addprefix $(INSTALLED),$(1))

.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.NOTPARALLEL:
.SECONDARY:
.PHONY: help demo test lint format types imports docs matrix changelog dev clean

help:  ## Show this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(call group,demo)  ## Train through SciPy's power flow of the IEEE 14-bus network, and through ipopt's plans
	$(BIN)/python examples/power_flow/demo.py
	$(BIN)/python examples/cart_pole_mpc/demo.py

test: $(call group,test demo qp-solvers)  ## Run the default test suite: core, plugins, code blocks of the docs
	$(BIN)/python -m pytest -n $(PYTEST_WORKERS) --dist loadscope $(PYTEST_ARGS)

lint: $(call group,lint)  ## Check style and format
	$(BIN)/ruff check
	$(BIN)/ruff format --check

format: $(call group,lint)  ## Repair style and format as far as ruff can
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

types: $(call group,types)  ## Check the types of core and plugins
	$(BIN)/mypy

imports: $(call group,imports)  ## Check the import contracts
	$(BIN)/lint-imports --no-logo

docs: $(call group,docs)  ## Build the documentation into docs/_build/html, with warnings as errors
	$(BIN)/sphinx-build -W --keep-going -q -E -b html docs docs/_build/html

matrix: $(call group,matrix)  ## Run the tests in the environments of tox.ini, each with its own installation
	$(BIN)/tox run -e $(MATRIX)

changelog: $(call group,changelog)  ## Show the changelog entry that the fragments make
	$(BIN)/towncrier build --draft --version unreleased

dev: $(call group,dev)  ## Install everything a contributor needs, without running anything

clean:  ## Remove every environment, cache and build output
	rm -rf $(VENV) .tox docs/_build build dist .pytest_cache .ruff_cache .mypy_cache .import_linter_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment itself. `venv --without-pip` works where Python comes without ensurepip, too.
$(INSTALLED)pip:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo 'invlayer needs Python 3.11 or newer; name one: make PYTHON=/path/to/python3.11 ...' >&2; exit 1; }
	@echo 'Setting up $(VENV); the first time takes a minute or two.'
	@$(PYTHON) -m venv --clear --without-pip $(VENV)
	@$(PYTHON) -m pip --disable-pip-version-check --python $(BIN)/python install --quiet -c constraints.txt pip
	@touch $@

# Core and plugins, editable. torch goes first, at the pinned version: any later requirement finds it there.
$(INSTALLED)core: $(INPUTS) | $(INSTALLED)pip
	@$(PIP) torch
	@$(PIP) --group build
	@$(PIP) --no-build-isolation --editable . $(PLUGINS:%/pyproject.toml=--editable %)
	@touch $@

# The dependency groups of pyproject.toml.
$(INSTALLED)%: $(INSTALLED)core
	@$(PIP) --group $*
	@touch $@
