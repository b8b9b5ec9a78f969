"""torchrun's way in (entry-point group `torchrun.handlers`).

torchrun imports this module on every start, whatever the backend, and only logs a warning when that fails: so
nothing is imported here that could be missing or slow.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.elastic.rendezvous import RendezvousHandler, RendezvousParameters


def factory() -> Callable[[RendezvousParameters], RendezvousHandler]:
    """The creator of handlers that torchrun registers under the name `stretto`."""
    return _create


def _create(params: RendezvousParameters) -> RendezvousHandler:
    from stretto.rendezvous.handler import StrettoHandler
    from stretto.rendezvous.settings import AgentSettings

    return StrettoHandler(AgentSettings.from_parameters(params))
