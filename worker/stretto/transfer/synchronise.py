"""The exchange: an offer, the manifest, the bytes, the checksums. Every rank takes part in every collective.

What one rank finds wrong it tells the others in the next small all-reduce, so that all give up at the same point and
nobody is left waiting.
"""

from __future__ import annotations

import logging
import struct
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stretto.errors import Rejoin
from stretto.group import Group
from stretto.transfer.checksum import DIGEST_BYTES, Checksum
from stretto.transfer.layout import Message, layout
from stretto.transfer.manifest import Manifest
from stretto.transfer.memory import Parcel, Parcels
from stretto.transfer.settings import TransferSettings, check_chunk_bytes

PROTOCOL_VERSION = 1

_log = logging.getLogger(__name__)


class TransferFailed(Rejoin):
    """No rank has received anything, through the fault of `ranks`; the group still works."""

    def __init__(self, reason: str, ranks: tuple[int, ...]) -> None:
        super().__init__(reason)
        self.reason = reason
        self.ranks = ranks


def synchronise(
    group: Group,
    state: Mapping[str, Any],
    source: int,
    *,
    settings: TransferSettings | None = None,
    device: torch.device | None = None,
) -> dict[str, Any] | None:
    """Return a copy of rank `source`'s state on every other rank, bit by bit; None on the source, which has it.

    Every rank of the group calls this with the same source, and with its own state: the receivers' serves only to
    find `device`, where to put what is on an accelerator at the source. Tensors that the source has on the CPU stay
    there. Tensors that are one object on the source are one in the copy. Nobody's state is changed.

    Raises GroupBroken when the group is cut or a peer dies; TransferFailed when another rank gives up, or the bytes
    that came differ from those that were sent; ValueError when this rank's state cannot be sent, or when it refuses
    what it is sent. After each of them there is no copy on any rank, but for one case: a rank that dies in the last
    all-reduce may leave some ranks with a (whole, checked) copy and others with GroupBroken.
    """
    if not 0 <= source < group.world_size:
        raise ValueError(f"source is rank {source}; allowed: 0 to {group.world_size - 1}")
    if device is not None and group.nccl_device not in (None, device):
        raise ValueError(f"device is {device}; allowed in this group, whose CUDA tensors use NCCL: {group.nccl_device}")
    if group.world_size == 1:
        return None
    place = device or group.nccl_device or _accelerator_of(state) or torch.device("cpu")
    transfer = _Transfer(group, source, settings or TransferSettings(), place)
    if group.rank == source:
        transfer.give(state)
        return None
    return transfer.take()


