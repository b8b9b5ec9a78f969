"""Requests that are no messages at all: one clear error, whatever the method."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import grpc

_OURS = "/stretto.v1."


@dataclass(frozen=True, slots=True)
class Malformed:
    """Stands in for a request whose bytes could not be read. grpc itself would answer with an unhelpful INTERNAL."""

    message: str


class MalformedGuard(grpc.aio.ServerInterceptor):
    """Unary methods answer INVALID_ARGUMENT by themselves; streams get a `Malformed` among their requests."""

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        method: str = handler_call_details.method
        if handler is None or not method.startswith(_OURS):
            return handler
        read = _reader(handler.request_deserializer, method)
        if handler.stream_stream is not None:
            return grpc.stream_stream_rpc_method_handler(handler.stream_stream, read, handler.response_serializer)
        assert handler.unary_unary is not None, f"{method} is of a kind that is not guarded"
        return grpc.unary_unary_rpc_method_handler(_refusing(handler.unary_unary), read, handler.response_serializer)


def _reader(deserialize: Callable[[bytes], Any] | None, method: str) -> Callable[[bytes], Any]:
    assert deserialize is not None

    def read(data: bytes) -> Any:
        try:
            return deserialize(data)
        # protobuf's implementations raise different errors for the same bytes.
        except Exception as error:  # noqa: BLE001
            return Malformed(f"the request of {len(data)} bytes is not a message of {method}: {error}")

    return read


def _refusing(behaviour: Callable[..., Any]) -> Callable[..., Any]:
    async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        if isinstance(request, Malformed):
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, request.message)
        return await behaviour(request, context)

    return guarded
