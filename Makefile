# Everything here runs in .venv, which `make install` creates. PYTHON chooses the interpreter it is made
# from: PYTHON=python3.12 make install.
PYTHON ?= python3
# Tests that run at once. Each mostly waits for the processes that it started.
JOBS ?= 3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
PEERS := .venv-peers
SOURCES := ps trainer protos tests hatch_build.py $(wildcard benchmarks examples)

.DEFAULT_GOAL := help
.PHONY: help install demo test lint format protos test-gpu soak load garbage bench bench-gpu bench-peers clean

help: ## list these targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-11s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

install: $(INSTALLED) ## create .venv with pinned versions and install zero-ps into it, editable
	@:

# The stamp makes `install` a no-op until something that an installation depends on has changed.
$(INSTALLED): pyproject.toml constraints.txt hatch_build.py protos/zero_ps.proto
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "zero-ps needs Python 3.11 or newer, and $(PYTHON) is %d.%d; choose another: PYTHON=python3.12 make install" % sys.version_info[:2])'
	@version='import sys; print(sys.version_info[:2])'; \
	if [ "$$($(BIN)/python -c "$$version" 2>/dev/null)" != "$$($(PYTHON) -c "$$version")" ]; then \
		echo "creating $(VENV)"; $(PYTHON) -m venv --clear $(VENV); \
	fi
	@echo "installing zero-ps and its dependencies into $(VENV); the first time this takes minutes"
	@PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --no-input --constraint constraints.txt --editable '.[dev,bench]'
	@touch $@
	@echo "ready: $(BIN)/zero-ps"

demo: install ## two servers, two trainers, one real training run (ARGS='--fresh' starts over)
	@$(BIN)/zero-ps demo $(ARGS)

test: lint ## lint, types, import rules, then every test
	$(BIN)/python -m pytest -n $(JOBS) --dist worksteal $(ARGS)

lint: install ## ruff, mypy and the import rules between the packages
	$(BIN)/ruff check --quiet $(SOURCES)
	$(BIN)/ruff format --quiet --check $(SOURCES)
	$(BIN)/mypy
	$(BIN)/lint-imports

format: install ## rewrite the sources the way `make lint` wants them
	$(BIN)/ruff check --quiet --fix $(SOURCES)
	$(BIN)/ruff format --quiet $(SOURCES)

# The build generates the code, with the generators that build-system.requires pins.
protos: install ## generate the gRPC code again from protos/*.proto
	@PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(BIN)/python -m pip install --quiet --no-input --no-deps --editable .
	@ls protos/zero_ps_pb2*

test-gpu: install ## the tests that need a CUDA device
	@if $(BIN)/python -c 'import sys, torch; sys.exit(not torch.cuda.is_available())'; then \
		$(BIN)/python -m pytest -m gpu $(ARGS); \
	else \
		echo "no GPU: torch finds no CUDA device here, so no GPU test was run"; \
	fi

soak: install ## kill servers 50 times, then kill, stop and cut off all kinds of processes 100 times (ARGS='--seed 1')
	$(BIN)/python -m tests.soak $(ARGS)

load: install ## 32 sessions against one server for a minute (ARGS='--sessions 64')
	$(BIN)/python -m tests.load $(ARGS)

garbage: install ## send servers thousands of messages that no trainer would (ARGS='--cases 20000 --seed 1')
	$(BIN)/python -m tests.garbage $(ARGS)

bench: install ## the benchmarks, and pictures of them, in runs/bench (ARGS='--quick --only step,links')
	$(BIN)/python -m benchmarks $(ARGS)

bench-gpu: install ## what links do with a CUDA device (ARGS='--quick --json runs/bench/gpu.json')
	$(BIN)/python -m benchmarks.gpu $(ARGS)

# DeepSpeed has an environment of its own, so that nothing of it can get into ours. What it compiles when it is first
# used is compiled here, since one that is interrupted there hangs the next.
define BUILD_OPERATORS
from deepspeed.ops.op_builder.cpu import AsyncIOBuilder, CPUAdamBuilder, PinMemoryBuilder, ShareMemCommBuilder
for builder in (CPUAdamBuilder, ShareMemCommBuilder, PinMemoryBuilder, AsyncIOBuilder):
    print("compiling", builder.NAME, flush=True)
    try:
        builder().load(verbose=False)
    except Exception as error:
        print("left out:", builder.NAME, "cannot be compiled:", error)
endef
export BUILD_OPERATORS

bench-peers: install ## install DeepSpeed, to compare with, into .venv-peers
	@test -e /usr/include/libaio.h || echo "libaio.h is missing, and deepspeed-nvme will be left out: apt-get install libaio-dev"
	@$(PYTHON) -m venv $(PEERS)
	@PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(PEERS)/bin/python -m pip install --quiet --no-input --constraint constraints.txt setuptools ninja --editable .
	@DS_BUILD_OPS=0 PIP_ROOT_USER_ACTION=ignore PIP_DISABLE_PIP_VERSION_CHECK=1 \
		$(PEERS)/bin/python -m pip install --quiet --no-input --constraint constraints.txt --no-build-isolation deepspeed==0.19.8
	@rm -f $(PEERS)/torch_extensions/*/lock
	@PATH=$(abspath $(PEERS))/bin:$$PATH DS_ACCELERATOR=cpu TORCH_EXTENSIONS_DIR=$(abspath $(PEERS))/torch_extensions \
		$(PEERS)/bin/python -c "$$BUILD_OPERATORS"
	@echo "ready: make bench, or $(BIN)/python -m benchmarks.step"

clean: ## delete .venv, generated code and caches; the stores under runs/ stay
	rm -rf $(VENV) $(PEERS) build dist .protoc-* protos/zero_ps_pb2* \
		.mypy_cache .pytest_cache .ruff_cache .hypothesis .import_linter_cache
	find ps trainer protos tests -name __pycache__ -prune -exec rm -rf {} +
