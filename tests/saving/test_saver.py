"""The trainer's saver: promised intervals, generations that break, failures that are told."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from saving.stores import Full, Held, with_store
from stretto.checkpoint import Checkpointer, CheckpointFailed, CheckpointSettings, Failed, Saved
from stretto.checkpoint.timetable import Interval
from stretto.group import GroupBroken
from stretto.saver import Saver

STATE = {"x": torch.arange(9.0)}


class OneRank:
    """A generation of one worker, which can break."""

    rank, world_size, restored = 0, 1, False

    def __init__(self, number: int) -> None:
        self.number = number
        self.broken = False

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        if self.broken:
            raise GroupBroken("a peer is gone", ())
        return list(numbers)


class News:
    """What the controller would hear."""

    def __init__(self, checkpointer: Checkpointer | str | None, *, steps: int = 10) -> None:
        self.saved: list[Saved] = []
        self.failed: list[Failed] = []
        self.saver = Saver(
            checkpointer, interval=Interval(steps=steps), told=self.saved.append, warned=self.failed.append
        )

    def train(self, first: int, last: int) -> None:
        """Steps as the trainer takes them."""
        for step in range(first, last + 1):
            self.saver.poll(lambda: STATE, step=step - 1, tau=float(step - 1))
            if self.saver.due(step, float(step - 1)):
                self.saver.start(STATE, step=step, tau=float(step))


def test_never_more_than_an_interval_is_unsaved(tmp_path: Path) -> None:
    news = News(Checkpointer(tmp_path))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    for last in (11, 22, 33):
        news.train(last - 10, last)
        assert news.saved[-1].step >= last - 1 - 10
    news.saver.close(failed=False)
    assert [each.tau for each in news.saved] == [float(each.step) for each in news.saved]
    assert {each.generation for each in news.saved} == {1}


def test_training_waits_for_a_save_that_takes_longer_than_the_interval(tmp_path: Path) -> None:
    store = Held(tmp_path)
    news = News(with_store(store))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    news.train(1, 10)
    assert store.reached.wait(60)
    done = threading.Event()

    def poll() -> None:
        news.saver.poll(lambda: STATE, step=10, tau=10.0)
        done.set()

    threading.Thread(target=poll, daemon=True).start()
    assert not done.wait(0.2)
    store.go.set()
    assert done.wait(60)
    assert len(news.saved) == 1


def test_a_generation_that_breaks_gives_its_save_up_and_the_next_begins_another(tmp_path: Path) -> None:
    store = Held(tmp_path)
    news = News(with_store(store))
    ranks = OneRank(1)
    news.saver.begin(ranks, step=0, tau=0.0)
    news.train(1, 7)
    assert store.reached.wait(60)
    ranks.broken = True
    news.saver.abandon()
    store.go.set()
    news.saver.begin(OneRank(2), step=7, tau=7.0)
    while not news.saved:
        news.train(8, 10)
    news.saver.close(failed=False)
    assert news.saved[0].generation == 2
    assert list(tmp_path.glob("generation-0000000001*")) == []


def test_a_save_that_runs_when_workers_leave_is_told_of_first(tmp_path: Path) -> None:
    store = Held(tmp_path)
    news = News(with_store(store, settings=CheckpointSettings(leave_wait_s=60.0)))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    news.train(1, 7)
    assert store.reached.wait(60)
    threading.Timer(0.1, store.go.set).start()
    news.saver.settle()
    assert [each.generation for each in news.saved] == [1]


def test_workers_that_leave_wait_for_a_save_no_longer_than_was_said(tmp_path: Path) -> None:
    store = Held(tmp_path)
    news = News(with_store(store, settings=CheckpointSettings(leave_wait_s=0.01)))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    news.train(1, 7)
    assert store.reached.wait(60)
    news.saver.settle()
    news.saver.begin(OneRank(2), step=7, tau=7.0)
    store.go.set()
    news.saver.close(failed=False)
    assert news.saved == [], "the controller takes nothing of an older generation"
    state: dict[str, Any] = {"x": None}
    assert Checkpointer(tmp_path).load_latest(state) is not None, "but it is there"


def test_who_leaves_a_broken_generation_hears_how_it_broke(tmp_path: Path) -> None:
    store = Held(tmp_path)
    news = News(with_store(store))
    ranks = OneRank(1)
    news.saver.begin(ranks, step=0, tau=0.0)
    news.train(1, 7)
    assert store.reached.wait(60)
    ranks.broken = True
    threading.Timer(0.1, store.go.set).start()
    with pytest.raises(GroupBroken):
        news.saver.save(STATE, step=9, tau=9.0)


def test_failed_saves_are_told_and_tried_again_an_interval_later(tmp_path: Path) -> None:
    store = Full(tmp_path)
    news = News(with_store(store))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    step = 0
    while not news.failed:
        news.train(step + 1, step + 1)
        step += 1
    assert "no space left" in news.failed[0].reason
    store.full = False
    news.train(step + 1, step + 30)
    news.saver.close(failed=False)
    assert news.saved


def test_a_save_that_training_cannot_go_on_without_is_an_error(tmp_path: Path) -> None:
    news = News(with_store(Full(tmp_path)))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    with pytest.raises(CheckpointFailed, match="no checkpoint of step 3: no space left"):
        news.saver.save(STATE, step=3, tau=3.0)


def test_one_step_is_saved_once(tmp_path: Path) -> None:
    news = News(Checkpointer(tmp_path))
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    for _ in range(3):
        news.saver.save(STATE, step=3, tau=3.0)
    assert len(news.saved) == 1


def test_without_a_place_nothing_is_saved() -> None:
    news = News(None)
    news.saver.begin(OneRank(1), step=0, tau=0.0)
    calls: list[Callable[[], Any]] = [
        lambda: news.train(1, 50),
        lambda: news.saver.save(STATE, step=3, tau=3.0),
        news.saver.abandon,
        lambda: news.saver.close(failed=False),
    ]
    for call in calls:
        call()
    assert news.saver.restore(STATE, 1) == 0
    assert news.saved == []
