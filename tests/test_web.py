"""The HTTP API: what it answers, one shape for every error, and events that can be resumed."""

from __future__ import annotations

import asyncio
import json
import math
from importlib.resources import files
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from harness.bench import SPEC, Bench
from sse_starlette import ServerSentEvent
from stretto_controller.core.errors import Refusal, Rejected
from stretto_controller.core.events import DeleteRequested, JobCreated, PauseRequested, ResumeRequested
from stretto_controller.service.errors import grpc_status, http_status
from stretto_controller.settings import ServiceLimits
from stretto_controller.web.app import build_app
from stretto_controller.web.feed import Feed, Position
from stretto_controller.web.watch import Watchers


class Site:
    """The application on a bench, and a client that saves whatever a request asks to be saved."""

    def __init__(self) -> None:
        self.bench = Bench()
        self.app: FastAPI = build_app(self.bench.runner, ServiceLimits(body_size_bytes=1000))
        self._client = httpx.AsyncClient(
            transport=httpx.ASGITransport(self.app, raise_app_exceptions=False), base_url="http://controller"
        )

    async def ask(self, method: str, path: str, **options: Any) -> httpx.Response:
        request = asyncio.create_task(self._client.request(method, path, **options))
        while not request.done():
            await self.bench.store.finish()
            await asyncio.sleep(0)
        return request.result()

    async def running(self) -> None:
        """Job a in generation 1, with progress."""
        self.bench.join("a", "n0")
        await self.bench.store.finish()
        await self.bench.train("a")
        await self.bench.progress("a", step=2, tau=3.0, loss=math.nan, generation_steps=2, generation_gain_sum=3.0)


@pytest.fixture
async def site() -> Site:
    site = Site()
    await site.running()
    return site


async def test_a_job_is_shown_with_its_nodes_generation_and_progress(site: Site) -> None:
    answer = await site.ask("GET", "/api/v1/jobs/a")
    assert answer.status_code == 200
    job = answer.json()
    assert (job["phase"], job["reason"], job["desired_nodes"]) == ("running", "started with 1 node", 1)
    assert job["nodes"] == [
        {
            "node_id": "n0",
            "state": "active",
            "node_rank": 0,
            "slots": 1,
            "address": "127.0.0.1",
            "connected": True,
            "silent_s": 0.0,
            "first_rank": 0,
            "step_s": None,
        }
    ]
    assert (job["generation"]["number"], job["generation"]["scale"]) == (1, 1.0)
    assert job["progress"]["tau"] == 3.0
    assert job["progress"]["loss"] is None, "JSON has no NaN"
    assert (await site.ask("GET", "/api/v1/jobs")).json() == {"jobs": [job]}


async def test_history_lists_generations(site: Site) -> None:
    (generation,) = (await site.ask("GET", "/api/v1/jobs/a/history")).json()["generations"]
    assert generation["generation"]["members"] == ["n0"]
    assert (generation["cause"], generation["steps"], generation["mean_gain"]) == ("start", 2, 1.5)
    assert generation["ended_s"] is None


async def test_patch_scales_pauses_and_resumes(site: Site) -> None:
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"paused": True})
    assert (answer.status_code, answer.json()["paused"]) == (200, True)
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"paused": False})
    assert answer.json()["paused"] is False
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"nodes": 1})
    assert (answer.status_code, answer.json()["desired_nodes"]) == (200, 1)


async def test_patch_sets_how_sizes_are_chosen(site: Site) -> None:
    wanted = {"autoscale": {"mode": "act", "efficiency_floor": 0.3}}
    job = (await site.ask("PATCH", "/api/v1/jobs/a", json=wanted)).json()
    assert job["autoscale"] == {
        "mode": "act", "goal": "progress", "efficiency_floor": 0.3, "deadline_s": None, "weight": 1.0, "priority": 0,
    }  # fmt: skip
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"autoscale": {}})
    assert (answer.status_code, "at least one of mode" in answer.json()["detail"]) == (400, True)
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"autoscale": {"goal": "deadline"}})
    assert (answer.status_code, "no deadline is known" in answer.json()["detail"]) == (400, True)


