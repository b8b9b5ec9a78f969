"""What the recovery benchmark concludes from workers' logs."""

from __future__ import annotations

import json
from pathlib import Path

from outages.timeline import Timeline


class Log:
    """Writes what workers would."""

    def __init__(self, directory: Path) -> None:
        self.timeline = Timeline(directory)
        self._directory = directory

    def steps(
        self, node: str, times_s: list[float], *, pid: int, generation: int, world_size: int, first: int = 1
    ) -> None:
        place = {"pid": pid, "node": node, "rank": 0, "generation": generation, "world_size": world_size}
        with (self._directory / f"{pid}.steps").open("a") as file:
            for step, done_s in enumerate(times_s, start=first):
                file.write(json.dumps({**place, "step": step, "asked_s": done_s - 0.1, "done_s": done_s}) + "\n")
        self.timeline.update()

    def stage(self, name: str, at_s: float, *, pid: int, size_bytes: int = 0) -> None:
        with (self._directory / f"{pid}.stages").open("a") as file:
            file.write(
                json.dumps({"pid": pid, "node": "a", "name": name, "at_s": at_s, "size_bytes": size_bytes}) + "\n"
            )
        self.timeline.update()


def test_a_step_that_was_under_way_is_no_recovery(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [1.0, 2.0, 3.1], pid=1, generation=1, world_size=3)
    assert log.timeline.recovered("a", event_s=3.0) is None
    log.steps("a", [3.5, 3.6], pid=1, generation=2, world_size=2, first=4)
    row = log.timeline.recovered("a", event_s=3.0)
    assert row is not None
    assert (row.step, row.done_s) == (4, 3.5)
    assert log.timeline.step_before(row).step == 3


def test_a_new_process_at_the_same_world_size_is_a_recovery(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [1.0, 2.0], pid=1, generation=0, world_size=3)
    log.steps("a", [9.0], pid=2, generation=0, world_size=3)
    row = log.timeline.recovered("a", event_s=2.5)
    assert row is not None
    assert row.pid == 2


def test_nodes_step_together_when_all_of_them_and_no_others_do_so_in_one_generation(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [5.0], pid=1, generation=2, world_size=2)
    assert not log.timeline.together(["a", "b"], since_s=4.0)
    log.steps("b", [5.1], pid=2, generation=1, world_size=2)
    assert not log.timeline.together(["a", "b"], since_s=4.0)
    log.steps("b", [5.2], pid=2, generation=2, world_size=2)
    assert log.timeline.together(["a", "b"], since_s=4.0)
    assert not log.timeline.together(["a", "b"], since_s=5.1)
    assert not log.timeline.together(["a"], since_s=4.0)


def test_the_longest_gap_begins_with_the_step_before_the_event_and_spans_processes(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [0.0, 8.0, 9.0], pid=1, generation=1, world_size=2)
    log.steps("a", [12.0, 13.0, 33.0], pid=2, generation=2, world_size=2)
    assert log.timeline.longest_gap("a", 9.5, 14.0) == 3.0


def test_a_usual_step_is_the_median_of_those_before_the_event(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [0.0, 1.0, 2.0, 7.0, 17.0], pid=1, generation=1, world_size=2)
    log.steps("b", [0.5, 1.5, 2.5, 3.5], pid=2, generation=1, world_size=2)
    assert log.timeline.usual_step_s(["a", "b"], before_s=16.0) == 1.0


def test_a_step_of_two_generations_counts_as_repeated(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [1.0, 2.0, 3.0], pid=1, generation=1, world_size=2)
    log.steps("b", [1.0, 2.0], pid=2, generation=1, world_size=2)
    log.steps("b", [4.0, 5.0], pid=2, generation=2, world_size=1, first=3)
    assert log.timeline.repeated(0.0, 9.0) == 1
    assert log.timeline.repeated(3.5, 9.0) == 0


def test_a_line_that_is_half_written_is_read_when_it_is_whole(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [1.0, 2.0], pid=1, generation=1, world_size=1)
    path = tmp_path / "1.steps"
    lines = path.read_text().splitlines()
    whole = json.dumps({**json.loads(lines[1]), "step": 3, "done_s": 3.0})
    with path.open("a") as file:
        file.write(whole[:20])
        file.flush()
        log.timeline.update()
        file.write(whole[20:] + "\n")
    log.timeline.update()
    assert [row.step for row in log.timeline.steps("a", 0.0, 9.0)] == [1, 2, 3]


def test_stages_add_up_to_the_time_since_the_event_and_repeated_ones_are_summed(tmp_path: Path) -> None:
    log = Log(tmp_path)
    log.steps("a", [1.0], pid=1, generation=1, world_size=2)
    for name, at_s in (("notice", 2.5), ("build", 3.0), ("notice", 3.5), ("build", 4.5), ("step", 5.0)):
        log.stage(name, at_s, pid=1, size_bytes=7 if name == "build" else 0)
    log.steps("a", [5.0], pid=1, generation=2, world_size=1, first=2)
    row = log.timeline.recovered("a", event_s=2.0)
    assert row is not None
    assert log.timeline.stages(row, 2.0) == {"notice": 1.0, "build": 1.5, "step": 0.5}
    assert log.timeline.state_bytes() == 7
