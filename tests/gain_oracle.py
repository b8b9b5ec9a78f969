"""A naive twin of the gain: float64 NumPy on every contribution's whole gradient, averages from their definition."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Vector = NDArray[np.float64]


def statistics(sizes: Sequence[int], gradients: Sequence[Vector]) -> tuple[float, float]:
    """A and B of contributions with these sample counts and mean gradients."""
    weights = np.asarray(sizes, dtype=np.float64) / sum(sizes)
    stacked = np.stack(gradients)
    mean = weights @ stacked
    return float(weights @ (stacked**2).sum(axis=1)), float(mean @ mean)


class GainOracle:
    """Keeps every sample (variance, squared norm, share) and adds up the averages anew at each reading."""

    def __init__(self, theta: float | None = None) -> None:
        self._theta = theta
        self._samples: list[tuple[float, float, float]] = []
        self._memory = 0.0

    def update(self, sizes: Sequence[int], gradients: Sequence[Vector], scale: float) -> None:
        """Take in one step from the contributions' gradients themselves."""
        filled = [(n, g) for n, g in zip(sizes, gradients, strict=True) if n]
        if len(filled) < 2:
            return
        weights = np.asarray([n for n, _ in filled], dtype=np.float64) / sum(sizes)
        stacked = np.stack([g for _, g in filled])
        mean = weights @ stacked
        # The weighted spread around the mean is A - B, written without the cancellation.
        spread = float(weights @ ((stacked - mean) ** 2).sum(axis=1))
        self.update_from(spread, float(mean @ mean), len(filled), scale)

    def update_from(self, spread: float, mean_sqr_norm: float, k: int, scale: float) -> None:
        """Take in one step from A - B and B."""
        variance = scale * spread / (k - 1)
        theta = max(1 - min(scale, k) / 1000, 0.0) if self._theta is None else self._theta
        self._memory = min(self._memory + 1, 1 / (1 - theta))
        self._samples.append((variance, mean_sqr_norm - variance / scale, 1 / self._memory))

    def averages(self) -> tuple[float, float]:
        """Variance and squared norm, clipped at 0."""
        variance = sqr_norm = 0.0
        left = 1.0
        for sample_variance, sample_sqr_norm, share in reversed(self._samples):
            variance += left * share * sample_variance
            sqr_norm += left * share * sample_sqr_norm
            left *= 1 - share
        return max(variance, 0.0), max(sqr_norm, 0.0)

    def gain(self, scale: float) -> float:
        """r by its definition."""
        variance, sqr_norm = self.averages()
        if variance == sqr_norm == 0.0:
            return 1.0
        return float(np.clip((variance + sqr_norm) / (variance / scale + sqr_norm), min(1, scale), max(1, scale)))
