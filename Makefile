# The two commands: `make demo` shows the main job for real, `make test` checks everything. Both do all
# the set-up they need on a fresh Debian 12 or 13, as root; the second time there is nothing to do.

PYTHON ?= /usr/bin/python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.complete
EXTENSION := $(VENV)/.extension
CATALOGUES := $(VENV)/.catalogues
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check --no-input

# Demo and tests mount file systems and start daemons: in namespaces of their own nothing stays behind,
# whatever happens.
PRIVATE := unshare --mount --propagation private --pid --fork --kill-child --mount-proc

IMAGE ?= /
LIVE ?= iso
SOAK ?= 1

.PHONY: help setup demo test test-kernel soak bench man site dist deb deb-test boot-test live live-test rpm arch messages lock clean

help:
	@echo 'make demo [IMAGE=FILE-OR-DIRECTORY]  run the main job for real, narrated'
	@echo 'make test                            lint, types and every test'
	@echo 'make test-kernel                     some of them on the kernel of Debian, in a virtual machine'
	@echo 'make soak [SOAK=FACTOR]              the tests that take long, FACTOR times as long'
	@echo 'make bench [BENCH=OPTIONS]           compare with other overlays: docs/benchmark.md'
	@echo 'make man                             the manual pages, from docs/, into build/man'
	@echo 'make site                            the documentation as a web site, into build/site'
	@echo 'make dist                            an sdist and a wheel, in dist'
	@echo 'make deb                             packages for Debian 13, in build/deb'
	@echo 'make deb-test                        install, upgrade and remove them, on a machine in a container'
	@echo 'make boot-test                       start a live system with them, in a virtual machine'
	@echo 'make live [LIVE=iso|stick]           a live CD with a desktop and the reset button, in build/live'
	@echo 'make live-test [LIVE=iso|stick]      start it in a virtual machine, and press the button'
	@echo 'make rpm, make arch                  packages for Fedora and Arch Linux, in build/rpm and build/arch'
	@echo 'make setup                           Debian packages and $(VENV), as the two above do'
	@echo 'make messages                        bring the translations up to date with the source'
	@echo 'make lock                            resolve the versions of the dependencies anew'
	@echo 'make clean                           remove what make has made'

setup: $(STAMP) $(EXTENSION) $(CATALOGUES)
	@packaging/setup-debian

demo: setup
	@$(PRIVATE) $(BIN)/python demo/run.py --image '$(IMAGE)'

test: setup
	@$(BIN)/ruff format --check --quiet . || { $(BIN)/ruff format --check .; exit 1; }
	@$(BIN)/ruff check --quiet .
	@$(BIN)/mypy --no-error-summary
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --numprocesses $$((2 * $$(nproc))) --dist worksteal

test-kernel: setup
	@packaging/setup-kernel
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --capture=no -m kernel tests/kernel

soak: setup
	@SOAK='$(SOAK)' $(PRIVATE) $(BIN)/python -m pytest --quiet -m soak

bench: setup
	@packaging/setup-bench
	@$(PRIVATE) $(BIN)/python -m tests.bench.run $(BENCH)

man:
	@command -v pandoc >/dev/null || packaging/setup-debian
	@packaging/manual/build build/man

# A warning, such as of a link that leads nowhere, is an error.
SPHINX := sphinx-build -q -n -W --keep-going -b html -d build/doctrees

site:
	@command -v sphinx-build >/dev/null || packaging/setup-debian
	@$(SPHINX) docs build/site

dist: setup
	@rm -rf dist
	@SOURCE_DATE_EPOCH=$${SOURCE_DATE_EPOCH:-$$(git log -1 --format=%ct 2>/dev/null || date +%s)} \
	    $(BIN)/python -m build --quiet --no-isolation --outdir dist .
	@ls dist/*

# Of the developers' set-up, it takes nothing.
deb:
	@mkdir -p build
	@packaging/pack-source build/source.tar.gz
	@packaging/build-package deb build/source.tar.gz build/deb

deb-test: setup deb
	@$(PRIVATE) $(BIN)/python -m pytest --quiet -m package tests/package

rpm arch: dist
	@packaging/build-package $@ dist/sessiond-*.tar.gz build/$@

boot-test: setup deb
	@packaging/setup-kernel
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --capture=no --durations=0 -m '' tests/boot

live: deb
	@packaging/live/build '$(LIVE)' build/live build/deb/sessiond_*.deb build/deb/sessiond-desktop_*.deb

live-test: setup live
	@packaging/setup-kernel
	@$(PRIVATE) $(BIN)/python -m pytest --quiet --capture=no -m live -k '$(LIVE)' tests/live

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

$(CATALOGUES): $(STAMP) setup.py $(wildcard sessiond/locale/*.po)
	@$(BIN)/python setup.py --quiet catalogues
	@touch $@

messages:
	@packaging/messages

# The header and the origin of a package are left out: the file says the same wherever it was made.
lock: $(STAMP)
	@$(PIP) install uv
	@$(BIN)/uv pip compile --quiet --upgrade --universal --python-version 3.11 --generate-hashes \
	    --no-header --no-emit-index-url --group dev --output-file requirements-dev.lock pyproject.toml

clean:
	rm -rf $(VENV) build dist *.egg-info sessiond/fuse/*.so sessiond/locale/*/ .hypothesis .mypy_cache .pytest_cache .ruff_cache
