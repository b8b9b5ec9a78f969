"""The demonstration's loop: look, tell, act; and at the end, everything that was started is gone."""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rich.console import Console
from stretto_proto.v1 import jobs_pb2

from stretto.client import JobsClient
from stretto.demo.processes import Child, SupervisedController, start_agent
from stretto.demo.screen import Screen, summary_table
from stretto.demo.story import MAX_NODES, Deed, Scene, Story, View
from stretto.errors import Fatal, NotFound, Retry
from stretto.sample_log import used_exactly_once

JOB = "demo"
TARGET_TAU = 2000
ALLOWED_LOSS_OF_ACCURACY = 0.02
_SCRIPT = ("-m", "stretto.demo.train")
_REMOVE_LIMIT_S = 10.0
_REMOVE_INTERVAL_S = 0.1


@dataclass(frozen=True, slots=True)
class DemoSettings:
    # A step takes at least this long, so that a person can follow. Training takes about 40 s of the whole.
    min_step_s: float = 0.04
    # ... and at least this long while a node is on its way, or training would be over before it comes.
    slow_step_s: float = 0.4
    # How often the job is looked at.
    look_interval_s: float = 0.2
    # A machine on which the whole takes longer than this is too busy to show anything.
    limit_s: float = 600.0
    # At the end, for agents and the reference to end by themselves.
    end_limit_s: float = 60.0


class Demo:
    """One run, in a directory of its own."""

    def __init__(self, directory: Path, screen: Screen, settings: DemoSettings) -> None:
        self._directory = directory
        self._screen = screen
        self._settings = settings
        self._story = Story()
        self._seen = 0
        self._children: dict[str, Child] = {}
        self._began_s = time.monotonic()
        self._images = directory / "images.npz"
        self._result = directory / "result.json"
        self._sample_log = directory / "samples.jsonl"
        self._pace = directory / "pace"
        self._controller: SupervisedController | None = None

    def prepare(self) -> SupervisedController:
        """Start the controller, and unpack the images once for all workers."""
        unpacking = self._run("images", "--prepare-images")
        self._controller = SupervisedController(self._directory)
        code = unpacking.wait(self._settings.end_limit_s)
        if code != 0:
            raise Fatal(f"the images could not be prepared:\n{unpacking.log_tail()}")
        # Beside the story, at the lowest priority: on the same images, with the same schedule.
        self._run("reference", "--reference", "--result", str(self._directory / "reference.json"))
        return self._controller

    def play(self, client: JobsClient) -> None:
        """Until the job has ended. Raises Fatal if it fails, or takes too long."""
        while True:
            self.supervise()
            try:
                job = self._look(client)
                if job is not None and job.phase in ("succeeded", "failed"):
                    break
                view = _view(job)
                self._act(client, view)
                self._set_pace(view)
            except Retry:
                # The controller is away; it will be back, and training goes on meanwhile.
                pass
            self._check(client)
            time.sleep(self._settings.look_interval_s)
        if job.phase == "failed":
            raise Fatal(f"the job failed: {job.reason}\n{self._log_tails()}")
        if not self._story.told:
            self._screen.warn("training reached its target before the whole story was told: a slow machine")

    def _set_pace(self, view: View) -> None:
        """Let training wait a little for nodes that were started and are not there yet."""
        started = [
            name for name, child in self._children.items() if name.startswith("node-") and child.exit_code is None
        ]
        awaited = not set(started) <= {*view.members, *view.waiting} and len(started) > 1
        step_s = self._settings.slow_step_s if awaited else self._settings.min_step_s
        temporary = self._pace.with_suffix(".incomplete")
        temporary.write_text(str(step_s))
        temporary.replace(self._pace)

    def supervise(self) -> None:
        """Start the controller again if it is gone; training does not notice."""
        assert self._controller is not None
        if self._controller.ensure():
            self._screen.warn("the controller was gone; it has been started again, training goes on meanwhile")

    def _look(self, client: JobsClient) -> jobs_pb2.Job | None:
        """The job, shown with its new events; None before there is one."""
        try:
            job = client.get(JOB)
        except NotFound:
            return None
        for event in client.events(JOB, after_sequence=self._seen):
            self._seen = event.sequence
            self._screen.event(event)
        self._screen.show(job)
        return job

    def _act(self, client: JobsClient, view: View) -> None:
        while (scene := self._story.due(view)) is not None:
            self._do(client, scene)
            self._story.done()
            if scene.text:
                self._screen.tell(scene.text)

    def _do(self, client: JobsClient, scene: Scene) -> None:
        assert self._controller is not None
        match scene.deed:
            case Deed.START:
                self._children[scene.target] = start_agent(
                    scene.target,
                    endpoint=self._controller.endpoint,
                    job=JOB,
                    script=(*_SCRIPT, *self._training_options()),
                    nodes=f"1:{MAX_NODES}",
                    directory=self._directory,
                )
            case Deed.SCALE:
                client.scale(JOB, int(scene.target))
            case Deed.KILL:
                self._children[scene.target].kill()
            case Deed.DRAIN:
                self._children[scene.target].send(signal.SIGTERM)

    def _training_options(self) -> list[str]:
        return [
            *("--checkpoint", str(self._directory / "checkpoints"), "--result", str(self._result)),
            *("--images", str(self._images), "--pace", str(self._pace)),
            *("--sample-log", str(self._sample_log)),
        ]

    def _run(self, name: str, *options: str) -> Child:
        command = ["nice", "-n", "19"] if name == "reference" else []
        command += [sys.executable, *_SCRIPT, "--images", str(self._images), *options]
        self._children[name] = Child(command, self._directory / f"{name}.log", {"OMP_NUM_THREADS": "1"})
        return self._children[name]

    def _check(self, client: JobsClient) -> None:
        """Raise Fatal where nothing more can come of it."""
        if time.monotonic() - self._began_s > self._settings.limit_s:
            raise Fatal(f"not done after {self._settings.limit_s:.0f} s\n{self._log_tails()}")
        agents = [child for name, child in self._children.items() if name.startswith("node-")]
        if agents and all(child.exit_code is not None for child in agents) and not self._result.exists():
            raise Fatal(f"every agent has ended, but training has not\n{self._log_tails()}")

    def accuracies(self) -> tuple[float, float]:
        """Of the elastic training, and of the single-worker reference."""
        deadline_s = time.monotonic() + self._settings.end_limit_s
        while self._children["reference"].exit_code is None and time.monotonic() < deadline_s:
            self.supervise()
            time.sleep(self._settings.look_interval_s)
        values = []
        for path in (self._result, self._directory / "reference.json"):
            if not path.exists():
                raise Fatal(f"{path.name} was not written\n{self._log_tails()}")
            values.append(float(json.loads(path.read_text())["accuracy"]))
        return values[0], values[1]

    def generations(self, client: JobsClient) -> Sequence[jobs_pb2.GenerationSummary]:
        """The job's history, also from a controller that has to come back first."""
        deadline_s = time.monotonic() + self._settings.end_limit_s
        while True:
            self.supervise()
            try:
                return client.generations(JOB)
            except Retry as error:
                if time.monotonic() > deadline_s:
                    raise Fatal(f"the controller did not come back: {error}") from error
                time.sleep(self._settings.look_interval_s)

    def samples_used_exactly_once(self) -> bool:
        """Whether each finished epoch used each sample once, by the log of committed steps."""
        return used_exactly_once(self._sample_log.read_text().splitlines())

    def close(self) -> None:
        """End everything that was started."""
        for child in self._children.values():
            child.kill()
        if self._controller is not None:
            self._controller.child.kill()

    def _log_tails(self) -> str:
        tails = [f"--- {name}\n{child.log_tail()}" for name, child in self._children.items()]
        return "\n".join([*tails, f"all logs are in {self._directory}"])


