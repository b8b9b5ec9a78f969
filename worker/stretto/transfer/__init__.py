"""Gives the state of one live worker to all others of its generation, and tells whether workers hold the same state.

    received = synchronise(group, state, source)     # on every rank; None on the source
    if received is not None:
        load(objects, received)                      # in place

    fingerprint(state)                               # one number for every bit of a state, to compare over the ranks

A state is what is saved: nested dicts, lists, plain values and tensors. It travels as a manifest (JSON: the plain
part, and a table of the tensors) and then as the tensors' bytes in large messages; nothing is pickled. Receivers
collect it in memory of their own. All ranks compare checksums of every byte before anyone gets it, so whatever goes
wrong on the way leaves every rank's own state as it was.

What belongs here: the wire's format, its checks, and putting a received state into place. Who gives, and when, is
decided elsewhere.
"""

from __future__ import annotations

from stretto.transfer.fingerprint import fingerprint
from stretto.transfer.loading import load
from stretto.transfer.settings import TransferSettings
from stretto.transfer.synchronise import TransferFailed, synchronise

__all__ = ["TransferFailed", "TransferSettings", "fingerprint", "load", "synchronise"]
