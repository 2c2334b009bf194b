"""What a run writes for its reader: a metrics file, one JSON object a training step, and a line in the terminal.

A row of the file: step, time (Unix seconds), estimator, `train` (the host's own numbers), `pref_groups` (numbers per
preference group), `samples` (an answer per preference group). The first row that a process writes, also after a
resume, also has `run`: versions, device and all settings.
"""

import json
import os
import re
import time
from collections.abc import Iterator
from itertools import count
from pathlib import Path

from openrlhf_pgrpo.files import whole_file
from openrlhf_pgrpo.host import flags, hooks, versions

HIDDEN = "(hidden)"
MOST_SAMPLES, MOST_CHARACTERS = 16, 2000
MOST_REWARDS = 8


class JSONLines:
    """A metrics file: one JSON object a training step, on disk before the next step begins.

    An older file at `path` is read when this is made, so that what is wrong with it is said before the first step. At
    the first row it is cleaned. Rows of earlier steps stay. Later rows go, because the resumed run writes them again.
    Half a line of a killed run goes too. If no row is of an earlier step, the file is of another run: it is kept
    beside the new one, as NAME.old-1.jsonl or the next number that is free.

    Args:
        run: what the first row also has, under that name.

    Raises:
        ValueError: the older file is none of metrics, or `path` cannot be a file.
    """

    def __init__(self, path: str, run: dict | None = None):
        self.path, self.run = Path(path), run
        self._begun = False
        for _ in self._rows():
            pass

    def append(self, row: dict) -> None:
        if not self._begun:
            self._begin(row["step"])
            row = {**row, "run": self.run} if self.run else row
        with open(self.path, "a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _rows(self) -> Iterator[tuple[int, bytes]]:
        """Step and line of each row of the older file; blank lines and half a line at the end are left out. One after
        the other: the file of a long run is larger than memory should be."""
        above = next(folder for folder in self.path.absolute().parents if folder.exists())
        if not above.is_dir() or (self.path.exists() and not self.path.is_file()):
            raise ValueError(f"metrics need a file, got {self.path}, which cannot be one: pass --{flags.METRICS_PATH}")
        if not self.path.exists():
            return
        with open(self.path, "rb") as file:
            for number, line in enumerate(file, 1):
                step = _step(line)
                if step is not None:
                    yield step, line
                elif line.strip() and line.endswith(b"\n"):
                    raise ValueError(
                        f'metrics need a file of rows with a whole number "step", got {line[:60]!r} in line {number} '
                        f"of {self.path}: move that file away, or name another by --{flags.METRICS_PATH}"
                    )

    def _begin(self, first_step: int) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        earlier = [step < first_step for step, _ in self._rows()]
        if earlier and not any(earlier):
            kept = self._put_aside()
            print(f"[pgrpo] the metrics of an earlier run are kept in {kept}", flush=True)
        with whole_file(self.path) as file:
            file.writelines(line for step, line in self._rows() if step < first_step)
        self._begun = True

    def _put_aside(self) -> Path:
        names = (self.path.with_name(f"{self.path.stem}.old-{number}.jsonl") for number in count(1))
        kept = next(name for name in names if not os.path.lexists(name))
        os.rename(self.path, kept)
        return kept


def _step(line: bytes) -> int | None:
    """The step of a whole row; None if the line is none."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    step = row.get("step") if isinstance(row, dict) else None
    return step if isinstance(step, int) and not isinstance(step, bool) else None


def description(args) -> dict:
    """The start time, versions and settings of a training process; `args` are nested host arguments."""
    return {
        "started": time.time(),
        "versions": versions.stack(),
        "device": os.environ[hooks.DEVICE],
        "settings": {name: _json_value(name, value) for name, value in flags.flatten(args).items()},
    }


def _json_value(flag: str, value):
    """`value` in a form that JSON can hold, without secrets, because people share this file."""
    if flag == "logger.wandb.key" and value:
        return HIDDEN
    if isinstance(value, str):
        return re.sub(r"://[^/\s]*@", f"://{HIDDEN}@", value)
    if isinstance(value, (list, tuple)):
        return [_json_value(flag, entry) for entry in value]
    return value if value is None or isinstance(value, (bool, int)) or _finite(value) else str(value)


def _finite(value) -> bool:
    return isinstance(value, float) and abs(value) < float("inf")


class SamplePicker:
    """Chooses an answer per preference group and step. It prefers prompts that it chose before: they show how the
    policy changes."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self._chosen_before = set()

    def pick(self, experiences) -> list[dict]:
        """pref_group, prompt, response and reward of one sample of each preference group, at most MOST_SAMPLES."""
        chosen = {}
        for experience in experiences:
            for row, prompt in enumerate(experience.prompts):
                first, again = prompt.pref_group not in chosen, prompt in self._chosen_before
                if (first and len(chosen) < MOST_SAMPLES) or (
                    not first and again and chosen[prompt.pref_group][2] not in self._chosen_before
                ):
                    chosen[prompt.pref_group] = experience, row, prompt
        self._chosen_before.update(prompt for *_, prompt in chosen.values())
        return [
            {
                "pref_group": name,
                "prompt": _cut(prompt),
                "response": _cut(self._response(experience, row)),
                "reward": experience.rewards.flatten()[row].item(),
            }
            for name, (experience, row, prompt) in chosen.items()
        ]

    def _response(self, experience, row: int) -> str:
        tokens = experience.sequences[row, 1:]  # an action is the token after its position
        mask = experience.action_mask[row, : len(tokens)].bool()
        return self.tokenizer.decode(tokens[mask], skip_special_tokens=True)


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else text[:MOST_CHARACTERS] + " …"


class Progress:
    """The line in the terminal: step, part of all prompts done, time left, reward per preference group.

    Args:
        total_prompts: how many prompts the whole run draws.
        prompts_per_step: gives the time left after the first step of this process.
    """

    def __init__(self, total_prompts: int, prompts_per_step: int):
        self.total_prompts = total_prompts
        self.prompts_per_step = prompts_per_step
        self._first = None

    def line(self, step: int, consumed: int, step_seconds: float, pref_groups: dict, now: float) -> str:
        """`consumed` prompts were drawn since the run began, in all its processes; `now` is a monotonic clock."""
        if self._first is None:
            self._first = (now - step_seconds, consumed - self.prompts_per_step)
        began, consumed_before = self._first
        left = max(0, self.total_prompts - consumed)
        seconds = left * (now - began) / max(1, consumed - consumed_before)
        done = min(1.0, consumed / max(1, self.total_prompts))
        return f"[pgrpo] step {step}  {done:.0%}  ETA {_clock(seconds)}  reward: {_rewards(pref_groups)}"


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"


def _rewards(pref_groups: dict) -> str:
    means = {name: group["reward_mean"] for name, group in sorted(pref_groups.items())}
    if len(means) <= MOST_REWARDS:
        return "  ".join(f"{name} {mean:+.2f}" for name, mean in means.items()) or "no preference groups"
    lowest = sorted(means, key=means.get)[:MOST_REWARDS]
    shown = "  ".join(f"{name} {means[name]:+.2f}" for name in lowest)
    return f"{shown}  (the lowest {MOST_REWARDS} of {len(means)} preference groups)"
