"""What an advantage estimator is, and the names under which `--advantage_estimator` finds them.

A new estimator is one class in one file:

    from openrlhf_pgrpo.core.registry import AdvantageEstimator, register_advantage_estimator

    @register_advantage_estimator("median_baseline")
    class MedianBaseline(AdvantageEstimator):
        def __call__(self, batch):
            return batch.rewards - np.median(batch.rewards)

Axes: B samples, P prompt groups.
"""

import importlib
import importlib.util
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Callable, Optional, Sequence

import numpy as np

from openrlhf_pgrpo.core.history import RewardHistory, segment_owners


@dataclass(frozen=True)
class RewardBatch:
    """One training step as an estimator sees it; every field has one entry per sample, in any order.

    Attributes:
        rewards: (B,) float64, after the host's length penalties, before KL and before the host's clip.
        prompt_groups: (B,) int64 in 0 ... P-1; samples of one prompt share a number, and a preference group.
        pref_groups: (B,) names of preference groups.
        users: (B,) user ids; None where no `--pgrpo.user_key` was given.
        labels: (B,) labels as the dataset has them.
        pref_group_names, pref_group_codes: the same preference groups as G distinct names, and (B,) numbers into them.

    Raises:
        ValueError: unequal lengths, a reward that is not finite, or a prompt group of two preference groups.
    """

    rewards: np.ndarray
    prompt_groups: np.ndarray
    pref_groups: Sequence[str]
    users: Sequence[Optional[str]]
    labels: Sequence[Any]
    pref_group_names: list[str] = field(init=False, repr=False)
    pref_group_codes: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        groups = RewardHistory()
        derived = {
            "rewards": np.asarray(self.rewards, np.float64),
            "prompt_groups": np.asarray(self.prompt_groups, np.int64),
            "pref_group_codes": groups.rows(self.pref_groups),
            "pref_group_names": groups.names,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)
        lengths = {spec.name: len(getattr(self, spec.name)) for spec in fields(self) if spec.init}
        if self.rewards.ndim != 1 or len(set(lengths.values())) != 1:
            raise ValueError(f"a reward batch needs one entry per sample in every field, got {lengths}")
        prompts, codes = self.prompt_groups[::-1], self.pref_group_codes[::-1]  # backwards: the first sample decides
        owners = segment_owners(prompts, codes, prompts.max(initial=-1) + 1)[self.prompt_groups]
        mixed = np.flatnonzero(owners != self.pref_group_codes)
        if len(mixed):
            i = mixed[0]
            raise ValueError(
                f"a prompt group needs samples of one preference group, got {self.pref_group_names[owners[i]]!r} and "
                f"{self.pref_groups[i]!r} in prompt group {self.prompt_groups[i]} (sample {i})"
            )
        bad = np.flatnonzero(~np.isfinite(self.rewards))
        if len(bad):
            i = bad[0]
            raise ValueError(
                f"a reward batch needs finite rewards, got {self.rewards[i]} for sample {i} "
                f"of preference group {self.pref_groups[i]!r} ({len(bad)} of {len(self.rewards)} samples)"
            )


class AdvantageEstimator:
    """Turns the rewards of one step into one advantage per sample.

    An instance lives as long as the run, in the process that makes experiences, and sees each training step once;
    evaluation never reaches it. What it remembers travels in checkpoints through `state_dict`.

    Args:
        options: the parsed `--pgrpo.*` options, a `PGRPOOptions`.
    """

    uses_pref_groups = True  # False: the run needs no --pgrpo.group_key

    def __init__(self, options):
        self.options = options

    @property
    def min_samples_per_prompt(self) -> int:
        """The smallest `--rollout.n_samples_per_prompt` that makes sense."""
        return 1

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """Advantages (B,), finite. May change the estimator's state; must not if it raises."""
        raise NotImplementedError

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got keys {sorted(state)}")

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        """Numbers to log for each of `pref_groups`, after the step."""
        return {}


_estimators: dict[str, Callable] = {}


def register_advantage_estimator(name: str) -> Callable:
    """Class decorator that makes an estimator known as `--advantage_estimator name`.

    Raises:
        ValueError: the name is taken by another class; both are named. Registering the same class again is fine.
    """

    def decorate(estimator: Callable) -> Callable:
        known = _estimators.setdefault(name, estimator)
        if _source(known) != _source(estimator):
            raise ValueError(
                f"advantage estimator {name!r} needs one owner, got {_source(known)} and {_source(estimator)}: "
                "rename one of them"
            )
        _estimators[name] = estimator
        return estimator

    return decorate


def _source(estimator: Callable) -> str:
    return f"{estimator.__module__}.{estimator.__qualname__}"


def advantage_estimators() -> dict[str, Callable]:
    """Name -> class of every registered estimator."""
    return dict(_estimators)


def make_advantage_estimator(name: str, options) -> AdvantageEstimator:
    """A fresh estimator without history.

    Raises:
        ValueError: nobody registered `name`; the message lists what exists.
    """
    if name not in _estimators:
        raise ValueError(f"advantage estimator needs one of {sorted(_estimators)}, got {name!r}")
    return _estimators[name](options)


def _is_module(name: str) -> bool:
    """Can `name` be imported? A missing parent package is a no; an error inside it is passed on."""
    if not all(map(str.isidentifier, name.split("."))):
        return False
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError as error:
        if f"{name}.".startswith(f"{error.name}."):
            return False
        raise


def load_plugin(plugin: str) -> None:
    """Runs a user's file (`my_file.py`) or imports a dotted module so that it can register its estimators.

    Raises:
        ValueError: there is no such file or module. An error inside the plugin itself is passed on as it is.
    """
    path = Path(plugin).expanduser()
    if path.suffix != ".py":
        if not _is_module(plugin):
            raise ValueError(f"a plugin needs a .py file or an importable module, got {plugin!r}")
        importlib.import_module(plugin)
        return
    if not path.is_file():
        raise ValueError(f"a plugin needs an existing file, got {str(path)!r}")
    name = f"openrlhf_pgrpo plugin {path.resolve()}"  # two plugins may share a file name
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
