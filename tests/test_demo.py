"""The demonstration's plot and screen, without its processes; tests/e2e/test_demo_command.py plays it."""

from __future__ import annotations

import io
import json
import socket
from collections.abc import Iterable

import pytest
from rich.console import Console
from stretto.demo.processes import _free_or_any
from stretto.demo.run import _view
from stretto.demo.screen import Screen, summary_table
from stretto.demo.story import MAX_NODES, SHOWN_STEPS, Deed, Story, View
from stretto.sample_log import used_exactly_once
from stretto_proto.v1 import jobs_pb2, types_pb2


def _play(story: Story, view: View) -> list[tuple[Deed, str]]:
    """What is done while the job looks like this."""
    deeds = []
    while (scene := story.due(view)) is not None:
        deeds.append((scene.deed, scene.target))
        story.done()
    return deeds


def test_the_story_is_told_in_order_and_each_part_is_shown_long_enough() -> None:
    story = Story()
    one, two = ("node-1",), ("node-1", "node-2")
    four = (*two, "node-3", "node-4")
    assert _play(story, View()) == [(Deed.START, "node-1")]
    assert _play(story, View(one, SHOWN_STEPS - 1)) == []
    assert _play(story, View(one, SHOWN_STEPS)) == [(Deed.START, "node-2")]
    assert _play(story, View(one, 1000)) == [], "the second node is still on its way"
    assert _play(story, View(two, SHOWN_STEPS)) == [
        (Deed.SCALE, "2"),
        (Deed.START, "node-3"),
        (Deed.START, "node-4"),
    ]
    assert _play(story, View(two, 1000, waiting=("node-3",))) == []
    assert _play(story, View(two, 1000, waiting=("node-3", "node-4"))) == [(Deed.SCALE, str(MAX_NODES))]
    assert _play(story, View(four, SHOWN_STEPS)) == [(Deed.KILL, "node-1")]
    assert not story.told
    assert _play(story, View(four[1:], SHOWN_STEPS)) == [(Deed.DRAIN, "node-2")]
    assert story.told


def _job() -> jobs_pb2.Job:
    job = jobs_pb2.Job(name="demo", phase="running", spec=types_pb2.JobSpec(target_tau=2000))
    job.generation.number = 3
    for name in ("node-1", "node-2"):
        job.generation.members.add(node_id=name)
        job.nodes.add(node_id=name, state="active")
    job.nodes.add(node_id="node-3", state="spare", node_rank=-1)
    job.nodes.add(node_id="node-4", state="joining", node_rank=-1)
    job.progress.generation = 3
    job.progress.generation_steps = 12
    job.progress.tau = 400
    job.progress.step = 300
    return job


def test_steps_of_an_earlier_generation_are_not_this_ones() -> None:
    job = _job()
    assert _view(job) == View(("node-1", "node-2"), 12, ("node-3",))
    job.progress.generation = 2
    assert _view(job).steps == 0
    assert _view(None) == View()


def test_plain_output_tells_what_happens_and_why() -> None:
    output = io.StringIO()
    with Screen(Console(file=output, width=120), plain=True, target_tau=2000) as screen:
        screen.tell("A second node comes [really].")
        screen.event(jobs_pb2.Event(kind="node_lost", reason="node-1 is lost: its stream closed"))
        screen.event(jobs_pb2.Event(kind="checkpoint_committed", reason="step 12 is saved"))
        screen.show(_job())
    assert "checkpoint_committed" not in output.getvalue(), "one every other second"
    assert "A second node comes [really]." in output.getvalue()
    assert "node_lost: node-1 is lost: its stream closed" in output.getvalue()


def test_a_terminal_shows_progress_figures_and_nodes_below_the_story() -> None:
    output = io.StringIO()
    console = Console(file=output, width=100, height=30, force_terminal=True, color_system=None)
    with Screen(console, plain=False, target_tau=2000) as screen:
        screen.show(_job())
        screen.tell("A second node comes.")
    for words in ("A second node comes.", "20%", "generation 3", "node-3", "joining"):
        assert words in output.getvalue()


def test_the_summary_has_a_row_for_each_generation() -> None:
    summary = jobs_pb2.GenerationSummary(steps=64, mean_gain=3.26, pause_s=12.3, end_reason="node-1 gone")
    summary.generation.number = 3
    summary.generation.scale = 4
    output = io.StringIO()
    Console(file=output, width=120).print(summary_table([summary]))
    for word in ("3.26", "12.3 s", "64", "node-1 gone"):
        assert word in output.getvalue()


def test_a_port_that_is_taken_is_not_chosen() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert _free_or_any(port) == 0
    assert _free_or_any(port) == port


def _lines(entries: Iterable[dict[str, object]]) -> list[str]:
    return [json.dumps({"generation": 1, **entry}) for entry in entries]


_GOOD: list[dict[str, object]] = [
    {"resumed_step": 0, "repeats_after": 0},
    {"step": 1, "epoch": 0, "indices": [2, 0]},
    {"step": 2, "epoch": 0, "indices": [1]},
    {"step": 3, "epoch": 1, "indices": [0, 1]},
    {"resumed_step": 2, "repeats_after": 2},
    {"step": 3, "epoch": 1, "indices": [0, 1]},
    {"step": 4, "epoch": 1, "indices": [2]},
    {"step": 5, "epoch": 2, "indices": [1]},
]


def test_steps_that_a_restart_took_back_do_not_count_as_second_uses() -> None:
    assert used_exactly_once(_lines(_GOOD))


@pytest.mark.parametrize("written", [0, 1, 2])
def test_a_restart_repeats_the_latest_steps_that_may_not_have_been_written(written: int) -> None:
    again: list[dict[str, object]] = [{"resumed_step": 2, "repeats_after": 0}, *_GOOD[1:3]]
    assert used_exactly_once(_lines([*_GOOD[: 1 + written], *again, *_GOOD[5:]]))


@pytest.mark.parametrize(
    ("position", "entry"),
    [
        (2, {"step": 2, "epoch": 0, "indices": [0]}),
        (2, {"step": 3, "epoch": 0, "indices": [1]}),
        (6, {"step": 4, "epoch": 1, "indices": []}),
        (6, {"step": 4, "epoch": 1, "indices": [1, 2]}),
        (7, {"step": 5, "epoch": 2, "indices": [1, 1]}),
        (7, {"step": 5, "epoch": 3, "indices": [1]}),
    ],
    ids=["twice", "a gap in steps", "left out", "twice and complete", "twice in the last epoch", "an epoch left out"],
)
def test_a_sample_that_is_used_twice_or_left_out_is_noticed(position: int, entry: dict[str, object]) -> None:
    entries = [*_GOOD]
    entries[position] = entry
    assert not used_exactly_once(_lines(entries))
