"""What the benchmarks of whole training runs share: a tiny policy, prompts with rewards, and runs that leave nothing
behind them."""

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
    """`folder`, made and absolute, or a usage error if it holds something; from now on a SIGTERM ends runs with us."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        parser.error(f"needs a new or empty folder, got {folder}, which holds something: name another or remove it")
    return folder


def tiny_policy(folder: Path) -> Path:
    """A random Llama over bytes; heads of 32, the smallest that vLLM has on a CPU."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    alphabet = ["<pad>", "<end>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<end>").save_pretrained(folder)
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
    """reward.py, and prompts.jsonl with prompts of so many characters, each with preference group, user and label."""
    with open(folder / "prompts.jsonl", "w") as file:
        for i in range(prompts):
            persona, prompt = f"persona {i % PREF_GROUPS}", f"{i:05} says ".rjust(characters, "o")
            row = {"prompt": prompt, "persona": persona, "user": f"user {i % USERS:02}", "label": persona}
            file.write(json.dumps(row) + "\n")
    (folder / "reward.py").write_text(REWARD)


def flags(policy: Path, folder: Path, run: Path) -> list[str]:
    """The command line of a run into the folder `run`, but for estimator, engines and ranks.

    A learning rate of 0 lets all runs sample from the same policy.
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
        "--actor.adam.lr": 0,
        "--algo.kl.init_coef": 0,
        "--ckpt.path": run / "checkpoints",
        "--ckpt.output_dir": run / "model",
        "--pgrpo.metrics_path": run / "metrics.jsonl",
    }
    return [str(word) for pair in values.items() for word in pair]


def run_to_the_end(command: list[str], log: Path, environment: dict[str, str]) -> None:
    """Runs `command` and ends whatever it leaves behind.

    Raises:
        SystemExit: it failed or did not end; the message holds the end of its log.
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
    """A process; in the end it is killed, and so is everything that it started."""
    mark = uuid.uuid4().hex
    # Ray names its processes, and would write the name over the mark, were it not for SPT_NOENV.
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
    """Ends all processes with this mark in their environment, by their ids: Ray's and vLLM's outlive the driver."""
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
            continue  # ended meanwhile, or not ours
