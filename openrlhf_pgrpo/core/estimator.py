"""What an advantage estimator is, the registry of estimators by name, and the options of each.

A new estimator is one class in one file, with options of its own if it needs some:

    from dataclasses import dataclass

    import numpy as np

    from openrlhf_pgrpo import AdvantageEstimator, option, register_advantage_estimator

    @dataclass(frozen=True)
    class QuantileOptions:
        level: float = option(0.5, "Quantile of the batch that is the baseline. Default 0.5: the median.")

    @register_advantage_estimator("quantile_baseline", options=QuantileOptions)
    class QuantileBaseline(AdvantageEstimator):
        def __call__(self, batch):
            return batch.rewards - np.quantile(batch.rewards, self.options.level)

Axes: B samples, P prompt groups, G preference groups.
"""

import importlib
import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from openrlhf_pgrpo.core.history import segment_owners
from openrlhf_pgrpo.core.names import Names

LARGEST = 1e140  # Rewards up to it, and their squares, can be added up in float64.


class SampleError(ValueError):
    """A sample of a `RewardBatch` that cannot be used; `sample` is its number there, for those who know its prompt."""

    def __init__(self, sample: int, message: str):
        super().__init__(message)
        self.sample = sample


@dataclass(frozen=True)
class RewardBatch:
    """One training step as an estimator sees it; every field has one entry per sample, in any order.

    Its arrays cannot be written to: others read the same rewards afterwards.

    Attributes:
        rewards: (B,) float64, after the host's length penalties, before KL and before the host's clip.
        prompt_groups: (B,) int64 in 0 ... P-1; samples of one prompt share a number, and a preference group.
        pref_groups: (B,) names of preference groups.
        users: (B,) user ids; None where the run names no users.
        labels: (B,) labels as the dataset has them.
        pref_group_names: the G distinct preference groups, in the order of first appearance.
        pref_group_codes: (B,) int64, the position of each sample's preference group in `pref_group_names`.

    Raises:
        ValueError: unequal lengths, or a prompt group in two preference groups.
        SampleError: a reward that is not finite, or beyond LARGEST.
    """

    rewards: np.ndarray
    prompt_groups: np.ndarray
    pref_groups: Sequence[str]
    users: Sequence[str | None]
    labels: Sequence[Any]
    pref_group_names: list[str] = field(init=False, repr=False)
    pref_group_codes: np.ndarray = field(init=False, repr=False)

    def __post_init__(self):
        names = Names()
        derived = {
            "rewards": np.asarray(self.rewards, np.float64),
            "prompt_groups": np.asarray(self.prompt_groups, np.int64),
            "pref_group_codes": names.rows(self.pref_groups),
            "pref_group_names": list(names),
        }
        for name, value in derived.items():
            if isinstance(value, np.ndarray):
                value = value.view()  # the caller's own array can still be written to
                value.flags.writeable = False
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
        bad = np.flatnonzero(~(np.abs(self.rewards) <= LARGEST))
        if len(bad):
            i = int(bad[0])
            raise SampleError(
                i,
                f"a reward batch needs finite rewards of at most {LARGEST:g} in size, got {self.rewards[i]} for "
                f"{_sample(self, i)} ({len(bad)} of {len(self.rewards)} samples)",
            )


@dataclass(frozen=True)
class NoOptions:
    """The options of an estimator that has none."""


