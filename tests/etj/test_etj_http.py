"""The operator's HTTP client against a server that answers as API servers do, well and badly."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import pytest
from aiohttp import web
from kubernetes_asyncio.client import Configuration
from stretto_operator.kubernetes import Kubernetes
from stretto_operator.server import JOB, POD, ApiError


class Scripted:
    """Answers with what comes next in `answers`, and remembers the requests."""

    def __init__(self) -> None:
        self.answers: list[web.StreamResponse] = []
        self.requests: list[tuple[str, str, dict[str, str], str, Any]] = []

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.requests.append((request.method, request.path, dict(request.query), request.content_type, body))
        return self.answers.pop(0)

    def say(self, content: Any, status: int = 200, **headers: str) -> None:
        self.answers.append(web.json_response(content, status=status, headers=headers))


@pytest.fixture
def scripted() -> Scripted:
    return Scripted()


@pytest.fixture
async def kubernetes(scripted: Scripted) -> AsyncIterator[Kubernetes]:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", scripted.handle)
    runner = web.AppRunner(app)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    configuration = Configuration()
    configuration.host = f"http://127.0.0.1:{runner.addresses[0][1]}"
    client = Kubernetes(configuration)
    yield client
    await client.close()
    await runner.cleanup()


async def test_lists_come_page_by_page_and_their_items_say_what_they_are(
    scripted: Scripted, kubernetes: Kubernetes
) -> None:
    scripted.say({"metadata": {"resourceVersion": "7", "continue": "next"}, "items": [{"metadata": {"name": "a"}}]})
    scripted.say({"metadata": {"resourceVersion": "7"}, "items": [{"metadata": {"name": "b"}}]})
    listing = await kubernetes.list(POD, None, "a=b")
    assert [each["metadata"]["name"] for each in listing.items] == ["a", "b"]
    assert listing.items[0]["kind"] == "Pod"
    assert listing.resource_version == "7"
    assert scripted.requests[0][1] == "/api/v1/pods"
    assert scripted.requests[1][2]["continue"] == "next"


async def test_a_watch_yields_changes_until_the_server_says_that_it_has_expired(
    scripted: Scripted, kubernetes: Kubernetes
) -> None:
    lines = [
        {"type": "ADDED", "object": {"metadata": {"name": "a", "resourceVersion": "8"}}},
        {"type": "ERROR", "object": {"code": 410, "reason": "Expired", "message": "too old resource version"}},
    ]
    scripted.answers.append(web.Response(text="".join(json.dumps(line) + "\n" for line in lines)))
    watch = kubernetes.watch(JOB, "default", "", "7")
    assert (await anext(watch)).type == "ADDED"
    with pytest.raises(ApiError) as raised:
        await anext(watch)
    assert raised.value.expired
    assert scripted.requests[0][1] == "/apis/stretto.dev/v1alpha1/namespaces/default/elastictrainingjobs"


async def test_a_deletion_names_the_uid_that_is_meant(scripted: Scripted, kubernetes: Kubernetes) -> None:
    scripted.say({"kind": "Pod"})
    scripted.say({"kind": "Pod"})
    await kubernetes.delete(POD, "default", "a", uid="u1")
    await kubernetes.delete(POD, "default", "a", uid="u1", force=True)
    assert scripted.requests[0][4]["preconditions"] == {"uid": "u1"}
    assert "gracePeriodSeconds" not in scripted.requests[0][4]
    assert scripted.requests[1][4]["gracePeriodSeconds"] == 0


async def test_patches_are_of_the_kind_that_they_say(scripted: Scripted, kubernetes: Kubernetes) -> None:
    scripted.say({})
    scripted.say({})
    await kubernetes.merge_status(JOB, "default", "a", {"status": {}})
    await kubernetes.json_patch(POD, "default", "a", [{"op": "test"}])
    assert scripted.requests[0][1].endswith("/elastictrainingjobs/a/status")
    assert [each[3] for each in scripted.requests] == ["application/merge-patch+json", "application/json-patch+json"]


@pytest.mark.parametrize(
    ("status", "reason", "kind"),
    [
        (409, "Conflict", "conflict"),
        (409, "AlreadyExists", "exists"),
        (404, "NotFound", "missing"),
        (410, "Expired", "expired"),
        (429, "TooManyRequests", "passing"),
        (500, "InternalError", "passing"),
        (503, "ServiceUnavailable", "passing"),
    ],
)
async def test_answers_are_sorted_by_what_to_do_next(
    scripted: Scripted, kubernetes: Kubernetes, status: int, reason: str, kind: str
) -> None:
    scripted.say({"reason": reason, "message": "in words"}, status, **{"Retry-After": "3"})
    with pytest.raises(ApiError, match="in words") as raised:
        await kubernetes.create(POD, {"metadata": {"namespace": "default", "name": "a"}})
    kinds = ("conflict", "exists", "missing", "expired", "passing")
    assert [each for each in kinds if getattr(raised.value, each)] == [kind]
    assert raised.value.retry_after_s == 3


async def test_an_answer_that_is_no_json_is_told_as_it_came(scripted: Scripted, kubernetes: Kubernetes) -> None:
    scripted.answers.append(web.Response(text="<html>bad gateway", status=502))
    with pytest.raises(ApiError, match="bad gateway") as raised:
        await kubernetes.get(POD, "default", "a")
    assert raised.value.passing


async def test_a_server_that_is_not_there_is_a_passing_trouble() -> None:
    configuration = Configuration()
    configuration.host = "http://127.0.0.1:1"
    client = Kubernetes(configuration)
    with pytest.raises(ApiError, match="did not answer GET /api/v1/pods") as raised:
        await client.list(POD, None, "")
    assert raised.value.passing
    await client.close()
