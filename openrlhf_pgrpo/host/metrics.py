"""What is logged per preference group and step, and where: TensorBoard and W&B through the host, and a JSONL file."""

import json
import os
import time
from functools import partial
from pathlib import Path

import torch
import wrapt

from openrlhf_pgrpo.core.history import RewardHistory, segment_moments


def install(module) -> None:
    """Adds preference-group metrics to what the host logs after a step, and writes the same to the JSONL file.

    `ray.remote` has copied the methods of `BasePPOTrainer` into `PPOTrainer` by now, so a method replaced on the base
    class would be ignored in sync training; only `__init__` is still looked up there. Hence the instance attribute.
    """

    def init(wrapped, trainer, args, kwargs):
        wrapped(*args, **kwargs)
        trainer.save_logs_and_checkpoints = partial(_log, trainer.experience_maker, trainer.save_logs_and_checkpoints)

    wrapt.wrap_function_wrapper(module, "BasePPOTrainer.__init__", init)


def _log(maker, save_logs_and_checkpoints, global_step, logs_dict=None, client_states=None):
    status, groups = logs_dict or {}, maker.pref_group_metrics
    maker.metrics_file.append(
        {
            "step": global_step,
            "time": time.time(),
            "estimator": maker.advantage_estimator,
            "train": {key: value for key, value in status.items() if isinstance(value, (int, float))},
            "pref_groups": groups,
        }
    )
    flat = {f"pref_group/{name}/{key}": value for name, group in groups.items() for key, value in group.items()}
    return save_logs_and_checkpoints(global_step, {**status, **flat}, client_states)


def by_pref_group(experiences, estimator) -> dict[str, dict[str, float]]:
    """Metrics of one step for each preference group in it.

    samples, share: number and part of the batch. reward_mean, reward_std: raw rewards after length penalties.
    advantage_mean, advantage_std: final advantages, KL and clip included, averaged over the action tokens of a sample.
    Standard deviations are population ones. Beside these stands what the estimator reports of its history.
    """
    groups = RewardHistory()
    rows = groups.rows([prompt.pref_group for experience in experiences for prompt in experience.prompts])
    rewards = torch.cat([experience.rewards.flatten() for experience in experiences]).double().numpy()
    advantages = torch.cat([_sample_means(experience) for experience in experiences]).double().numpy()
    reward, advantage = (segment_moments(rows, values, len(groups)) for values in (rewards, advantages))
    history = {} if estimator is None else estimator.metrics(groups.names)
    return {
        name: {
            "samples": reward.count[row],
            "share": reward.count[row] / len(rows),
            "reward_mean": reward.mean[row],
            "reward_std": reward.std()[row],
            "advantage_mean": advantage.mean[row],
            "advantage_std": advantage.std()[row],
            **{key: float(value) for key, value in history.get(name, {}).items()},
        }
        for row, name in enumerate(groups.names)
    }


def _sample_means(experience) -> torch.Tensor:
    mask = experience.action_mask
    return (experience.advantages * mask).sum(-1) / mask.sum(-1).clamp(min=1)


class JSONLines:
    """A metrics file: one JSON object a training step, on disk before the next step begins.

    The first row decides what becomes of an older file: rows of earlier steps stay, later ones are about to be written
    again by the resumed run and go, and so does half a line that a killed run left.
    """

    def __init__(self, path: str):
        self.path = Path(path)
        self._begun = False

    def append(self, row: dict) -> None:
        if not self._begun:
            self._begin(row["step"])
        with open(self.path, "a") as file:
            _write(file, [json.dumps(row) + "\n"])

    def _begin(self, first_step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines(keepends=True) if self.path.exists() else []
        whole = [line for line in lines if line.endswith("\n")]
        beside = self.path.with_name(self.path.name + ".new")
        with open(beside, "w") as file:
            _write(file, [line for line in whole if json.loads(line)["step"] < first_step])
        os.replace(beside, self.path)
        self._begun = True


def _write(file, lines: list[str]) -> None:
    file.writelines(lines)
    file.flush()
    os.fsync(file.fileno())
