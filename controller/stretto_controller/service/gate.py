"""What stands before every method of ours: a controller that does not lead says who does."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import grpc

from stretto_controller.runner import Runner, Unavailable
from stretto_controller.service.errors import abort

OURS = "/stretto.v1."


class LeaderGate(grpc.aio.ServerInterceptor):
    """Followers answer UNAVAILABLE, with the leader's address in the status."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        if handler is None or not handler_call_details.method.startswith(OURS):
            return handler
        return rewrapped(handler, self._led)

    def _led(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        async def led(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
            try:
                self._runner.refuse_unless_leading()
            except Unavailable as error:
                await abort(context, error)
            return await behaviour(request, context)

        return led


def rewrapped(
    handler: grpc.RpcMethodHandler[Any, Any], wrap: Callable[[Callable[..., Any]], Callable[..., Any]]
) -> grpc.RpcMethodHandler[Any, Any]:
    """The same handler around another behaviour; ours are unary, or streams both ways."""
    if handler.stream_stream is not None:
        return grpc.stream_stream_rpc_method_handler(
            wrap(handler.stream_stream), handler.request_deserializer, handler.response_serializer
        )
    assert handler.unary_unary is not None, "a kind of method that is not guarded"
    return grpc.unary_unary_rpc_method_handler(
        wrap(handler.unary_unary), handler.request_deserializer, handler.response_serializer
    )
