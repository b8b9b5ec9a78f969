"""The HTTP application. Handlers run on the event loop and only read snapshots, or ask the runner to decide."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Annotated

from fastapi import Depends, FastAPI, Header, Path, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse
from prometheus_client.exposition import choose_encoder
from pydantic import JsonValue
from sse_starlette import EventSourceResponse
from starlette.exceptions import HTTPException

from stretto_controller import metrics
from stretto_controller.auth.access import ROUTES, UNNAMED
from stretto_controller.auth.tokens import Tokens, Unauthenticated, check_job
from stretto_controller.core import events as ev
from stretto_controller.core.errors import Rejected
from stretto_controller.runner import Runner, Unavailable
from stretto_controller.service.errors import http_status
from stretto_controller.settings import ServiceLimits
from stretto_controller.web import schema
from stretto_controller.web.body_limit import BodyLimit
from stretto_controller.web.feed import Feed, Position
from stretto_controller.web.page import add_page
from stretto_controller.web.watch import Watchers
from stretto_controller.wire import checks

PROBLEM = "application/problem+json"
_ERRORS: dict[int | str, dict[str, object]] = {
    status: {"model": schema.ProblemOut, "content": {PROBLEM: {}}}
    for status in (400, 401, 403, 404, 409, 413, 429, 503)
}
# Said in the description, checked by `checks.job_name`, whose errors say what to do.
_DNS_LABEL: dict[str, JsonValue] = {"pattern": f"^{checks.LABEL}$", "maxLength": 63}
_SEQUENCE: dict[str, JsonValue] = {"pattern": "^[0-9]{0,18}$"}
JobName = Annotated[str, Path(alias="job", description="the job's name, a DNS label", json_schema_extra=_DNS_LABEL)]


def build_app(runner: Runner, limits: ServiceLimits, tokens: Tokens | None = None) -> FastAPI:
    """The application on one runner."""
    app = FastAPI(
        title="Stretto controller",
        description="Jobs, their generations and their events. The /docs page loads its scripts from a CDN.",
        responses=_ERRORS,
        dependencies=[Depends(_gate(runner, tokens or Tokens(None, 0.0)))],
    )
    app.add_middleware(BodyLimit, size_bytes=limits.body_size_bytes)
    _answer_errors(app)
    _add_health(app, runner)
    _add_metrics(app, runner, limits.finished_series_s)
    _add_jobs(app, runner)
    watchers = Watchers(runner, limits.max_watchers)
    _add_events(app, watchers)
    _add_feed(app, Feed(runner, watchers, limits.watch_interval_s))
    add_page(app)
    return app


def _gate(runner: Runner, tokens: Tokens) -> Callable[[Request], Awaitable[None]]:
    """What stands before every route: auth.access.ROUTES; and the API is the leader's, the rest is everybody's."""

    async def check(request: Request) -> None:
        path = request.scope["route"].path
        access = ROUTES.get((request.method, path), UNNAMED)
        who = tokens.caller(access, request.headers.get("authorization", ""))
        if "job" in request.path_params:
            check_job(who, request.path_params["job"])
        if path.startswith("/api/"):
            runner.refuse_unless_leading()

    return check


def _answer_errors(app: FastAPI) -> None:
    """Every error has the same shape, RFC 9457's."""

    def answer(request: Request, status: int, word: str, message: str) -> JSONResponse:
        problem = schema.ProblemOut(
            type=f"urn:stretto:problem:{word}",
            title=HTTPStatus(status).phrase,
            status=status,
            detail=message,
            instance=request.url.path,
        )
        return JSONResponse(problem.model_dump(), status_code=status, media_type=PROBLEM)

    @app.exception_handler(Rejected)
    @app.exception_handler(Unauthenticated)
    @app.exception_handler(Unavailable)
    async def refused(request: Request, error: Rejected | Unauthenticated | Unavailable) -> JSONResponse:
        status, word, message = http_status(error)
        response = answer(request, status, word, message)
        if isinstance(error, Unauthenticated):
            response.headers["WWW-Authenticate"] = 'Bearer realm="stretto"'
        if isinstance(error, Unavailable):
            response.headers["Retry-After"] = "1"
            if error.leader.http_url:
                response.headers["Stretto-Leader"] = error.leader.http_url
        return response

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc'] if part != 'body') or 'body'}: {problem['msg']}"
            for problem in error.errors()
        ]
        return answer(request, 400, "invalid", "; ".join(problems))

    @app.exception_handler(HTTPException)
    async def other(request: Request, error: HTTPException) -> JSONResponse:
        response = answer(request, error.status_code, "http", str(error.detail))
        response.headers.update(error.headers or {})
        return response


def _add_health(app: FastAPI, runner: Runner) -> None:
    @app.get("/healthz")
    async def alive() -> schema.Health:
        """200 while the process answers at all."""
        return schema.Health(status="ok")

    @app.get("/readyz")
    async def ready(response: Response) -> schema.Health:
        """200 while this controller decides and saves; 503 with the reason otherwise."""
        if runner.ready:
            return schema.Health(status="ready")
        response.status_code = 503
        return schema.Health(status="not ready", reason=runner.reason_not_ready)


