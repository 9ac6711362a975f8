# make demo: from a fresh checkout to a trained model and its report in runs/demo. No GPU, no root.
# make check: style, types and the fast tests, in under a minute.     make test: all tests.     CONTRIBUTING.md has more.
#
#   make install PYTHON=python3.12                   another interpreter (3.11 to 3.13), for a new .venv
#   make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"      another build of torch
#   make soak                                        kills, full disks, damaged files, strange input: docs/reliability.md
#   make builds                                      does it install by other compilers, without one, from sdist and wheel?
#   make wheel                                       a wheel that an index takes, in dist/
#   make wheel-check TORCH_OTHER="torch==2.12.1"     does that wheel run under another torch (>= 2.10)?
#   FLOWBP_BUILD=0 make install                      no C++ compiler: the ops run on plain PyTorch

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install check lint types fast test soak demo builds wheel wheel-check clean

install: $(INSTALLED)

# torch comes first because the build needs it, and its pin is lifted after that so that TORCH may name another version;
# so is Triton's where that torch has brought its own (a build for GPUs does).
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(BIN)/python
	$(BIN)/python -m pip install --upgrade "pip>=23.1" "setuptools>=77,<82" wheel ninja pybind11
	$(BIN)/python -m pip install $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	if $(BIN)/python -c 'import triton' 2>/dev/null; then sed -i '/^triton==/d' $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install --no-build-isolation -e ".[train,test,quantise]" -c $(VENV)/constraints.txt
	$(BIN)/python -m flowbp_kernels
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("flowbp needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Python keeps what it compiles: a test that starts a program would compile all of flowbp again, and every process of
# pytest all tests.
unexport PYTHONDONTWRITEBYTECODE

# Nothing is downloaded at run time.
check fast test soak demo: export HF_HUB_OFFLINE = 1

# pytest: one process a core, each with whole files, the slow ones first, so that none is left alone at the end.
WORKERS ?= auto
PYTEST := $(BIN)/python -m pytest -q -n $(WORKERS) --maxprocesses 8
BY_FILE := --dist loadfile --no-loadscope-reorder

# What every commit passes: three jobs side by side, each with its output in one piece.
check: install
	$(MAKE) --no-print-directory --jobs 3 --output-sync lint types fast

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python benchmarks/tables.py --check

# pyright runs on the node that its package brings, and does not ask for a newer version.
types: export PYRIGHT_PYTHON_IGNORE_WARNINGS = 1
types: install
	$(BIN)/python -m pyright --pythonpath $(BIN)/python

fast: install
	$(PYTEST) --dist worksteal -m fast

test: install
	$(PYTEST) $(BY_FILE)

# Half an hour on one core. A part of it is in `make test`.
soak: install
	$(BIN)/python tests/reliability/soak.py --json docs/reliability.json

# Processes of one thread: threads would wait for each other in every operation as soon as another program takes a core.
demo: install
	$(BIN)/flowbp train demo --processes 2 data.batch_size=16 --overwrite

builds:
	PYTHON=$(PYTHON) TORCH="$(TORCH)" .ci/builds

wheel: install
	.ci/wheel $(BIN)/python

# The wheel in dist/, and no other file of this checkout but the tests, in an environment of its own with TORCH_OTHER.
CHECK := build/wheel-check
CHECK_BIN := $(CHECK)/bin
wheel-check: TORCH_OTHER ?= $(TORCH)
wheel-check:
	rm -rf $(CHECK)
	$(PYTHON) -m venv $(CHECK)
	$(CHECK_BIN)/python -m pip install --quiet $(TORCH_OTHER)
	$(CHECK_BIN)/python -m pip install --quiet numpy pytest hypothesis "setuptools>=77,<82" dist/flowbp-*.whl
	cd $(CHECK) && bin/python -m flowbp_kernels
	$(CHECK_BIN)/pytest -q -m "not slow" tests/kernels

clean:
	rm -rf build dist *.egg-info flowbp_kernels/_C.* $(INSTALLED)
