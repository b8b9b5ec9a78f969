"""What stands before every method: who calls, whether they may, and whether this controller leads."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import grpc

from stretto_controller.auth.access import RPCS, UNNAMED, Access, Principal
from stretto_controller.auth.tokens import Tokens, Unauthenticated, check_job
from stretto_controller.core.errors import Rejected
from stretto_controller.runner import Runner, Unavailable
from stretto_controller.service.errors import abort
from stretto_controller.service.guard import Malformed

OURS = "/stretto.v1."
# Followers answer it themselves.
_OF_EVERY_CONTROLLER = "/stretto.v1.Jobs/GetController"


class AccessGate(grpc.aio.ServerInterceptor):
    """auth.access.RPCS, enforced. The job is the request's, or that of a stream's hello."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any] | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        handler = await continuation(handler_call_details)
        access = RPCS.get(handler_call_details.method, UNNAMED)
        if handler is None or access is Access.OPEN:
            return handler
        authorization = _authorization(handler_call_details.invocation_metadata)
        about_job = access in (Access.SEE_JOB, Access.CHANGE_JOB)
        stream = handler.stream_stream is not None

        def guard(behaviour: Callable[..., Any]) -> Callable[..., Any]:
            async def guarded(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
                try:
                    who = self._tokens.caller(access, authorization)
                    # What is no message at all is refused further on.
                    if about_job and not stream and not isinstance(request, Malformed):
                        check_job(who, request.job)
                except (Unauthenticated, Rejected) as error:
                    await abort(context, error)
                return await behaviour(_own(request, who) if stream and who.job else request, context)

            return guarded

        return rewrapped(handler, guard)


async def _own(requests: AsyncIterator[Any], who: Principal) -> AsyncIterator[Any]:
    """The same requests; a hello of another job raises Rejected instead."""
    async for request in requests:
        if not isinstance(request, Malformed) and request.HasField("hello"):
            check_job(who, request.hello.job)
        yield request


def _authorization(metadata: Any) -> str:
    return next((value for key, value in metadata or () if key == "authorization" and isinstance(value, str)), "")


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
        method: str = handler_call_details.method
        if handler is None or not method.startswith(OURS) or method == _OF_EVERY_CONTROLLER:
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