class _Transfer:
    """One exchange, as one rank sees it."""

    def __init__(self, group: Group, source: int, settings: TransferSettings, device: torch.device) -> None:
        self._group = group
        self._source = source
        self._settings = settings
        self._device = device
        # gloo is given memory of the host. With NCCL, each message travels from and to where its tensors are.
        self._wire = torch.device("cpu") if group.nccl_device is None else None

    def give(self, state: Mapping[str, Any]) -> None:
        """Be the source."""
        data, tensors, error = b"", list[Tensor](), None
        manifest = Manifest(None, ())
        try:
            manifest, tensors = Manifest.of(state)
            data = manifest.to_bytes()
            self._check_limits(len(data), manifest.state_bytes)
        except Exception as failure:  # noqa: BLE001 - raised below, once the others know
            error = failure
        self._exchange_offers([len(data), manifest.state_bytes, self._settings.chunk_bytes], error)
        self._exchange_objections(None)
        self._broadcast(torch.frombuffer(bytearray(data), dtype=torch.uint8))
        self._exchange_objections(None)
        self._stream(manifest, tensors, data, self._settings.chunk_bytes)

    def take(self) -> dict[str, Any]:
        """Be a receiver."""
        manifest_bytes, state_bytes, chunk_bytes = self._exchange_offers([0, 0, 0], None)
        objection = _objection(lambda: self._check_offer(manifest_bytes, state_bytes, chunk_bytes))
        self._exchange_objections(objection)
        data = bytes(self._broadcast(torch.empty(manifest_bytes, dtype=torch.uint8)).numpy())
        manifest, tensors, state = Manifest(None, ()), [], {}

        def stage() -> None:
            nonlocal manifest, tensors, state
            manifest = Manifest.from_bytes(data, state_bytes=state_bytes)
            tensors = [spec.empty(self._device) for spec in manifest.specs]
            state = manifest.state_with(tensors)

        self._exchange_objections(_objection(stage))
        self._stream(manifest, tensors, data, chunk_bytes)
        return state

    def _exchange_offers(self, sizes: list[int], error: Exception | None) -> list[int]:
        """Return the source's sizes, once all ranks agree who it is."""
        own = [PROTOCOL_VERSION, self._source, int(error is not None), *sizes]
        rows = self._gather(own)
        if error is not None:
            raise error
        if len({row[0] for row in rows}) > 1:
            others = _ranks_where(rows, lambda row: row[0] != PROTOCOL_VERSION)
            raise TransferFailed(f"{_named(others)} run another release of stretto: install the same one", others)
        if len({row[1] for row in rows}) > 1:
            others = _ranks_where(rows, lambda row: row[1] != self._source)
            raise TransferFailed(f"{_named(others)} expect another source than rank {self._source}", others)
        if rows[self._source][2]:
            raise TransferFailed(f"rank {self._source} cannot give its state; its own error says why", (self._source,))
        return rows[self._source][3:]

    def _exchange_objections(self, own: Exception | None) -> None:
        """Go on if nobody objects."""
        objectors = _ranks_where(self._gather([int(own is not None)]), lambda row: row[0] != 0)
        if own is not None:
            raise own
        if objectors:
            raise TransferFailed(
                f"{_named(objectors)} refused the state of rank {self._source}; their own errors say why", objectors
            )

    def _check_offer(self, manifest_bytes: int, state_bytes: int, chunk_bytes: int) -> None:
        self._check_limits(manifest_bytes, state_bytes)
        check_chunk_bytes(chunk_bytes)

    def _check_limits(self, manifest_bytes: int, state_bytes: int) -> None:
        for what, size, name in (
            ("plain part", manifest_bytes, "max_manifest_bytes"),
            ("tensors", state_bytes, "max_state_bytes"),
        ):
            limit = getattr(self._settings, name)
            if not 0 <= size <= limit:
                raise ValueError(
                    f"the {what} of rank {self._source}'s state would take {size} bytes; allowed: up to {limit} "
                    f"(TransferSettings.{name})"
                )

    def _stream(self, manifest: Manifest, tensors: list[Tensor], data: bytes, chunk_bytes: int) -> None:
        """Move all bytes, then make sure that every rank has the same."""
        checksum = Checksum()
        checksum.add_text(data)
        parcels = Parcels(tensors, chunk_bytes, self._wire)
        flying: deque[tuple[torch.futures.Future[Tensor], Parcel]] = deque()
        for message in layout(
            [(spec.size_bytes, spec.on_accelerator) for spec in manifest.specs], chunk_bytes=chunk_bytes
        ):
            if len(flying) >= self._settings.in_flight:
                self._land(*flying.popleft(), parcels, checksum)
            flying.append(self._launch(message, parcels))
        while flying:
            self._land(*flying.popleft(), parcels, checksum)
        self._compare(checksum.digest(), manifest.state_bytes)

    def _launch(self, message: Message, parcels: Parcels) -> tuple[torch.futures.Future[Tensor], Parcel]:
        parcel = parcels.wrap(message)
        if self._group.rank == self._source:
            parcels.fill(parcel)
        with self._group.guarded():
            return self._group.broadcast(parcel.wire, self._source), parcel

    def _land(self, future: torch.futures.Future[Tensor], parcel: Parcel, parcels: Parcels, checksum: Checksum) -> None:
        self._group.wait(future)
        if self._group.rank != self._source:
            parcels.empty(parcel)
        checksum.add(parcel.local)
        parcels.release(parcel)

    def _compare(self, digest: bytes, size: int) -> None:
        rows = self._gather(list(struct.unpack(f"<{DIGEST_BYTES // 8}q", digest)))
        wrong = _ranks_where(rows, lambda row: row != rows[self._source])
        if wrong:
            raise TransferFailed(
                f"what {_named(wrong)} received differs from what rank {self._source} sent ({size} bytes): memory or "
                "network have failed, or the source's state was changed meanwhile",
                wrong,
            )
        _log.info("rank %d gave its state, %.1f MB, to %d ranks", self._source, size / 1e6, len(rows) - 1)

    def _gather(self, row: list[int]) -> list[list[int]]:
        """Everybody's numbers, by rank."""
        rows = torch.zeros(self._group.world_size, len(row), dtype=torch.int64)
        rows[self._group.rank] = torch.tensor(row, dtype=torch.int64)
        with self._group.guarded():
            self._group.all_reduce(rows).wait()
        gathered: list[list[int]] = rows.tolist()
        return gathered

    def _broadcast(self, data: Tensor) -> Tensor:
        with self._group.guarded():
            self._group.broadcast(data, self._source).wait()
        return data


def _objection(check: Callable[[], None]) -> Exception | None:
    """What `check` raised, to be raised once the others know."""
    try:
        check()
    except Exception as error:  # noqa: BLE001 - too little memory, or whatever: the others must not wait
        return error
    return None


def _ranks_where(rows: list[list[int]], condition: Callable[[list[int]], bool]) -> tuple[int, ...]:
    return tuple(rank for rank, row in enumerate(rows) if condition(row))


def _named(ranks: tuple[int, ...]) -> str:
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def _accelerator_of(value: Any) -> torch.device | None:
    """The device of the first tensor that is not on the CPU, if there is one."""
    if isinstance(value, Tensor):
        return None if value.device.type == "cpu" else value.device
    children = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return next((device for device in map(_accelerator_of, children) if device is not None), None)
