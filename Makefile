# `make demo` and `make test` set up everything they need in .venv; nothing has to be installed beforehand but Python.
#
# Torch.  The default is the release the project is tested with, in whichever build pip finds first.  On a machine with
# a GPU any supported build does; name it here, or point pip at another package source through its own variables:
#
#     make demo TORCH=torch TRITON=triton         # what pip thinks best for this machine
#     PIP_INDEX_URL=... make demo                 # a particular CUDA, ROCm or CPU build
#     make gpu NO_VENV=1                          # the python3 of this machine as it is, nothing installed
#
# torchvision is left out on purpose: beside a torch of another build it breaks transformers' image processors.

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
TORCH  ?= torch==2.13.0
TRITON ?= triton==3.7.*

VENV := .venv
# Absolute, so that it works from any directory; `-m` everywhere, so that a moved checkout still finds its own tools.
VENV_PYTHON := $(CURDIR)/$(VENV)/bin/python
PIP_INSTALL := $(VENV_PYTHON) -m pip install -qq --disable-pip-version-check

# One interpreter thread a test process: two cores are better spent on two processes than on two threads of one.
PYTEST_FLAGS ?= -n auto --dist loadfile
TEST_ENVIRONMENT := OMP_NUM_THREADS=1 MKL_NUM_THREADS=1

IMAGES    ?=
DEMO_FLAGS  ?=
BENCH       ?= towers
BENCH_FLAGS ?=
GPU_FLAGS   ?=
GPU_PYTHON  := $(if $(NO_VENV),$(PYTHON),$(VENV_PYTHON))

.PHONY: help demo test lint bench gpu clean

help: ## Say what can be made
	@sed -n 's/^\([a-z]*\):.*## /  make \1\t/p' $(firstword $(MAKEFILE_LIST)) | expand -t 16

demo: $(VENV)/.ready-demo ## Run the tower of Qwen2-VL-2B over photographs, check it, draw what it sees (IMAGES="a.jpg b.png")
	@$(VENV_PYTHON) -m tritontower demo $(DEMO_FLAGS) $(IMAGES)

test: $(VENV)/.ready-dev ## Run the tests (PYTEST_FLAGS="-k norm")
	@$(TEST_ENVIRONMENT) $(VENV_PYTHON) -m pytest $(PYTEST_FLAGS)

lint: $(VENV)/.ready-dev ## Check style, format and types
	@$(VENV_PYTHON) -m ruff check .
	@$(VENV_PYTHON) -m ruff format --check .
	@$(VENV_PYTHON) -m mypy

bench: $(VENV)/.ready-dev ## Measure (BENCH=towers BENCH_FLAGS="--help"; also kernels, preprocessing, loading, launches, memory)
	@$(VENV_PYTHON) -m tritontower bench $(BENCH) $(BENCH_FLAGS)

gpu: $(if $(NO_VENV),,$(VENV)/.ready-dev) ## Test and measure everything on the GPU of this machine (GPU_FLAGS="--stage tests"; NO_VENV=1: with its python3)
	@$(GPU_PYTHON) -m bench.campaign $(GPU_FLAGS)

clean: ## Remove the environment and everything made
	rm -rf $(VENV) build dist *.egg-info demo-output .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The stamps.  Each says that the environment has held, since these two files last changed, what a group of targets needs.
$(VENV)/.ready-demo: pyproject.toml Makefile
	@$(call create_environment)
	@echo "Installing what the demo needs into $(VENV) (about a minute) ..." >&2
	@$(PIP_INSTALL) "$(TORCH)" "$(TRITON)" -e ".[demo]"
	@touch $@

$(VENV)/.ready-dev: pyproject.toml Makefile
	@$(call create_environment)
	@echo "Installing what the checks need into $(VENV) (about a minute) ..." >&2
	@$(PIP_INSTALL) "$(TORCH)" "$(TRITON)" -e ".[demo,dev]"
	@touch $(VENV)/.ready-demo $@

# An environment whose interpreter is gone (a copied checkout, an upgraded Python) is made anew.
define create_environment
$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
  || { echo "tritontower needs Python 3.11 or newer; name one: make PYTHON=python3.12" >&2; exit 1; }; \
$(VENV_PYTHON) -c '' 2>/dev/null || $(PYTHON) -m venv --clear $(VENV)
endef
