"""The roster of worker streams equals a plain dictionary, whatever is done to it."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st
from stretto_controller.core.model import WorkerSession
from stretto_controller.core.roster import Roster

NODES = ("n0", "n1", "n2")

sessions = st.builds(
    WorkerSession,
    session_id=st.sampled_from([f"w{i}" for i in range(6)]),
    node_id=st.just(""),
    local_rank=st.integers(0, 3),
    rank=st.integers(-1, 3),
    generation=st.integers(0, 3),
    heard_s=st.floats(0, 10),
).map(lambda w: replace(w, node_id=NODES[int(w.session_id[1]) % 3]))
changes = st.lists(st.one_of(st.tuples(st.just("with"), sessions), st.tuples(st.just("without"), sessions)))


@given(changes)
def test_it_holds_what_a_dictionary_would_hold(changes: list[tuple[str, WorkerSession]]) -> None:
    roster, expected = Roster(), dict[str, WorkerSession]()
    for how, worker in changes:
        before, kept = roster, dict(expected)
        if how == "with":
            roster = roster.with_(worker)
            expected[worker.session_id] = worker
        else:
            roster = roster.without(roster.of(worker.node_id))
            expected = {k: w for k, w in expected.items() if w.node_id != worker.node_id}
        assert dict(before) == kept, "an earlier roster changed"
        assert dict(roster) == expected
        assert list(roster.values()) == list(expected.values())
        assert len(roster) == len(expected)
        for node_id in NODES:
            assert roster.of(node_id) == [w for w in expected.values() if w.node_id == node_id]
        assert roster == Roster(expected.values())
