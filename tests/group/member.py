"""A worker process of the group tests: jobs run in its main thread, news comes in a session thread."""

# Annotations stay objects here: DDP compares those of a communication hook with its own types.

import contextlib
import faulthandler
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from stretto.group import (
    BuildFailed,
    Group,
    GroupBroken,
    GroupLife,
    GroupSettings,
    Member,
    Plan,
    Superseded,
    build,
    store,
)
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed re-exports it without saying so
from torch.nn.parallel import DistributedDataParallel

Message = dict[str, Any]


class Worker:
    """Answers every job with one event; each carries the monotonic time, which all processes share."""

    device = torch.device("cpu")  # of the tensors
    nccl_device: torch.device | None = None

    def __init__(self, pipe: Connection, settings: GroupSettings) -> None:
        self._pipe = pipe
        self._send_lock = threading.Lock()
        self._jobs: queue.Queue[Message] = queue.Queue()
        self._newest = 0
        self._life = GroupLife(
            "tests", "127.0.0.1", settings=settings, on_stuck=self._stuck, nccl_device=self.nccl_device
        )
        self._group: Group | None = None
        ports = self._life.serve()
        self._tell("serving", store=ports.store, preflight=ports.preflight)
        threading.Thread(target=self._session, daemon=True).start()

    def run(self) -> None:
        while True:
            job = self._jobs.get()
            action = job.pop("do")
            if action == "exit":
                self._tell("exited", clean=self._life.close(job["timeout_s"]))
                return
            getattr(self, f"do_{action}")(**job)

    def do_build(self, generation: int, rank: int, members: list[tuple[int, int]], leader: int, fault: str) -> None:
        plan = Plan(generation, rank, tuple(Member("127.0.0.1", *ports) for ports in members), leader)
        began_s = time.monotonic()
        with injected(fault):
            try:
                self._group = self._life.build(plan, cancelled=lambda: self._newest > generation)
            except Superseded as superseded:
                self._tell("superseded", reason=str(superseded), began_s=began_s)
            except BuildFailed as failed:
                self._tell("failed", reason=failed.reason, unreachable=failed.unreachable, began_s=began_s)
            else:
                self._tell("built", began_s=began_s)

    def do_reduce(self, numel: int, in_flight: int, rounds: int) -> None:
        """All-reduce `rounds` times, `in_flight` at a time; rounds = 0 is until the group breaks."""
        group = self._held()
        expected = sum(range(1, group.world_size + 1))
        done = 0

        def steps() -> None:
            nonlocal done
            while not rounds or done < rounds:
                own = float(group.rank + 1)
                tensors = [torch.full((numel,), own, device=self.device) for _ in range(in_flight)]
                futures = [group.all_reduce(tensor) for tensor in tensors]
                for future in futures:
                    total = group.wait(future)
                    assert bool((total == expected).all()), f"sum {total[:4]} where {expected} was expected"
                done += 1

        self._report("reduced", steps, lambda: done)

    def do_train(self, steps: int, width: int, layers: int) -> None:
        """Train with DDP, each bucket and a scalar reduced through the group; 0 steps is until it breaks."""
        group = self._held()
        torch.manual_seed(1)
        model = torch.nn.Sequential(*(torch.nn.Linear(width, width) for _ in range(layers))).to(self.device)
        wrapped = DistributedDataParallel(model, process_group=group.process_group, init_sync=False, bucket_cap_mb=1)
        wrapped.register_comm_hook(group, all_reduce_bucket)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.001, momentum=0.9)
        done = 0

        def train() -> None:
            nonlocal done
            while not steps or done < steps:
                optimizer.zero_grad()
                loss = wrapped(torch.randn(4, width, device=self.device)).square().mean()
                loss.backward()
                group.wait(group.all_reduce(torch.tensor([1.0], dtype=torch.float64)))
                optimizer.step()
                done += 1

        self._report("trained", train, lambda: done)

    def do_operation(self, name: str) -> None:
        """Wait in one operation that the others do not join."""
        group = self._held()
        begin: dict[str, Callable[[], torch.futures.Future[Any]]] = {
            "all_reduce": lambda: group.all_reduce(torch.ones(4, device=self.device)),
            "broadcast": lambda: group.broadcast(torch.ones(4, device=self.device), source=1 - group.rank),
            "barrier": group.barrier,
        }
        self._report("done", lambda: group.wait(begin[name]()), lambda: 0)

    def do_fork(self) -> None:
        """Leave a child behind that lives on when this process is killed, as a DataLoader's may."""
        child = os.fork()
        if child == 0:
            signal.pause()
        self._tell("done", child=child)

    def do_subgroup(self) -> None:
        """Make a process group as a script would, with torch's own means, and reduce the ranks plus 1 over it."""
        subgroup = dist.new_group(list(range(self._held().world_size)))
        total = torch.tensor([float(self._held().rank + 1)])
        dist.all_reduce(total, group=subgroup)
        self._tell("done", total=float(total))

    def do_abandon(self) -> None:
        self._held().abandon()
        self._group = None
        self._tell("abandoned")

    def do_figures(self) -> None:
        self._life._reaper.wait(60)
        with open("/proc/self/status", encoding="ascii") as status:
            resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
        self._tell(
            "figures",
            threads=len(os.listdir("/proc/self/task")),
            descriptors=len(os.listdir("/proc/self/fd")),
            resident_mb=resident / 1024,
            firings=self._life.watchdog_firings,
            environment={name: os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "MASTER_PORT")},
            excepthook=sys.excepthook.__qualname__,
        )

    def _report(self, event: str, work: Callable[[], object], progress: Callable[[], int]) -> None:
        group = self._held()
        try:
            with group.guarded():
                work()
        except GroupBroken as broken:
            released_s = time.monotonic()
            self._tell(
                "broken", reason=broken.reason, unreachable=broken.unreachable, done=progress(), released_s=released_s
            )
        else:
            self._tell(event, done=progress())

    def _held(self) -> Group:
        assert self._group is not None
        return self._group

    def _session(self) -> None:
        while True:
            try:
                message = self._pipe.recv()
            except EOFError:
                os._exit(0)  # the test ended
            if message["do"] == "newest":
                self._newest = message["generation"]
            elif message["do"] == "cut":
                began_s = time.monotonic()
                self._life.cut(message["generation"], message["reason"])
                self._tell("cut", began_s=began_s)
            elif message["do"] == "unreachable":
                self._tell("unreachable", who=self._held().unreachable())
            else:
                self._jobs.put(message)

    def _stuck(self, section: str) -> None:
        self._tell("stuck", section=section)

    def _tell(self, event: str, **facts: Any) -> None:
        with self._send_lock:
            self._pipe.send({"event": event, "at_s": time.monotonic()} | facts)


def all_reduce_bucket(group: Group, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return group.all_reduce(bucket.buffer())


@contextlib.contextmanager
def injected(fault: str) -> Iterator[None]:
    """Signal ourselves at a point inside init: `before_set:KILL`, `after_set:STOP`, `at_get_2:KILL` (second get)."""
    point, _, name = fault.partition(":")
    if not point:
        yield
        return
    original = store.FormationStore
    number = int(signal.Signals[f"SIG{name}"])
    gets = 0

    class Faulty(original):  # type: ignore[misc, valid-type]  # the class is a variable here
        def set(self, key: str, value: Any) -> None:
            if point == "before_set":
                os.kill(os.getpid(), number)
            super().set(key, value)
            if point == "after_set":
                os.kill(os.getpid(), number)

        def get(self, key: str) -> bytes:
            nonlocal gets
            gets += 1
            value: bytes = super().get(key)
            if point == f"at_get_{gets}":
                os.kill(os.getpid(), number)
            return value

    with mock.patch.object(build, "FormationStore", Faulty):
        yield


def main(pipe: Connection, settings: GroupSettings, worker: type[Worker] = Worker) -> None:
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker(pipe, settings).run()
