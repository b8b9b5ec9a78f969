"""Workers that change generation without leaving Python (in-process mode); ElasticTrainer is built on this.

For a training loop of your own (examples/plain_loop.py is a whole one):

    session = stretto.live.join(base_batch_size=16, batch_size=16, target_tau=300)
    state = {"model": model, "optimizer": optimizer, "sampler": sampler}    # whatever has state_dict, load_state_dict
    while optimizer.tau < 300:
        with session.enter() as generation:                # a place among the workers; ends when the group breaks
            generation.synchronise(state)                  # everyone gets the most advanced worker's state
            wrapped = generation.wrap(model, optimizer)    # DDP in this generation, AdaScale on top of it
            while optimizer.tau < 300 and not generation.leaving:
                with generation.guarded():
                    ... forward and backward of this rank's part of the batch ...
                generation.step(optimizer, loss=loss.item(), samples=len(mine))
                sampler.advance(len(batch))                # all that `state` holds moves on together
            generation.leave() if optimizer.tau < 300 else generation.finish(optimizer.tau)

A loop never sees a failure of others: the block ends, nothing of the step under way has happened, and the next
generation begins where the most advanced worker stands.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stretto.live.entry import join
    from stretto.live.generation import Generation
    from stretto.live.session import LiveSession
    from stretto.live.settings import GivenUp, LiveSettings

__all__ = ["Generation", "GivenUp", "LiveSession", "LiveSettings", "join"]

_MODULES = {
    "Generation": "stretto.live.generation",
    "GivenUp": "stretto.live.settings",
    "LiveSession": "stretto.live.session",
    "LiveSettings": "stretto.live.settings",
    "join": "stretto.live.entry",
}


def __getattr__(name: str) -> Any:
    """Import torch only when a name that needs it is used: the pure state is simulated without it."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
