"""What the one controller process does for a step when its samples and preference groups are many: time and memory.

    python examples/benchmarks/controller_limit.py [--samples 1000000] [--pref-groups 1000000] [--policy MODEL_FOLDER]

First what is ours, by calling what a run calls, on synthetic experiences of one step with one sample to a prompt. The
dataset gets its tags once a run, the state is copied and sent with every checkpoint, all else happens each step. Then
the host's work in the same process: an experience of each response, the tokenizer that it sends with every prompt (of
MODEL_FOLDER, else a tiny one), and `ray.wait`, of which it makes one for every prompt over all that are outstanding.

Seconds are processor time. Memory is what the process has grown by when the part is done, its result included.
"""

import argparse
import gc
import os
import pickle
import resource
import tempfile
import time
from copy import deepcopy
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from estimator_time import Step, experience_maker, experiences
from tiny_run import tiny_policy

MOST_SCALARS = 100_000  # of TensorBoard; each costs the same
PROMPT, ANSWER = 200, 800  # tokens of the host's experiences
WAITS = 30


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10**6)
    parser.add_argument("--pref-groups", type=int, default=10**6)
    parser.add_argument("--policy", type=Path, help="a Hugging Face folder, for its tokenizer")
    parser.add_argument("--outstanding", type=int, nargs="+", default=[1000, 3000, 10000], help="prompts waited for")
    args = parser.parse_args()
    if not 1 <= args.pref_groups <= args.samples:
        parser.error(f"needs 1 <= --pref-groups <= --samples, got {args.pref_groups} and {args.samples}")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        ours(args.samples, args.pref_groups, Path(folder))
        policy = args.policy.resolve() if args.policy else tiny_policy(Path(folder) / "policy")
        the_hosts(policy, args.outstanding)


class Ledger:
    """Measures parts, and prints a line for each."""

    def __init__(self, samples: int):
        self.samples = samples
        print(f"{'':44}{'seconds':>10}{'us/sample':>11}{'GiB':>8}")

    def part(self, name: str, function, *args, note=lambda result: "", times: float = 1):
        """The result of `function(*args)`, which does one of `times` equal shares of the work."""
        gc.collect()
        before, began = memory(), time.process_time()
        result = function(*args)
        seconds, grown = (time.process_time() - began) * times, memory() - before
        print(f"{name:44}{seconds:10.2f}{1e6 * seconds / self.samples:11.2f}{grown:8.2f}  {note(result)}", flush=True)
        return result


def memory() -> float:
    """GiB of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(samples: int, pref_groups: int, folder: Path) -> None:
    maker = experience_maker("pgrpo", samples_per_prompt=1)
    from openrlhf_pgrpo.core.advantages import PGRPOOptions
    from openrlhf_pgrpo.core.registry import make_advantage_estimator
    from openrlhf_pgrpo.host import metrics
    from openrlhf_pgrpo.host.experience_maker import _reward_batch

    print(f"ours, for {samples} samples of {pref_groups} preference groups")
    step, ledger = Step(samples, pref_groups, seed=0, samples_per_prompt=1), Ledger(samples)
    tag_dataset(ledger, step)
    made = experiences(step)
    batch = ledger.part("reward batch", _reward_batch, made, 1, True)
    ledger.part("pgrpo, its first step", maker.estimator, batch)
    ledger.part("pgrpo, a later one", maker.estimator, batch)
    ledger.part("or pgrpo_eb, its first step", make_advantage_estimator("pgrpo_eb", PGRPOOptions()), batch)
    del batch
    for experience in made:
        experience.advantages = torch.zeros_like(experience.kl)
    maker.pref_group_metrics = ledger.part(
        "metrics of each preference group", metrics.by_pref_group, made, maker.estimator
    )
    maker.pref_group_samples = ledger.part("an answer of each, at most 16", maker.sample_picker.pick, made)
    del made
    log(ledger, maker, samples, folder)
    maker.pref_group_metrics = {}
    maker.args.pgrpo.group_key = "persona"
    state = ledger.part("checkpoint: its state, copied", lambda: deepcopy(maker.checkpoint_state()))
    ledger.part("checkpoint: sent to the ranks", serialized, state, note=lambda sent: f"{bytes_of(sent) / 1e6:.0f} MB")


def tag_dataset(ledger: Ledger, step: Step) -> None:
    """Our two hooks on the host's dataset, with rows as `datasets` holds them."""
    import datasets

    from openrlhf_pgrpo.host import prompts

    plain = [f"prompt {q}" for q in range(len(step.owners))]

    class PromptDataset:
        def __init__(self, dataset, tokenizer, strategy, input_template=None):
            self.prompts = plain

    prompts.install_tags(SimpleNamespace(PromptDataset=PromptDataset))
    args = SimpleNamespace(
        pgrpo=SimpleNamespace(group_key="persona", user_key="user"),
        data=SimpleNamespace(label_key=None),
        robust=SimpleNamespace(estimator=None),
    )
    users = [f"user {q}" for q in range(len(step.owners))]
    rows = datasets.Dataset.from_dict({"persona": step.owners, "user": users})
    ledger.part("dataset: checked, once a run", prompts._check, rows, "prompts.jsonl", args)
    ledger.part("dataset: tagged, once a run", PromptDataset, rows, None, SimpleNamespace(args=args))


