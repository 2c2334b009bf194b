"""What the benchmarks of whole training runs share: a tiny policy, prompts with rewards, and runs that leave no
processes behind."""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from contextlib import contextmanager
from pathlib import Path

PREF_GROUPS, USERS = 8, 32
CONTEXT = 256
PROMPTS, SAMPLES, TOKENS = 16, 4, 32  # per step, per prompt, per answer
LONGEST_RUN = 1800  # seconds
MARK = "OPENRLHF_PGRPO_BENCHMARK_RUN"

REWARD = """
import torch

def reward_func(queries, prompts, labels):
    distinct = float(len(set(queries[0][len(prompts[0]):])))
    return {"rewards": torch.tensor([distinct]), "scores": torch.tensor([distinct]), "extra_logs": {}}
"""


def new_folder(parser, folder: Path) -> Path:
    """Makes `folder` and returns it, absolute; a usage error if it is not empty. From now on a SIGTERM also ends
    runs."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"needs a new or empty folder, got {folder}, which is not empty: name another or remove it")
    return folder


def tiny_policy(folder: Path) -> Path:
    """A random Llama over bytes, with heads of size 32, the smallest that vLLM supports on a CPU."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<pad>", "<eos>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>").save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(alphabet),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=CONTEXT,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=1,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def write_data(folder: Path, prompts: int, characters: int = 11) -> None:
    """Writes reward.py, and prompts.jsonl with prompts of `characters`, each with preference group, user and label."""
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(prompts):
            persona, prompt = f"persona {i % PREF_GROUPS}", f"{i:05} says ".rjust(characters, "o")
            row = {"prompt": prompt, "persona": persona, "user": f"user {i % USERS:02}", "label": persona}
            file.write(json.dumps(row) + "\n")
    (folder / "reward.py").write_text(REWARD)


def flags(policy: Path, folder: Path, run: Path) -> list[str]:
    """The command line of a run into the folder `run`, without estimator, engines and ranks.

    A learning rate that moves no weight lets all runs sample from the same policy. 0 is refused.
    """
    values = {
        "--actor.model_name_or_path": policy,
        "--data.prompt_dataset": folder / "prompts.jsonl",
        "--data.input_key": "prompt",
        "--data.label_key": "label",
        "--data.max_len": CONTEXT,
        "--reward.remote_url": folder / "reward.py",
        "--rollout.batch_size": PROMPTS,
        "--rollout.n_samples_per_prompt": SAMPLES,
        "--rollout.micro_batch_size": 16,
        "--rollout.max_new_tokens": TOKENS,
        "--train.batch_size": PROMPTS * SAMPLES,
        "--train.micro_batch_size": 16,
        "--actor.adam.lr": 1e-30,
        "--algo.kl.init_coef": 0,
        "--ckpt.path": run / "checkpoints",
        "--ckpt.output_dir": run / "model",
        "--logger.metrics_path": run / "metrics.jsonl",
    }
    return [str(word) for pair in values.items() for word in pair]


def run_to_the_end(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Runs `command`, and ends all processes that it leaves behind.

    Raises:
        SystemExit: the command failed or did not end. The message has the end of its log.
    """
    with started(command, log, environment) as process:
        try:
            code = process.wait(LONGEST_RUN)
        except subprocess.TimeoutExpired:
            code = f"no end after {LONGEST_RUN} seconds"
    if code != 0:
        raise SystemExit(f"a benchmark needs runs that succeed, got {code} from {log.parent.name}; {tail(log)}")


@contextmanager
def started(command: list[str], log: Path, environment: dict[str, str]):
    """A process. At the end it is killed, with every process that it started."""
    mark = uuid.uuid4().hex
    # Without SPT_NOENV, Ray overwrites the mark when it renames its processes.
    environment = {**os.environ, **environment, MARK: mark, "SPT_NOENV": "1"}
    with open(log, "w") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            yield process
        finally:
            process.kill()
            end_all(f"{MARK}={mark}".encode())
            process.wait()


def tail(log: Path) -> str:
    return f"{log} ends:\n" + "\n".join(log.read_text(errors="replace").splitlines()[-40:])


def end_all(mark: bytes) -> None:
    """Ends all processes with this mark in their environment: those of Ray and vLLM outlive the driver."""
    while pids := list(marked(mark)):
        for pid in pids:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        time.sleep(0.05)


def marked(mark: bytes):
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdigit() and mark in (entry / "environ").read_bytes():
                yield int(entry.name)
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has ended, or is not ours
