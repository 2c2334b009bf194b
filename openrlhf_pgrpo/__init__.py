"""Many preferences instead of one: P-GRPO and its relatives as a plug-in for OpenRLHF.

The public names load on first use. Importing this package alone loads nothing else, because every Ray worker does it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # for type checkers; at run time `__getattr__` imports them
    from openrlhf_pgrpo.core.estimator import AdvantageEstimator, RewardBatch, register_advantage_estimator
    from openrlhf_pgrpo.core.options import option
    from openrlhf_pgrpo.core.pgrpo import PGRPO, PGRPOOptions

__version__ = "0.1.0"

_HOME = {
    "AdvantageEstimator": "core.estimator",
    "RewardBatch": "core.estimator",
    "register_advantage_estimator": "core.estimator",
    "option": "core.options",
    "PGRPO": "core.pgrpo",
    "PGRPOOptions": "core.pgrpo",
}
__all__ = ["PGRPO", "AdvantageEstimator", "PGRPOOptions", "RewardBatch", "option", "register_advantage_estimator"]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
