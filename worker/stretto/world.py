"""The ranks that train together where they never change: in restart mode, or without a controller.

The same interface as a live `Generation`, so that one loop serves both: there is one world per process.
"""

from __future__ import annotations

import atexit
import datetime
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from stretto.adascale import AdaScale
from stretto.broadcast import broadcast
from stretto.checkpoint.peers import present_peers
from stretto.errors import Fatal
from stretto.process import end_quickly_after
from stretto.progress_report import StepFigures
from stretto.session import Session
from stretto.unattended import Unattended

_LOOK_S = 0.01  # how often one who waits for other ranks asks the store


class World:
    """This process's place among the ranks; a context manager that tells the session when training breaks."""

    def __init__(
        self,
        session: Session | Unattended,
        *,
        device: torch.device,
        backend: str | None,
        timeout_s: float,
        on_commit: Callable[[int], None],
    ) -> None:
        """Meet the other ranks as torchrun's environment says, or be the only one where it says nothing.

        A process group that the script has made already is used as it is.
        """
        self._session = session
        self._device = device
        self._on_commit = on_commit
        self.leaving = self.saving = False
        # A failure ends the process.
        self.broken = False
        # It began with a checkpoint, or from nothing.
        self.restored = True
        launched = all(name in os.environ for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"))
        if not dist.is_initialized() and launched:
            dist.init_process_group(
                backend or ("nccl" if device.type == "cuda" else "gloo"),
                timeout=datetime.timedelta(seconds=timeout_s),
            )
            atexit.register(_leave)
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.world_size = dist.get_world_size() if dist.is_initialized() else 1
        self._step = 0
        self._meetings: Counter[str] = Counter()

    @property
    def number(self) -> int:
        return self._session.generation

    @property
    def scale(self) -> float | None:
        return self._session.scale

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """Of each rank, by rank: its node, as torchrun numbers them, and its number there. All ranks ask together."""
        numbers = torch.zeros(self.world_size, 2, dtype=torch.int64)
        numbers[self.rank, 0] = int(os.environ.get("GROUP_RANK", 0))
        numbers[self.rank, 1] = int(os.environ.get("LOCAL_RANK", self.rank))
        found = torch.tensor(self.add_up(numbers.flatten().tolist())).view(-1, 2)
        return tuple((f"{node:08d}", worker) for node, worker in found.tolist())

    def __enter__(self) -> World:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Training is over for this process; where its agent wants it gone anyway, at once."""
        if isinstance(error, Exception):
            self._session.failed()
            end_quickly_after(error)

    def synchronise(self, state: Mapping[str, Any], *, restore: Callable[[], int] | None = None) -> int:
        """Have rank 0 restore the newest checkpoint, and give its state to all; returns the step."""
        step, error = 0, None
        if self.rank == 0 and restore is not None:
            try:
                step = restore()
            except Exception as failure:  # noqa: BLE001  (raised again below, on all ranks)
                error = failure
        if self.world_size > 1:
            saved = {name: value.state_dict() for name, value in state.items()} if step else None
            there = self._wire()
            step, why, saved = broadcast([step, error and f"{type(error).__name__}: {error}", saved], there)
            if why is not None and error is None:
                error = Fatal(f"rank 0 could not restore the newest checkpoint: {why}")
            if saved is not None and self.rank > 0:
                for name, value in state.items():
                    value.load_state_dict(saved[name])
        if error is not None:
            raise error
        self._step = step
        return step

    def wrap(
        self, model: torch.nn.Module, optimizer: AdaScale, *, ddp: Mapping[str, Any], **rebinding: Any
    ) -> torch.nn.Module:
        """The model as it is to be called: DDP where there are several ranks. Starts from rank 0's weights."""
        wrapped = model
        if self.world_size > 1:
            device_ids = [self._device.index] if self._device.type == "cuda" else None
            wrapped = DistributedDataParallel(model, device_ids=device_ids, **ddp)
        optimizer.rebind(wrapped, **rebinding)
        return wrapped

    def guarded(self) -> AbstractContextManager[None]:
        """Errors of collectives are what torch says."""
        return nullcontext()

    def wishes(self) -> list[float]:
        """What this rank wants after the step under way: to leave, to save."""
        session = self._session
        leave = session.leave_requested
        alone = session.draining and not session.connected
        return [float(leave), float(session.take_save_wish() or leave or alone)]

    def stepped(self, agreed: Sequence[float], figures: StepFigures) -> None:
        """Count a step: a failure ends every process of this world, and what it had not saved."""
        session = self._session
        self._step = figures.step
        self.leaving, self.saving = agreed[0] > 0, agreed[1] > 0
        session.report(figures)
        self._on_commit(figures.step)
        if session.error is not None:
            raise session.error
        if session.fenced is not None:
            session.wait_until_stopped()

    def add_up(self, numbers: Sequence[int]) -> list[int]:
        """The sums over the ranks of what each gives."""
        return present_peers().add_up(numbers)

    def meet(self, what: str, limit_s: float) -> bool:
        """Whether all ranks call this, as often under this name, within the limit; the same answer on all.

        It asks the store and not the group, whose other operations a rank that did not call this may have begun.
        """
        if self.world_size == 1:
            return True
        store = dist.distributed_c10d._get_default_store()  # the group's own: nothing else is known to all ranks
        self._meetings[what] += 1
        place, until_s = f"stretto/{what}/{self._meetings[what]}", time.monotonic() + limit_s
        if store.add(f"{place}/ranks", 1) == self.world_size:
            store.compare_set(place, "", "all")
        while not store.check([place]):
            if time.monotonic() > until_s:
                store.compare_set(place, "", "some")
            time.sleep(_LOOK_S)
        return bool(store.get(place) == b"all")

    def commit(self) -> None:
        """Every step counts as it is done."""

    def leave(self) -> None:
        """Wait for the agent to stop this process."""
        self._session.left(self._step)
        self._session.wait_until_stopped()

    def finish(self, tau: float) -> None:
        self._session.finished(self._step, tau)

    def _wire(self) -> torch.device:
        """Where the group's tensors have to be."""
        return self._device if dist.get_backend() == "nccl" else torch.device("cpu")


def chosen_device(name: str | None) -> torch.device:
    """The device of this name, or this worker's own GPU, or the CPU. A GPU is made the present one."""
    device = torch.device(name or "cpu")
    if not name and torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if device.type == "cuda":
        torch.cuda.set_device(device)
    return device


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
