"""Time and memory of the one controller process, for a step with many samples and preference groups.

    python examples/benchmarks/controller_limit.py [--samples 1000000] [--pref-groups 1000000] [--policy MODEL_FOLDER]

First comes our own work, on synthetic experiences of one step with one sample per prompt. The dataset gets its tags
once in a run, the state is copied and sent with every checkpoint, and the rest happens in each step. Then comes the
host's work in the same process: an experience of each response, the tokenizer that it sends with every prompt (of
MODEL_FOLDER, or a tiny one), and `ray.wait`, which it calls once for every prompt, over all outstanding prompts.

Seconds are processor time. Memory is the growth of the process at the end of a part, with the part's result.
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

MOST_SCALARS = 100_000  # written to TensorBoard; the cost of more is computed, because each costs the same
PROMPT, ANSWER = 200, 800  # tokens in the host's experiences
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
    """Measures parts of the work, and prints a line for each."""

    def __init__(self, samples: int):
        self.samples = samples
        print(f"{'':44}{'seconds':>10}{'us/sample':>11}{'GiB':>8}")

    def part(self, name: str, function, *args, note=lambda result: "", times: float = 1):
        """The result of `function(*args)`, which is one of `times` equal shares of the part."""
        gc.collect()
        before, began = memory(), time.process_time()
        result = function(*args)
        seconds, grown = (time.process_time() - began) * times, memory() - before
        print(f"{name:44}{seconds:10.2f}{1e6 * seconds / self.samples:11.2f}{grown:8.2f}  {note(result)}", flush=True)
        return result


def memory() -> float:
    """GiB that this process uses."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize() / 2**30


# ---- ours -----------------------------------------------------------------------------------------------------------


def ours(samples: int, pref_groups: int, folder: Path) -> None:
    maker = experience_maker("pgrpo", samples_per_prompt=1)
    from openrlhf_pgrpo.core.estimator import make_advantage_estimator
    from openrlhf_pgrpo.core.pgrpo import PGRPOOptions
    from openrlhf_pgrpo.host.ppo import metrics

    print(f"ours, for {samples} samples of {pref_groups} preference groups")
    step, ledger = Step(samples, pref_groups, seed=0, samples_per_prompt=1), Ledger(samples)
    tag_dataset(ledger, step)
    made = experiences(step)
    batch = ledger.part("reward batch", reward_batch, maker, made)
    ledger.part("pgrpo, its first step", maker.estimator, batch)
    ledger.part("pgrpo, a later one", maker.estimator, batch)
    ledger.part("or pgrpo_eb, its first step", make_advantage_estimator("pgrpo_eb", PGRPOOptions()), batch)
    for experience in made:
        experience.advantages = torch.zeros_like(experience.kl)
    names, rows = batch.pref_group_names, batch.pref_group_codes
    maker.pref_group_metrics = ledger.part(
        "metrics of each preference group", metrics.by_pref_group, made, names, rows, maker.estimator
    )
    del batch, names, rows
    maker.pref_group_samples = ledger.part("an answer of each, at most 16", maker.sample_picker.pick, made)
    del made
    log(ledger, maker, samples, folder)
    maker.pref_group_metrics = {}
    state = ledger.part("checkpoint: its state, copied", lambda: deepcopy(maker.checkpoint_state()))
    ledger.part("checkpoint: sent to the ranks", serialized, state, note=lambda sent: f"{bytes_of(sent) / 1e6:.0f} MB")


def reward_batch(maker, made):
    return maker._reward_batch(made, [prompt for experience in made for prompt in experience.prompts])


def tag_dataset(ledger: Ledger, step: Step) -> None:
    """Runs our two hooks on the host's dataset, with rows as `datasets` stores them."""
    import datasets

    from openrlhf_pgrpo.host.ppo import prompts

    plain = [f"prompt {q}" for q in range(len(step.owners))]

    class PromptDataset:
        def __init__(self, dataset, tokenizer, strategy, input_template=None):
            self.prompts = plain

    prompts.install_tags(SimpleNamespace(PromptDataset=PromptDataset))
    args = SimpleNamespace(
        pgrpo=SimpleNamespace(),
        data=SimpleNamespace(
            input_key="prompt",
            apply_chat_template=False,
            input_template=None,
            label_key=None,
            image_key=None,
            pref_group_key="persona",
            user_key="user",
        ),
        robust=SimpleNamespace(estimator=None),
    )
    users = [f"user {q}" for q in range(len(step.owners))]
    rows = datasets.Dataset.from_dict({"prompt": plain, "persona": step.owners, "user": users})
    ledger.part("dataset: checked, once a run", prompts.check, rows, args, "prompts.jsonl")
    ledger.part("dataset: tagged, once a run", PromptDataset, rows, None, SimpleNamespace(args=args))


def log(ledger: Ledger, maker, samples: int, folder: Path) -> None:
    from openrlhf.utils.logging_utils import TensorboardLogger

    from openrlhf_pgrpo.host.ppo.metrics import StepLog
    from openrlhf_pgrpo.host.run_log import Progress

    maker.args.logger.metrics_path = str(folder / "metrics.jsonl")
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
        note=lambda _: f"{os.path.getsize(maker.args.logger.metrics_path) / 1e6:.0f} MB of metrics.jsonl a step",
    )
    scalars = handed_on.pop()
    written = dict(list(scalars.items())[:MOST_SCALARS])
    board = TensorboardLogger(
        SimpleNamespace(
            logger=SimpleNamespace(tensorboard_dir=str(folder / "board"), wandb=SimpleNamespace(run_name="run"))
        )
    )

    def write() -> float:
        board.log_train(1, written)
        board.close()
        return sum(path.stat().st_size for path in (folder / "board").rglob("*") if path.is_file())

    share = len(scalars) / len(written)
    ledger.part(
        f"log: TensorBoard, {len(scalars)} scalars",
        write,
        note=lambda size: f"{size * share / 1e6:.0f} MB a step; computed from {len(written)} scalars",
        times=share,
    )


def serialized(value) -> tuple[bytes, list]:
    """`value` as Ray sends it: bytes, and the buffers that are kept outside of them."""
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
        print(f"ray.wait over {prompts} prompts: {1e3 * seconds:.3f} ms each; {whole:.1f} s for a step of {prompts}")
    ray.shutdown()


def waiting(ray, prompts: int) -> float:
    """Seconds of the first `ray.wait` of a step. The host calls one for every prompt, and the last waits for none."""

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
