"""The status of a job: what a user, `kubectl wait` and an autoscaler see, and what the operator records. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stretto_operator import names
from stretto_operator.job import Job
from stretto_operator.outcome import Judgement, agrees, is_current, times
from stretto_operator.pod import Pod
from stretto_operator.record import NO_FORMER_RUN, Condition
from stretto_operator.suspension import Suspension
from stretto_operator.times import to_text
from stretto_operator.view import ControllerView, JobView

# What moves with every step; `diff` lets it be written only so often.
FIGURES = ("tau", "gain", "progressRate", "remainingSeconds", "recommendedNodes")
_DIGITS = 4
# Of the time that is left, the tail is noise.
_REMAINING_DIGITS = 2
_MESSAGE_LENGTH = 1000
_TROUBLED_SHOWN = 3


@dataclass(frozen=True, slots=True)
class Situation:
    """All that a status tells of. suspension None: the job is over. target: how many pods are wanted.

    objection: why the API server refused an object, the last time.
    """

    view: ControllerView
    pods: tuple[Pod, ...]
    judgement: Judgement
    suspension: Suspension | None
    target: int
    objection: str = ""

    @property
    def current(self) -> JobView | None:
        """The controller's job, if it is this run of it."""
        known = self.view.job
        return known if known is not None and is_current(known, self.judgement.former_generation) else None


def status(job: Job, situation: Situation, *, now_s: float) -> dict[str, Any]:
    """The whole status, as it should be."""
    record, judgement, stage = job.record, situation.judgement, situation.suspension
    phase = _phase(job, situation)
    suspended = stage is not None and job.suspend
    content: dict[str, Any] = {
        "observedGeneration": job.revision,
        "phase": phase,
        "job": job.controller_job,
        "selector": names.selector(job.name),
        "nodes": sum(pod.alive for pod in situation.pods),
        "readyNodes": sum(pod.ready for pod in situation.pods),
        "conditions": [each.manifest(job.revision) for each in _conditions(job, situation, phase, now_s)],
        "registered": judgement.registered,
    }
    if not suspended:
        content["startTime"] = to_text(record.start_s if record.start_s is not None else now_s)
    if stage is not None and stage.since_s is not None:
        content["suspendTime"] = to_text(stage.since_s)
    if judgement.outcome:
        content["completionTime"] = to_text(now_s)
    if judgement.failures:
        content["failures"] = [judgement.failures[index].manifest() for index in sorted(judgement.failures)]
    if judgement.former_generation != NO_FORMER_RUN:
        content["formerGeneration"] = judgement.former_generation
    content.update(_figures(job, situation))
    return content


def _phase(job: Job, situation: Situation) -> str:
    known, stage = situation.current, situation.suspension
    if situation.judgement.outcome:
        return situation.judgement.outcome
    if job.suspend:
        return "Suspended" if stage is not None and stage.reason == "Suspended" else "Suspending"
    if not situation.view.reachable:
        # Pods go on; so does what was last known of them.
        return job.record.phase if job.record.phase in ("Running", "Waiting", "Paused") else "Pending"
    match known.phase if known is not None else "":
        case "running" | "reconfiguring":
            return "Running"
        case "waiting":
            return "Waiting"
        case "paused":
            return "Paused"
        case _:
            return "Pending"


def _figures(job: Job, situation: Situation) -> dict[str, Any]:
    """Rounded, so that what does not matter is not written. What is not known now stays as it was."""
    known = situation.current
    if known is None or known.generation == 0:
        kept = (*FIGURES, "generation", "scale")
        return {name: value for name, value in job.record.manifest.items() if name in kept}
    figures: dict[str, Any] = {"generation": known.generation}
    for name, value in (
        ("scale", known.scale),
        ("tau", known.tau),
        ("gain", known.gain),
        ("progressRate", known.progress_rate),
    ):
        if value > 0:
            figures[name] = rounded(value, _DIGITS)
    if known.recommended_nodes:
        figures["recommendedNodes"] = known.recommended_nodes
    if known.remaining_s >= 0:
        figures["remainingSeconds"] = int(rounded(known.remaining_s, _REMAINING_DIGITS))
    return figures


def rounded(value: float, digits: int) -> float:
    """To so many significant digits; infinities and NaN, which JSON lacks, to the largest number that is none."""
    return float(f"{value:.{digits}g}") if abs(value) < 1e300 else 1e300


