"""The gRPC server: which services, which limits, which port."""

from __future__ import annotations

import socket
from typing import Any
from uuid import uuid4

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from stretto_proto.v1 import jobs_pb2, rendezvous_pb2, training_pb2
from stretto_proto.v1.jobs_pb2_grpc import add_JobsServicer_to_server
from stretto_proto.v1.rendezvous_pb2_grpc import add_RendezvousServicer_to_server
from stretto_proto.v1.training_pb2_grpc import add_TrainingServicer_to_server

from stretto_controller.auth.certificates import Certificates
from stretto_controller.auth.tokens import Tokens
from stretto_controller.runner import Runner
from stretto_controller.service.gate import AccessGate, LeaderGate
from stretto_controller.service.guard import MalformedGuard
from stretto_controller.service.jobs import JobsService
from stretto_controller.service.streaming import Identity, RendezvousService, TrainingService
from stretto_controller.sessions import Stopping
from stretto_controller.settings import Settings

_SERVICES = tuple(
    module.DESCRIPTOR.services_by_name[name].full_name
    for module, name in ((rendezvous_pb2, "Rendezvous"), (training_pb2, "Training"), (jobs_pb2, "Jobs"))
)


class GrpcServer:
    """All three services, health and reflection on one port."""

    def __init__(self, runner: Runner, settings: Settings, tokens: Tokens, certificates: Certificates | None) -> None:
        self._runner = runner
        self._settings = settings
        self._certificates = certificates
        self._health = health.aio.HealthServicer()
        self._server = grpc.aio.server(
            interceptors=[AccessGate(tokens), LeaderGate(runner), MalformedGuard()],
            options=_options(settings.service.message_size_bytes),
        )
        identity = Identity(uuid4().hex, settings.limits.heartbeat_interval_s)
        add_RendezvousServicer_to_server(RendezvousService(runner, settings.service, identity), self._server)
        add_TrainingServicer_to_server(TrainingService(runner, settings.service, identity), self._server)
        add_JobsServicer_to_server(JobsService(runner, identity), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((*_SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)

    async def start(self) -> int:
        """Serve, and return the port. Raises OSError when the address cannot be used."""
        host, port = self._settings.host, self._settings.grpc_port
        try:
            if self._certificates is None:
                port = self._server.add_insecure_port(address(host, port))
            else:
                port = self._server.add_secure_port(address(host, port), self._certificates.grpc_credentials())
        except RuntimeError as error:
            raise OSError(f"cannot serve gRPC on {address(host, port)}: {_reason(host, port, error)}") from error
        await self._server.start()
        for service in ("", *_SERVICES):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        return port

    async def stop(self) -> None:
        """Tell every stream that the controller stops, then end them."""
        await self._health.enter_graceful_shutdown()
        self._runner.sessions.end_all(Stopping("this controller is stopping; connect again"))
        await self._server.stop(self._settings.service.stop_grace_s)


def address(host: str, port: int) -> str:
    """host:port, with brackets around an IPv6 address."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _reason(host: str, port: int, error: RuntimeError) -> str:
    """Why the port cannot be used: gRPC does not say it."""
    try:
        socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET).close()
    except OSError as reason:
        return f"{reason.strerror}; end what uses it or give another --grpc-port"
    return str(error)


def _options(message_size_bytes: int) -> list[tuple[str, Any]]:
    return [
        ("grpc.max_receive_message_length", message_size_bytes),
        # A second controller on the port must fail, not share it.
        ("grpc.so_reuseport", 0),
        # By default gRPC refuses most of a storm of reconnections, and says INTERNAL; we have limits of our own.
        ("grpc.server.max_pending_requests", 20_000),
        ("grpc.server.max_pending_requests_hard_limit", 40_000),
        # A backstop for peers that vanish without closing; heartbeats notice first. ping_timeout is what counts.
        ("grpc.keepalive_time_ms", 20_000),
        ("grpc.keepalive_timeout_ms", 20_000),
        ("grpc.http2.ping_timeout_ms", 20_000),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients may ping once a second without being told "Too many pings".
        ("grpc.http2.min_recv_ping_interval_without_data_ms", 900),
        ("grpc.http2.max_ping_strikes", 0),
    ]
