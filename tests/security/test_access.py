"""The table of what each caller may do, held against every gRPC method and every HTTP route that there is."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from fastapi import FastAPI
from google.protobuf import message_factory
from harness.bench import SPEC, Bench
from starlette.routing import Route
from stretto_controller.auth.access import ROUTES, RPCS, Access, Principal, Role
from stretto_controller.auth.tokens import Tokens, line_of, new_token, read_tokens
from stretto_controller.core.events import JobCreated
from stretto_controller.service.server import GrpcServer
from stretto_controller.settings import ServiceLimits, Settings
from stretto_controller.web.app import build_app
from stretto_proto.v1 import jobs_pb2, rendezvous_pb2, training_pb2

CALLERS = {
    "nobody": None,
    "admin": Principal(Role.ADMIN),
    "viewer": Principal(Role.VIEWER),
    "job a": Principal(Role.JOB, "a"),
    "job b": Principal(Role.JOB, "b"),
}
# Who may call something about job a; written down once more, in words of this test.
MAY_A: dict[Access, set[str]] = {
    Access.OPEN: set(CALLERS),
    Access.KNOWN: set(CALLERS) - {"nobody"},
    Access.SEE_ALL: {"admin", "viewer"},
    Access.SEE_JOB: {"admin", "viewer", "job a"},
    Access.CHANGE_JOB: {"admin", "job a"},
    Access.CHANGE_ALL: {"admin"},
}
OUR_METHODS = [
    (f"/{service.full_name}/{method.name}", method)
    for module in (jobs_pb2, rendezvous_pb2, training_pb2)
    for service in module.DESCRIPTOR.services_by_name.values()
    for method in service.methods
]


class Guarded:
    """A controller in this process that asks for tokens, with jobs a and b."""

    def __init__(self, directory: Path) -> None:
        self.tokens = {name: new_token() for name, who in CALLERS.items() if who is not None}
        self.file = directory / "tokens"
        self.write_tokens()
        self.bench = Bench()
        limits = ServiceLimits(first_message_s=30.0)
        checked = Tokens(self.file, 0.0)
        self.server = GrpcServer(self.bench.runner, Settings(grpc_port=0, service=limits), checked, None)
        self.app: FastAPI = build_app(self.bench.runner, limits, checked)

    def write_tokens(self, *more: str) -> None:
        lines = [line_of(who, self.tokens[name]) for name, who in CALLERS.items() if who is not None]
        self.file.write_text("\n".join(["# who may call", *lines, *more, ""]))

    async def start(self) -> None:
        for job in ("a", "b"):
            self.bench.runner.submit(job, JobCreated(SPEC))
        await self.bench.store.finish()
        self._saving = asyncio.create_task(self._save())
        self.port = await self.server.start()
        transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx.AsyncClient(transport=transport, base_url="http://controller")

    async def _save(self) -> None:
        while True:
            await self.bench.store.finish()
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        await self.bench.runner.stop()
        await self.server.stop()
        self._saving.cancel()
        await self.http.aclose()

    def header(self, caller: str) -> dict[str, str]:
        return {"authorization": f"Bearer {self.tokens[caller]}"} if caller in self.tokens else {}

    async def rpc(self, path: str, method: Any, caller: str, job: str) -> grpc.StatusCode:
        """Call with an otherwise empty request, and say how it ended; OK also for a stream that began."""
        request: Any = message_factory.GetMessageClass(method.input_type)()
        if "hello" in request.DESCRIPTOR.fields_by_name:
            request.hello.job = job
        elif "job" in request.DESCRIPTOR.fields_by_name:
            request.job = job
        metadata = tuple(self.header(caller).items())
        async with grpc.aio.insecure_channel(f"127.0.0.1:{self.port}") as channel:
            kind: Any = channel.stream_stream if method.client_streaming else channel.unary_unary
            call = kind(path, request_serializer=lambda data: data, response_deserializer=lambda data: data)
            data: Any = request.SerializeToString()
            call = call(_once(data) if method.client_streaming else data, metadata=metadata, timeout=60)
            code: grpc.StatusCode = await call.code()
            return code


async def _once(data: bytes) -> AsyncIterator[bytes]:
    yield data


@pytest.fixture
async def guarded(tmp_path: Path) -> AsyncIterator[Guarded]:
    guarded = Guarded(tmp_path)
    await guarded.start()
    yield guarded
    await guarded.stop()


def test_the_table_names_every_method_and_no_other() -> None:
    services = {path for path, _ in OUR_METHODS}
    assert services == {path for path in RPCS if path.startswith("/stretto.")}


def test_the_table_names_every_route_and_no_other(guarded: Guarded) -> None:
    routes = {
        (method, route.path)
        for route in guarded.app.routes
        if isinstance(route, Route)
        for method in (route.methods or set()) - {"HEAD"}
    }
    assert routes == set(ROUTES)


# DeleteJob last: what it is asked about is gone then.
@pytest.mark.parametrize(("path", "method"), OUR_METHODS, ids=[path for path, _ in OUR_METHODS])
async def test_each_method_is_for_those_that_the_table_names(guarded: Guarded, path: str, method: Any) -> None:
    for caller in CALLERS:
        code = await guarded.rpc(path, method, caller, "a")
        refused = code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED)
        assert refused == (caller not in MAY_A[RPCS[path]]), (caller, code)
        if refused:
            assert (code is grpc.StatusCode.UNAUTHENTICATED) == (caller == "nobody")


@pytest.mark.parametrize(("method", "path"), ROUTES, ids=[f"{method} {path}" for method, path in ROUTES])
async def test_each_route_is_for_those_that_the_table_names(guarded: Guarded, method: str, path: str) -> None:
    for caller in CALLERS:
        headers = {"accept": "application/json", **guarded.header(caller)}
        # A body that is refused, so that nothing changes.
        content = b"{}" if method in ("PATCH", "POST") else None
        # Nor is a stream begun that would never end.
        if (method == "DELETE" or path.endswith("/watch")) and caller in MAY_A[ROUTES[method, path]]:
            continue
        answer = await guarded.http.request(
            method, path.replace("{job}", "a").replace("{name}", "app.js"), headers=headers, content=content
        )
        refused = answer.status_code in (401, 403)
        assert refused == (caller not in MAY_A[ROUTES[method, path]]), (caller, answer.status_code)
        if refused:
            assert (answer.status_code == 401) == (caller == "nobody")
            assert answer.headers["content-type"] == "application/problem+json"


async def test_a_job_s_token_can_touch_nothing_else_whatever_the_path(guarded: Guarded) -> None:
    for job, path in itertools.product(("b", "nobody", "A", "a%2F..%2Fb", "..%2Fa"), ("", "/history", "/events")):
        answer = await guarded.http.get(f"/api/v1/jobs/{job}{path}", headers=guarded.header("job a"))
        assert answer.status_code in (403, 404), (job, path)
        assert "min_nodes" not in answer.text


async def test_who_sends_no_token_is_told_which_kind_is_asked_for(guarded: Guarded) -> None:
    refused = await guarded.http.get("/api/v1/jobs")
    assert refused.headers["www-authenticate"] == 'Bearer realm="stretto"'
    assert "STRETTO_TOKEN" in refused.json()["detail"]


@pytest.mark.parametrize(
    "header",
    [
        "Bearer",
        "Bearer ",
        "bearer wrong",
        "Basic ???",
        "Basic d3Jvbmc=",
        "Digest x",
        "x" * 5000,
        "Bearer " + "x" * 5000,
    ],
)
async def test_what_is_no_known_token_is_refused_and_never_repeated(guarded: Guarded, header: str) -> None:
    answer = await guarded.http.get("/api/v1/jobs", headers={"authorization": header})
    assert answer.status_code == 401
    assert "wrong" not in answer.text
    assert "xxx" not in answer.text


async def test_tokens_are_replaced_without_a_restart_and_a_bad_file_changes_nothing(guarded: Guarded) -> None:
    fresh = new_token()
    headers = {"authorization": f"Bearer {fresh}"}
    assert (await guarded.http.get("/api/v1/jobs", headers=headers)).status_code == 401
    guarded.write_tokens(line_of(Principal(Role.ADMIN), fresh))
    assert (await guarded.http.get("/api/v1/jobs", headers=headers)).status_code == 200
    guarded.file.write_text("nonsense")
    assert (await guarded.http.get("/api/v1/jobs", headers=headers)).status_code == 200
    guarded.write_tokens()
    assert (await guarded.http.get("/api/v1/jobs", headers=headers)).status_code == 401


async def test_no_token_is_in_the_file_the_metrics_the_events_or_the_log(
    guarded: Guarded, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG"):
        for caller in CALLERS:
            await guarded.http.get("/api/v1/jobs/b", headers=guarded.header(caller))
        accept = {**guarded.header("admin"), "accept": "application/json"}
        seen = [
            guarded.file.read_text(),
            (await guarded.http.get("/metrics", headers=guarded.header("admin"))).text,
            (await guarded.http.get("/api/v1/jobs/a/events", headers=accept)).text,
            caplog.text,
        ]
    assert seen[0].count("sha256:") == 4
    for token in guarded.tokens.values():
        assert not [text for text in seen if token in text]


@pytest.mark.parametrize("text", ["", "# nothing\n", "admin secret-token\n", "job sha256:" + "0" * 64, "root sha256:x"])
def test_a_tokens_file_that_says_nothing_or_nonsense_is_refused_without_its_content(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tokens"
    file.write_text(text)
    with pytest.raises(ValueError, match=r"holds no tokens|line 1 of") as error:
        read_tokens(file)
    assert "secret-token" not in str(error.value)
