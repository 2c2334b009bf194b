"""Runs as a user starts them, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch

# Since 0.11.2 the host has levels of it.
CORRECTION = ("--algo.advantage.is_correction_level", "token")
if metadata.version("openrlhf") in ("0.11.0", "0.11.1"):
    CORRECTION = ("--algo.advantage.is_correction_enable",)


class Run:
    """One training run, started as a user starts it; `folder` holds everything it writes."""

    def __init__(self, started, tiny: Path, folder: Path, *flags: str, module: str, **environment: str):
        self.folder = folder
        folder.mkdir(exist_ok=True)
        argv = {
            "--actor.model_name_or_path": tiny / "model",
            "--data.prompt_dataset": tiny / "prompts.jsonl",
            "--data.input_key": "input",
            "--data.label_key": "answer",
            "--vllm.num_engines": 1,
            "--rollout.batch_size": 4,
            "--rollout.n_samples_per_prompt": 2,
            "--rollout.micro_batch_size": 4,
            "--rollout.max_new_tokens": 16,
            "--train.batch_size": 8,
            "--train.micro_batch_size": 4,
            "--data.max_len": 64,
            "--actor.adam.lr": 1e-2,
            "--algo.kl.init_coef": 0,
            "--ckpt.path": folder / "ckpt",
            "--ckpt.output_dir": folder / "out",
        }
        words = [str(word) for pair in argv.items() for word in pair] + [*CORRECTION, *map(str, flags)]
        command = [sys.executable, "-m", module, *words]
        self.started = started(command, folder / "log.txt", {**os.environ, **environment})
        self.process = self.started.process

    def wait(self, timeout: float = 900) -> int:
        return self.process.wait(timeout)

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.tail()
        return self

    def until(self, ready, timeout: float = 900) -> None:
        """Waits until `ready()` is true of a run that is alive."""
        self.started.until(ready, timeout)

    def stop(self) -> None:
        """Ends the driver and all that it started: Ray's and vLLM's processes too."""
        self.started.kill()

    @property
    def steps(self) -> list[dict]:
        path = self.folder / "out" / "metrics.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def output(self) -> str:
        return self.started.output()

    def tail(self) -> str:
        return self.started.tail()

    def checkpoint(self, tag: str) -> dict:
        """Our state in the checkpoint `tag`."""
        first_rank = min((self.folder / "ckpt" / "_actor" / tag).glob("*model_states.pt"))
        return torch.load(first_rank, weights_only=False, map_location="cpu")["openrlhf_pgrpo"]


@pytest.fixture
def start(started, tiny, tmp_path):
    """Starts runs in the folder of this test and ends what is left of them."""
    runs = []

    def start(*flags, module="openrlhf_pgrpo.cli.train_ppo_ray", **environment) -> Run:
        runs.append(Run(started, tiny, tmp_path / "run", *flags, module=module, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()


class Training:
    """One run of a trainer without Ray; `folder` holds everything it writes. Runs in turn share log and process."""

    def __init__(self, folder: Path, log: Path, process: subprocess.Popen):
        self.folder, self.log, self.process = folder, log, process

    def finish(self) -> "Training":
        assert self.process.wait(600) == 0, self.log.read_text(errors="replace")[-4000:]
        return self

    def kill(self) -> None:
        """Ends its process, all its ranks and loaders: they are in a session of their own."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            self.process.wait()

    @property
    def steps(self) -> list[dict]:
        return [json.loads(line) for line in (self.folder / "out" / "metrics.jsonl").read_text().splitlines()]

    @property
    def files(self) -> list[Path]:
        """Weights that were saved at the end."""
        return list((self.folder / "out").glob("*.safetensors"))


@pytest.fixture
def start_in_turn(tmp_path):
    """Starts a process that makes runs one after the other, each in the folder of its name, and ends what is left of
    it. `runs` are names and flags; `argv` is for all of them. A single run starts as a user starts it."""
    started = []

    def start_in_turn(script, argv, runs, ranks=1, launcher=None, **environment) -> list[Training]:
        folders, words = [tmp_path / name for name, _ in runs], []
        for folder, (_, flags) in zip(folders, runs):
            folder.mkdir(exist_ok=True)
            own = {**argv, "--ckpt.path": folder / "ckpt", "--ckpt.output_dir": folder / "out"}
            words += ["then"] * bool(words) + [word for pair in own.items() for word in pair] + [*flags]
        if launcher is None:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", ranks]
            program = Path(__file__).parent / "in_turn.py" if len(runs) > 1 else "-m"
            launcher = [*(torchrun if ranks > 1 else []), program]
        # One thread per process, because threads would wait for each other on a busy machine.
        ours = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        command = [str(word) for word in (sys.executable, *launcher, script, *words)]
        log, environment = folders[0] / "log.txt", {**os.environ, **ours, **environment}
        with open(log, "a") as file:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )
        started.append([Training(folder, log, process) for folder in folders])
        return started[-1]

    yield start_in_turn
    for first, *_ in started:
        first.kill()
