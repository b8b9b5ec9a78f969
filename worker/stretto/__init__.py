"""Stretto: elastic PyTorch training whose learning rate stays right.

Torch is imported only when a name that needs it is used: `import stretto` and `import stretto.gain` stay light.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto import adasum, gain, live, rules
    from stretto.adascale import AdaScale
    from stretto.adascale_options import AdaScaleSettings
    from stretto.checkpoint import Checkpointer
    from stretto.mixed_precision import MixedPrecision
    from stretto.sampler import ElasticSampler
    from stretto.trainer import ElasticTrainer, StepReport

_HOMES = {
    "AdaScale": "stretto.adascale",
    "AdaScaleSettings": "stretto.adascale_options",
    "Checkpointer": "stretto.checkpoint",
    "ElasticSampler": "stretto.sampler",
    "ElasticTrainer": "stretto.trainer",
    "MixedPrecision": "stretto.mixed_precision",
    "StepReport": "stretto.trainer",
}
_MODULES = ("adasum", "gain", "live", "rules")

__all__ = [
    "AdaScale",
    "AdaScaleSettings",
    "Checkpointer",
    "ElasticSampler",
    "ElasticTrainer",
    "MixedPrecision",
    "StepReport",
    "adasum",
    "gain",
    "live",
    "rules",
]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _MODULES:
        return importlib.import_module(f"stretto.{name}")
    raise AttributeError(f"module 'stretto' has no attribute {name!r}; it has {', '.join(__all__)}")
