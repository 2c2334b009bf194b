"""Tests on one GPU, for a machine where nothing can be installed; see kit.py. They run when asked for:

    python3 -m pytest tests/gpu --device cuda     on a GPU, against the CPU of the same machine
    python3 -m pytest tests/gpu --device cpu      the same files on a CPU alone, as far as one can

Runs are processes, started as a user starts them. Those that are not timed share the machine.
"""

import importlib.util
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
KIT = ROOT / "gpu-kit"
COSTS = pytest.StashKey()
ASK = "a GPU's tests run when asked for: python3 -m pytest tests/gpu --device cuda (or cpu)"
ADAM = "from deepspeed.ops.op_builder import FusedAdamBuilder; FusedAdamBuilder().load()"


def pytest_addoption(parser):
    parser.addoption("--device", choices=("cuda", "cpu"), help="Where tests/gpu train. Without it they are skipped.")


def pytest_configure(config):
    """Makes this Python ready, from the kit if it lacks the host, or says what is missing."""
    device = config.getoption("device", None)  # there is no such option if pytest was started on another folder
    if device is None:
        return
    sys.path.append(str(HERE))
    from kit import EXPECTED, install

    if missing := [name for name in EXPECTED if not importlib.util.find_spec(name)]:
        raise pytest.UsageError(
            f"tests/gpu need {', '.join(EXPECTED)} in this Python, got no {', '.join(missing)}: install those"
        )
    if importlib.util.find_spec("openrlhf") is None:
        if not KIT.is_dir():
            raise pytest.UsageError(
                f"tests/gpu need the host, got no openrlhf in this Python and no folder {KIT.name}: call `make "
                "gpu-kit` where packages can be downloaded, and bring the folder here"
            )
        folder = tempfile.TemporaryDirectory(prefix="gpu-kit-")
        config.add_cleanup(folder.cleanup)
        if complaint := install(KIT, Path(folder.name)):
            version = "{}.{}".format(*sys.version_info)
            raise pytest.UsageError(
                f"tests/gpu need wheels for this Python, {version}, got a kit that pip refuses: {complaint}: make it "
                f"again with `make gpu-kit GPU_PYTHON={version}`"
            )
        sys.path.insert(0, folder.name)
        os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [folder.name, os.environ.get("PYTHONPATH")]))

    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise pytest.UsageError(
            f"--device cuda needs a GPU that torch sees, got none with torch {torch.__version__}: look at nvidia-smi, "
            "and at the CUDA that this torch was built for"
        )
    if device == "cuda":  # one device, for all that is started here as well
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]


def pytest_collection_modifyitems(config, items):
    if config.getoption("device", None) is None:
        for item in items:
            if HERE in item.path.parents:
                item.add_marker(pytest.mark.skip(reason=ASK))


@pytest.fixture(scope="session", autouse=True)
def hooks():
    """Nothing: the host is imported in processes of its own alone, not in this one, as for other tests."""


@pytest.fixture(scope="session")
def device(pytestconfig) -> str:
    return pytestconfig.getoption("device")


class Run:
    """A command of ours that has ended well; `folder` holds everything it wrote."""

    def __init__(self, folder: Path, words: list, environment: dict[str, str]):
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir(parents=True, exist_ok=True)
        with open(self.log, "w") as log:
            done = subprocess.run(
                command(*words, "--ckpt.path", folder / "ckpt", "--ckpt.output_dir", folder / "out"),
                **dict(stdout=log, stderr=subprocess.STDOUT, timeout=400),
                env={**environment, "MEASURES": str(folder / "measures.json")},
            )
        assert done.returncode == 0, f"{self.log}:\n{self.log.read_text(errors='replace')[-4000:]}"

    @property
    def steps(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]

    def weights(self) -> dict:
        """What was learned, by name, in float32."""
        from safetensors.torch import load_file

        (file,) = (self.folder / "out").glob("*.safetensors")
        return {name: value.float() for name, value in load_file(file).items()}

    def costs(self, skipped: int) -> tuple[float, int]:
        """Seconds of an update, the median after the first ones, and the most bytes that were held."""
        measures = json.loads((self.folder / "measures.json").read_text())
        return float(np.median(np.diff(measures["ends"])[skipped:])), measures["memory"]


def command(door: str, *words) -> list[str]:
    return [sys.executable, str(HERE / "launcher.py"), door, *map(str, words)]


@pytest.fixture(scope="session")
def adam(device, tmp_path_factory) -> str | None:
    """What hinders DeepSpeed's Adam, which it compiles at its first use; None if nothing does. All other tests go on,
    with PyTorch's Adam, which is the same update."""
    if device == "cpu":
        return None
    log = tmp_path_factory.mktemp("adam") / "log.txt"
    with open(log, "w") as file:
        done = subprocess.run([sys.executable, "-c", ADAM], stdout=file, stderr=subprocess.STDOUT, timeout=300)
    return log.read_text(errors="replace")[-4000:] if done.returncode else None


