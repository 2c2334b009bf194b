"""The whole stack on CPU: a tiny Llama made on the spot, runs as a user starts them, and nothing left behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

import pytest
import torch

MARK = "OPENRLHF_PGRPO_TEST_RUN"

REWARD = """
import torch

def reward_func(queries, prompts, labels):
    assert type(labels[0]) is str, f"a label of type {type(labels[0])}"
    answer = queries[0][len(prompts[0]):]
    scale = {"ann": 1.0, "bob": 5.0, "cleo/3": 0.2}[labels[0]]
    vowels = scale * sum(letter in "aeiouAEIOU" for letter in answer)
    return {"rewards": torch.tensor([vowels]), "scores": torch.tensor([vowels]), "extra_logs": {"vowels": vowels}}
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A folder with a two-layer Llama (head_dim 32, which vLLM's CPU attention takes), prompts and a reward function."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    vocab = {token: i for i, token in enumerate(["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    shape = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, head_dim=32)
    config = LlamaConfig(vocab_size=len(vocab), num_key_value_heads=2, max_position_embeddings=256, **shape,
                         tie_word_embeddings=True, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder / "model")

    personas = ["ann", "bob", "ann", "cleo/3"]
    rows = [
        {"input": f"{i} says ", "answer": personas[i % 4], "persona": personas[i % 4], "who": f"u{i % 6}",
         "struct": {"persona": personas[i % 4], "who": f"u{i % 6}", "nested": [i]}}
        for i in range(24)
    ]
    write_jsonl(folder / "prompts.jsonl", rows)
    write_jsonl(folder / "eval.jsonl", [{"input": "who says ", "answer": "ann"}])
    (folder / "reward.py").write_text(REWARD)
    return folder


def write_jsonl(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


class Run:
    """One training run, started as a user starts it; `folder` holds everything it writes."""

    def __init__(self, tiny: Path, folder: Path, *flags: str, **environment: str):
        self.folder, self.mark = folder, uuid.uuid4().hex
        folder.mkdir(exist_ok=True)
        self.log = folder / "log.txt"
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
        command = [sys.executable, "-m", "openrlhf_pgrpo.cli.train_ppo_ray", *words]
        with open(self.log, "a") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env={**os.environ, **environment, MARK: self.mark}
            )

    def wait(self, timeout: float = 400) -> int:
        return self.process.wait(timeout)

    def succeed(self) -> "Run":
        assert self.wait() == 0, self.tail()
        return self

    def until(self, ready, timeout: float = 400) -> None:
        """Waits until `ready()` is true of a run that is alive."""
        deadline = time.monotonic() + timeout
        while not ready():
            assert self.process.poll() is None and time.monotonic() < deadline, self.tail()
            time.sleep(0.02)

    def stop(self) -> None:
        """Ends the driver and, by their ids, all processes that inherited this run's mark: Ray's and vLLM's too."""
        self.process.kill()
        while pids := self._alive():
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    continue
            time.sleep(0.05)
        self.process.wait()

    def _alive(self) -> list[int]:
        mark, pids = f"{MARK}={self.mark}".encode(), []
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                    pids.append(int(entry.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # ended meanwhile, or not ours
        return pids

    @property
    def steps(self) -> list[dict]:
        return read_jsonl(self.folder / "out" / "metrics.jsonl")

    def output(self) -> str:
        return self.log.read_text(errors="replace")

    def tail(self) -> str:
        return f"{self.log}:\n" + "\n".join(self.output().splitlines()[-60:])

    def checkpoint(self, tag: str) -> dict:
        """What the checkpoint `tag` holds for us."""
        path = self.folder / "ckpt" / "_actor" / tag / "mp_rank_00_model_states.pt"
        return torch.load(path, weights_only=False, map_location="cpu")["openrlhf_pgrpo"]


@pytest.fixture
def start(tiny, tmp_path):
    """Starts runs in the folder of this test and ends what is left of them."""
    runs = []

    def start(*flags, folder="run", **environment) -> Run:
        runs.append(Run(tiny, tmp_path / folder, *flags, **environment))
        return runs[-1]

    yield start
    for run in runs:
        run.stop()
