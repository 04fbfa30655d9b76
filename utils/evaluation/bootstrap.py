"""The bootstrap: texts are drawn again with replacement many times, and intervals are read from the results."""

import numpy as np

ROUNDS = 2000


def resample(count: int, seed: int, size: int | None = None) -> np.ndarray:
    """Draw `size` (default: count) of `count` items with replacement; return (ROUNDS, count) times each was drawn."""
    return np.random.default_rng(seed).multinomial(size or count, np.full(count, 1 / count), size=ROUNDS)


def interval(values: np.ndarray, estimate: float | None = None) -> list[float]:
    """Return the 2.5 and 97.5 % points of bootstrap values.

    Args:
        estimate: shifts the values to this mean, for measures that resampling itself raises.
    """
    if estimate is not None:
        values = values - values.mean() + estimate
    return [float(point) for point in np.percentile(values, [2.5, 97.5])]
