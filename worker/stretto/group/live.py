"""A formed generation: collectives that a cut releases at once, from any thread and at any moment.

Threads and locks:
- the training thread starts operations, waits for futures and calls `abandon`;
- any thread calls `cut`: the session's when the controller says so, gloo's own or that of Completions when an
  operation failed, the beacon's when a peer's process has ended;
- `_lock` guards who cuts first, nothing else; it is never held while something is called;
- the lock of Operations guards what is in flight.
So a cut waits for no thread: it makes system calls that do not block, then completes futures. Their callbacks run in
the cutting thread. NCCL is aborted in a thread of the reaper's, since that waits for the GPU.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from stretto.group import nccl, sockets, torch_private
from stretto.group.build import Formed
from stretto.group.completions import Completions, Gpu
from stretto.group.failures import GroupBroken
from stretto.group.operations import Operations
from stretto.group.plan import GroupSettings, Plan
from stretto.group.reaper import Reaper
from stretto.group.watchdog import Watchdog

T = TypeVar("T")


class Group:
    """One generation's process group. Made by GroupLife.build; `abandon` it before the next build.

    A tensor that was given to an operation belongs to the group until its future completes. When the group breaks,
    never use that tensor again: an operation that is still dying may write to it.
    """

    def __init__(
        self,
        plan: Plan,
        formed: Formed,
        settings: GroupSettings,
        *,
        reaper: Reaper,
        watchdog: Watchdog,
        on_over: Callable[[], None],
        nccl_device: torch.device | None = None,
    ) -> None:
        self.generation = plan.generation
        self.rank = plan.rank
        self.world_size = plan.world_size
        # Tensors on this GPU go over NCCL; all others, CUDA tensors included where this is None, over gloo.
        self.nccl_device = nccl_device
        self._formed: Formed | None = formed
        self._watch = formed.watch
        self._sockets = formed.sockets
        self._settings = settings
        self._reaper = reaper
        self._watchdog = watchdog
        self._on_over = on_over
        self._lock = threading.Lock()
        self._cutting = False
        self._cut_done = threading.Event()
        self._nccl = formed.nccl
        completions = None
        if nccl_device is not None:
            completions = Completions(
                Gpu(nccl_device), settings, left=self._who_left, on_failure=self._operation_failed
            )
        self._operations = Operations(self._operation_failed, completions)
        formed.store.check_with(self.check)
        formed.watch.on_death(self.cut)

    @property
    def process_group(self) -> dist.ProcessGroup:
        """Torch's group, for DistributedDataParallel(process_group=...). Keep no reference beyond the generation."""
        if self._formed is None:
            raise GroupBroken(f"generation {self.generation} was abandoned")
        return self._formed.process_group

    @property
    def broken(self) -> GroupBroken | None:
        """Why the group is over, or None while it works."""
        return self._operations.broken

    def check(self) -> None:
        """Raise GroupBroken if the group is over."""
        if self.broken is not None:
            raise self._error()

    def all_reduce(
        self, tensor: Tensor, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM
    ) -> torch.futures.Future[Tensor]:
        """Start reducing `tensor` over all ranks, in place. May be handed to whoever needs a callable for it."""
        return self.start(lambda: dist.all_reduce(tensor, op, group=self.process_group, async_op=True), tensor)

    def broadcast(self, tensor: Tensor, source: int) -> torch.futures.Future[Tensor]:
        """Start overwriting `tensor` on every rank with that of rank `source`."""
        return self.start(lambda: dist.broadcast(tensor, source, group=self.process_group, async_op=True), tensor)

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> torch.futures.Future[Tensor]:
        """Start sending parts of `sent` to the ranks, in their order; theirs come to `received`, in their order."""

        def begin() -> dist.Work | None:
            arguments = (received, sent, received_sizes, sent_sizes)
            work: dist.Work | None = dist.all_to_all_single(*arguments, group=self.process_group, async_op=True)
            return work

        return self.start(begin, received)

    def barrier(self) -> torch.futures.Future[None]:
        """Start waiting for every rank to get here."""
        return self.start(lambda: dist.barrier(group=self.process_group, async_op=True), None)

    def start(self, begin: Callable[[], dist.Work | None], result: T) -> torch.futures.Future[T]:
        """Begin any operation that returns torch's work; the future gets `result`, or fails when the group breaks.

        result: the tensor or tensors that it writes; where they are says when it has ended.
        """

        def started() -> Any:
            work = begin()
            assert work is not None, "an asynchronous operation of a member returns its work"
            return work

        return self._operations.start(started, result)

    def wait(self, future: torch.futures.Future[T]) -> T:
        """Return the future's value, or raise GroupBroken in the training thread's own words."""
        with self.guarded():
            return future.wait()

    @contextlib.contextmanager
    def guarded(self) -> Iterator[None]:
        """Turn what goes wrong inside because the group broke into GroupBroken: put forward to step in here.

        Collectives that torch or a script calls by itself raise errors of torch's own, perhaps before anybody cut the
        group: when one of its connections has ended, the group is cut now.
        """
        try:
            yield
        except GroupBroken:
            raise self._error() from None
        except Exception as error:
            if not self._cut_done.is_set() and not self._cutting:
                if self._nccl is not None and isinstance(error, dist.DistBackendError):
                    self.cut(f"NCCL failed: {error}")
                elif self._connections_ended():
                    self.cut(f"a connection of the group ended: {error}")
            if not self._cutting:
                raise
            self._cut_done.wait(self._settings.stuck_limit_s)
            raise self._error() from error.with_traceback(None)

    def cut(self, reason: str) -> None:
        """End the group now, from any thread: whoever waits for one of its operations is released within milliseconds.

        The first call counts; a later one returns at once. Sockets first: an operation whose future alone had failed
        would run on until its timeout. NCCL's have no socket that would do: its part of the group is aborted, which
        another thread waits for. Then the futures: a message that was partly sent does not notice its socket.
        """
        self._cut(reason)

    def _cut(self, reason: str, *, linger_s: float = 0.0) -> None:
        with self._lock:
            if self._cutting:
                return
            self._cutting = True
        with self._watchdog.watch(f"the cut of generation {self.generation}"):
            gone = tuple(sorted(self._watch.gone()))
            sockets.cut(self._sockets)
            if self._nccl is not None:
                self._reaper.run(partial(nccl.abort, self._nccl, after_s=linger_s))
                self._nccl = None  # the last to hold it waits until it is destroyed
            self._operations.break_with(GroupBroken(f"generation {self.generation}: {reason}", gone))
            self._cut_done.set()

    def unreachable(self) -> dict[int, str]:
        """Ask every peer's process to answer; return who is gone or silent, and how we know.

        For reports, from any thread, before `abandon`: blocks for `roll_call_s` if somebody is silent. A peer whose
        training thread hangs answers; a frozen or dead process, or one behind a broken network, does not.
        """
        return self._watch.roll_call(self._settings.roll_call_s)

    def abandon(self) -> None:
        """Leave the generation for good, in milliseconds; called by the training thread, once it holds no future.

        Drop the model's DDP wrapper first. What torch still does in the background is destroyed by the reaper.
        """
        self._cut("abandoned", linger_s=self._settings.linger_s)
        if self._formed is None:
            return
        with self._watchdog.watch(f"abandoning generation {self.generation}"):
            remains = torch_private.forget_groups()
            remains.append(self._formed)
            self._formed = None
            self._watch.close()
            self._on_over()
            self._reaper.take(remains, self._operations.take_running())

    def _connections_ended(self) -> bool:
        ours = {each.inode for each in self._sockets}
        return len(sockets.find(lambda found: found.inode in ours)) < len(ours)

    def _who_left(self) -> str:
        """Says that a peer left the generation, if one has."""
        ranks = [rank for rank, number in self._watch.numbers().items() if number != self.generation]
        return f"rank {min(ranks)} has left the generation" if ranks else ""

    def _error(self) -> GroupBroken:
        """A fresh exception: one that is raised twice collects the tracebacks of both."""
        broken = self.broken
        assert broken is not None
        return GroupBroken(broken.reason, tuple(sorted(self._watch.gone())))

    def _operation_failed(self, error: Exception) -> None:
        self.cut(f"a collective failed: {error}")
