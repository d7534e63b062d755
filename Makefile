# The two commands: `make demo` shows the main job for real, `make test` checks everything. Both do all
# the set-up they need on a fresh Debian 12 or 13, as root; the second time there is nothing to do.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
EXTENSION := $(VENV)/.extension
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

# Demo and tests mount file systems and start daemons: in namespaces of their own nothing stays behind,
# whatever happens.
PRIVATE := unshare --mount --propagation private --pid --fork --kill-child --mount-proc

IMAGE ?= /
SOAK ?= 1

.PHONY: help setup demo test test-kernel soak bench lock clean

help:
	@echo 'make demo [IMAGE=FILE-OR-DIRECTORY]  run the main job for real, narrated'
	@echo 'make test                            lint, types and every test'
	@echo 'make test-kernel                     some of them on the kernel of Debian, in a virtual machine'
	@echo 'make soak [SOAK=FACTOR]              the tests that take long, FACTOR times as long'
	@echo 'make bench [BENCH=OPTIONS]           compare with other overlays: docs/benchmark.md'
	@echo 'make setup                           Debian packages and $(VENV), as the two above do'
	@echo 'make lock                            resolve the versions of the dependencies anew'
	@echo 'make clean                           remove what make has made'

setup: $(STAMP) $(EXTENSION)
	@packaging/setup-debian

demo: setup
	@$(PRIVATE) $(BIN)/python demo/run.py --image '$(IMAGE)'

test: setup
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --numprocesses auto --dist worksteal

test-kernel: setup
	@packaging/setup-kernel
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --capture=no -m kernel tests/kernel

soak: setup
	@SOAK='$(SOAK)' $(PRIVATE) $(BIN)/python -m pytest --quiet -m soak

bench: setup
	@packaging/setup-bench
	@$(PRIVATE) $(BIN)/python -m tests.bench.run $(BENCH)

# pip builds pyfuse3 against the system's libfuse, hence the Debian packages first.
$(STAMP): requirements-dev.lock pyproject.toml
	@packaging/setup-debian
	@echo 'Installing the dependencies into $(VENV).'
	@$(PYTHON) -m venv --clear $(VENV)
	@$(PIP) install --require-hashes -r requirements-dev.lock
	@$(PIP) install --no-deps --no-build-isolation --editable .
	@touch $@

$(EXTENSION): $(STAMP) setup.py $(wildcard sessiond/fuse/kernel_io/*)
	@$(BIN)/python setup.py --quiet build_ext --inplace
	@touch $@

# The header and the origin of a package are left out: the file says the same wherever it was made.
lock: $(STAMP)
	@$(PIP) install uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-emit-index-url --group dev --output-file requirements-dev.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info sessiond/fuse/*.so .hypothesis .mypy_cache .pytest_cache .ruff_cache
