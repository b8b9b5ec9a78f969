"""The loop of `stretto top`: ask the controller, draw, read keys, and do what they say once it is confirmed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import replace

from rich.console import Console, Group
from rich.live import Live
from stretto_proto.v1 import jobs_pb2

from stretto.client import JobsClient
from stretto.errors import StrettoError
from stretto.top.keys import next_keys, single_keys
from stretto.top.view import SORTS, Picture, draw, keys_line, ordered

_KEPT_RATES = 60


class Screen:
    """What is shown, and the question that waits for an answer."""

    def __init__(self, client: JobsClient) -> None:
        self._client = client
        self._rates: dict[str, deque[float]] = {}
        self._confirmed: Callable[[], jobs_pb2.Job] | None = None
        self.picture = Picture()

    def refresh(self) -> None:
        """Ask the controller. While it does not answer the latest picture stays, and says so."""
        try:
            jobs = self._client.list()
            names = {job.name for job in jobs}
            for job in jobs:
                if job.name not in self._rates:
                    earlier = self._client.points(job.name).progress_rate[-_KEPT_RATES:]
                    self._rates[job.name] = deque(earlier, maxlen=_KEPT_RATES)
                self._rates[job.name].append(job.progress_rate)
            for name in self._rates.keys() - names:
                del self._rates[name]
            selected = self.picture.selected if self.picture.selected in names else ""
            if not selected and jobs:
                selected = ordered(jobs, self.picture.sort)[0].name
            events = self._client.events(selected) if selected else ()
        except StrettoError as error:
            self._tell(str(error), failed=True)
            return
        if self.picture.failed:
            self._tell("")
        rates = {name: tuple(values) for name, values in self._rates.items()}
        self.picture = replace(self.picture, jobs=jobs, rates=rates, events=events, selected=selected)

    def press(self, key: str) -> bool:
        """Do what a key says; False when it is the end."""
        if self._confirmed is not None:
            self._answer(key)
            return True
        if key == "q":
            return False
        names = [job.name for job in ordered(self.picture.jobs, self.picture.sort)]
        if key in ("up", "down", "j", "k") and names:
            here = names.index(self.picture.selected) if self.picture.selected in names else 0
            there = here + (1 if key in ("down", "j") else -1)
            self.picture = replace(self.picture, selected=names[there % len(names)], events=())
        elif key == "s":
            following = SORTS[(SORTS.index(self.picture.sort) + 1) % len(SORTS)]
            self.picture = replace(self.picture, sort=following)
        elif key in ("+", "=", "-"):
            self._ask_scale(1 if key in ("+", "=") else -1)
        elif key == "p":
            self._ask_pause()
        elif key == "c" and (job := self._chosen()) is not None:
            name = job.name
            self._ask(f"Write a checkpoint of {name} after this step?", lambda: self._client.checkpoint(name))
        return True

    def _chosen(self) -> jobs_pb2.Job | None:
        return next((job for job in self.picture.jobs if job.name == self.picture.selected), None)

    def _ask_scale(self, more: int) -> None:
        if (job := self._chosen()) is not None:
            name, nodes = job.name, job.desired_nodes + more
            self._ask(
                f"Scale {name} from {job.desired_nodes} to {nodes} nodes?", lambda: self._client.scale(name, nodes)
            )

    def _ask_pause(self) -> None:
        if (job := self._chosen()) is not None:
            name = job.name
            if job.phase == "paused":
                self._ask(f"Resume {name}?", lambda: self._client.resume(name))
            else:
                self._ask(f"Pause {name}? It saves, and keeps its nodes.", lambda: self._client.pause(name))

    def _ask(self, question: str, act: Callable[[], jobs_pb2.Job]) -> None:
        self._confirmed = act
        self.picture = replace(self.picture, asking=f"{question} y/n", told="")

    def _answer(self, key: str) -> None:
        act, self._confirmed = self._confirmed, None
        self.picture = replace(self.picture, asking="")
        if key not in ("y", "Y") or act is None:
            self._tell("nothing was changed")
            return
        try:
            job = act()
        except StrettoError as error:
            self._tell(str(error), failed=True)
        else:
            self._tell(f"{job.name}: {job.reason}" if job.reason else f"{job.name}: done")

    def _tell(self, text: str, *, failed: bool = False) -> None:
        self.picture = replace(self.picture, told=text, failed=failed)


def show_once(client: JobsClient, console: Console) -> None:
    """One picture, for scripts. Raises StrettoError when the controller does not answer."""
    jobs = client.list()
    rates = {job.name: tuple(client.points(job.name).progress_rate) for job in jobs}
    # Where there is no terminal everything is as wide as in one of 80 columns, or as COLUMNS says.
    console.print(draw(Picture(jobs=jobs, rates=rates), console.width))


def watch(client: JobsClient, console: Console, interval_s: float) -> None:
    """Until q, or Ctrl-C."""
    screen = Screen(client)

    def drawn() -> Group:
        return Group(draw(screen.picture, console.width, console.height), "", keys_line(screen.picture.sort))

    with single_keys(), Live(console=console, screen=True, auto_refresh=False) as live:
        while True:
            screen.refresh()
            live.update(drawn(), refresh=True)
            for key in next_keys(interval_s):
                if not screen.press(key):
                    return
            live.update(drawn(), refresh=True)
