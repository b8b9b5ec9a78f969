"""What each caller may do: the one table of every gRPC method and HTTP route. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class Role(StrEnum):
    ADMIN = "admin"
    # Sees everything, changes nothing: for Prometheus and dashboards.
    VIEWER = "viewer"
    # Does everything with one job, and sees nothing else.
    JOB = "job"


@dataclass(frozen=True, slots=True)
class Principal:
    """Who calls. job: only with Role.JOB."""

    role: Role
    job: str = ""

    def __str__(self) -> str:
        return f"{self.role}/{self.job}" if self.job else str(self.role)


class Access(StrEnum):
    # Says nothing about any job.
    OPEN = "open to everybody"
    KNOWN = "any token"
    SEE_ALL = "admin or viewer"
    SEE_JOB = "admin, viewer or the job's own token"
    CHANGE_JOB = "admin or the job's own token"
    CHANGE_ALL = "admin"


RPCS: dict[str, Access] = {
    "/stretto.v1.Rendezvous/Attend": Access.CHANGE_JOB,
    "/stretto.v1.Training/Train": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/GetController": Access.KNOWN,
    "/stretto.v1.Jobs/ListJobs": Access.SEE_ALL,
    "/stretto.v1.Jobs/GetJob": Access.SEE_JOB,
    "/stretto.v1.Jobs/ListEvents": Access.SEE_JOB,
    "/stretto.v1.Jobs/ListGenerations": Access.SEE_JOB,
    "/stretto.v1.Jobs/ListPoints": Access.SEE_JOB,
    "/stretto.v1.Jobs/CreateJob": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/CheckpointJob": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/ScaleJob": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/SetAutoscale": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/PauseJob": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/ResumeJob": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/DrainNode": Access.CHANGE_JOB,
    "/stretto.v1.Jobs/DeleteJob": Access.CHANGE_JOB,
    "/grpc.health.v1.Health/Check": Access.OPEN,
    "/grpc.health.v1.Health/Watch": Access.OPEN,
    "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo": Access.OPEN,
}

ROUTES: dict[tuple[str, str], Access] = {
    # The page asks for a token when the API does.
    ("GET", "/"): Access.OPEN,
    ("GET", "/static/{name}"): Access.OPEN,
    ("GET", "/api/v1/watch"): Access.SEE_ALL,
    ("GET", "/docs"): Access.OPEN,
    ("GET", "/docs/oauth2-redirect"): Access.OPEN,
    ("GET", "/redoc"): Access.OPEN,
    ("GET", "/openapi.json"): Access.OPEN,
    ("GET", "/healthz"): Access.OPEN,
    ("GET", "/readyz"): Access.OPEN,
    ("GET", "/metrics"): Access.SEE_ALL,
    ("GET", "/api/v1/jobs"): Access.SEE_ALL,
    # Its name is in the body: only who may create any job may use it.
    ("POST", "/api/v1/jobs"): Access.CHANGE_ALL,
    ("POST", "/api/v1/jobs/{job}/nodes/{node}/drain"): Access.CHANGE_JOB,
    ("GET", "/api/v1/jobs/{job}"): Access.SEE_JOB,
    ("GET", "/api/v1/jobs/{job}/history"): Access.SEE_JOB,
    ("GET", "/api/v1/jobs/{job}/events"): Access.SEE_JOB,
    ("PATCH", "/api/v1/jobs/{job}"): Access.CHANGE_JOB,
    ("DELETE", "/api/v1/jobs/{job}"): Access.CHANGE_JOB,
}
# What the table does not name is not for everybody.
UNNAMED = Access.SEE_ALL


def may_call(access: Access, who: Principal | None) -> bool:
    """Whether they may call it at all, for some job; None: nobody is known to call."""
    if access is Access.OPEN:
        return True
    if who is None:
        return False
    match who.role:
        case Role.ADMIN:
            return True
        case Role.VIEWER:
            return access not in (Access.CHANGE_JOB, Access.CHANGE_ALL)
        case Role.JOB:
            return access not in (Access.SEE_ALL, Access.CHANGE_ALL)


def may_touch(who: Principal, job: str) -> bool:
    """Whether a call that they may make may be about this job."""
    return who.role is not Role.JOB or who.job == job
