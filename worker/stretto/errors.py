"""What can go wrong in operation, sorted by what the caller does next, and the gRPC statuses that mean it."""

from __future__ import annotations

import grpc


class StrettoError(Exception):
    """The root of every error of this package that is not a caller's mistake."""


class Retry(StrettoError):
    """Nothing is wrong with the request: ask again later, perhaps elsewhere."""


class Rejoin(StrettoError):
    """The caller's place is gone: ask for a new one, from the start."""


class Fatal(StrettoError):
    """Asking again would end the same way: stop, and show the message to a person."""


class NotFound(Fatal):
    """The job or node that was named does not exist."""


FATAL_CODES = frozenset(
    {
        grpc.StatusCode.INVALID_ARGUMENT,
        grpc.StatusCode.FAILED_PRECONDITION,
        grpc.StatusCode.PERMISSION_DENIED,
        grpc.StatusCode.ALREADY_EXISTS,
        grpc.StatusCode.UNAUTHENTICATED,
        grpc.StatusCode.UNIMPLEMENTED,
        grpc.StatusCode.NOT_FOUND,
    }
)


def from_rpc_error(error: grpc.RpcError, *, endpoint: str) -> StrettoError:
    """The error of ours that a failed call to `endpoint` means; the caller chains the cause."""
    code, details = error.code(), error.details() or str(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Retry(f"no controller can be reached at {endpoint} ({details}); is `stretto controller` running?")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Retry(f"the controller at {endpoint} did not answer in time; try again")
    if code is grpc.StatusCode.NOT_FOUND:
        return NotFound(details)
    if code in FATAL_CODES:
        return Fatal(details)
    if code is grpc.StatusCode.ABORTED:
        return Rejoin(details)
    return Retry(f"{endpoint} answered {code.name}: {details}")
