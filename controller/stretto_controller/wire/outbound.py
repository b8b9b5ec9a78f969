"""Core values -> messages to nodes, workers and tools."""

from __future__ import annotations

import math
from typing import Any

from stretto_proto.v1 import jobs_pb2 as jobs
from stretto_proto.v1 import rendezvous_pb2 as rendezvous
from stretto_proto.v1 import training_pb2 as training
from stretto_proto.v1 import types_pb2 as types

from stretto_controller.core import actions as act
from stretto_controller.core.model import Generation, JobSpec, Member, Mode
from stretto_controller.core.report import Checkpoint, Histogram, Progress
from stretto_controller.sessions import StreamAction
from stretto_controller.snapshot import JobView
from stretto_controller.store.contents import GenerationSummary, StoredEvent
from stretto_controller.wire import autoscale
from stretto_controller.wire.inbound import PROTOCOL_VERSION

_MODES = {
    None: types.RECONFIGURE_MODE_UNSPECIFIED,
    Mode.RESTART: types.RECONFIGURE_MODE_RESTART,
    Mode.IN_PROCESS: types.RECONFIGURE_MODE_IN_PROCESS,
}


def node_welcome(controller_id: str, heartbeat_interval_s: float) -> rendezvous.AttendResponse:
    return rendezvous.AttendResponse(
        welcome=rendezvous.NodeWelcome(
            protocol_version=PROTOCOL_VERSION,
            controller_id=controller_id,
            heartbeat_interval_s=heartbeat_interval_s,
        )
    )


def to_node(action: StreamAction) -> rendezvous.AttendResponse:
    """An action on an agent's stream."""
    match action:
        case act.Assign():
            return rendezvous.AttendResponse(assignment=_assignment(action))
        case act.StopWorkers():
            stop = rendezvous.StopWorkers(generation=action.generation, reason=action.reason, force=action.force)
            return rendezvous.AttendResponse(stop_workers=stop)
        case act.StartWorkers():
            start = rendezvous.StartWorkers(request_id=action.request_id, at_fault=action.at_fault)
            return rendezvous.AttendResponse(start_workers=start)
        case act.Dismiss():
            dismissed = rendezvous.NodeDismissed(success=action.success, reason=action.reason)
            return rendezvous.AttendResponse(dismissed=dismissed)
        case act.FinishGeneration():
            finished = rendezvous.GenerationFinished(generation=action.generation)
            return rendezvous.AttendResponse(generation_finished=finished)
    raise AssertionError(f"{type(action).__name__} is not for a node's stream")


def _assignment(action: act.Assign) -> rendezvous.NodeAssignment:
    """What one node needs to know: its own place and the leader's, not everybody's."""
    members = action.generation.members
    own = next(member for member in members if member.node_id == action.node_id)
    message = _summary(action.generation)
    message.members.extend([_member(members[0])] if own is members[0] else [_member(members[0]), _member(own)])
    return rendezvous.NodeAssignment(
        request_id=action.request_id, generation=message, at_fault=action.at_fault, node_count=len(members)
    )


def to_worker(action: StreamAction, controller_id: str, heartbeat_interval_s: float) -> training.TrainResponse:
    """An action on a worker's stream."""
    match action:
        case act.WelcomeWorker():
            welcome = training.WorkerWelcome(
                protocol_version=PROTOCOL_VERSION,
                controller_id=controller_id,
                scale=action.scale,
                heartbeat_interval_s=heartbeat_interval_s,
            )
            return training.TrainResponse(welcome=welcome)
        case act.AssignWorker():
            return training.TrainResponse(assignment=_seat(action))
        case act.CutGeneration():
            cut = training.CutGeneration(generation=action.generation, reason=action.reason)
            return training.TrainResponse(cut=cut)
        case act.SaveAndExit():
            return training.TrainResponse(save_and_exit=training.SaveAndExit(reason=action.reason))
        case act.AskToLeave():
            leave = training.LeaveGeneration(generation=action.generation, reason=action.reason, save=action.save)
            return training.TrainResponse(leave=leave)
        case act.AskToSave():
            save = training.SaveCheckpoint(generation=action.generation, reason=action.reason)
            return training.TrainResponse(save=save)
        case act.FenceWorker():
            fenced = training.WorkerFenced(generation=action.generation, reason=action.reason)
            return training.TrainResponse(fenced=fenced)
    raise AssertionError(f"{type(action).__name__} is not for a worker's stream")


