"""The methods themselves: numpy and scipy only, no Ray, no OpenRLHF."""

from openrlhf_pgrpo.core import controls, pgrpo, pgrpo_eb

__all__ = ["controls", "pgrpo", "pgrpo_eb"]  # imported here, so that their estimators are always registered
