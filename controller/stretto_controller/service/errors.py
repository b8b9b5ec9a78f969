"""The one place that says which refusal is which gRPC and HTTP status."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any, NoReturn

import grpc
from stretto_proto.v1 import types_pb2

from stretto_controller.auth.tokens import Unauthenticated
from stretto_controller.core.errors import Refusal, Rejected
from stretto_controller.runner import Unavailable
from stretto_controller.sessions import Overflow, Replaced, Stopping

_STATUSES: dict[Refusal, tuple[grpc.StatusCode, HTTPStatus]] = {
    Refusal.INVALID: (grpc.StatusCode.INVALID_ARGUMENT, HTTPStatus.BAD_REQUEST),
    Refusal.NOT_FOUND: (grpc.StatusCode.NOT_FOUND, HTTPStatus.NOT_FOUND),
    Refusal.CONFLICT: (grpc.StatusCode.ALREADY_EXISTS, HTTPStatus.CONFLICT),
    Refusal.DENIED: (grpc.StatusCode.PERMISSION_DENIED, HTTPStatus.FORBIDDEN),
    Refusal.EXHAUSTED: (grpc.StatusCode.RESOURCE_EXHAUSTED, HTTPStatus.TOO_MANY_REQUESTS),
    Refusal.NOT_YET: (grpc.StatusCode.UNAVAILABLE, HTTPStatus.TOO_EARLY),
    Refusal.PRECONDITION: (grpc.StatusCode.FAILED_PRECONDITION, HTTPStatus.CONFLICT),
}

# What a caller is told; any other exception is a fault of ours.
ANSWERED = (Rejected, Unauthenticated, Unavailable, Replaced, Overflow, Stopping)


def grpc_status(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status of one of ANSWERED, and what to tell the caller."""
    match error:
        case Rejected():
            return _STATUSES[error.kind][0], error.message
        case Unauthenticated():
            return grpc.StatusCode.UNAUTHENTICATED, str(error)
        case Unavailable() | Stopping():
            return grpc.StatusCode.UNAVAILABLE, str(error)
        case Replaced():
            return grpc.StatusCode.ABORTED, str(error)
        case Overflow():
            return grpc.StatusCode.RESOURCE_EXHAUSTED, str(error)
    raise AssertionError(f"{type(error).__name__} is not answered") from error


LEADER_KEY = "stretto-leader-bin"


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: Exception) -> NoReturn:
    """End a call with the status of one of ANSWERED. A follower's tells, for programs too, who leads."""
    code, message = grpc_status(error)
    metadata: tuple[tuple[str, bytes], ...] = ()
    if isinstance(error, Unavailable) and error.leader.grpc_address:
        leader = types_pb2.Leader(grpc_address=error.leader.grpc_address, http_url=error.leader.http_url)
        metadata = ((LEADER_KEY, leader.SerializeToString()),)
    await context.abort(code, message, metadata)
    raise AssertionError("abort raises") from error


def http_status(error: Rejected | Unauthenticated | Unavailable) -> tuple[HTTPStatus, str, str]:
    """The status, a short stable word for programs, and what to tell the caller."""
    if isinstance(error, Rejected):
        return _STATUSES[error.kind][1], error.kind.value, error.message
    if isinstance(error, Unauthenticated):
        return HTTPStatus.UNAUTHORIZED, "unauthenticated", str(error)
    return HTTPStatus.SERVICE_UNAVAILABLE, "unavailable", str(error)