@pytest.fixture(scope="session")
def environment(device, adam, tmp_path_factory):
    """The environment of a process that trains on a device, this session's if none is named."""

    def environment(on: str = device) -> dict[str, str]:
        alone = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
        return {
            **os.environ,
            **alone,  # otherwise DeepSpeed would ask MPI, if there is an mpi4py
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "HF_HUB_OFFLINE": "1",
            "HF_DATASETS_CACHE": str(tmp_path_factory.getbasetemp() / "datasets"),
            "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # with it cuBLAS is deterministic
            # One thread: others would only wait for each other, on models as small as these.
            **({"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"} if on == "cpu" else {}),
            **({"TORCH_ADAM": "1"} if adam and on == "cuda" else {}),
        }

    return environment


@pytest.fixture(scope="session")
def train(environment, device, tmp_path_factory):
    """Trains in a folder of its own and waits for the end."""
    folder = tmp_path_factory.mktemp("runs")

    def train(name: str, door: str, *flags, on: str = device, **more: str) -> Run:
        words = (door, *flags, "--pgrpo.device", "gpu" if on == "cuda" else "cpu")
        return Run(folder / name, words, {**environment(on), **more})

    return train


@pytest.fixture(scope="session")
def pool():
    """Starts what is not timed: two at once, more where there are many cores."""
    with ThreadPoolExecutor(max(2, len(os.sched_getaffinity(0)) // 4)) as pool:
        yield pool


@pytest.fixture(scope="session")
def pairs(tmp_path_factory) -> Path:
    """64 pairs of six users in two preference groups: three in four prefer yes, one no."""
    rows = []
    for i in range(64):
        yes, no = "yes" * (1 + i % 3), "no" * (1 + i % 2)
        chosen, rejected = (no, yes) if i % 4 == 3 else (yes, no)
        who = {"who": "few" if i % 4 == 3 else "many", "user": f"u{i % 6}"}
        rows.append({"prompt": f"{i} asks: ", "chosen": chosen, "rejected": rejected, **who})
    return write_pairs(tmp_path_factory.mktemp("pairs"), rows)


class Large(NamedTuple):
    """What is timed: a model, and pairs that fill its texts."""

    model: Path
    pairs: Path
    max_len: int
    hidden_size: int


@pytest.fixture(scope="session")
def large(device, tiny, tmp_path_factory) -> Large:
    """On a GPU the shape of SmolLM2-360M with random weights, texts of 512 tokens, and 24 updates of eight pairs. On a
    CPU, where no figure counts, the tiny one and eight updates."""
    import torch
    from transformers import AutoConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("large")
    model = Path(shutil.copytree(tiny / "model", folder / "model"))
    config, updates, length = AutoConfig.from_pretrained(model), 8, 64
    if device == "cuda":
        shape = dict(vocab_size=49152, hidden_size=960, intermediate_size=2560, num_hidden_layers=32, head_dim=64)
        config.update({**shape, "num_attention_heads": 15, "num_key_value_heads": 5, "max_position_embeddings": 1024})
        updates, length = 24, 512
        torch.manual_seed(0)
        with torch.device(device):
            LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(model)
    letters, rows = random.Random(0), []
    for i in range(8 * updates):
        prompt, *answers = ("".join(letters.choices("etaoinsh ", k=length // 2 - 4)) for _ in range(3))
        names = {"who": f"g{i % 2}", "user": f"u{i % 6}"}
        rows.append({"prompt": f"{prompt}: ", "chosen": f"{answers[0]}.", "rejected": f"{answers[1]}.", **names})
    return Large(model, write_pairs(folder, rows), length, config.hidden_size)


def write_pairs(folder: Path, rows: list[dict]) -> Path:
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def costs(pytestconfig) -> dict[str, tuple[float, int]]:
    """Seconds of an update and bytes, by what trains; printed at the end."""
    return pytestconfig.stash.setdefault(COSTS, {})


def pytest_report_header(config):
    if config.getoption("device", None) is None:
        return None
    from openrlhf_pgrpo.host import versions

    return f"{card(config)}; " + ", ".join(f"{name} {version}" for name, version in versions.stack().items())


def card(config) -> str:
    """The name of the GPU, or of the processor."""
    import torch

    if config.getoption("device") == "cuda":
        return torch.cuda.get_device_name()
    name = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    return name[1] if name else "CPU"


def pytest_terminal_summary(terminalreporter, config):
    if not (costs := config.stash.get(COSTS, None)):
        return
    terminalreporter.section("memory and time")
    rows = [f"| {card(config)} | ms an update | GiB |", "|---|---|---|"]
    rows += [f"| {name} | {1000 * seconds:.1f} | {size / 2**30:.2f} |" for name, (seconds, size) in costs.items()]
    for row in rows:
        terminalreporter.write_line(row)