class AdvantageEstimator:
    """Turns the rewards of one step into one advantage per sample.

    An instance lives as long as the run, in the process that makes experiences, and sees each training step once but
    no evaluation. `state_dict` puts what it remembers into checkpoints.

    Args:
        options: an instance of `options_class`.
    """

    options_class: type = NoOptions
    uses_pref_groups = True  # False: the run does not need to name preference groups

    def __init__(self, options: Any):
        self.options = options

    @property
    def min_samples_per_prompt(self) -> int:
        """The smallest number of samples per prompt that makes sense."""
        return 1

    def __call__(self, batch: RewardBatch) -> np.ndarray:
        """Advantages (B,), finite. May change the estimator's state, but not if it raises."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if state:
            raise ValueError(f"{type(self).__name__} keeps no state, got keys {sorted(state)}")

    def metrics(self, pref_groups: Sequence[str]) -> dict[str, dict[str, float]]:
        """Numbers to log for each of `pref_groups`, after the step."""
        return {}


class Registered(NamedTuple):
    """What a name stands for. One class may have two names with other options."""

    estimator: type[AdvantageEstimator]
    options: type


_estimators: dict[str, Registered] = {}
_option_classes: dict[str, type] = {}  # by namespace
Estimator = TypeVar("Estimator", bound=type[AdvantageEstimator])


def register_advantage_estimator(name: str, options: type | None = None) -> Callable[[Estimator], Estimator]:
    """Class decorator that makes an `AdvantageEstimator` known by `name`.

    Args:
        options: a dataclass, preferably frozen, whose fields are the options. Default: those of the parent class. The
            name under which an options class is first registered is its namespace.

    Raises:
        ValueError: another class has the name, `options` is no dataclass, or the name cannot be a namespace.
            Registering the same class again is fine.
    """

    def decorate(estimator: Estimator) -> Estimator:
        known = _estimators[name].estimator if name in _estimators else estimator
        if _source(known) != _source(estimator):
            raise ValueError(
                f"advantage estimator {name!r} needs one owner, got {_source(known)} and {_source(estimator)}: "
                "rename one of them"
            )
        chosen = options or estimator.options_class
        if not (isinstance(chosen, type) and is_dataclass(chosen)):
            raise ValueError(f"advantage estimator {name!r} needs a dataclass as options, got {chosen!r}")
        namespace = namespace_of(chosen) or name
        if fields(chosen) and not namespace.isidentifier():
            raise ValueError(
                f"advantage estimator {name!r} has options, so it needs a name of letters, digits and underscores: "
                "rename it"
            )
        if "options_class" not in vars(estimator):  # for subclasses; another name must not change it
            estimator.options_class = chosen
        _estimators[name] = Registered(estimator, chosen)
        if chosen is not NoOptions:
            _option_classes[namespace] = chosen
        return estimator

    return decorate


def _source(owner: type) -> str:
    return f"{owner.__module__}.{owner.__qualname__}"


def advantage_estimators() -> dict[str, type[AdvantageEstimator]]:
    """Name -> class of every registered estimator."""
    return {name: registered.estimator for name, registered in _estimators.items()}


def options_of(name: str) -> type:
    """The options class of a registered estimator."""
    return _estimators[name].options


def option_classes() -> dict[str, type]:
    """Namespace -> options class of the registered estimators that have options."""
    return dict(_option_classes)


def namespace_of(options_class: type) -> str | None:
    """The name under which an options class was first registered; None for `NoOptions`."""
    for namespace, known in _option_classes.items():
        if _source(known) == _source(options_class):
            return namespace
    return None


def make_advantage_estimator(name: str, options: Any = None) -> AdvantageEstimator:
    """A fresh estimator without history; without `options` it has the defaults.

    Raises:
        ValueError: no estimator is registered as `name`; the message lists those that are.
    """
    if name not in _estimators:
        raise ValueError(f"advantage estimator needs one of {sorted(_estimators)}, got {name!r}")
    registered = _estimators[name]
    return registered.estimator(registered.options() if options is None else options)


def estimate(name: str, estimator: AdvantageEstimator, batch: RewardBatch) -> np.ndarray:
    """The estimator's advantages (B,) float64 for a batch, checked.

    Raises:
        ValueError: it did not return one finite number per sample, or writes to the batch. The message names the
            estimator.
        SampleError: the number of a sample is not finite. The message names estimator, sample and preference group.
    """
    try:
        returned, size = estimator(batch), len(batch.rewards)
    except ValueError as error:
        if "read-only" not in str(error):  # what numpy says in all its messages of this kind
            raise
        raise ValueError(
            f"advantage estimator {name!r} needs to leave the batch as it is, got {error}: let it work on a copy, "
            "such as batch.rewards.copy()"
        ) from error
    need = f"advantage estimator {name!r} needs to return one finite number per sample, shape ({size},), got"
    try:
        advantages = np.asarray(returned)
    except (TypeError, ValueError, RuntimeError) as error:  # the last of a tensor that needs a gradient
        raise ValueError(f"{need} {type(returned).__name__}: {error}") from error
    if returned is not None and advantages.dtype.kind not in "biuf":
        raise ValueError(f"{need} {type(returned).__name__} of {advantages.dtype}")
    if advantages.shape != (size,):
        short = advantages.ndim == 1 and len(advantages) < size
        none = f", none for {_sample(batch, len(advantages))}" if short else ""
        raise ValueError(f"{need} {'None' if returned is None else f'shape {advantages.shape}'}{none}")
    advantages = advantages.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(advantages))
    if len(bad):
        i = int(bad[0])
        raise SampleError(i, f"{need} {advantages[i]} for {_sample(batch, i)} ({len(bad)} of {size} samples)")
    return advantages


def _sample(batch: RewardBatch, i: int) -> str:
    return f"sample {i} of preference group {batch.pref_groups[i]!r}"


def _is_module(name: str) -> bool:
    """Whether `name` can be imported. A missing parent package means no; an error inside it is passed on."""
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
    assert spec is not None and spec.loader is not None  # the name ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