async def test_post_creates_a_job_and_drains_a_node(site: Site) -> None:
    wanted = {"name": "b", "min_nodes": 1, "max_nodes": 4, "desired_nodes": 2, "autoscale": {"mode": "off"}}
    answer = await site.ask("POST", "/api/v1/jobs", json=wanted)
    assert (answer.status_code, answer.headers["location"]) == (201, "/api/v1/jobs/b")
    assert (answer.json()["desired_nodes"], answer.json()["autoscale"]["mode"]) == (2, "off")
    answer = await site.ask("POST", "/api/v1/jobs", json={**wanted, "max_nodes": 5})
    assert answer.status_code == 409
    answer = await site.ask("POST", "/api/v1/jobs", json={**wanted, "name": "c", "min_nodes": 9})
    assert (answer.status_code, "give min_nodes <= max_nodes" in answer.json()["detail"]) == (400, True)
    answer = await site.ask("POST", "/api/v1/jobs/a/nodes/nobody/drain")
    assert answer.status_code == 404
    answer = await site.ask("POST", "/api/v1/jobs/a/nodes/n0/drain")
    assert answer.json()["nodes"][0]["state"] == "draining"


async def test_delete_forgets_the_job(site: Site) -> None:
    assert (await site.ask("DELETE", "/api/v1/jobs/a")).status_code == 204
    assert (await site.ask("GET", "/api/v1/jobs/a")).status_code == 404
    assert (await site.ask("DELETE", "/api/v1/jobs/a")).status_code == 404


@pytest.mark.parametrize(
    ("method", "path", "options", "status", "error", "message"),
    [
        ("GET", "/api/v1/jobs/nobody", {}, 404, "not_found", "no job 'nobody'"),
        ("PATCH", "/api/v1/jobs/nobody", {"json": {"paused": True}}, 404, "not_found", "no job nobody"),
        ("GET", "/api/v1/jobs/No_Label", {}, 400, "invalid", "job is 'No_Label'"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": 9}}, 400, "invalid", "9 nodes were asked for"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": 0}}, 400, "invalid", "nodes"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": "2"}}, 400, "invalid", "nodes"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": True}}, 400, "invalid", "nodes"),
        ("PATCH", "/api/v1/jobs/a", {"json": {}}, 400, "invalid", "exactly one"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": 1, "paused": True}}, 400, "invalid", "exactly one"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"nodes": 1, "checkpoint": True}}, 400, "invalid", "exactly one"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"checkpoint": False}}, 400, "invalid", "checkpoint"),
        ("PATCH", "/api/v1/jobs/a", {"json": {"node": 1}}, 400, "invalid", "node"),
        ("PATCH", "/api/v1/jobs/a", {"content": b"{"}, 400, "invalid", ""),
        ("PATCH", "/api/v1/jobs/a", {"content": b"x" * 5000}, 413, "http", "above 1000 bytes"),
        ("GET", "/api/v1/jobs/a/events", {"headers": {"Last-Event-ID": "x"}}, 400, "invalid", "Last-Event-ID is 'x'"),
        ("PUT", "/api/v1/jobs/a", {}, 405, "http", "Method Not Allowed"),
        ("GET", "/nowhere", {}, 404, "http", "Not Found"),
    ],
)
async def test_a_bad_request_has_one_clear_error_and_changes_nothing(
    site: Site, method: str, path: str, options: dict[str, Any], status: int, error: str, message: str
) -> None:
    before = site.bench.runner.view("a").record
    answer = await site.ask(method, path, **options)
    assert answer.status_code == status, answer.text
    body = answer.json()
    assert answer.headers["content-type"] == "application/problem+json"
    assert set(body) == {"type", "title", "status", "detail", "instance"}
    assert body["type"] == f"urn:stretto:problem:{error}"
    assert (body["status"], body["instance"]) == (status, path)
    assert message in body["detail"]
    assert site.bench.runner.view("a").record is before


async def test_events_come_as_a_plain_list_after_the_one_that_was_seen_last(site: Site) -> None:
    json_please = {"Accept": "application/json"}
    events = (await site.ask("GET", "/api/v1/jobs/a/events", headers=json_please)).json()["events"]
    assert [event["kind"] for event in events] == ["node_joined", "running"]
    headers = {**json_please, "Last-Event-ID": str(events[0]["sequence"])}
    assert (await site.ask("GET", "/api/v1/jobs/a/events", headers=headers)).json()["events"] == events[1:]


async def test_followed_events_come_once_each_in_order_until_the_job_is_deleted(site: Site) -> None:
    follower = Watchers(site.bench.runner, 1).follow("a", 1)
    first = await anext(follower)
    assert (first.event, first.id) == ("running", "2")
    assert isinstance(first, ServerSentEvent)
    assert first.data is not None
    assert json.loads(first.data)["reason"] == "started with 1 node"
    pending = asyncio.ensure_future(anext(follower))
    await asyncio.sleep(0)
    site.bench.runner.submit("a", PauseRequested())
    await asyncio.sleep(0)
    assert not pending.done(), "an event was told before it was saved"
    await site.bench.store.finish()
    site.bench.runner.submit("a", ResumeRequested())
    site.bench.runner.submit("a", DeleteRequested())
    await site.bench.store.finish()
    rest = [await pending] + [event async for event in follower]
    ids = [int(event.id) for event in rest if event.id]
    assert ids == sorted(set(ids))
    assert ids[0] == 3
    assert rest[-1].event == "deleted"


