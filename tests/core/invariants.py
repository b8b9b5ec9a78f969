"""What must hold after every decision, in the words of docs/protocol.md. Tests and simulations share this file."""

from __future__ import annotations

from stretto_controller.core.actions import Assign, AssignWorker, BeginGeneration, Decision
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobState, NodeState, Phase

_WITH_GENERATION = (Phase.RUNNING, Phase.RECONFIGURING)


def check(before: JobState | None, decision: Decision, *, now_s: float, limits: Limits) -> None:
    """Raise AssertionError, naming the broken invariant."""
    state = decision.state
    same_incarnation = before is not None and before.record.incarnation == state.record.incarnation
    _ranks_have_no_gaps(state)
    _size_is_within_the_spec(state)
    _members_are_present_nodes(state)
    if before is not None:
        _generations_only_grow(before, state)
    if before is not None and same_incarnation:
        _a_running_generation_does_not_change(before, state)
        _finished_stays_finished(before, state)
    _one_assignment_per_decision(decision)
    _the_source_has_the_newest_state(before, decision)


def _ranks_have_no_gaps(state: JobState) -> None:
    generation = state.record.generation
    if generation is None:
        return
    assert [m.node_rank for m in generation.members] == list(range(len(generation.members))), "node ranks have gaps"
    ranks = [m.first_rank + i for m in generation.members for i in range(m.slots)]
    assert ranks == list(range(generation.world_size)), "worker ranks have gaps"
    assert len(set(generation.node_ids)) == len(generation.members), "a node is a member twice"


def _size_is_within_the_spec(state: JobState) -> None:
    generation, spec = state.record.generation, state.record.spec
    if generation is not None:
        assert spec.min_nodes <= len(generation.members) <= spec.max_nodes, "a generation has too few or too many nodes"


def _members_are_present_nodes(state: JobState) -> None:
    """While RUNNING with nothing under way, every member is known, and neither lost nor waiting."""
    record = state.record
    if record.phase is not Phase.RUNNING or record.change is not None or record.target_reached:
        return
    assert record.generation is not None, "a job runs without a generation"
    for node_id in record.generation.node_ids:
        node = record.nodes.get(node_id)
        assert node is not None, f"member {node_id} of a running generation is unknown"
        assert node.succeeded or node.state in (NodeState.ACTIVE, NodeState.DRAINING), (
            f"member {node_id} is {node.state}"
        )


def _generations_only_grow(before: JobState, after: JobState) -> None:
    assert after.record.next_generation >= before.record.next_generation, "generation numbers went back"
    if before.record.generation is not None and after.record.generation is not None:
        assert after.record.generation.number >= before.record.generation.number, "the current generation went back"
    if after.record.generation is not None:
        assert after.record.generation.number < after.record.next_generation, "a generation's number can be given again"


def _a_running_generation_does_not_change(before: JobState, after: JobState) -> None:
    old, new = before.record.generation, after.record.generation
    if old is not None and new is not None and old.number == new.number:
        assert old.members == new.members, "members changed without a new generation"
        assert after.record.phase in _WITH_GENERATION or after.record.phase.finished, (
            "a generation outlives its job's run"
        )


def _finished_stays_finished(before: JobState, after: JobState) -> None:
    if before.record.phase.finished:
        assert after.record.phase is before.record.phase, "a finished job moved on"


def _one_assignment_per_decision(decision: Decision) -> None:
    begun = [a for a in decision.actions if isinstance(a, BeginGeneration)]
    assert len(begun) <= 1, "two generations began in one decision"
    assigned = [a for a in decision.actions if isinstance(a, Assign | AssignWorker)]
    current = decision.state.record.generation
    for action in assigned:
        assert current is not None, "an assignment without a generation"
        assert action.generation.number == current.number, "an assignment to an old generation"
        assert decision.state.record.phase is Phase.RUNNING, "an assignment outside a running generation"
    who = [a.node_id if isinstance(a, Assign) else a.session_id for a in assigned]
    assert len(who) == len(set(who)), "a node or worker was assigned twice"
    ranks = [a.rank for a in assigned if isinstance(a, AssignWorker)]
    assert len(ranks) == len(set(ranks)), "two workers have one rank"


def _the_source_has_the_newest_state(before: JobState | None, decision: Decision) -> None:
    """In-process mode: who gives its state away has the newest, and none older than where training is known to be."""
    for action in decision.actions:
        if not isinstance(action, BeginGeneration) or action.generation.source_rank < 0 or before is None:
            continue
        asked = {a.rank: a.session_id for a in decision.actions if isinstance(a, AssignWorker)}
        versions = {
            rank: worker.ready.version
            for rank, session_id in asked.items()
            if (worker := before.live.workers.get(session_id)) is not None and worker.ready is not None
        }
        source = versions.get(action.generation.source_rank)
        if source is not None:
            assert source >= before.record.lineage, "an older lineage became the source"
            assert source == max(versions.values()), "the source has not the newest state"
