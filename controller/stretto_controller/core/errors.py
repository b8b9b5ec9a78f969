"""How the core refuses: nothing has changed when it does, and the message says what to do."""

from __future__ import annotations

from enum import StrEnum


class Refusal(StrEnum):
    INVALID = "invalid"
    NOT_FOUND = "not_found"
    CONFLICT = "conflict"
    DENIED = "denied"
    EXHAUSTED = "exhausted"
    # Right request, wrong moment: the job's state does not allow it.
    PRECONDITION = "precondition"
    # Right request, too early: ask again in a moment.
    NOT_YET = "not_yet"


class Rejected(Exception):
    """A request that changes nothing. service/errors.py maps its kind to gRPC and HTTP statuses."""

    def __init__(self, kind: Refusal, message: str) -> None:
        super().__init__(message)
        self.kind = kind
        self.message = message

    @classmethod
    def invalid(cls, message: str) -> Rejected:
        return cls(Refusal.INVALID, message)

    @classmethod
    def not_found(cls, message: str) -> Rejected:
        return cls(Refusal.NOT_FOUND, message)

    @classmethod
    def conflict(cls, message: str) -> Rejected:
        return cls(Refusal.CONFLICT, message)

    @classmethod
    def denied(cls, message: str) -> Rejected:
        return cls(Refusal.DENIED, message)

    @classmethod
    def exhausted(cls, message: str) -> Rejected:
        return cls(Refusal.EXHAUSTED, message)

    @classmethod
    def precondition(cls, message: str) -> Rejected:
        return cls(Refusal.PRECONDITION, message)

    @classmethod
    def not_yet(cls, message: str) -> Rejected:
        return cls(Refusal.NOT_YET, message)