async def test_followers_beyond_the_limit_are_refused_and_an_ended_one_makes_room(site: Site) -> None:
    watchers = Watchers(site.bench.runner, 1)
    first = watchers.follow("a", 0)
    await anext(first)
    with pytest.raises(Rejected, match="1 event streams are open"):
        watchers.follow("a", 0)
    await first.aclose()  # type: ignore[attr-defined]  # a generator
    await anext(watchers.follow("a", 0))


async def test_readiness_ends_with_a_failed_save_and_says_why(site: Site) -> None:
    assert (await site.ask("GET", "/readyz")).json() == {"status": "ready", "reason": ""}
    site.bench.runner.submit("b", JobCreated(SPEC))
    await site.bench.store.fail()
    answer = await site.ask("GET", "/readyz")
    assert (answer.status_code, answer.json()["reason"]) == (503, "a save failed: disk full")
    assert (await site.ask("GET", "/healthz")).status_code == 200
    answer = await site.ask("PATCH", "/api/v1/jobs/a", json={"paused": True})
    assert (answer.status_code, answer.json()["type"]) == (503, "urn:stretto:problem:unavailable")
    assert "stretto_controller_store_errors_total 1.0" in (await site.ask("GET", "/metrics")).text


async def test_metrics_are_served_in_both_formats_without_a_redirect(site: Site) -> None:
    plain = await site.ask("GET", "/metrics")
    assert plain.status_code == 200
    assert plain.headers["content-type"].startswith("text/plain")
    assert 'stretto_tau_iterations{training_job="a"} 3.0' in plain.text
    openmetrics = await site.ask("GET", "/metrics", headers={"Accept": "application/openmetrics-text;version=1.0.0"})
    assert openmetrics.headers["content-type"].startswith("application/openmetrics-text")
    assert openmetrics.text.endswith("# EOF\n")


async def test_the_page_needs_nothing_from_elsewhere(site: Site) -> None:
    page = await site.ask("GET", "/")
    assert page.headers["content-type"].startswith("text/html")
    assert "<title>Stretto</title>" in page.text
    static = files("stretto_controller.web") / "static"
    names = [path.name for path in static.iterdir() if path.is_file() and path.name != "index.html"]
    assert len(names) > 5
    for name in names:
        answer = await site.ask("GET", f"/static/{name}")
        assert answer.status_code == 200
        assert "//" not in answer.text.replace("// ", ""), f"{name} may refer to another server"
    assert (await site.ask("GET", "/static/nothing.js")).status_code == 404


async def test_history_has_the_curve_of_a_diverged_run_without_breaking_json(site: Site) -> None:
    await site.bench.progress("a", step=3, tau=4.0, loss=math.inf, gain=-math.inf)
    site.bench.wall_s += 5.0
    await site.bench.progress("a", step=4, tau=5.5, loss=-0.25)
    points = (await site.ask("GET", "/api/v1/jobs/a/history")).json()["points"]
    assert {len(values) for values in points.values()} == {2}
    assert points["loss"] == [None, -0.25]
    assert points["step"] == [2, 4]


def told(frame: bytes) -> tuple[str, str, Any]:
    """(id, event, data) of a server-sent event."""
    fields = dict(line.partition(": ")[::2] for line in frame.decode().splitlines() if line)
    return fields.get("id", ""), fields["event"], json.loads(fields["data"])


async def test_a_page_is_told_everything_first_and_only_news_when_it_comes_back(site: Site) -> None:
    feed = Feed(site.bench.runner, Watchers(site.bench.runner, 10), 0.01)
    follower = feed.follow("a", Position())
    _, kind, fleet = told(await anext(follower))
    assert (kind, fleet["whole"], [job["name"] for job in fleet["jobs"]]) == ("fleet", True, ["a"])
    seen, kind, news = told(await anext(follower))
    assert (kind, news["job"]["phase"], news["points"]["step"]) == ("job", "running", [2])
    assert [event["kind"] for event in news["events"]] == ["node_joined", "running"]
    await follower.aclose()  # type: ignore[attr-defined]  # a generator

    site.bench.wall_s += 5.0
    await site.bench.progress("a", step=9, tau=9.0)
    follower = feed.follow("a", Position.parse(seen))
    await anext(follower)
    _, _, news = told(await anext(follower))
    assert (news["events"], news["points"]["step"], news["anew"]) == ([], [9], False)
    assert len(news["generations"]) == 1, "all of them, since one may have ended meanwhile"
    await follower.aclose()  # type: ignore[attr-defined]  # a generator