def log(ledger: Ledger, maker, samples: int, folder: Path) -> None:
    from openrlhf.utils.logging_utils import TensorboardLogger

    from openrlhf_pgrpo.host.metrics import StepLog
    from openrlhf_pgrpo.host.run_log import Progress

    maker.args.pgrpo.metrics_path = str(folder / "metrics.jsonl")
    handed_on = []
    steps = StepLog(SimpleNamespace(args=maker.args, experience_maker=maker, actor_model_group=None))
    steps.progress = Progress(samples, samples)
    ledger.part(
        "log: metrics file, line, names for the host",
        steps.step,
        lambda _step, status, _states: handed_on.append(status),
        1,
        {"timing/step_total": 1.0},
        {"total_consumed_prompts": samples},
        note=lambda _: f"{os.path.getsize(maker.args.pgrpo.metrics_path) / 1e6:.0f} MB of metrics.jsonl a step",
    )
    scalars = handed_on.pop()
    some = dict(list(scalars.items())[:MOST_SCALARS])
    board = TensorboardLogger(
        SimpleNamespace(
            logger=SimpleNamespace(tensorboard_dir=str(folder / "board"), wandb=SimpleNamespace(run_name="run"))
        )
    )

    def write() -> float:
        board.log_train(1, some)
        board.close()
        return sum(path.stat().st_size for path in (folder / "board").rglob("*") if path.is_file())

    share = len(scalars) / len(some)
    ledger.part(
        f"log: TensorBoard, {len(scalars)} scalars",
        write,
        note=lambda size: f"{size * share / 1e6:.0f} MB a step; computed from {len(some)} scalars",
        times=share,
    )


def serialized(value) -> tuple[bytes, list]:
    """`value` as Ray sends it: bytes, and buffers that are not copied into them."""
    from ray import cloudpickle

    buffers = []
    return cloudpickle.dumps(value, protocol=5, buffer_callback=buffers.append), buffers


def bytes_of(sent: tuple[bytes, list]) -> int:
    text, buffers = sent
    return len(text) + sum(buffer.raw().nbytes for buffer in buffers)


# ---- the host's -----------------------------------------------------------------------------------------------------


def the_hosts(policy: Path, outstanding: list[int]) -> None:
    import ray
    from openrlhf.trainer.ppo_utils.samples_generator import SamplesGenerator
    from transformers import AutoTokenizer

    print(f"\nthe host's, for a prompt of {PROMPT} tokens with answers of {ANSWER}")
    generator = object.__new__(SamplesGenerator)
    response = {
        "prompt": "prompt",
        "label": "",
        "observation_tokens": list(range(PROMPT + ANSWER)),
        "action_ranges": [(PROMPT, PROMPT + ANSWER)],
        "rollout_log_probs": None,
        "reward": 1.0,
        "scores": 1.0,
    }
    seconds, experience = median(lambda: generator._process_response_into_experience(response, max_len=4096))
    size = sum(value.nbytes for value in vars(experience).values() if isinstance(value, torch.Tensor))
    print(f"experience of a response: {1e6 * seconds:.0f} us, {size / (PROMPT + ANSWER):.1f} bytes a token")
    tokenizer = AutoTokenizer.from_pretrained(policy)
    seconds, sent = median(lambda: serialized(tokenizer))
    there, _ = median(lambda: pickle.loads(sent[0], buffers=sent[1]))
    size = bytes_of(sent) / 1e6
    print(f"tokenizer with every prompt: {1e3 * seconds:.2f} ms, {size:.3f} MB; {1e3 * there:.2f} ms in the engine")

    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False)
    for prompts in outstanding:
        seconds = waiting(ray, prompts)
        whole = seconds * prompts / 2
        print(f"ray.wait over {prompts} prompts: {1e3 * seconds:.3f} ms each; {whole:.1f} s a step of so many prompts")
    ray.shutdown()


def waiting(ray, prompts: int) -> float:
    """Seconds of the first of the host's `ray.wait`, one for every prompt; over the step they fall to none."""

    @ray.remote(num_cpus=0)
    class Engine:
        async def generate_responses(self, prompt):
            return prompt

    engine = Engine.remote()
    pending = [engine.generate_responses.remote("prompt") for _ in range(prompts)]
    ray.wait(pending, num_returns=prompts)
    seconds, _ = median(lambda: ray.wait(pending, num_returns=1, timeout=10.0))
    return seconds


def median(function):
    """(seconds of processor time, result)"""
    seconds = []
    for _ in range(WAITS):
        began = time.process_time()
        result = function()
        seconds.append(time.process_time() - began)
    return float(np.median(seconds)), result


if __name__ == "__main__":
    main()