def run_demo(*, keep: bool, plain: bool, settings: DemoSettings | None = None) -> int:
    """Tell the story; returns the exit code: 0 if the accuracy is what one worker would have reached."""
    # Where nobody's terminal sets the width, tables need more than the usual 80 columns.
    console = Console(width=None if sys.stdout.isatty() else 120, soft_wrap=True)
    with ExitStack() as stack:
        stack.enter_context(_signals_as_exit())
        directory = Path(tempfile.mkdtemp(prefix="stretto-demo-"))
        remove = stack.enter_context(ExitStack())
        remove.callback(_remove, directory)
        screen = Screen(console, plain=plain, target_tau=TARGET_TAU)
        demo = Demo(directory, screen, settings or DemoSettings())
        stack.callback(demo.close)
        try:
            controller = demo.prepare()
            console.print(f"page     {controller.url}/\nmetrics  {controller.url}/metrics", highlight=False)
            client = stack.enter_context(JobsClient(controller.endpoint))
            with screen:
                demo.play(client)
            code = _conclude(console, demo, client)
        except Fatal as error:
            console.print(f"[red]the demonstration failed:[/] {error}", highlight=False, markup=True)
            # For its logs.
            remove.pop_all()
            return 1
        if keep:
            _serve_until_interrupt(console, demo, controller.url)
        return code


def _remove(directory: Path) -> None:
    """What was just killed may still be writing there."""
    until_s = time.monotonic() + _REMOVE_LIMIT_S
    while directory.exists() and time.monotonic() < until_s:
        shutil.rmtree(directory, ignore_errors=True)
        time.sleep(_REMOVE_INTERVAL_S)


def _conclude(console: Console, demo: Demo, client: JobsClient) -> int:
    accuracy, reference = demo.accuracies()
    console.print(summary_table(demo.generations(client)))
    once = demo.samples_used_exactly_once()
    console.print(
        f"every sample of each finished epoch was used exactly once: {'yes' if once else 'NO'}", highlight=False
    )
    good = once and accuracy >= reference - ALLOWED_LOSS_OF_ACCURACY
    verdict = "[green]as good as one worker[/]" if good else "[red]too low[/]"
    console.print(
        f"test accuracy {accuracy:.1%}; one worker alone, same schedule: {reference:.1%}: {verdict}", highlight=False
    )
    return 0 if good else 1


def _view(job: jobs_pb2.Job | None) -> View:
    if job is None:
        return View()
    current = job.progress.generation == job.generation.number
    return View(
        members=tuple(member.node_id for member in job.generation.members),
        steps=job.progress.generation_steps if current else 0,
        waiting=tuple(node.node_id for node in job.nodes if node.state == "spare"),
    )


def _serve_until_interrupt(console: Console, demo: Demo, url: str) -> None:
    console.print(f"still serving {url}/ until Ctrl-C", highlight=False)
    try:
        while True:
            demo.supervise()
            time.sleep(1.0)
    except KeyboardInterrupt:
        console.print("ended")


@contextmanager
def _signals_as_exit() -> Iterator[None]:
    """SIGTERM, and a terminal that is closed, unwind as Ctrl-C does; further ones do not disturb the tidying up."""
    own = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    # nohup, and a shell that starts it in the background, have some ignored.
    numbers = [number for number in own if signal.getsignal(number) is not signal.SIG_IGN]

    def leave(number: int, frame: FrameType | None) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    former = {number: signal.signal(number, leave) for number in numbers}
    try:
        yield
    finally:
        for number, handler in former.items():
            signal.signal(number, handler)
