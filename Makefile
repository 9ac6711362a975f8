# make demo: from a fresh checkout to a trained model and its report in runs/demo. No GPU, no root.
#
#   make install PYTHON=python3.12                   another interpreter (3.11 to 3.13), for a new .venv
#   make install TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"      another build of torch
#   make wheel-check TORCH_OTHER="torch==2.12.1"      does a wheel built against this torch run under another one (>= 2.10)?
#   FLOWBP_BUILD=0 make install                      no C++ compiler: the ops run on plain PyTorch

PYTHON ?= python3
TORCH ?= $(shell grep '^torch==' constraints.txt)
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

.PHONY: install demo test lint wheel-check clean

install: $(INSTALLED)

# torch comes first because the build needs it, and its pin is lifted after that so that TORCH may name another version;
# so is Triton's where that torch has brought its own (a build for GPUs does).
$(INSTALLED): pyproject.toml setup.py constraints.txt $(shell find csrc -type f) | $(BIN)/python
	$(BIN)/python -m pip install --upgrade "pip>=23.1" "setuptools>=77" wheel ninja pybind11
	$(BIN)/python -m pip install $(TORCH)
	grep -v '^torch==' constraints.txt > $(VENV)/constraints.txt
	if $(BIN)/python -c 'import triton' 2>/dev/null; then sed -i '/^triton==/d' $(VENV)/constraints.txt; fi
	$(BIN)/python -m pip install --no-build-isolation -e ".[train,test]" -c $(VENV)/constraints.txt
	touch $@

$(BIN)/python:
	@$(PYTHON) -c 'import sys; sys.exit("flowbp needs Python 3.11 or newer" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)

# Nothing is downloaded at run time.
demo test: export HF_HUB_OFFLINE = 1

demo: install
	$(BIN)/flowbp train demo --overwrite

test: install
	$(BIN)/python -m pytest -q

lint: install
	$(BIN)/ruff check .

# A wheel built here, and no other file of this checkout but the tests, in an environment of its own with TORCH_OTHER.
WHEEL := build/wheel-check
WHEEL_BIN := $(WHEEL)/venv/bin
wheel-check: TORCH_OTHER ?= $(TORCH)
wheel-check: install
	rm -rf $(WHEEL)
	$(BIN)/python -m pip wheel --no-build-isolation --no-deps --wheel-dir $(WHEEL) .
	$(BIN)/python -m venv $(WHEEL)/venv
	$(WHEEL_BIN)/python -m pip install --quiet $(TORCH_OTHER)
	$(WHEEL_BIN)/python -m pip install --quiet numpy pytest hypothesis setuptools $(WHEEL)/*.whl
	cd $(WHEEL) && venv/bin/python -m flowbp_kernels
	$(WHEEL_BIN)/pytest -q tests/kernels/test_compiled_ops.py tests/kernels/test_quadrature_update.py

clean:
	rm -rf build dist *.egg-info flowbp_kernels/_C.* $(INSTALLED)
