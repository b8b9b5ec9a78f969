"""Which samples each step uses on this rank, and the batches made of them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

from stretto.process import die_with_parent
from stretto.random_state import seed_sample
from stretto.sampler import ElasticSampler

Key = tuple[int, int]  # epoch, index

_OURS = frozenset({"dataset", "batch_size", "shuffle", "sampler", "batch_sampler", "drop_last"})


@dataclass(frozen=True)
class Share:
    """How one rank takes part in steps of `size` samples: at most `batch_size` in each of `micro_batches`."""

    rank: int
    world_size: int
    size: int
    batch_size: int

    @property
    def micro_batches(self) -> int:
        """As many as the rank with the largest share needs; every rank does so many."""
        largest = -(-self.size // self.world_size)
        return -(-largest // self.batch_size)


@dataclass(frozen=True)
class MicroBatch:
    """`samples` may be 0: `keys` then names one sample that stands in, so that forward and backward still run."""

    keys: tuple[Key, ...]
    samples: int


@dataclass(frozen=True)
class StepPlan:
    """One step: the global batch, and this rank's part of it."""

    epoch: int
    indices: tuple[int, ...]
    micro_batches: tuple[MicroBatch, ...]


def plan_steps(sampler: ElasticSampler, share: Share) -> Iterator[StepPlan]:
    """The steps from the sampler's cursor on, without end; the cursor stays where it is."""
    epoch, consumed = sampler.epoch, sampler.consumed
    while True:
        indices = sampler.global_batch(epoch, consumed, share.size)
        mine = sampler.for_rank(indices, share.rank, share.world_size)
        yield StepPlan(epoch, tuple(indices), tuple(_cut(epoch, mine, share.micro_batches, indices[0])))
        consumed += len(indices)
        if consumed == len(sampler):
            epoch, consumed = epoch + 1, 0


def _cut(epoch: int, indices: Sequence[int], parts: int, stand_in: int) -> Iterator[MicroBatch]:
    """Exactly `parts` micro-batches that differ by at most one sample."""
    each, rest = divmod(len(indices), parts)
    position = 0
    for part in range(parts):
        size = each + (part < rest)
        chosen = indices[position : position + size] or [stand_in]
        yield MicroBatch(tuple((epoch, index) for index in chosen), size)
        position += size


class Feed:
    """Gives each step its batches, prefetched by a DataLoader if its options say so. One per generation."""

    def __init__(
        self,
        dataset: Dataset[Any],
        sampler: ElasticSampler,
        share: Share,
        *,
        seed: int,
        options: Mapping[str, Any],
        device: torch.device,
    ) -> None:
        # One plan for both, since the loader runs ahead.
        self._plans, ahead = itertools.tee(plan_steps(sampler, share))
        self._device = device
        given = {"worker_init_fn": None, **options}
        if given.get("num_workers"):
            given["worker_init_fn"] = _Child(os.getpid(), given["worker_init_fn"])
        loader: DataLoader[Any] = DataLoader(
            _seeded(dataset, seed),
            batch_sampler=(list(part.keys) for plan in ahead for part in plan.micro_batches),
            **given,
        )
        self._batches = iter(loader)

    def next_step(self) -> tuple[StepPlan, Iterator[tuple[MicroBatch, Any]]]:
        """The next step's plan, and its micro-batches with their batches on the device; take all of them."""
        plan = next(self._plans)
        return plan, ((part, to_device(next(self._batches), self._device)) for part in plan.micro_batches)

    def close(self) -> None:
        """End the loader's children."""
        del self._batches


def check_dataset(dataset: Dataset[Any]) -> int:
    """The dataset's length; ValueError for one that cannot give any sample at any time."""
    if isinstance(dataset, IterableDataset):
        raise ValueError(
            "dataset is an IterableDataset, whose samples have no index, so nobody can tell which ones a lost worker "
            "had used; give a map-style dataset with __len__ and __getitem__"
        )
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ValueError(
            f"dataset is a {type(dataset).__name__} without __len__ or __getitem__; give a map-style dataset"
        )
    length = len(dataset)
    if length < 1:
        raise ValueError("dataset is empty; give one with at least 1 sample")
    return length


def check_options(options: Mapping[str, Any]) -> None:
    """ValueError for DataLoader options that would decide which samples a step uses."""
    taken = sorted(_OURS & options.keys())
    if taken:
        raise ValueError(
            f"dataloader has {', '.join(taken)}, which the trainer decides itself; allowed are options such as "
            "num_workers, collate_fn, pin_memory, prefetch_factor, worker_init_fn"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """The batch with every tensor in it, however nested, on the device."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(to_device(value, device) for value in batch))
    if isinstance(batch, list | tuple):
        return type(batch)(to_device(value, device) for value in batch)
    return batch


class _SeededSamples(Dataset[Any]):
    """Reads samples of a dataset by (epoch, index), each with random numbers of its own."""

    def __init__(self, dataset: Dataset[Any], seed: int | None) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitem__(self, key: Key) -> Any:
        epoch, index = key
        if self._seed is not None:
            seed_sample(self._seed, epoch, index)
        return self._dataset[index]


class _SeededBatches(_SeededSamples):
    """The same for a dataset that reads many samples at once."""

    def __getitems__(self, keys: Sequence[Key]) -> Any:
        if self._seed is not None:
            seed_sample(self._seed, *keys[0])
        return self._dataset.__getitems__([index for _, index in keys])  # type: ignore[attr-defined]  # checked by _seeded


def _seeded(dataset: Dataset[Any], seed: int) -> Dataset[Any]:
    draws_nothing = isinstance(dataset, TensorDataset)
    kind = _SeededBatches if callable(getattr(dataset, "__getitems__", None)) else _SeededSamples
    return kind(dataset, None if draws_nothing else seed)


class _Child:
    """How a DataLoader's child begins: bound to its parent, whose sockets it holds copies of."""

    def __init__(self, parent_pid: int, then: Callable[[int], None] | None) -> None:
        self._parent_pid = parent_pid
        self._then = then

    def __call__(self, worker_id: int) -> None:
        # torchrun signals the worker's whole process group. While a node drains, the worker needs its children.
        os.setpgid(0, 0)
        # Another parent (forkserver) is another matter: torch's own watch over the parent's pid must do.
        if os.getppid() == self._parent_pid:
            die_with_parent(self._parent_pid)
        if self._then is not None:
            self._then(worker_id)
