"""The win rate of one policy over another, with a confidence interval over prompts.

    r = mean of N scores: 1 for a win, 1/2 for a tie, 0 for a loss
    V = P / (P-1) * sum_p (s_p - r m_p)^2 / N^2       s_p: sum of the scores of prompt p, m_p: their number
    n = r (1-r) / V                                   so many independent wins and losses would tell as much
    Wilson's interval at r and n, with Student's t of P-1 degrees of freedom as its z

Comparisons of one prompt are about the same two answers, so a prompt is the unit: V is the variance of a ratio whose
units are clusters. Wilson's interval stays within 0 and 1, and is not a point where one policy wins everywhere: where
all prompts agree V is 0, and n is P.

Axes: N comparisons, P prompts.
"""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtrit  # not scipy.stats, which takes a second to import

SCORES = {"A": 1.0, "tie": 0.5, "B": 0.0}  # of a verdict, for policy A


class WinRate(NamedTuple):
    """A win rate and its interval; without two prompts or more there is no interval, and without one no rate: nan."""

    rate: float
    low: float
    high: float
    prompts: int


def win_rate(verdicts: Sequence[str], prompts: Sequence[Hashable], level: float = 0.95) -> WinRate:
    """The win rate of A.

    Args:
        verdicts: (N,) keys of SCORES. prompts: (N,) which prompt each is about.
    """
    units = {prompt: row for row, prompt in enumerate(dict.fromkeys(prompts))}
    if not units:
        return WinRate(math.nan, math.nan, math.nan, 0)
    scores = np.array([SCORES[verdict] for verdict in verdicts])
    rows = np.array([units[prompt] for prompt in prompts])
    rate = float(scores.mean())
    if len(units) < 2:
        return WinRate(rate, math.nan, math.nan, 1)
    residuals = np.bincount(rows, scores - rate)
    variance = len(units) / (len(units) - 1) * float(residuals @ residuals) / len(scores) ** 2
    # Residuals of prompts that agree are zero but for rounding.
    worth = rate * (1 - rate) / variance if variance > 1e-20 else len(units)
    z = float(stdtrit(len(units) - 1, (1 + level) / 2))
    centre = (rate + z**2 / (2 * worth)) / (1 + z**2 / worth)
    half = z * math.sqrt(rate * (1 - rate) / worth + (z / (2 * worth)) ** 2) / (1 + z**2 / worth)
    return WinRate(rate, max(0.0, centre - half), min(1.0, centre + half), len(units))
