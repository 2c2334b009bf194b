# make venv    everything that trains and tests without a GPU, in .venv
# make demo    trains SmolLM2-135M for seven personas and draws what happened
# make road    the whole road, from votes to a stranger who is served; ROAD names its folder and other words
# make lint    ruff and mypy: seconds, after a first time of two minutes
# make test    all tests but the next
# make test-slurm    the Slurm script on a real Slurm cluster, set up for it on this machine; as root
# make bench   all benchmarks, about an hour on quiet cores, into BENCH; says what changed since the last time
# make gpu-kit    wheels for a GPU machine without a package index, in gpu-kit/; GPU_PYTHON names its Python
# make flags   docs/flags.md again, after a change of flags or help texts
# make install-gpu    the GPU stack, into the Python that PYTHON names

PYTHON ?= python3
# pip options that find the CPU build of PyTorch, such as --index-url, if plain `torch` is the CUDA build for you
TORCH_PIP ?=
DEMO ?= demo-run
ROAD ?= road-run
BENCH ?= bench.json
GPU_PYTHON ?= 3.12
VENV := .venv
BIN := $(VENV)/bin

# The version that the host asks for.
FLASH_ATTN := flash-attn==2.8.3

.PHONY: venv requirements demo road lint test test-slurm bench gpu-kit flags flash-attn install-gpu

venv: $(VENV)/.complete

# Separate from venv, because it is a layer of examples/docker/Dockerfile.cpu.
requirements: $(VENV)/.requirements

# torch is installed first, with its dependencies. The rest is a complete list (see its first lines).
$(VENV)/.requirements: requirements-cpu.txt
	$(PYTHON) -c 'import sys; assert (3, 11) <= sys.version_info < (3, 13), f"needs Python 3.11 or 3.12, got {sys.version}: make PYTHON=python3.11"'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet $(TORCH_PIP) --constraint requirements-cpu.txt torch
	$(BIN)/python -m pip install --quiet --no-deps --requirement requirements-cpu.txt
	touch $@

$(VENV)/.complete: $(VENV)/.requirements setup.py
	$(BIN)/python -m pip install --quiet --no-deps --editable .
	touch $@

demo: venv
	$(BIN)/python examples/personas/demo.py $(DEMO)

road: venv
	$(BIN)/python examples/road/road.py $(ROAD)

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# Two files at a time, those that take longest first. One thread for each: on two cores more would wait for each other.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests/e2e tests/ray tests/ops/test_cluster.py tests --ignore tests/slurm -n 2 --dist loadfile --no-loadscope-reorder --durations 20

# Without root or apt-get nothing is installed, and the tests say what is missing.
test-slurm: venv
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } || \
	        echo "no Slurm could be installed"; \
	fi
	$(BIN)/python -m pytest tests/slurm

bench: venv
	$(BIN)/python examples/benchmarks/bench.py $(BENCH)

gpu-kit: venv
	$(BIN)/python tests/gpu/kit.py gpu-kit --python $(GPU_PYTHON)

flags: venv
	$(BIN)/python docs/flags.py

# flash-attn is compiled against the installed torch, so it is built without pip's isolation, with its build tools here.
flash-attn:
	$(PYTHON) -m pip install --constraint requirements-cpu.txt torch ninja packaging psutil setuptools wheel
	$(PYTHON) -m pip install --no-build-isolation --no-deps $(FLASH_ATTN)

install-gpu: flash-attn
	$(PYTHON) -m pip install ".[gpu]"
