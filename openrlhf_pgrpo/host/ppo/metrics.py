"""What is logged per preference group and step: TensorBoard and W&B through the host, the metrics file, and a line in
the terminal. It runs in the trainer actor."""

import heapq
import time
from collections.abc import Sequence
from functools import cache, partial

import numpy as np
import ray
import torch
import wrapt
from openrlhf.utils.logging_utils import init_logger

from openrlhf_pgrpo.core.history import segment_moments
from openrlhf_pgrpo.host import flags
from openrlhf_pgrpo.host.ppo import estimators
from openrlhf_pgrpo.host.run_log import JSONLines, Progress, description

logger = init_logger(__name__)

# Writing more to TensorBoard takes longer than a step: nine minutes for a million of them.
MOST_PREF_GROUPS = 1000


def install(module) -> None:
    """Adds preference-group metrics to what the host logs after a step, and writes the same to the metrics file.

    By now `ray.remote` has copied the methods of `BasePPOTrainer` into `PPOTrainer`, so sync training would ignore a
    method replaced on the base class. Only `__init__` is still looked up there; it sets an attribute of the instance.
    """

    def init(wrapped, trainer, args, kwargs):
        wrapped(*args, **kwargs)
        trainer.save_logs_and_checkpoints = partial(StepLog(trainer).step, trainer.save_logs_and_checkpoints)

    wrapt.wrap_function_wrapper(module, "BasePPOTrainer.__init__", init)


class StepLog:
    """Writes each step of one trainer to the metrics file and the terminal, and hands it on to the host's loggers."""

    def __init__(self, trainer):
        self.args, self.maker, self.actors = trainer.args, trainer.experience_maker, trainer.actor_model_group
        self.file = JSONLines(flags.metrics_path(self.args), description(self.args))
        self.progress = None

    def step(self, save_logs_and_checkpoints, global_step, logs_dict=None, client_states=None):
        status = {**(logs_dict or {}), **self.maker.partial_logs}
        groups, samples = self.maker.pref_group_metrics, self.maker.pref_group_samples
        row = {
            "step": global_step,
            "time": time.time(),
            "estimator": estimators.estimator_name(self.args),
            "train": {key: value for key, value in status.items() if isinstance(value, (int, float))},
            "pref_groups": groups,
            "samples": samples,
        }
        if self.progress is None:
            total = self._total_prompts()
            self.progress = Progress(total, self.args.rollout.batch_size)
            self.file.run["total_prompts"] = total
        self.file.append(row)
        line = self.progress.line(
            global_step,
            client_states["total_consumed_prompts"],
            status["timing/step_total"],
            groups,
            time.monotonic(),
        )
        print(line, flush=True)
        flat = {f"pref_group/{name}/{key}": value for name, group in groups.items() for key, value in group.items()}
        return save_logs_and_checkpoints(global_step, {**status, **flat}, client_states)

    def _total_prompts(self) -> int:
        """How many prompts the run draws, without a remainder that does not fill an optimizer step.

        In async training this process has no loader. The policy's actors know the number of optimizer steps in every
        mode.
        """
        steps = ray.get(self.actors.async_run_method("__ray_call__", lambda actor: actor.max_steps))[0]
        args = self.args
        return steps * args.train.batch_size // (args.rollout.n_samples_per_prompt * args.train.max_epochs)


def take_partial_logs(rollout_samples) -> dict[str, float]:
    """Takes out of `info` what only some samples have; the mean of each such key, over the samples that have it."""
    found = {}
    for sample in rollout_samples:
        for key, value in sample.info.items():
            found.setdefault(key, []).append(value)
    partial_keys = [key for key, values in found.items() if len(values) < len(rollout_samples)]
    for sample in rollout_samples:
        for key in partial_keys:
            sample.info.pop(key, None)
    return {key: torch.cat(found[key]).double().mean().item() for key in partial_keys}


def by_pref_group(experiences, names: Sequence[str], rows: np.ndarray, *reporters) -> dict[str, dict[str, float]]:
    """Metrics of one step for each preference group in it, or for the MOST_PREF_GROUPS with most samples.

    samples, share: number and part of the batch. reward_mean, reward_std: raw rewards after length penalties.
    response_length_mean: tokens of the policy, without those of tools. advantage_mean, advantage_std: final
    advantages, KL, clip and weights included, averaged over the action tokens of a sample. Standard deviations are
    population ones. The `metrics` of `reporters` are added to these.

    Args:
        names: (G,) preference groups of the step. rows: (B,) that of each sample, in the order of `experiences`.
    """
    size = len(names)
    rewards = torch.cat([experience.rewards.flatten() for experience in experiences]).double().numpy()
    advantages = torch.cat([_sample_means(experience) for experience in experiences]).double().numpy()
    lengths = torch.cat([experience.action_mask.sum(-1) for experience in experiences]).double().numpy()
    reward, advantage, length = (segment_moments(rows, values, size) for values in (rewards, advantages, lengths))
    reward_std, advantage_std = reward.std(), advantage.std()
    shown = range(size)
    if size > MOST_PREF_GROUPS:  # equal sizes in order of name, so that every step has the same ones
        _log_limit_once()
        shown = heapq.nsmallest(MOST_PREF_GROUPS, shown, key=lambda row: (-reward.count[row], names[row]))
    reports = [reporter.metrics([names[row] for row in shown]) for reporter in reporters]
    return {
        names[row]: {
            "samples": reward.count[row],
            "share": reward.count[row] / len(rows),
            "reward_mean": reward.mean[row],
            "reward_std": reward_std[row],
            "advantage_mean": advantage.mean[row],
            "advantage_std": advantage_std[row],
            "response_length_mean": length.mean[row],
            **{key: float(value) for report in reports for key, value in report.get(names[row], {}).items()},
        }
        for row in shown
    }


@cache
def _log_limit_once() -> None:
    logger.info(f"more than {MOST_PREF_GROUPS} preference groups in a step: only those with most samples are logged")


def _sample_means(experience) -> torch.Tensor:
    mask = experience.action_mask
    return (experience.advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1)