async def test_a_page_that_knows_more_than_the_controller_begins_anew(site: Site) -> None:
    feed = Feed(site.bench.runner, Watchers(site.bench.runner, 10), 0.01)
    follower = feed.follow("a", Position(sequence=999, point_s=9e12))
    await anext(follower)
    _, _, news = told(await anext(follower))
    assert news["anew"]
    assert len(news["events"]) == 2
    assert news["points"]["step"] == [2]
    await follower.aclose()  # type: ignore[attr-defined]  # a generator


async def test_pages_of_one_job_share_what_is_made_for_them(site: Site) -> None:
    feed = Feed(site.bench.runner, Watchers(site.bench.runner, 10), 0.01)
    one, other = feed.follow("a", Position()), feed.follow("a", Position())
    for follower in (one, other):
        await anext(follower)
    assert await anext(one) is await anext(other)
    for follower in (one, other):
        await follower.aclose()  # type: ignore[attr-defined]  # a generator


async def test_the_fleet_is_told_by_its_changes_and_a_deleted_job_goes(site: Site) -> None:
    feed = Feed(site.bench.runner, Watchers(site.bench.runner, 10), 0.01)
    follower = feed.follow(None, Position())
    await anext(follower)
    site.bench.runner.submit("b", JobCreated(SPEC))
    await site.bench.store.finish()
    _, _, fleet = told(await anext(follower))
    assert (fleet["whole"], [job["name"] for job in fleet["jobs"]], fleet["gone"]) == (False, ["b"], [])
    site.bench.runner.submit("a", DeleteRequested())
    await site.bench.store.finish()
    _, _, fleet = told(await anext(follower))
    assert (fleet["jobs"], fleet["gone"]) == ([], ["a"])
    await follower.aclose()  # type: ignore[attr-defined]  # a generator


async def test_a_page_is_let_go_when_the_controller_stops(site: Site) -> None:
    follower = Feed(site.bench.runner, Watchers(site.bench.runner, 10), 0.01).follow("a", Position())
    await anext(follower)
    stopping = asyncio.ensure_future(site.bench.runner.stop())
    await asyncio.sleep(0)
    await site.bench.store.finish()
    await stopping
    assert [told(frame)[1] async for frame in follower] in ([], ["job"])


async def test_pages_beyond_the_limit_and_of_unknown_jobs_are_refused(site: Site) -> None:
    watchers = Watchers(site.bench.runner, 1)
    feed = Feed(site.bench.runner, watchers, 0.01)
    with pytest.raises(Rejected, match="no job 'nobody'"):
        feed.follow("nobody", Position())
    first = feed.follow(None, Position())
    await anext(first)
    with pytest.raises(Rejected, match="1 event streams are open"):
        feed.follow(None, Position())
    await first.aclose()  # type: ignore[attr-defined]  # a generator


@pytest.mark.parametrize("text", ["x", "1", "-1/2", "1/x", "9" * 50, "1/2/3", "1/nan"])
def test_a_bad_position_is_refused(text: str) -> None:
    with pytest.raises(Rejected, match="Last-Event-ID"):
        Position.parse(text)


async def test_the_api_describes_itself(site: Site) -> None:
    paths = (await site.ask("GET", "/openapi.json")).json()["paths"]
    assert {
        "/healthz",
        "/readyz",
        "/metrics",
        "/api/v1/jobs",
        "/api/v1/jobs/{job}",
        "/api/v1/jobs/{job}/nodes/{node}/drain",
        "/api/v1/jobs/{job}/history",
        "/api/v1/jobs/{job}/events",
        "/api/v1/watch",
    } == set(paths)
    assert (await site.ask("GET", "/docs")).status_code == 200


@pytest.mark.parametrize("kind", Refusal)
def test_every_refusal_has_a_status_on_both_sides(kind: Refusal) -> None:
    code, message = grpc_status(Rejected(kind, "why"))
    assert code.name not in ("OK", "UNKNOWN", "INTERNAL")
    assert message == "why"
    assert 400 <= http_status(Rejected(kind, "why"))[0] < 500
