"""A worker process of the transfer tests: one of tests/group that also holds a state, and steps with AdaScale."""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from group.member import Worker
from group.member import main as member_main
from rank_scenarios import Scenario, run_step
from stretto import AdaScale
from stretto.group import Group, GroupBroken, GroupSettings
from stretto.transfer import TransferFailed, TransferSettings, fingerprint, load, synchronise
from stretto.transfer.memory import Parcel, Parcels
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from toy_regression import LR, make_model, parameters_of
from transfer.states import mixed_state, same_bits, state_of, train_step, training_objects


class Trainee(Worker):
    """Each job is answered by one event."""

    _state: dict[str, Any]
    _objects: dict[str, Any]
    _received: dict[str, Any] | None
    _model: nn.Module
    _optimizer: AdaScale

    def do_hold_mixed(self, seed: int) -> None:
        self._state = mixed_state(seed)
        self._tell("held", print=fingerprint(self._state))

    def do_hold_large(self, seed: int, megabytes: int) -> None:
        """Eight tensors, some of them strided, and many small ones."""
        generator = torch.Generator().manual_seed(seed)
        rows = megabytes * 1_000_000 // 8 // 8 // 1000
        tensors = [torch.randint(-9, 9, (rows, 1000), generator=generator) for _ in range(8)]
        self._state = {"large": [tensors[0].t(), *tensors[1:]], "small": [torch.full((n,), seed) for n in range(100)]}
        self._tell("held", print=fingerprint(self._state))

    def do_hold_unsendable(self) -> None:
        self._state = {"scheduler": {"function": lambda step: step}}
        self._tell("held", print=0)

    def do_hold_objects(self, seed: int, steps: int, momentum: float) -> None:
        self._objects = training_objects(seed, steps, momentum=momentum)
        self._state = state_of(self._objects)
        self._tell("held", print=fingerprint(self._state))

    def do_synchronise(self, source: int, fault: str = "", **settings: int) -> None:
        group, before = self._held(), 0 if "scheduler" in self._state else fingerprint(self._state)
        self._received = None
        answer: dict[str, Any] = {"event": "synchronised"}
        try:
            with faulty(group, fault):
                self._received = synchronise(group, self._state, source, settings=TransferSettings(**settings))
        except GroupBroken as broken:
            answer = {"event": "broken", "unreachable": broken.unreachable}
        except TransferFailed as failed:
            answer = {"event": "failed_transfer", "reason": str(failed), "ranks": failed.ranks}
        except ValueError as error:
            answer = {"event": "refused", "reason": str(error)}
        else:
            answer["print"] = fingerprint(self._state if self._received is None else self._received)
        untouched = "scheduler" in self._state or fingerprint(self._state) == before
        self._tell(**answer, untouched=untouched)

    def do_compare_mixed(self, seed: int) -> None:
        """Compare what was received with what a source holds that was told this seed."""
        received, expected = self._received, mixed_state(seed)
        assert received is not None
        strides = {
            name: received["strided"][name].stride() == expected["strided"][name].stride()
            for name in ("turned", "channels_last")
        }
        storages = {
            id(t): t.untyped_storage().nbytes() == t.numel() * t.element_size() for t in received["strided"].values()
        }
        self._tell(
            "compared",
            same=same_bits(received, expected),
            tied=received["tied"]["one"] is received["tied"]["other"],
            strides=strides,
            own_memory=all(storages.values()),
        )

    def do_load(self) -> None:
        """Load what was received; say what stayed the same object, and what all hold now."""
        model, optimizer = self._objects["model"], self._objects["optimizer"]
        before = [id(each) for each in (*model.parameters(), *model.buffers(), *optimizer.param_groups[0]["params"])]
        if self._received is not None:
            load(self._objects, self._received)
        after = [id(each) for each in (*model.parameters(), *model.buffers(), *optimizer.param_groups[0]["params"])]
        self._state = state_of(self._objects)
        self._tell("loaded", kept=before == after, print=fingerprint(self._state), tau=optimizer.tau)

    def do_train_alone(self, steps: int) -> None:
        """Step on the same batches as the others; ranks that hold the same bits must end with the same bits."""
        for step in range(steps):
            train_step(self._objects, step)
        self._tell("trained", print=fingerprint(state_of(self._objects)))

    def do_begin_adascale(self, accumulation: int, base: int) -> None:
        """Make a model and AdaScale, in no generation yet."""
        self._model = make_model()
        self._optimizer = AdaScale(
            torch.optim.SGD(self._model.parameters(), lr=LR),
            self._model,
            base_batch_size=base,
            batch_size=base,
            accumulation_steps=accumulation,
        )
        self._tell("begun")

    def do_adascale(self, scenario: Scenario, first: int, stop: int, dies: str = "") -> None:
        """Take these steps of a scenario in the present generation; `dies`: where to kill ourselves in the last."""
        group, optimizer = self._held(), self._optimizer
        steps: list[tuple[float, float, float, list[float]]] = []
        answer: dict[str, Any] = {"event": "stepped"}

        collectives = {"ours": 0, "all": 0}
        torchs = dist.all_reduce

        def all_reduce(tensor: Tensor, /, *, more: bool = False) -> torch.futures.Future[Tensor]:
            collectives["ours"] += 1
            return group.all_reduce(tensor)

        def counted(*arguments: Any, **options: Any) -> Any:
            collectives["all"] += 1
            return torchs(*arguments, **options)

        def wrapped_model() -> nn.Module:
            if group.world_size == 1:
                return self._model
            return DistributedDataParallel(
                self._model,
                process_group=group.process_group,
                init_sync=False,
                bucket_cap_mb=1e-4,
                gradient_as_bucket_view=True,
            )

        def train() -> weakref.ref[nn.Module]:
            wrapped = wrapped_model()
            optimizer.rebind(wrapped, all_reduce=all_reduce if group.world_size > 1 else None)
            gone = weakref.ref(wrapped)
            try:
                with group.guarded():
                    for step in range(first, stop):
                        with deadly(dies if step == stop - 1 else "", self._model, optimizer):
                            run_step(scenario, optimizer, wrapped, step, scenario.steps[step], group.rank)
                        parameters = parameters_of(self._model).tolist()
                        steps.append((optimizer.gain, optimizer.tau, optimizer.scale, parameters))
            except GroupBroken:
                answer["event"] = "broken"
            return gone

        gc.disable()
        with mock.patch.object(dist, "all_reduce", counted):
            gone = train()
        optimizer.unbind()
        answer["freed"] = gone() is None or group.world_size == 1
        gc.enable()
        answer["gradients"] = sum(p.grad is not None for p in self._model.parameters())
        self._tell(**answer, steps=steps, collectives=collectives)


