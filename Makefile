# `make demo` and `make test` create .venv and install everything they need; only Python has to be there.
#
# TORCH is the release that the project is tested with.  On a machine with a GPU, name another build:
#
#     make demo TORCH=torch TRITON=triton         # pip's choice for this machine
#     PIP_INDEX_URL=... make demo                 # a particular CUDA, ROCm or CPU build
#     make gpu NO_VENV=1                          # this machine's python3, nothing installed
#
# torchvision is not installed: next to a torch of another build it breaks transformers' image processors.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.*

VENV := .venv
# Absolute, and `-m` everywhere, so that a moved checkout still finds its tools.
VENV_PYTHON := $(CURDIR)/$(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check

# One thread per test process: two processes use two cores better than two threads of one.
PYTEST_FLAGS ?= -n auto --dist loadfile
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

IMAGES    ?=
DEMO_FLAGS  ?=
BENCH       ?= towers
BENCH_FLAGS ?=
GPU_FLAGS   ?=
GPU_PYTHON  := $(if $(NO_VENV),$(PYTHON),$(VENV_PYTHON))

.PHONY: help demo test test-slow test-all lint docs bench gpu clean

help: ## Print this list
	@sed -n 's/^\([a-z-]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.ready-demo ## Run the Qwen2-VL-2B tower over photographs, check it, draw its features (IMAGES="a.jpg b.png")
	@$(VENV_PYTHON) -m tritontower demo $(DEMO_FLAGS) $(IMAGES)

test: $(VENV)/.ready-dev ## Run the tests that are not slow (PYTEST_FLAGS="-k norm")
	@$(TEST_ENVIRONMENT) $(VENV_PYTHON) -m pytest -m "not slow" $(PYTEST_FLAGS)

test-slow: $(VENV)/.ready-dev ## Run the slow tests
	@$(TEST_ENVIRONMENT) $(VENV_PYTHON) -m pytest -m slow $(PYTEST_FLAGS)

test-all: $(VENV)/.ready-dev ## Run all tests
	@$(TEST_ENVIRONMENT) $(VENV_PYTHON) -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.ready-dev ## Check style, format and types
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

docs: $(VENV)/.ready-dev ## Build the documentation site into site/
	@NO_MKDOCS_2_WARNING=1 $(VENV_PYTHON) -m mkdocs build --strict --quiet

bench: $(VENV)/.ready-dev ## Measure (BENCH=towers BENCH_FLAGS="--help"; also kernels, preprocessing, loading, launches, memory)
	@$(VENV_PYTHON) -m tritontower bench $(BENCH) $(BENCH_FLAGS)

gpu: $(if $(NO_VENV),,$(VENV)/.ready-dev) ## Test and measure everything on this machine's GPU (GPU_FLAGS="--step tests")
	@$(GPU_PYTHON) -m bench.campaign $(GPU_FLAGS)

clean: ## Remove the environment and all build products
	rm -rf $(VENV) build dist site *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# Stamps: the environment has what a group of targets needs, as of the last change of these two files.
$(VENV)/.ready-demo: pyproject.toml Makefile
	@$(call create_environment)
	@echo "Installing the demo's packages into $(VENV) (about a minute) ..." >&2
	@$(PIP_INSTALL) "$(TORCH)" "$(TRITON)" -e ".[demo]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml Makefile
	@$(call create_environment)
	@echo "Installing the development packages into $(VENV) (about a minute) ..." >&2
	@$(PIP_INSTALL) "$(TORCH)" "$(TRITON)" -e ".[demo,dev,docs]"
	@touch $(VENV)/.ready-demo $@

# Recreates an environment whose interpreter is gone (a copied checkout, an upgraded Python).
define create_environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "tritontower needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }; \
$(VENV_PYTHON) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
endef
