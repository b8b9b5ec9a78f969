"""Checkpoints that can be trusted: what is needed to save, load, list and verify them."""

from stretto.checkpoint.background import Failed, Saved
from stretto.checkpoint.catalogue import Catalogue, Verification
from stretto.checkpoint.checkpointer import Checkpointer, CheckpointInfo, PassedOver
from stretto.checkpoint.errors import CheckpointFailed, Conflict, Damaged, Fenced
from stretto.checkpoint.peers import Alone, Peers
from stretto.checkpoint.settings import CheckpointSettings

__all__ = [
    "Alone",
    "Catalogue",
    "CheckpointFailed",
    "CheckpointInfo",
    "CheckpointSettings",
    "Checkpointer",
    "Conflict",
    "Damaged",
    "Failed",
    "Fenced",
    "PassedOver",
    "Peers",
    "Saved",
    "Verification",
]
