# make venv    everything that trains and tests without a GPU, in .venv
# make demo    trains SmolLM2-135M for seven personas and draws what happened
# make test    all tests but the next
# make test-slurm    the Slurm script on a real Slurm cluster, set up for it on this machine; as root
# make install-gpu    the GPU stack, into the Python that PYTHON names

PYTHON ?= python3
# Where pip finds the CPU build of PyTorch, if plain `torch` means the CUDA build for you: pip options, e.g. --index-url
TORCH_PIP ?=
DEMO ?= demo-run
VENV := .venv
BIN := $(VENV)/bin

# The version that the host asks for.
FLASH_ATTN := flash-attn==2.8.3

.PHONY: venv requirements demo test test-slurm flash-attn install-gpu

venv: $(VENV)/.complete

# A step of its own, as a layer of examples/docker/Dockerfile.cpu.
requirements: $(VENV)/.requirements

# torch comes first and with its dependencies: the rest is a complete list, installed as it stands (see its first lines).
$(VENV)/.requirements: requirements-cpu.txt
	$(PYTHON) -c 'import sys; assert sys.version_info[:2] == (3, 11), f"needs Python 3.11, got {sys.version}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_PIP) --constraint requirements-cpu.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-cpu.txt
	touch $@

$(VENV)/.complete: $(VENV)/.requirements setup.py
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: venv
	$(BIN)/python examples/personas/demo.py $(DEMO)

test: venv
	$(BIN)/python -m pytest --ignore tests/slurm

# Without root or apt-get nothing is installed, and the tests say what they miss.
test-slurm: venv
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } || \
	        echo "no Slurm could be installed"; \
	fi
	$(BIN)/python -m pytest tests/slurm

# It is compiled against an installed torch and by its build tools, which pip would not show it.
flash-attn:
	$(PYTHON) -m pip install --constraint requirements-cpu.txt torch ninja packaging psutil setuptools wheel
	$(PYTHON) -m pip install --no-build-isolation --no-deps $(FLASH_ATTN)

install-gpu: flash-attn
	$(PYTHON) -m pip install ".[gpu]"
