"""The bootstrap: texts are drawn again with replacement many times, and intervals are read from the results."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

ROUNDS = 2000
# A part is measured only where the author's texts, drawn again, get at least this share in 97.5 % of the draws.
MIN_OWN_SHARE = 1 / 3


@dataclass(frozen=True)
class Estimate:
    """A value and its bootstrap draws, (R,)."""

    value: float
    draws: np.ndarray

    def interval(self, lowest: float = -np.inf, highest: float = np.inf) -> dict[str, float]:
        """Return value, low and high, the 2.5 and 97.5 % points of the draws, within the bounds of the measure.

        Draws of nan, as of a single item, may be anything: low and high are the bounds.
        """
        ends = np.percentile(self.draws, [2.5, 97.5])
        low, high = np.clip(np.where(np.isnan(ends), [-np.inf, np.inf], ends), lowest, highest)
        return {"value": self.value, "low": float(low), "high": float(high)}


def resample(count: int, seed: int, size: int | None = None, rounds: int = ROUNDS) -> np.ndarray:
    """Draw `size` (default: count) of `count` items with replacement; return (rounds, count) times each was drawn."""
    return np.random.default_rng(seed).multinomial(size or count, np.full(count, 1 / count), size=rounds)


def resample_groups(groups: Sequence[int], seed: int, size: int | None = None) -> tuple[np.ndarray, int, int]:
    """Draw whole groups, of about `size` (default: all) items: items of one group resemble each other, and drawn one
    by one they would make an interval too narrow.

    Returns:
        How often each item was drawn, (ROUNDS, n_items); the number of groups drawn per round; the number of groups.
    """
    names, numbers = np.unique(groups, return_inverse=True)
    n_drawn = max(1, round((size or len(groups)) * len(names) / len(groups)))
    return resample(len(names), seed, n_drawn)[:, numbers], n_drawn, len(names)


def center(value: float, draws: np.ndarray, count: int) -> Estimate:
    """Return the estimate of a value whose draws resampled `count` items.

    The draws are moved to the value, because resampling itself raises some measures, and spread as Student's t:
    percentiles of few items are too narrow. The draws of one item are nan: it says nothing about others.
    Source: Hesterberg 2015, "What teachers should know about the bootstrap"; tests/evaluation/test_bootstrap.py counts
    how often intervals hold the true value.
    """
    widening = stdtrit(count - 1, 0.975) / ndtri(0.975) * np.sqrt(count / (count - 1)) if count > 1 else np.nan
    return Estimate(float(value), value + (draws - draws.mean()) * widening)


def measure_gap_closed(column: Estimate, base: Estimate, reference: Estimate) -> dict[str, float] | None:
    """Measure the share, 0 to 1, of the distance from base to reference that a column has covered: value, low, high.

    None where that distance does not exceed its noise: then the author's own texts would not get their full share.
    """
    gap = base.draws - reference.draws
    redrawn = np.random.default_rng(0).permutation(reference.draws)
    is_clear = np.percentile(gap, 2.5) > 0  # False for nan
    if not is_clear or np.percentile((base.draws - redrawn) / gap, 2.5) < MIN_OWN_SHARE:
        return None
    share = (base.value - column.value) / (base.value - reference.value)
    return Estimate(float(np.clip(share, 0, 1)), (base.draws - column.draws) / gap).interval(0, 1)
