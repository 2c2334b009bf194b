# make venv    everything that trains and tests without a GPU, in .venv
# make demo    trains SmolLM2-135M for seven personas and draws what happened
# make test    all tests

PYTHON ?= python3
# Where pip finds the CPU build of PyTorch, if plain `torch` means the CUDA build for you: pip options, e.g. --index-url
TORCH_PIP ?=
DEMO ?= demo-run
VENV := .venv
BIN := $(VENV)/bin

.PHONY: venv demo test

venv: $(VENV)/.complete

# torch comes first and with its dependencies: the rest is a complete list, installed as it stands (see its first lines).
$(VENV)/.complete: requirements-cpu.txt setup.py
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"needs Python 3.11, got {sys.version}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_PIP) --constraint requirements-cpu.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-cpu.txt
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: venv
	$(BIN)/python examples/personas/demo.py $(DEMO)

test: venv
	$(BIN)/python -m pytest