@contextlib.contextmanager
def faulty(group: Group, fault: str) -> Iterator[None]:
    """`kill:7`: die when the seventh broadcast begins. `flip:3`: a byte of the third message changes on its way."""
    kind, _, number = fault.partition(":")
    left = int(number or 0)
    if not kind:
        yield
        return
    broadcast, empty = group.broadcast, Parcels.empty

    def dying(tensor: Tensor, source: int) -> torch.futures.Future[Tensor]:
        nonlocal left
        left -= 1
        if left == 0:
            die()
        return broadcast(tensor, source)

    def flipping(parcels: Parcels, parcel: Parcel) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            parcel.wire[parcel.wire.numel() // 2] ^= 64
        empty(parcels, parcel)

    patch = (
        mock.patch.object(group, "broadcast", dying)
        if kind == "kill"
        else mock.patch.object(Parcels, "empty", flipping)
    )
    with patch:
        yield


@contextlib.contextmanager
def deadly(place: str, model: nn.Module, optimizer: AdaScale) -> Iterator[None]:
    """Kill this process in the forward, the count, the backward (of micro-batch n with `backward:n`), or the step."""
    where, _, number = place.partition(":")
    left = int(number or 1)

    def at_last(*_: object) -> None:
        nonlocal left
        left -= 1
        if left == 0:
            die()

    undo: Callable[[], object] = lambda: None  # noqa: E731 - replaced below
    if where == "forward":
        undo = model.register_forward_pre_hook(at_last).remove
    elif where == "backward":
        parameter: Any = next(model.parameters())  # the last one whose gradient comes
        undo = parameter.register_hook(at_last).remove
    methods = {"count": "set_num_samples", "step": "step"}
    patch = mock.patch.object(optimizer, methods[where], at_last) if where in methods else contextlib.nullcontext()
    try:
        with patch:
            yield
    finally:
        undo()


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def main(pipe: Connection, settings: GroupSettings) -> None:
    member_main(pipe, settings, Trainee)