def _conditions(job: Job, situation: Situation, phase: str, now_s: float) -> list[Condition]:
    judgement, view = situation.judgement, situation.view
    known, stage = situation.current, situation.suspension
    said: list[tuple[str, bool, str, str]] = [
        ("ControllerReachable", view.reachable, "Answered" if view.reachable else "NoAnswer", view.reason)
    ]
    if view.refusal or judgement.registered or (known is not None and not agrees(known, job)):
        said.append(("Accepted", *_accepted(job, view, known, judgement)))
    told = known.reason if known is not None and known.reason else "the controller has not heard of any pod yet"
    said.append(("Running", phase == "Running", phase, told if not judgement.outcome else judgement.message))
    said.append(("Degraded", *_degraded(situation, job)))
    if stage is not None and (job.suspend or "Suspended" in job.record.conditions):
        said.append(("Suspended", phase == "Suspended", stage.reason, stage.message))
    if judgement.outcome:
        said.append((judgement.outcome, True, judgement.reason, judgement.message))
    return [_stamped(job, *each, now_s) for each in said]


def _stamped(job: Job, kind: str, status: bool, reason: str, message: str, now_s: float) -> Condition:
    before = job.record.conditions.get(kind)
    changed_s = before.changed_s if before is not None and before.status == status else now_s
    return Condition(kind, status, reason, message[:_MESSAGE_LENGTH], changed_s)


def _accepted(job: Job, view: ControllerView, known: JobView | None, judgement: Judgement) -> tuple[bool, str, str]:
    if view.refusal and not judgement.registered:
        return False, "Refused", f"{view.refusal} (the controller calls it {job.controller_job})"
    if known is not None and not agrees(known, job):
        asked, runs = job.training, known.training
        return (
            False,
            "Differs",
            f"this object asks for {asked.min_nodes} to {asked.max_nodes} nodes, mode {asked.mode or 'any'}; the "
            f"controller's job {job.controller_job} takes {runs.min_nodes} to {runs.max_nodes}, mode "
            f"{runs.mode or 'any'}: give the pods' command no --nnodes of its own, or run `stretto jobs delete "
            f"{job.controller_job}`",
        )
    return True, "Registered", f"the controller knows it as {job.controller_job}"


def _degraded(situation: Situation, job: Job) -> tuple[bool, str, str]:
    """Pods that are wanted and do not run, with the first one's reason."""
    if situation.judgement.outcome or job.suspend:
        return False, "NotWanted", "no pods are wanted"
    if situation.objection:
        return True, "Refused", situation.objection
    troubled = [(pod.index, pod.reason, pod.message) for pod in situation.pods if pod.reason]
    troubled += [
        (index, "BackoffLimitExceeded", f"failed {times(failure.count)}, last with {failure.reason}; not replaced")
        for index, failure in sorted(situation.judgement.failures.items())
        if situation.judgement.given_up(index, job) and index < situation.target
    ]
    if not troubled:
        return False, "AllWell", ""
    shown = [f"{names.pod(job.name, index)}: {reason}{': ' if text else ''}{text}" for index, reason, text in troubled]
    more = f"; {len(shown) - _TROUBLED_SHOWN} more" if len(shown) > _TROUBLED_SHOWN else ""
    return True, troubled[0][1], "; ".join(shown[:_TROUBLED_SHOWN]) + more


def announcements(job: str, before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[tuple[str, str, str], ...]:
    """What deserves an event, as (type, reason, message): new failures, and phases that people wait for."""
    known = {each["uid"] for each in before.get("failures") or ()}
    found = [
        (
            "Warning",
            "PodFailed",
            f"pod {names.pod(job, each['index'])} failed {times(each['count'])}, last with {each['reason']}",
        )
        for each in after.get("failures") or ()
        if each["uid"] not in known
    ]
    phase, old = after.get("phase"), before.get("phase")
    if phase != old and phase in ("Succeeded", "Failed", "Suspended"):
        conditions = {each["type"]: each for each in after["conditions"]}
        message = conditions.get(str(phase), {}).get("message", "")
        found.append(("Warning" if phase == "Failed" else "Normal", str(phase), message or str(phase)))
    return tuple(found)
