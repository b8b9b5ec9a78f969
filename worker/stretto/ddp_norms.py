"""Contributions of a DDP model: each rank's gradient, seen by one communication hook on DDP's flat buckets."""

# Annotations stay objects here: DDP compares those of a communication hook with its own types.

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import GradBucket  # torch.distributed re-exports it without saying so
from torch.nn.parallel import DistributedDataParallel

from stretto.measure import Sources
from stretto.micro_batches import LeafHooks, micro_batch_weighted
from stretto.norms import SqrNorm, sqr_norm_then_scale_, sum_sqr_norms
from stretto.window import LocalSums, StepTotals, Window, to_vector

CommHook = Callable[[Any, GradBucket], torch.futures.Future[Tensor]]
LaidOut = tuple[Sequence[Tensor], Sequence[Tensor]]  # parameters, and their places in a bucket; empty: not needed


class AllReduce(Protocol):
    """Starts adding a tensor up over the ranks, in place."""

    def __call__(self, tensor: Tensor, /, *, more: bool = False) -> torch.futures.Future[Any]:
        """more: this rank has work of its own to do before it waits for the result."""


class RankContributions:
    """Statistics of a DDP model: one dot product per bucket before the all-reduce, one of a part of it afterwards.

    Every rank holds the same mean, so each measures a part of its own, and the parts meet in the step's all-reduce.
    `all_reduce` starts every collective of its own, so that whoever owns the group can release a waiting thread;
    without it they go to torch, over the model's process group. Holds that group or `all_reduce`, but not the model:
    an old DDP wrapper is freed when its owner drops it.
    """

    def __init__(
        self,
        model: DistributedDataParallel,
        sources: Sources,
        window: Window,
        *,
        comm_hook: tuple[Any, CommHook] | None,
        all_reduce: AllReduce | None = None,
    ) -> None:
        self._all_reduce = all_reduce or _through_torch(model.process_group)
        self._device = next(model.parameters()).device
        self._parameters, self._measure = sources.parameters, sources.measure
        self._loss_scale, self._sum_loss = sources.loss_scale, sources.sum_loss
        self._window = window
        self._comm_hook = comm_hook
        # Of a hook whose result is no mean, but which knows the mean's norm.
        self._mean_sqr_norm = getattr(comm_hook[0], "mean_sqr_norm", None) if comm_hook is not None else None
        self._rank = model.process_group.rank()
        self._hooks = LeafHooks(on_begin=self._begin_micro_batch, on_gradient=self._gradient)
        self._counting: tuple[torch.futures.Future[Any], Tensor] | None = None  # the sum of the ranks' counts
        self.discard()
        try:
            model.register_comm_hook(self, _on_bucket)
        except RuntimeError as error:
            raise ValueError(
                "this DDP model has a communication hook already, and DDP takes one only: build a new DDP, and "
                "pass your hook as AdaScale(..., comm_hook=hook) or comm_hook=(state, hook)"
            ) from error

    def attach(self) -> None:
        """Hook parameters that came or were unfrozen since the last call, where micro-batches are counted."""
        if self._window.accumulation_steps > 1:
            self._hooks.attach(self._parameters())

    def detach(self) -> None:
        self._hooks.detach()

    def discard(self) -> None:
        """Forget this step's statistics."""
        self._window.clear()
        self._start()

    def announce(self, samples: int, total: int | None) -> None:
        """Note the next micro-batch's size; without a total, start adding the ranks' sizes up meanwhile."""
        self._window.announce(samples, total)
        if total is None:
            counts = torch.tensor([float(samples)], dtype=torch.float64, device=self._device)
            self._counting = (self._all_reduce(counts, more=True), counts)

    def totals(self, agreement: Sequence[float]) -> StepTotals:
        """Return the sums over all ranks since the last step: one collective, one host read."""
        sums = self._local_sums()
        vector = to_vector(sums.encode(agreement), self._device)
        self._all_reduce(vector).wait()
        return StepTotals.decode(vector.tolist(), world_size=self._window.world_size, problem=sums.problem)

    def on_bucket(self, bucket: GradBucket) -> torch.futures.Future[Tensor]:
        """Take the norm of one bucket, weight it by this rank's share of the samples, and start its all-reduce."""
        window, measure, buffer = self._window, self._measure, bucket.buffer()
        if bucket.index() == 0:
            self._begin_backward(buffer.device)
        flat, last = measure.flat, bucket.is_last()
        laid_out: LaidOut = ((), ()) if flat else (bucket.parameters(), bucket.gradients())
        if window.samples == 0:
            buffer.zero_()  # the mean over no samples is NaN
        elif measure.active and flat:
            self._local.append(sqr_norm_then_scale_(buffer, self._weight()))
        else:
            if measure.active:
                self._local.append(measure.of_buffer(buffer, *laid_out))
            buffer.mul_(self._weight())
        if self._comm_hook is None:
            future = self._all_reduce(buffer, more=not last)
        else:
            state, hook = self._comm_hook
            future = hook(state, bucket)
        # Not future.then(): its callbacks run in the process group's threads, which would contend for the GIL.
        answer: torch.futures.Future[Tensor] = torch.futures.Future(devices=[buffer.device] if buffer.is_cuda else None)
        self._pending.append((future, answer, laid_out))
        if last:
            self._end_backward()
        return answer

    def _end_backward(self) -> None:
        """Take the norms of the reduced buckets and hand them back to DDP, which would wait for them now as well."""
        for index, (future, answer, laid_out) in enumerate(self._pending):
            value = future.wait()
            result: Tensor = value[0] if isinstance(value, list | tuple) else value
            mean = None if self._mean_sqr_norm is None else self._mean_sqr_norm(index)
            if mean is None:
                part, share = self._part_of(result)
                mean = self._measure.of_buffer(part, *laid_out) * share
            self._reduced.append(mean)
            answer.set_result(result)
        self._pending.clear()

    def _local_sums(self) -> LocalSums:
        """Return this rank's statistics since the last step."""
        window, samples = self._window, self._window.samples
        total, shrink = float(window.denominator), 1.0 / (self._scale * self._scale)
        own = self._carried + sum_sqr_norms(self._local)
        if window.accumulation_steps > 1:
            # Micro-batches were weighted one by one: undo that to get the mean gradient over this rank's
            # samples.
            own = own * (total / (samples * window.world_size)) ** 2 if samples else 0.0
            shrink = shrink / (window.accumulation_steps**2 if self._sum_loss else 1)
        return LocalSums(
            samples=samples if window.micro_batches else window.nominal_total // window.world_size,
            contributions=int(self._measure.active and samples > 0 and self._backwards > 0),
            weighted_sqr_norm=samples * own * shrink,
            global_sqr_norm=sum_sqr_norms(self._reduced) * shrink,
            denominator=total if self._reduced_total is None else 0.0,
            declared=window.total is not None,
            problem=window.problem or self._synchronisation_problem(),
        )

    def _part_of(self, buffer: Tensor) -> tuple[Tensor, int]:
        """What this rank measures of a reduced bucket, and how many such parts there are."""
        window = self._window
        if self._comm_hook is not None or not self._measure.flat or window.accumulation_steps > 1 or buffer.is_sparse:
            return buffer, 1  # not known to be the same on all ranks, or wanted as a whole, or without places
        elements, count = buffer.numel(), window.world_size
        return buffer[elements * self._rank // count : elements * (self._rank + 1) // count], count

    def _start(self) -> None:
        self._local: list[SqrNorm] = []  # by bucket, as is the next
        self._reduced: list[SqrNorm] = []
        self._pending: list[tuple[torch.futures.Future[Any], torch.futures.Future[Tensor], LaidOut]] = []
        self._carried: SqrNorm = 0.0
        self._backwards = 0  # those that DDP synchronised
        self._reduced_total: SqrNorm | None = None  # the ranks' counts added up, where no total was given
        self._scale: SqrNorm = 1.0

    def _begin_backward(self, device: torch.device) -> None:
        window = self._window
        if window.accumulation_steps == 1:
            self._begin_micro_batch(device)
        elif self._backwards:
            # Synchronised in each micro-batch: the buckets hold what was reduced before, plus this rank's
            # newest gradient. The ranks differ by that only, so the differences of the norms add up.
            self._carried = self._carried + sum_sqr_norms(self._local) - sum_sqr_norms(self._reduced)
            self._local, self._reduced = [], []
        self._pending.clear()  # of a backward that broke off
        self._backwards += 1

    def _begin_micro_batch(self, device: torch.device) -> None:
        self._window.open_micro_batch()
        if self._window.micro_batches == 1:
            self._start()
            self._take_reduced_total()
        self._scale = self._loss_scale(device)

    def _take_reduced_total(self) -> None:
        if self._counting is not None:
            future, counts = self._counting
            self._counting = None
            future.wait()
            self._reduced_total = float(counts) if counts.device.type == "cpu" else counts[0]

    def _gradient(self, parameter: Tensor, grad: Tensor) -> Tensor | None:
        if self._window.latest == 0:
            return torch.zeros_like(grad)
        return micro_batch_weighted(grad, self._window)

    def _weight(self) -> SqrNorm:
        """The factor on this rank's bucket, so that summing the ranks (or the user's hook's mean) is right."""
        window = self._window
        averaged = 1 if self._comm_hook is None else window.world_size  # such hooks divide by it
        if window.accumulation_steps > 1:
            return averaged / window.world_size
        total = window.denominator if self._reduced_total is None else self._reduced_total
        return window.samples * averaged / total

    def _synchronisation_problem(self) -> str:
        if self._window.micro_batches and not self._backwards:
            return (
                "no backward of this step was synchronised between the ranks: leave no_sync() for the last micro-batch"
            )
        if self._backwards > 1 and self._window.total is not None:
            return (
                "micro-batches of announced sizes were each synchronised between the ranks, which hides each "
                "rank's own gradient: put all but the last one into no_sync()"
            )
        return ""


def _on_bucket(contributions: RankContributions, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    return contributions.on_bucket(bucket)


def _through_torch(group: dist.ProcessGroup) -> AllReduce:
    def all_reduce(tensor: Tensor, /, *, more: bool = False) -> torch.futures.Future[Any]:
        # dist.all_reduce would do the same after checks of its own, which a small model's step shows.
        future: torch.futures.Future[Any] = group.allreduce([tensor]).get_future()
        return future

    return all_reduce
