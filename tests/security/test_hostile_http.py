"""The HTTP API under schemathesis and broken HTTP: what it says of itself is true, and nothing is a fault of ours."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from schemathesis import Case, GenerationMode
from schemathesis.specs.openapi.checks import positive_data_acceptance
from security.under_fire import HOSTILE, WELL, UnderFire

EXAMPLES = 150
SOAK_EXAMPLES = 4000
BROKEN = 300
# A stream of events has no end; `broken` opens it.
_ENDLESS = "/api/v1/watch"


def _examine(under_fire: UnderFire, examples: int) -> None:
    """Valid and invalid requests to every route, each answered as the API's own description says."""
    schema = schemathesis.openapi.from_url(
        f"{under_fire.controller.http}/openapi.json", headers=under_fire.header("admin")
    ).exclude(path=_ENDLESS)
    cases = st.one_of([schema.as_strategy(mode) for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE)])

    @seed(1)
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases, existing=st.booleans())
    def examine(case: Case[Any], existing: bool) -> None:
        if existing and "job" in (case.path_parameters or {}):
            case.path_parameters["job"] = HOSTILE
        headers = {**under_fire.header("admin"), "accept": "application/json"}
        response = case.call(headers=headers)
        # Of a body the description says less than there is to say: that min_nodes is not above max_nodes, for example.
        excluded: list[Any] = [positive_data_acceptance] if case.method in ("POST", "PATCH") else []
        case.validate_response(response, headers=headers, excluded_checks=excluded)

    examine()


def _broken(rng: random.Random) -> bytes:
    """A request that no client of ours would send."""
    paths = ["/api/v1/jobs/hostile", "/api/v1/jobs/" + "a" * 9000, "/%00", "/api/v1/watch?job=%ff", "*", "/\xff"]
    path, method = rng.choice(paths), rng.choice(["GET", "PATCH", "DELETE", "POST", "CONNECT", "\x00", "G" * 300])
    numbers = [b"NaN", b"1e999", b"-1", b"1" * 5000, b"[" * 30_000]
    body = rng.choice([b"", b"{", b"[]", *(b'{"nodes":' + number + b"}" for number in numbers)])
    headers = rng.sample(
        [
            f"Content-Length: {len(body)}",
            "Content-Length: -1",
            "Content-Length: 99999999999",
            "Transfer-Encoding: chunked",
            "Content-Type: application/json",
            "Authorization: Bearer \xff",
            "Last-Event-ID: 1e999/nan",
            "Accept: \xff",
            "X: " + "a" * 20_000,
            "Host: a\x00b",
        ],
        k=rng.randrange(5),
    )
    head = "\r\n".join([f"{method} {path} HTTP/1.1", *headers, "", ""]).encode("latin-1")
    return rng.choice([head + body, head[: rng.randrange(len(head))], rng.randbytes(rng.randrange(2000)), body])


async def _answers(under_fire: UnderFire, count: int) -> list[bytes]:
    """The first line of what came back to so many broken requests, each on a connection of its own."""
    rng = random.Random(1)
    _, _, address = under_fire.controller.http.rpartition("/")
    host, _, port = address.rpartition(":")
    token = under_fire.tokens[HOSTILE]
    answers = []
    for _ in range(count):
        reader, writer = await asyncio.open_connection(host, int(port))
        request = _broken(rng).replace(b"Bearer \xff", rng.choice([b"Bearer \xff", f"Bearer {token}".encode()]))
        writer.write(request)
        try:
            if rng.random() < 0.5:
                writer.write_eof()
            async with asyncio.timeout(0.2):
                answers.append(await reader.readline())
        except (TimeoutError, ConnectionError):
            # It waits for the rest, which never comes; or it has hung up.
            pass
        writer.transport.abort()
    return answers


async def _attacked(directory: Path, examples: int, broken: int) -> None:
    with UnderFire(directory) as under_fire:
        await under_fire.attack(seed=3, inputs=100)
        under_fire.outcomes.clear()
        await asyncio.to_thread(_examine, under_fire, examples)
        for line in await _answers(under_fire, broken):
            assert not line.startswith(b"HTTP/1.1 5"), line
        under_fire.assert_well()
        assert under_fire.shown(WELL)["spec"]["min_nodes"] == 1


async def test_the_http_api_does_what_it_says_and_refuses_the_rest(tmp_path: Path) -> None:
    await _attacked(tmp_path, EXAMPLES, BROKEN)


@pytest.mark.soak
async def test_thousands_of_requests_do_the_http_api_no_harm(tmp_path: Path) -> None:
    await _attacked(tmp_path, SOAK_EXAMPLES, 3 * BROKEN)
