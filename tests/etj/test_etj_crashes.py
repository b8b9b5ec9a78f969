"""kill -9 between any two calls, and an API server that answers badly: in the end there is the same as without."""

from __future__ import annotations

import random
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
from etj.etj_site import Crash, Site
from etj.memory_server import Call
from hypothesis import given, settings
from hypothesis import strategies as st
from stretto_operator import names
from stretto_operator.server import ApiError

Step = Callable[[Site], None]
_TIMES = frozenset(
    {
        "lastTransitionTime",
        "startTime",
        "time",
        "suspendTime",
        "completionTime",
        "uid",
        "creationTimestamp",
        "startedAt",
        "finishedAt",
    }
)
_VERSIONS = frozenset({"resourceVersion", "token", "credentials", "generation", "observedGeneration", "managedFields"})


def _scaled(nodes: int) -> Step:
    return lambda site: site.server.change(names.KIND, "digits", spec={"nodes": nodes})


def _suspended(wish: bool) -> Step:
    return lambda site: site.server.change(names.KIND, "digits", spec={"suspend": wish})


def _pod_fails(site: Site) -> None:
    if "digits-0" in site.pods():
        site.end_pod("digits-0", 1)


def _pod_gone(site: Site) -> None:
    if "digits-1" in site.pods():
        site.server.remove("Pod", "digits-1")


def _run_fails(site: Site) -> None:
    site.say(phase="failed", reason="the workers of all nodes failed")


def _done(site: Site) -> None:
    for pod in site.pods():
        site.end_pod(pod)
    site.say(phase="succeeded", reason="target reached")


STORIES: dict[str, list[Step]] = {
    "grows, shrinks": [_scaled(4), _scaled(2)],
    "suspended and resumed": [_suspended(True), _suspended(False)],
    "fails and goes": [_pod_fails, _pod_gone],
    "tried again": [_run_fails],
    "ends": [_pod_gone, _done],
}


async def _tell(site: Site, story: list[Step], look: Callable[[Site], Awaitable[None]]) -> dict[str, Any]:
    """The story with a kubelet and a controller that do their part; what there is in the end."""
    site.apply(nodes=3, minNodes=1, podDisruptionBudget=True)
    for step in (None, *story):
        if step is not None:
            step(site)
        for _ in range(4):
            await look(site)
            site.run_pods()
            await look(site)
            known = site.controller.jobs.get(names.controller_job("default", "digits"))
            if known is not None and site.pods() and known.phase in ("pending", "running"):
                site.train(generation=max(known.generation, 1) + (0 if known.phase == "running" else 1))
            elif known is not None and known.phase == "failed" and not site.status().get("formerGeneration"):
                continue
            elif known is not None and known.phase == "failed" and site.pods():
                site.train()
            # Longer than any backoff.
            site.now_s += 400
    await look(site)
    return {kind: site.server.all(kind) for kind in (names.KIND, "Pod", "Secret", "PodDisruptionBudget")}


async def _quietly(site: Site) -> None:
    await site.settle()


def _bare(value: Any) -> Any:
    """Without what is another in each run."""
    if isinstance(value, dict):
        return {k: _bare(v) for k, v in value.items() if k not in _TIMES and k not in _VERSIONS}
    if isinstance(value, list):
        return [_bare(each) for each in value]
    return value


@pytest.mark.parametrize("happened", [True, False], ids=["after the call", "before the call"])
@pytest.mark.parametrize("story", list(STORIES))
async def test_killed_at_any_call_the_next_operator_comes_to_the_same(story: str, happened: bool) -> None:
    calm = Site()
    expected = _bare(await _tell(calm, STORIES[story], _quietly))
    total = len(calm.server.writes)
    assert total > 5
    for fatal in range(1, total + 1):
        site = Site()

        def fault(call: Call, site: Site = site, fatal: int = fatal) -> None:
            if call.writes and len(site.server.writes) == fatal:
                site.server.before = site.server.after = lambda call: None
                raise Crash

        if happened:
            site.server.after = fault
        else:
            site.server.before = fault

        async def look(site: Site) -> None:
            try:
                await site.settle()
            except Crash:
                site.start_operator()
                await site.settle()

        found = _bare(await _tell(site, STORIES[story], look))
        assert found == expected, f"killed at write {fatal} of {total}"


@settings(max_examples=25)
@given(seed=st.integers(0, 10_000), story=st.sampled_from(sorted(STORIES)))
async def test_an_api_server_that_answers_badly_changes_nothing_in_the_end(seed: int, story: str) -> None:
    expected = _bare(await _tell(Site(), STORIES[story], _quietly))
    rng, site = random.Random(seed), Site()

    def fault(call: Call) -> None:
        # A call in four is answered badly, whether it was done or not.
        if call.writes and call.kind.kind != "Event" and rng.random() < 0.25:
            status, reason = rng.choice([(409, "Conflict"), (429, "TooManyRequests"), (500, "InternalError"), (0, "")])
            raise ApiError(status, reason, f"injected {status}")

    async def look(site: Site) -> None:
        for _ in range(12):
            site.server.before, site.server.after = rng.choice([(fault, _well), (_well, fault)])
            await site.look()
        site.server.before = site.server.after = _well
        await site.settle()

    assert _bare(await _tell(site, STORIES[story], look)) == expected


def _well(call: Call) -> None:
    pass
