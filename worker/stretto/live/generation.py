"""One generation as the training thread lives it: its group, its state, its steps, and how it ends."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from types import MappingProxyType, TracebackType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from stretto_proto.v1 import training_pb2 as pb
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed re-exports it without saying so
from torch.nn.parallel import DistributedDataParallel

from stretto.adascale import AdaScale
from stretto.group import Group, GroupBroken
from stretto.live.buffers import Buffers
from stretto.process import end_quickly_after
from stretto.progress_report import StepFigures
from stretto.transfer import TransferFailed, load, synchronise

if TYPE_CHECKING:
    from stretto.live.session import LiveSession

_log = logging.getLogger(__name__)

# A peer that did not answer so often, one heartbeat after the other, is gone.
_SILENCES = 3


class Generation:
    """A place among the live workers, from the moment when the group is built.

    A context manager: when the group breaks inside the block (a peer died, the network failed, the controller cut
    it), the block ends without an error, and `LiveSession.enter` waits for the next generation. The order is:
    `synchronise`, `wrap`, then one `step` after the other; see the example in `stretto.live`.
    """

    def __init__(self, session: LiveSession, assignment: pb.WorkerAssignment, group: Group) -> None:
        self.number = assignment.generation
        self.rank = group.rank
        self.world_size = group.world_size
        self.reason = assignment.reason
        # S, as the controller owns it; None while it does not know the batch sizes.
        self.scale: float | None = assignment.scale or None
        # Nobody had a state worth keeping: it began with a checkpoint, or from nothing.
        self.restored = assignment.source_rank < 0
        # All ranks have agreed to leave after the latest step.
        self.leaving = False
        # ... or to write a checkpoint of it.
        self.saving = False
        self._session = session
        self._assignment = assignment
        self._group = group
        self._clock = session.clock
        self._clock.enter(time.monotonic())
        self._optimizer: AdaScale | None = None
        self._buffers: Buffers | None = None
        self._samples = 0
        self._silences: dict[int, int] = {}

    def __enter__(self) -> Generation:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> bool:
        if error is None:
            return False
        if isinstance(error, GroupBroken):
            self._break(error.reason, error.unreachable)
            return True
        if isinstance(error, TransferFailed):  # another rank refused the state, and ends by an error of its own
            self._break(error.reason, ())
            return True
        if isinstance(error, Exception):
            end_quickly_after(error)
        return False

    def synchronise(self, state: Mapping[str, Any], *, restore: Callable[[], int] | None = None) -> int:
        """Give every rank the state of the most advanced one, in place; returns the step that it stands at.

        state: by name, objects with `state_dict` and `load_state_dict` (the module itself, not its DDP wrapper), the
        same names on all ranks. restore(): called on rank 0 where nobody has a state worth keeping; it loads the
        newest checkpoint into these objects and returns its step, or 0 if there is none. Raises GroupBroken, and then
        the objects are as they were.
        """
        place = self._assignment
        step = self._session.state.version.step
        if not place.in_step:
            source = max(place.source_rank, 0)
            if place.source_rank < 0 and self.rank == 0:
                # Without a checkpoint, what this rank holds is better than nothing, stale as it may be.
                step = (restore() if restore is not None else 0) or step
            if self.world_size > 1:
                tree = {"step": step, "state": {name: value.state_dict() for name, value in state.items()}}
                received = synchronise(self._group, tree, source)
                if received is not None:
                    step = received["step"]
                    load(state, received["state"])
        self._session.synchronised(step)
        return step

    def wrap(
        self,
        model: torch.nn.Module,
        optimizer: Any = None,
        *,
        ddp: Mapping[str, Any] = MappingProxyType({}),
        **rebind: Any,
    ) -> torch.nn.Module:
        """The model as it is to be called in this generation; an AdaScale optimizer goes on with it.

        Keep it no longer than the generation. ddp: options of DistributedDataParallel. rebind: options of
        `AdaScale.rebind`, such as another batch_size.
        """
        wrapped = model
        options = dict(ddp)
        sends = options.pop("broadcast_buffers", None) in (None, True) and options.pop("forward_sync_buffers", True)
        self._buffers = Buffers(model, self._from_first if sends and self.world_size > 1 else None)
        if self.world_size > 1:
            device = next(model.parameters()).device
            with self._group.guarded():
                wrapped = DistributedDataParallel(
                    model,
                    device_ids=[device.index] if device.type == "cuda" else None,
                    process_group=self._group.process_group,
                    init_sync=False,
                    forward_sync_buffers=False,
                    **options,
                )
            self._buffers.attach(wrapped)
            if not isinstance(optimizer, AdaScale):
                wrapped.register_comm_hook(self, _average)
        if isinstance(optimizer, AdaScale):
            self._optimizer = optimizer
            optimizer.zero_grad()
            optimizer.rebind(wrapped, all_reduce=self.all_reduce if self.world_size > 1 else None, **rebind)
        self._clock.step(time.monotonic())
        return wrapped

    def no_sync(self, wrapped: torch.nn.Module) -> Any:
        """The context in which a micro-batch that is not the last of its step runs forward and backward."""
        return wrapped.no_sync() if isinstance(wrapped, DistributedDataParallel) else nullcontext()

    def all_reduce(
        self, tensor: Tensor, /, op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM, *, more: bool = False
    ) -> torch.futures.Future[Tensor]:
        """Start reducing a tensor over the ranks, in place; the future fails when the generation breaks.

        more: this rank has work of its own to do before it waits for the result, as in the middle of a backward.
        """
        if more:
            return self._group.all_reduce(tensor, op)
        return self._timed(lambda: self._group.all_reduce(tensor, op))

    def broadcast(self, tensor: Tensor, source: int) -> torch.futures.Future[Tensor]:
        """Start overwriting a tensor with that of rank `source`; the future fails when the generation breaks."""
        return self._timed(lambda: self._group.broadcast(tensor, source))

    def all_to_all(
        self, received: Tensor, sent: Tensor, received_sizes: list[int], sent_sizes: list[int]
    ) -> torch.futures.Future[Tensor]:
        """Start giving each rank its part of a tensor; the future fails when the generation breaks."""
        return self._timed(lambda: self._group.all_to_all(received, sent, received_sizes, sent_sizes))

    def _timed(self, begin: Callable[[], torch.futures.Future[Tensor]]) -> torch.futures.Future[Tensor]:
        operation = self._clock.begin(time.monotonic())
        future = begin()
        future.add_done_callback(lambda _: self._clock.end(operation, time.monotonic()))
        return future

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Of each rank, by rank: its node's id, and which of that node's workers it is, from 0."""
        seen: dict[str, int] = {}
        found = []
        for place in self._assignment.places:
            index = seen.get(place.node_id, 0)
            seen[place.node_id] = index + 1
            found.append((place.node_id, index))
        return tuple(found)

    @property
    def in_step(self) -> bool:
        """All ranks held the same state when it began, so nothing was sent."""
        return self._assignment.in_step

    def wait(self, future: torch.futures.Future[Tensor]) -> Tensor:
        """The future's value; GroupBroken when the generation breaks."""
        return self._group.wait(future)

    def guarded(self) -> Any:
        """A context that turns torch's own errors about a broken group into GroupBroken; forward to step go inside."""
        return self._group.guarded()

    def wishes(self) -> list[float]:
        """What this rank wants after the step under way: to leave, to save. Attach it to the step's all-reduce."""
        session = self._session
        leave = session.state.leave
        # The controller says when, and whether others hold the state; while it is away, nobody can know.
        alone = session.draining and not session.connected
        saves = session.take_save_wish() or alone or (leave is not None and leave.save)
        return [float(leave is not None or alone), float(saves)]

    def agree(self, extra: Sequence[float] = ()) -> list[float]:
        """Exchange the wishes in a small all-reduce of their own; returns the sums, those of `extra` last.

        For loops whose optimizer is not AdaScale. Call it before the optimizer's step.
        """
        values = torch.tensor([*self.wishes(), *extra], dtype=torch.float64)
        if self.world_size > 1:
            with self.guarded():
                values = self.wait(self.all_reduce(values))
        return [float(value) for value in values]

    def stepped(self, agreed: Sequence[float], figures: StepFigures | None = None) -> None:
        """Count a step that this rank has just done, the all-reduce in which the ranks agreed having succeeded.

        The step before it is committed by this; `figures`, if given, are reported once this one is.
        """
        if self._buffers is not None:
            self._buffers.keep()
        self.leaving, self.saving = agreed[0] > 0, agreed[1] > 0
        self._session.stepped(figures)
        self._clock.step(time.monotonic())

    def step(self, optimizer: AdaScale, *, loss: float, samples: int) -> None:
        """Take one AdaScale step in which the ranks also agree whether to leave after it, and report it.

        loss: this rank's mean, weighted by the `samples` that it used; the report has the mean over the ranks.
        """
        started_s = time.monotonic()
        with self.guarded():
            optimizer.set_agreement([*self.wishes(), loss * samples, float(samples)])
            base_lr, tau_before = tuple(float(group["lr"]) for group in optimizer.param_groups), optimizer.tau
            optimizer.step()
        optimizer.zero_grad()
        *agreed, loss_sum, used = optimizer.agreed
        self._samples += int(used)
        figures = StepFigures(
            step=self._session.state.version.step + 1,
            tau=optimizer.tau,
            tau_before=tau_before,
            gain=optimizer.gain,
            scale=optimizer.scale,
            loss=loss_sum / used if used else 0.0,
            effective_lr=tuple(optimizer.effective_lr),
            base_lr=base_lr,
            variance=optimizer.variance,
            sqr_norm=optimizer.sqr_norm,
            samples=self._samples,
            epoch=0,
            step_s=time.monotonic() - started_s,
        )
        self.stepped(agreed, figures)

    def commit(self) -> None:
        """Make sure that every rank has done the latest step. All ranks call it, before a checkpoint or the end."""
        state = self._session.state
        if self.world_size > 1 and state.committed_step < state.version.step:
            with self.guarded():
                self.wait(self.all_reduce(torch.zeros(1)))
        self._session.committed()

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """The sums over the ranks of what each gives; all ranks call it."""
        values = torch.tensor(list(numbers), dtype=torch.int64)
        if self.world_size > 1:
            with self.guarded():
                values = self.wait(self.all_reduce(values))
        return [int(value) for value in values]

    def leave(self) -> None:
        """Go on to the next generation; all ranks have agreed on it. Its last step is reported as one of this."""
        self.commit()
        self._clock.stop()
        self._session.ask(failed=False)

    def finish(self, tau: float) -> None:
        """The job is done, on all ranks."""
        self.commit()
        self._clock.stop()
        self._session.finish(tau)

    def check_equal(self, fingerprint: int) -> bool:
        """Whether all ranks gave the same number, in 63 bits."""
        if self.world_size == 1:
            return True
        pair = torch.tensor([fingerprint, -fingerprint], dtype=torch.int64)
        with self.guarded():
            pair = self.wait(self.all_reduce(pair, dist.ReduceOp.MAX))
        return bool(pair[0] == -pair[1])

    def suspect(self) -> None:
        """Ask the peers whether they are there; give the generation up if one was silent three times in a row.

        For the heartbeat's thread, at each beat while nothing moves; blocks for `roll_call_s` at most. A peer that is
        busy, and whose process has no time to answer at once, is not gone.
        """
        found = self._group.unreachable()
        self._silences = {rank: self._silences.get(rank, 0) + 1 for rank in found}
        gone = {rank: found[rank] for rank, times in self._silences.items() if times >= _SILENCES}
        if gone and self._group.broken is None:
            self._session.suspect(self.number, tuple(gone))
            self._group.cut("; ".join(f"rank {rank} {how}" for rank, how in gone.items()))

    @property
    def broken(self) -> bool:
        return self._group.broken is not None

    def close(self) -> None:
        """Give the group back. Not while an error of this generation is handled: its frames hold the wrapped model."""
        if self._optimizer is not None:
            self._optimizer.unbind()
            self._optimizer.zero_grad()
        self._group.abandon()

    def _break(self, reason: str, unreachable: tuple[int, ...]) -> None:
        """First the report, since others wait for it; then the tidying up."""
        self._clock.stop()
        self._session.ask(failed=True, unreachable=unreachable)
        _log.info("generation %d broke: %s", self.number, reason)
        if self._buffers is not None:
            self._buffers.restore()

    def _from_first(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, on every rank."""
        operation = self._clock.begin(time.monotonic())
        try:
            return self._group.wait(self._group.broadcast(tensor, 0))
        finally:
            self._clock.end(operation, time.monotonic())


def _average(generation: Generation, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """The mean over the ranks, through the group's own futures: a cut ends them at once."""
    mean = bucket.buffer().div_(generation.world_size)
    return generation.all_reduce(mean, more=not bucket.is_last())