def _seat(action: act.AssignWorker) -> training.WorkerAssignment:
    """What one live worker needs to know: its rank, and where all of them are."""
    generation = action.generation
    return training.WorkerAssignment(
        request_id=action.request_id,
        generation=generation.number,
        rank=action.rank,
        places=[
            training.WorkerPlace(
                node_id=member.node_id,
                address=member.address,
                store_port=seat.store_port,
                preflight_port=seat.preflight_port,
            )
            for member in generation.members
            for seat in member.seats
        ],
        source_rank=generation.source_rank,
        in_step=generation.in_step,
        scale=generation.scale,
        reason=generation.reason,
    )


def job(view: JobView) -> jobs.Job:
    record = view.record
    remaining_s = view.remaining_s
    return jobs.Job(
        name=record.name,
        spec=job_spec(record.spec),
        phase=record.phase.value,
        reason=record.reason,
        desired_nodes=record.wanted_nodes,
        nodes=[
            jobs.Node(
                node_id=shown.node.node_id,
                state=shown.node.state.value,
                node_rank=shown.node_rank,
                slots=shown.node.slots,
                address=shown.node.address,
                connected=shown.connected,
                silent_s=-1.0 if math.isnan(shown.silent_s) else shown.silent_s,
            )
            for shown in view.nodes
        ],
        generation=generation(record.generation) if record.generation else None,
        progress=progress(view.progress) if view.progress else None,
        progress_rate=view.progress_rate,
        remaining_s=-1.0 if math.isnan(remaining_s) else remaining_s,
        checkpoint=checkpoint(record.checkpoint) if record.checkpoint else None,
        autoscale=autoscale.autoscale(record.autoscale),
        recommendation=autoscale.recommendation(view.recommendation) if view.recommendation else None,
    )


def event(stored: StoredEvent) -> jobs.Event:
    return jobs.Event(
        sequence=stored.sequence,
        time_s=stored.time_s,
        kind=stored.kind,
        reason=stored.reason,
        node_id=stored.node_id,
        generation=stored.generation,
    )


def generation_summary(summary: GenerationSummary) -> jobs.GenerationSummary:
    return jobs.GenerationSummary(
        generation=generation(summary.generation),
        steps=summary.steps,
        mean_gain=summary.mean_gain,
        effective_lr=summary.effective_lr,
        first_tau=summary.first_tau,
        last_tau=summary.last_tau,
        pause_s=summary.pause_s,
        started_s=summary.started_s,
        end_reason=summary.end_reason,
    )


def points(view: JobView, after_s: float) -> jobs.ListPointsResponse:
    columns: dict[str, Any] = dict(view.curve.columns(after_s))
    for name in ("generation", "step"):
        columns[name] = [int(value) for value in columns[name]]
    return jobs.ListPointsResponse(**columns)


def job_spec(spec: JobSpec) -> types.JobSpec:
    return types.JobSpec(
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        mode=_MODES[spec.mode],
        base_batch_size=spec.base_batch_size,
        batch_size=spec.batch_size,
        global_batch_size=spec.global_batch_size,
        target_tau=spec.target_tau,
    )


def generation(value: Generation) -> types.Generation:
    message = _summary(value)
    message.members.extend(map(_member, value.members))
    return message


def _summary(value: Generation) -> types.Generation:
    """The generation without its members."""
    return types.Generation(number=value.number, world_size=value.world_size, scale=value.scale, reason=value.reason)


def _member(value: Member) -> types.Member:
    return types.Member(
        node_id=value.node_id,
        node_rank=value.node_rank,
        slots=value.slots,
        first_rank=value.first_rank,
        address=value.address,
        master_port=value.master_port,
        store_port=value.store_port,
    )


def progress(value: Progress) -> types.Progress:
    return types.Progress(
        generation=value.generation,
        step=value.step,
        tau=value.tau,
        gain=value.gain,
        scale=value.scale,
        loss=value.loss,
        effective_lr=value.effective_lr,
        base_lr=value.base_lr,
        variance=value.variance,
        sqr_norm=value.sqr_norm,
        samples=value.samples,
        epoch=value.epoch,
        generation_steps=value.generation_steps,
        generation_gain_sum=value.generation_gain_sum,
        generation_first_tau=value.generation_first_tau,
        pause_s=value.pause_s,
        step_seconds=histogram(value.step_seconds),
        orthogonality=value.orthogonality,
    )


def histogram(value: Histogram) -> types.Histogram:
    return types.Histogram(
        upper_bounds=value.upper_bounds,
        cumulative_counts=value.cumulative_counts,
        count=value.count,
        sum=value.sum,
    )


def checkpoint(value: Checkpoint) -> types.CheckpointCommitted:
    return types.CheckpointCommitted(
        generation=value.generation,
        step=value.step,
        tau=value.tau,
        path=value.path,
        size_bytes=value.size_bytes,
        duration_s=value.duration_s,
    )
