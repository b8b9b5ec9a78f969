"""Puts a received state into the objects that it belongs to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def load(objects: Mapping[str, Any], state: Mapping[str, Any]) -> None:
    """Load each entry of `state` into the object of the same name, in place.

    Modules keep their parameters and buffers, optimizers the parameters that they move: the same objects get other
    values. An optimizer's own tensors become those of `state`. Names that do not match raise ValueError and nothing
    is loaded. When an object refuses its entry, those before it are loaded already: end the process.
    """
    if set(objects) != set(state):
        raise ValueError(
            f"the state has entries {', '.join(sorted(state)) or '(none)'}, but this worker has "
            f"{', '.join(sorted(objects)) or '(none)'}: run the same script on all workers"
        )
    for name, target in objects.items():
        if not callable(getattr(target, "load_state_dict", None)):
            raise ValueError(f"{name} is a {type(target).__name__}, which has no load_state_dict to take its state")
    for name, target in objects.items():
        target.load_state_dict(state[name])
