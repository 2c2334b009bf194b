"""Numbers of the host that would train on nonsense, or nothing, without a word. Only those that a run reads are here;
learning rates and sizes are in `plan`.
"""

import math
from collections.abc import Iterator
from typing import NamedTuple

from openrlhf_pgrpo.host import flags


class Range(NamedTuple):
    """From `low` to `high`, each of them part of it or not; and what comes of a number beyond."""

    low: float
    high: float = math.inf
    with_low: bool = True
    with_high: bool = True
    because: str = ""

    def holds(self, number: float) -> bool:
        above = number >= self.low if self.with_low else number > self.low
        below = number <= self.high if self.with_high else number < self.high
        return math.isfinite(number) and above and below

    def __str__(self) -> str:
        low = f"{'from' if self.with_low else 'above'} {self.low:g}"
        if self.high == math.inf:
            return f"a finite number {low}"
        return f"a number {low} {'to' if self.with_high else 'to below'} {self.high:g}"


ABOVE_0 = Range(0, with_low=False)
SHARE, PART = Range(0, 1), Range(0, 1, with_high=False)
# For each scheduler and optimizer; in PPO, actor and critic have one each.
SCHEDULES = {
    "lr_warmup_ratio": SHARE._replace(because="it is a share of the updates, not their number"),
    "min_lr_ratio": SHARE,
    "max_norm": Range(0),
    "adam.betas": PART,
    "adam.eps": ABOVE_0,
    "adam.weight_decay": Range(0),
}
RANGES = {
    "rollout.temperature": ABOVE_0._replace(because="log-probabilities are divided by it"),
    "rollout.top_p": Range(0, 1, with_low=False),
    "eval.temperature": Range(0),
    "algo.kl.init_coef": Range(0),
    "algo.advantage.gamma": SHARE,
    "algo.advantage.lambd": SHARE,
    "model.beta": ABOVE_0._replace(because="it would reverse the preferences, or undo them"),
    "model.label_smoothing": Range(0, 0.5, with_high=False, because="it would reverse the preferences, or undo them"),
    "model.nll_loss_coef": Range(0),
    "model.aux_loss_coef": Range(0),
    "actor.aux_loss_coef": Range(0),
}
EMA = {"train.ema_beta": PART._replace(because="the average is saved, and at 1 it stays the untrained model")}
LORA = {"ds.lora.alpha": ABOVE_0._replace(because="adapters would stay zero"), "ds.lora.dropout": PART}


def check(args) -> None:
    """Checks the numbers among nested host arguments.

    Raises:
        ValueError: one is out of its range, or not finite.
    """
    ranges = dict(RANGES) | (LORA if args.ds.lora.rank else {})
    if flags.value(args, "train.enable_ema", False):
        ranges |= EMA
    for section in ("", "actor.", "critic."):
        ranges |= {section + flag: its for flag, its in SCHEDULES.items()}
    for flag, its in ranges.items():
        if wrong := [number for number in _numbers(args, flag) if not its.holds(number)]:
            because = f", because {its.because}" * bool(its.because)
            raise ValueError(f"--{flag} needs {its}, got {wrong[0]:g}: correct it{because}")


def _numbers(args, flag: str) -> Iterator[float]:
    """The numbers of a flag; none where it is not set, or of another script."""
    found = flags.value(args, flag, None)
    if found is not None:
        yield from found if isinstance(found, (list, tuple)) else [found]