def _add_metrics(app: FastAPI, runner: Runner, finished_series_s: float) -> None:
    formats: dict[str, dict[str, str]] = {"text/plain": {}, "application/openmetrics-text": {}}

    @app.get("/metrics", response_class=PlainTextResponse, responses={200: {"content": formats}})
    async def scrape(accept: Annotated[str, Header()] = "") -> Response:
        """For Prometheus: its text format, or OpenMetrics when asked for."""
        _, content_type = choose_encoder(accept)
        openmetrics = content_type.startswith("application/openmetrics-text")
        text = metrics.exposition(runner, finished_series_s, openmetrics=openmetrics)
        return Response(text, headers={"Content-Type": content_type})


def _add_jobs(app: FastAPI, runner: Runner) -> None:
    @app.get("/api/v1/jobs")
    async def list_jobs() -> schema.JobsOut:
        return schema.JobsOut(jobs=[schema.job_out(view) for view in runner.views()])

    @app.post("/api/v1/jobs", status_code=201)
    async def create_job(wanted: schema.JobCreate, response: Response) -> schema.JobOut:
        """Create a job before any node comes. One that exists has to be asked for with the same spec."""
        await runner.decide(checks.job_name(wanted.name), wanted.event())
        response.headers["Location"] = f"/api/v1/jobs/{wanted.name}"
        return schema.job_out(runner.view(wanted.name))

    @app.get("/api/v1/jobs/{job}")
    async def show_job(name: JobName) -> schema.JobOut:
        return schema.job_out(runner.view(checks.job_name(name)))

    @app.patch("/api/v1/jobs/{job}")
    async def change_job(name: JobName, patch: schema.JobPatch) -> schema.JobOut:
        """Scale, choose how sizes are chosen, pause, resume or save. Answers once the wish is saved; nodes follow."""
        event: ev.Event
        if patch.nodes is not None:
            event = ev.ScaleRequested(patch.nodes)
        elif patch.autoscale is not None:
            event = ev.AutoscaleRequested(patch.autoscale.change())
        elif patch.checkpoint:
            event = ev.CheckpointRequested()
        else:
            event = ev.PauseRequested() if patch.paused else ev.ResumeRequested()
        await runner.decide(checks.job_name(name), event)
        return schema.job_out(runner.view(name))

    @app.post("/api/v1/jobs/{job}/nodes/{node}/drain")
    async def drain_node(name: JobName, node: Annotated[str, Path(description="as the job names it")]) -> schema.JobOut:
        """The node leaves at the next step boundary."""
        await runner.decide(checks.job_name(name), ev.DrainRequested(checks.node_id(node)))
        return schema.job_out(runner.view(name))

    @app.delete("/api/v1/jobs/{job}", status_code=204)
    async def delete_job(name: JobName) -> Response:
        """Send all its nodes home and forget it."""
        await runner.decide(checks.job_name(name), ev.DeleteRequested())
        return Response(status_code=204)

    @app.get("/api/v1/jobs/{job}/history", response_model=schema.HistoryOut)
    async def show_history(name: JobName) -> Response:
        """The job's generations, and the curve of its figures."""
        view = runner.view(checks.job_name(name))
        generations = ",".join(schema.summary_out(summary).model_dump_json() for summary in view.history)
        columns = []
        for column, values in view.curve.columns():
            columns.append(f'"{column}":[{schema.column_text(column, values)}]')
            # A long curve must not keep heartbeats waiting.
            await asyncio.sleep(0)
        text = f'{{"generations":[{generations}],"points":{{{",".join(columns)}}}}}'
        return Response(text, media_type="application/json")


def _add_events(app: FastAPI, watchers: Watchers) -> None:
    stream: dict[str, object] = {"text/event-stream": {}}

    @app.get("/api/v1/jobs/{job}/events", response_model=schema.EventsOut, responses={200: {"content": stream}})
    async def show_events(
        name: JobName,
        accept: Annotated[str, Header()] = "",
        last_event_id: Annotated[str, Header(description="send only later events", json_schema_extra=_SEQUENCE)] = "",
    ) -> Response:
        """Server-sent events, from the oldest kept or after Last-Event-ID; a plain list for application/json."""
        after = _sequence(last_event_id)
        if "application/json" in accept:
            events = [schema.event_out(event) for event in watchers.kept(checks.job_name(name), after)]
            return JSONResponse(schema.EventsOut(events=events).model_dump())
        return EventSourceResponse(watchers.follow(checks.job_name(name), after), ping=15)


def _add_feed(app: FastAPI, feed: Feed) -> None:
    @app.get("/api/v1/watch")
    async def watch(
        job: Annotated[str, Query(description="tell all that is new about this job, too")] = "",
        last_event_id: Annotated[str, Header(description="what was seen already")] = "",
    ) -> Response:
        """Server-sent events for pages: `fleet`, which jobs changed; `job`, all that is new about one; `deleted`."""
        name = checks.job_name(job) if job else None
        return EventSourceResponse(feed.follow(name, Position.parse(last_event_id)), ping=15)


def _sequence(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and len(text) <= 18):
        raise Rejected.invalid(f"Last-Event-ID is {checks.shown(text)}; give the id of an event, a whole number")
    return int(text)
