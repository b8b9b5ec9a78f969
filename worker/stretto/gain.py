"""The AdaScale gain, estimated from two squared gradient norms per step.

Pure Python floats; never imports torch, so that controllers and tools can use it too. Formulas and symbols:
Johnson, Agrawal, Gu and Guestrin, "AdaScale SGD", ICML 2020. Both averages refer to the *base* batch size,
so a change of the scale needs no correction: the same averages give the gain of the new scale at once.
"""

from __future__ import annotations

import math
from typing import Any, Literal

Clip = Literal["on-read", "before-averaging"]
FORMAT_VERSION = 1

_AVERAGED_STEPS = 1000.0  # the paper's theta = 1 - S/1000: about 1000/S steps are remembered
_MIN_VARIANCE = 1e-6  # the authors' floor, used by clip="before-averaging" only


class GainEstimator:
    """Estimates the gain r at any scale S from averages of the gradient's variance and squared norm.

    `smoothing`: "paper" (theta = max(1 - min(S, k)/1000, 0)) or a fixed theta in [0, 1); 0 keeps the last
    sample only. `clip`: "on-read" averages signed samples and clips what is read; "before-averaging" clips
    each sample as the paper's authors did (variance >= 1e-6, squared norm >= 0), which biases the averages.
    """

    def __init__(self, *, smoothing: Literal["paper"] | float = "paper", clip: Clip = "on-read") -> None:
        if smoothing != "paper" and not (_is_number(smoothing) and 0.0 <= smoothing < 1.0):
            raise ValueError(f'smoothing is {smoothing!r}; allowed: "paper", or a number in [0, 1)')
        if clip not in ("on-read", "before-averaging"):
            raise ValueError(f'clip is {clip!r}; allowed: "on-read", "before-averaging"')
        self._smoothing = smoothing
        self._clip = clip
        self._variance = 0.0
        self._sqr_norm = 0.0
        self._weight = 0.0
        self._num_updates = 0

    def update(self, *, local_sqr_norm: float, global_sqr_norm: float, num_contributions: int, scale: float) -> None:
        """Take one step's statistics into the averages; what cannot be used changes nothing.

        `local_sqr_norm`: A, the sample-weighted mean of the contributions' squared norms.
        `global_sqr_norm`: B, the squared norm of their sample-weighted mean. `num_contributions`: k, the
        gradients that were averaged, without empty ones. `scale`: S, the step's samples divided by the base
        batch size.

        Fewer than two contributions say nothing about the variance, and NaN or Inf say nothing at all: both
        leave the estimator as it was. `num_updates` grows by one exactly when the sample entered.
        """
        scale = _check_scale(scale)
        if isinstance(num_contributions, bool) or int(num_contributions) != num_contributions:
            raise ValueError(f"num_contributions is {num_contributions!r}; it counts gradients: 0, 1, 2, ...")
        if num_contributions < 0:
            raise ValueError(f"num_contributions is {num_contributions}; allowed: 0 or more")
        for name, value in (("local_sqr_norm", local_sqr_norm), ("global_sqr_norm", global_sqr_norm)):
            if value < 0:
                raise ValueError(f"{name} is {value}; a squared norm is 0 or more")
        if num_contributions < 2:
            return
        variance = scale * ((local_sqr_norm - global_sqr_norm) / (num_contributions - 1))
        sqr_norm = global_sqr_norm - variance / scale
        if not (math.isfinite(variance) and math.isfinite(sqr_norm)):
            return
        if self._clip == "before-averaging":
            variance, sqr_norm = max(variance, _MIN_VARIANCE), max(sqr_norm, 0.0)
        self._average(variance, sqr_norm, 1.0 - self._theta(scale, int(num_contributions)))

    def gain(self, scale: float) -> float:
        """Return r at `scale`, between 1 and the scale; 1 before the first update and for zero gradients."""
        scale = _check_scale(scale)
        variance, sqr_norm = self.variance, self.sqr_norm
        largest = max(variance, sqr_norm)
        if largest == 0.0:
            return 1.0
        # Relative to the larger of the two, nothing here can overflow or vanish, however small the
        # gradients are.
        noise, signal = variance / largest, sqr_norm / largest
        gain = (noise + signal) / (noise / scale + signal)
        return min(max(gain, min(1.0, scale)), max(1.0, scale))

    @property
    def variance(self) -> float:
        """sigma^2, the trace of the gradient's covariance at the base batch size; 0 or more."""
        return max(self._variance, 0.0)

    @property
    def sqr_norm(self) -> float:
        """mu^2, the squared norm of the true gradient; 0 or more."""
        return max(self._sqr_norm, 0.0)

    @property
    def num_updates(self) -> int:
        """How many samples have entered the averages."""
        return self._num_updates

    def state_dict(self) -> dict[str, Any]:
        """Return the averages as plain numbers; smoothing and clip are configuration, not state."""
        return {
            "format_version": FORMAT_VERSION,
            "variance": self._variance,
            "sqr_norm": self._sqr_norm,
            "weight": self._weight,
            "num_updates": self._num_updates,
        }

    def load_state_dict(self, d: dict[str, Any]) -> None:
        """Continue from `state_dict()`'s numbers; a refused state leaves the estimator as it was."""
        version = d.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"the gain estimator's state has format version {version!r}; "
                f"this release reads {FORMAT_VERSION}: load it with the release that wrote it"
            )
        missing = sorted(self.state_dict().keys() - d.keys())
        if missing:
            raise ValueError(
                f"the gain estimator's state lacks {', '.join(missing)}; it was not written by state_dict()"
            )
        variance, sqr_norm, weight = (float(d[name]) for name in ("variance", "sqr_norm", "weight"))
        if not (math.isfinite(variance) and math.isfinite(sqr_norm) and math.isfinite(weight) and weight >= 0):
            raise ValueError(
                f"the gain estimator's state holds {variance=}, {sqr_norm=}, {weight=}; "
                "allowed: finite numbers, weight 0 or more"
            )
        self._variance, self._sqr_norm, self._weight = variance, sqr_norm, weight
        self._num_updates = int(d["num_updates"])

    def _theta(self, scale: float, num_contributions: int) -> float:
        if self._smoothing != "paper":
            return float(self._smoothing)
        # The paper has k = S. With few contributions at a large scale each sample is noisy, and S alone
        # would average too few of them.
        return max(1.0 - min(scale, num_contributions) / _AVERAGED_STEPS, 0.0)

    def _average(self, variance: float, sqr_norm: float, share: float) -> None:
        """Move the averages by `share` of the difference; by 1/n for the n-th sample while that is more."""
        weight = min(self._weight + 1.0, 1.0 / share)
        new_variance = self._variance + (variance - self._variance) / weight
        new_sqr_norm = self._sqr_norm + (sqr_norm - self._sqr_norm) / weight
        if not (math.isfinite(new_variance) and math.isfinite(new_sqr_norm)):
            return
        self._variance, self._sqr_norm, self._weight = new_variance, new_sqr_norm, weight
        self._num_updates += 1


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _check_scale(scale: float) -> float:
    if not (_is_number(scale) and math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale is {scale!r}; it is samples per step / base batch size: a finite number above 0")
    return float(scale)
