"""What an Adasum has found out about the gradients it combined."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from stretto.adasum.tree import Floats


@dataclass(frozen=True)
class Statistics:
    """Of one flat vector, or of several one after the other; the same bits on every rank.

    `sqr_norms` [layers]: the sum over the ranks of |g_i|^2. `result_sqr_norms` [layers]: |adasum|^2. `mean_sqr_norm`:
    |mean_i g_i|^2 over all layers, AdaScale's B; None where the algorithm does not see it.
    """

    sqr_norms: Floats
    result_sqr_norms: Floats
    mean_sqr_norm: float | None

    @property
    def orthogonality(self) -> Floats:
        """Per layer with a gradient: 1 where the ranks' gradients are orthogonal, 1/n where they are the same."""
        with np.errstate(all="ignore"):
            ratios = self.result_sqr_norms / self.sqr_norms
        kept: Floats = ratios[np.isfinite(ratios)]
        return kept

    def quantiles(self) -> tuple[float, float, float] | None:
        """Minimum, median and maximum over the layers; None where no layer has a gradient."""
        ratios = self.orthogonality
        if not len(ratios):
            return None
        return float(ratios.min()), float(np.median(ratios)), float(ratios.max())


def joined(several: list[Statistics]) -> Statistics:
    """Of all vectors together."""
    means = [each.mean_sqr_norm for each in several]
    return Statistics(
        np.concatenate([each.sqr_norms for each in several]) if several else np.zeros(0),
        np.concatenate([each.result_sqr_norms for each in several]) if several else np.zeros(0),
        None if any(mean is None for mean in means) else sum(mean for mean in means if mean is not None),
    )
