"""A live worker's pure state: what it says and when, and which news it believes."""

from __future__ import annotations

from stretto.live.state import Leave, LiveIdentity, LiveState, OnSigterm, Version
from stretto_proto.v1 import training_pb2 as pb
from stretto_proto.v1 import types_pb2

IDENTITY = LiveIdentity(job="digits", node_id="node-a", local_rank=1, store_port=4001, preflight_port=4002)


def _state() -> LiveState:
    return LiveState(IDENTITY, types_pb2.JobSpec(base_batch_size=32), first_request=100)


def _assign(state: LiveState, generation: int, *, request: int | None = None, rank: int = 0) -> None:
    assert state.request is not None or request is not None
    number = request if request is not None else state.request.request_id  # type: ignore[union-attr]
    assignment = pb.WorkerAssignment(request_id=number, generation=generation, rank=rank)
    assert state.hear(pb.TrainResponse(assignment=assignment)) == []


def _running(generation: int = 3, step: int = 10) -> LiveState:
    state = _state()
    state.ask()
    _assign(state, generation)
    state.synchronised(step)
    return state


def test_only_the_answer_to_the_latest_request_counts() -> None:
    state = _state()
    state.ask()
    state.ask()
    _assign(state, 4, request=100)
    assert state.generation == 0, "that was the answer to the first one"
    _assign(state, 5, request=101)
    assert state.generation == 5
    _assign(state, 6, request=101)
    assert state.generation == 5, "an answer counts once"


def test_a_request_tells_what_was_left_and_what_is_held() -> None:
    state = _running(3, step=10)
    state.reduced()
    state.moved()
    ready = state.ask(failed=True, unreachable=(2, 1)).ready
    assert (ready.generation, ready.version_generation, ready.version_step) == (3, 3, 11)
    assert ready.failed
    assert list(ready.unreachable) == [1, 2]
    assert (ready.store_port, ready.preflight_port) == (4001, 4002)
    again = state.ask(failed=True).ready
    assert again.generation == 3, "still the one that was left last"
    assert again.request_id > ready.request_id


def test_a_step_counts_when_the_next_collective_has_succeeded() -> None:
    state = _running(3, step=10)
    state.reduced()
    state.moved()
    assert state.version == Version(3, 11)
    assert state.committed_step == 10
    state.reduced()
    assert state.committed_step == 11


def test_a_received_state_replaces_a_step_that_was_done_alone() -> None:
    state = _running(3, step=10)
    state.reduced()
    state.moved()
    state.ask(failed=True)
    _assign(state, 4)
    state.synchronised(10)
    assert state.version == Version(4, 10)
    assert state.committed_step == 10


def test_a_cut_is_answered_at_once_and_only_by_those_whom_it_concerns() -> None:
    state = _running(3)
    assert state.hear(pb.TrainResponse(cut=pb.CutGeneration(generation=2, reason="late news"))) == []
    assert state.over(3) is None
    answers = state.hear(pb.TrainResponse(cut=pb.CutGeneration(generation=3, reason="node-b is gone")))
    assert [answer.WhichOneof("body") for answer in answers] == ["alive"]
    assert state.over(3) == "node-b is gone"
    state.ask(failed=True)
    _assign(state, 4)
    assert state.over(4) is None
    assert state.over(3) is not None


def test_a_checkpoint_is_asked_for_in_one_generation() -> None:
    state, asked = _running(3), list[bool]()
    for generation in (2, 3):
        state.hear(pb.TrainResponse(save=pb.SaveCheckpoint(generation=generation, reason="asked")))
        asked.append(state.save_asked)
    assert asked == [False, True]


def test_a_request_to_leave_is_of_one_generation() -> None:
    state = _running(3)
    said: list[Leave | None] = []
    state.hear(pb.TrainResponse(leave=pb.LeaveGeneration(generation=2, reason="old")))
    said.append(state.leave)
    state.hear(pb.TrainResponse(leave=pb.LeaveGeneration(generation=3, reason="paused", save=True)))
    said.append(state.leave)
    state.ask()
    _assign(state, 4)
    said.append(state.leave)
    assert said == [None, Leave("paused", save=True), None]


def test_a_new_connection_says_again_what_waits_for_an_answer() -> None:
    state = _state()
    request = state.ask().ready
    hello = state.opening()[0].hello
    assert (hello.rank, hello.generation, hello.local_rank) == (-1, 0, 1)
    assert hello.ready == request
    _assign(state, 3, rank=2)
    state.synchronised(7)
    hello = state.opening()[0].hello
    assert (hello.rank, hello.generation, hello.step) == (2, 3, 7)
    assert not hello.HasField("ready")


def test_sigterm_means_drain_only_where_there_is_work_to_leave_in_order() -> None:
    assert _state().on_sigterm(broken=True) is OnSigterm.EXIT
    state = _running(3, step=0)
    assert state.on_sigterm(broken=True) is OnSigterm.EXIT, "its peers are gone, and it has done nothing yet"
    assert state.on_sigterm(broken=False) is OnSigterm.DRAIN
    assert state.drain().draining.generation == 3
    assert [message.WhichOneof("body") for message in state.opening()] == ["hello", "draining"]
    state.hear(pb.TrainResponse(cut=pb.CutGeneration(generation=3, reason="broken")))
    assert state.on_sigterm(broken=False) is OnSigterm.EXIT


def test_who_keeps_steps_in_memory_asks_before_it_goes() -> None:
    state = _running(3, step=10)
    state.hear(pb.TrainResponse(cut=pb.CutGeneration(generation=3, reason="broken")))
    assert state.on_sigterm(broken=True) is OnSigterm.DRAIN
    state.ask(failed=True)
    assert state.on_sigterm(broken=True) is OnSigterm.DRAIN, "it waits, and may be the last that has them"
    state.refused = True
    assert state.on_sigterm(broken=True) is OnSigterm.EXIT
