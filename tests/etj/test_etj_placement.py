"""Properties of the choice of pods, over all that can be there."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st
from stretto_operator.job import Job, Training
from stretto_operator.limits import Limits
from stretto_operator.outcome import judge
from stretto_operator.placement import Placement, place
from stretto_operator.pod import Pod, PodState
from stretto_operator.record import Failure, Record
from stretto_operator.requests import target
from stretto_operator.view import ControllerView, JobView, NodeView

_NOW_S = 1_800_000_000.0
_LIMITS = Limits()
_MOST = 8

_states = st.sampled_from(list(PodState))
_pods = st.dictionaries(st.integers(0, _MOST - 1), st.tuples(_states, st.floats(0, 500)), max_size=_MOST)
_failures = st.dictionaries(st.integers(0, _MOST - 1), st.tuples(st.integers(1, 4), st.booleans()), max_size=4)
_phases = st.sampled_from(["pending", "running", "paused", "succeeded", "failed"])


def _made(
    nodes: int, pods: dict[int, tuple[PodState, float]], failures: dict[int, tuple[int, bool]], phase: str, trains: int
) -> tuple[Job, list[Pod], ControllerView]:
    found = [
        Pod(
            f"digits-{index}",
            f"uid-{index}",
            index,
            state,
            own_fault=state is PodState.FAILED and index % 2 == 0,
            ended_s=_NOW_S - ago_s,
            gone_by_s=_NOW_S + 30,
        )
        for index, (state, ago_s) in sorted(pods.items())
    ]
    recorded = {
        index: Failure(index, count, f"uid-{index}" if same else "uid-old", _NOW_S - 100, "Error")
        for index, (count, same) in failures.items()
    }
    record = Record(failures=recorded, registered=True)
    job = Job(
        "default",
        "digits",
        "uid",
        1,
        0.0,
        False,
        {},
        nodes,
        training=Training(1, _MOST, "in-process"),
        backoff_limit=2,
        record=record,
    )
    running = [pod.name for pod in found if pod.state is PodState.RUNNING][:trains]
    nodes_there = {name: NodeView("active", rank) for rank, name in enumerate(running)}
    view = JobView(phase, training=job.training, generation=3, nodes=nodes_there)
    return job, found, ControllerView(True, job=view)


_worlds = st.builds(_made, st.integers(1, _MOST), _pods, _failures, _phases, st.integers(0, _MOST))


def _placed(world: tuple[Job, list[Pod], ControllerView]) -> Placement:
    job, pods, view = world
    judgement = judge(job, view, pods, now_s=_NOW_S, limits=_LIMITS)
    return place(job, target(job, view, pods), pods, judgement, view.job, _NOW_S, _LIMITS)


@given(_worlds)
def test_no_more_pods_than_wanted_and_each_index_once(world: tuple[Job, list[Pod], ControllerView]) -> None:
    job, pods, _ = world
    placed = _placed(world)
    assert len(placed.indexes) <= job.nodes
    assert len(set(placed.indexes)) == len(placed.indexes)
    assert all(0 <= index < 2 * _MOST for index in placed.indexes)
    doomed = [each.pod.uid for each in placed.doomed]
    assert len(set(doomed)) == len(doomed)
    assert set(doomed) <= {pod.uid for pod in pods}
    assert not {each.pod.index for each in placed.doomed} & set(placed.indexes)


@given(_worlds)
def test_who_trains_goes_only_when_too_many_do(world: tuple[Job, list[Pod], ControllerView]) -> None:
    job, pods, view = world
    assert view.job is not None
    recorded = {failure.uid for failure in job.record.failures.values()}
    train = [pod for pod in pods if pod.name in view.job.nodes and pod.uid not in recorded]
    gone = [each.pod for each in _placed(world).doomed if each.pod in train and view.job.phase == "running"]
    assert len(gone) <= max(0, len([pod for pod in pods if pod.alive]) - job.nodes)


@given(_worlds)
def test_nothing_changes_when_it_is_looked_at_again(world: tuple[Job, list[Pod], ControllerView]) -> None:
    job, pods, view = world
    first = judge(job, view, pods, now_s=_NOW_S, limits=_LIMITS)
    record = Record(failures=first.failures, registered=first.registered, former_generation=first.former_generation)
    again = Job(
        job.namespace,
        job.name,
        job.uid,
        1,
        0.0,
        False,
        {},
        job.nodes,
        training=job.training,
        backoff_limit=job.backoff_limit,
        record=record,
    )
    second = judge(again, view, pods, now_s=_NOW_S + 5, limits=_LIMITS)
    assert second.failures == first.failures
    assert second.former_generation == first.former_generation
