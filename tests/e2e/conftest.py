"""Runs as a user starts them, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch


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
            "--algo.advantage.is_correction_level": "token",
            "--ckpt.path": folder / "ckpt",
            "--ckpt.output_dir": folder / "out",
        }
        words = [str(word) for pair in argv.items() for word in pair] + [str(flag) for flag in flags]
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
    """One run of a trainer without Ray; `folder` holds everything it writes."""

    def __init__(self, folder: Path, command: list[str], environment: dict):
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir(exist_ok=True)
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True
            )

    def finish(self) -> "Training":
        assert self.process.wait(600) == 0, self.log.read_text(errors="replace")[-4000:]
        return self

    def kill(self) -> None:
        """Ends this run, all its ranks and loaders: they are in a session of their own."""
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
def start_training(tmp_path):
    """Starts runs, each in the folder of its name, and ends what is left of them."""
    runs = []

    def start_training(name, argv, flags, ranks=1, program=(), launcher=None, **environment) -> Training:
        folder = tmp_path / name
        argv = {**argv, "--ckpt.path": folder / "ckpt", "--ckpt.output_dir": folder / "out"}
        words = [str(word) for pair in argv.items() for word in pair] + [str(flag) for flag in flags]
        if launcher is None:
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
            launcher = torchrun if ranks > 1 else []
        # One thread per process, because threads would wait for each other on a busy machine.
        ours = {"HF_DATASETS_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
        command = [sys.executable, *launcher, *program, *words]
        runs.append(Training(folder, command, {**os.environ, **ours, **environment}))
        return runs[-1]

    yield start_training
    for run in runs:
        run.kill()
