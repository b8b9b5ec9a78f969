"""Contributions of an FSDP2 model (`fully_shard`, HSDP too): each rank's gradient, seen before its reduce-scatter.

A rank's own gradient exists only as the input of a reduce-scatter, and the mean only as shards. So the norm of the
input is this rank's contribution, and the norms of the shards add up to that of the mean. The custom reduce-scatter is
torch's public hook; that the one which was there before is kept rests on a private name, here alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter
from torch.distributed.tensor import DTensor, Shard
from torch.utils._pytree import tree_leaves

from stretto.measure import Sources
from stretto.micro_batches import micro_batch_weighted
from stretto.norms import SqrNorm, sqr_norm, sqr_norm_then_scale_, sum_sqr_norms
from stretto.window import LocalSums, StepTotals, Window, to_vector


class ShardContributions:
    """Statistics of a sharded model: one norm per reduce-scatter before it, one per parameter's shard after it.

    Takes over the division of gradients, by samples instead of by ranks. Micro-batches are counted by a hook on the
    root's outputs, so every backward has to go through the root module's forward.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        sources: Sources,
        window: Window,
    ) -> None:
        first = next(p for p in model.parameters() if isinstance(p, DTensor))
        self._groups = _groups(first)
        self._replicas = first.device_mesh.size(0) if first.device_mesh.ndim == 2 else 1
        self._device = first.to_local().device
        self._parameters, self._measure = sources.parameters, sources.measure
        self._loss_scale, self._sum_loss = sources.loss_scale, sources.sum_loss
        self._window = window
        self._counted: SqrNorm | None = None  # the ranks' announced sizes added up, for the next micro-batch
        self._backward = -1
        self._hooked: dict[int, Tensor] = {}
        self._handles: list[Any] = [model.register_forward_hook(self._on_output)]
        self._reduce_scatters = [
            _WeighingReduceScatter(self, module) for module in model.modules() if isinstance(module, FSDPModule)
        ]
        self.discard()
        self.attach()

    def attach(self) -> None:
        """Hook the shards of parameters that came or were unfrozen since the last call."""
        for parameter in self._parameters():
            if parameter.requires_grad and id(parameter) not in self._hooked:
                self._hooked[id(parameter)] = parameter
                leaf: Any = parameter  # torch leaves its hook methods untyped
                self._handles.append(leaf.register_post_accumulate_grad_hook(self._on_shard))

    def detach(self) -> None:
        """Give the model its own reduce-scatter and division back."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooked.clear()
        for reduce_scatter in self._reduce_scatters:
            reduce_scatter.release()
        self._reduce_scatters.clear()

    def discard(self) -> None:
        """Forget this step's statistics."""
        self._window.clear()
        self._start()

    def announce(self, samples: int, total: int | None) -> None:
        """Note the next micro-batch's size; without a total, add the ranks' sizes up."""
        self._window.announce(samples, total)
        if total is None:
            counts = torch.tensor([float(samples)], dtype=torch.float64, device=self._device)
            self._sum_over_ranks(counts)
            self._counted = float(counts) if counts.device.type == "cpu" else counts[0]

    def totals(self, agreement: Sequence[float]) -> StepTotals:
        """Return the sums over all ranks since the last step.

        One collective (HSDP on a part of the ranks: two), one host read.
        """
        sums = self._local_sums()
        vector = to_vector(sums.encode(agreement), self._device)
        self._sum_over_ranks(vector)
        return StepTotals.decode(vector.tolist(), world_size=self._window.world_size, problem=sums.problem)

    def weigh(self, gradients: Tensor) -> None:
        """Take the norm of this rank's own gradients, flat and padded with zeros, and weight them by its samples."""
        self._count_backward()
        if self._window.samples == 0:
            gradients.zero_()  # the mean over no samples is NaN
            self._own.append(0.0)
        elif self._measure.active:
            self._own.append(sqr_norm_then_scale_(gradients, self._weight()))
        else:
            gradients.mul_(self._weight())

    def scattered(self, shard: Tensor) -> None:
        """Take the norm of a reduced shard, where later micro-batches of this step can come on top of it."""
        if self._window.accumulation_steps > 1 and self._measure.active:
            self._scattered.append(sqr_norm(shard))

    def _local_sums(self) -> LocalSums:
        """Return this rank's statistics since the last step."""
        window, measured = self._window, self._measure.active
        samples = window.samples if window.micro_batches else window.nominal_total // window.world_size
        # The ranks' sums are divided by their number; each replica has all the shards.
        whole = window.world_size / self._replicas
        shards = sum_sqr_norms(self._shards.values()) * whole
        own = sum_sqr_norms(self._own) if self._own else shards  # a single rank scatters nothing
        if self._backwards > 1:
            # Each micro-batch was scattered by itself: how the ranks differ in each of them adds up.
            own = own - sum_sqr_norms(self._scattered) * whole + shards
        total, shrink = float(window.denominator), 1.0 / (self._scale * self._scale)
        if window.accumulation_steps > 1:
            # Micro-batches were weighted one by one: undo that, for the mean over this rank's samples.
            own = own * (total / (samples * window.world_size)) ** 2 if samples else 0.0
            shrink = shrink / (window.accumulation_steps**2 if self._sum_loss else 1)
        return LocalSums(
            samples=samples,
            contributions=int(measured and samples > 0 and bool(self._shards)),
            weighted_sqr_norm=samples * own * shrink if measured else 0.0,
            global_sqr_norm=shards * shrink,
            denominator=total if self._reduced_total is None else 0.0,
            declared=window.total is not None,
            problem=window.problem or self._synchronisation_problem(),
        )

    def _start(self) -> None:
        self._own: list[SqrNorm] = []
        self._scattered: list[SqrNorm] = []
        self._shards: dict[int, SqrNorm] = {}
        self._scale: SqrNorm = 1.0
        self._reduced_total: SqrNorm | None = None
        self._backwards = 0  # those whose gradients met
        self._met = False  # in the present backward

    def _on_output(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.requires_grad and tensor.grad_fn is not None:
                tensor.register_hook(self._on_output_gradient)  # type: ignore[no-untyped-call]  # torch's own

    def _on_output_gradient(self, grad: Tensor) -> Tensor | None:
        """A micro-batch's backward begins; its weight reaches all of its gradients by way of the outputs' one."""
        backward = torch._C._current_graph_task_id()
        if backward != self._backward:
            self._backward = backward
            self._begin_micro_batch(grad.device)
        if self._window.accumulation_steps == 1:
            return None
        return torch.zeros_like(grad) if self._window.latest == 0 else micro_batch_weighted(grad, self._window)

    def _begin_micro_batch(self, device: torch.device) -> None:
        self._window.open_micro_batch()
        if self._window.micro_batches == 1:
            self._start()
            self._reduced_total, self._counted = self._counted, None
        self._met = False
        self._scale = self._loss_scale(device)

    def _count_backward(self) -> None:
        self._backwards += not self._met
        self._met = True

    def _on_shard(self, parameter: Tensor) -> None:
        """One parameter's shard of the mean gradient is there, with what earlier micro-batches left in it."""
        self._count_backward()
        grad = parameter.grad
        if isinstance(grad, DTensor):
            self._shards[id(parameter)] = self._measure.of(parameter, grad.to_local())

    def _weight(self) -> SqrNorm:
        """The factor on this rank's gradients, so that summing the ranks is right."""
        window = self._window
        if window.accumulation_steps > 1:
            return 1.0 / window.world_size
        return window.samples / (window.denominator if self._reduced_total is None else self._reduced_total)

    def _sum_over_ranks(self, vector: Tensor) -> None:
        for group in self._groups:
            dist.all_reduce(vector, group=group)

    def _synchronisation_problem(self) -> str:
        advice = "call model.set_requires_gradient_sync(last) before each micro-batch, true for the last one of a step"
        if self._window.micro_batches and not self._backwards:
            return f"no backward of this step was synchronised between the ranks: {advice}"
        if self._backwards > 1 and (self._window.total is not None or self._replicas > 1):
            return f"micro-batches of announced sizes, or of HSDP, were each synchronised between the ranks: {advice}"
        return ""


class _WeighingReduceScatter(ReduceScatter):
    """One FSDP module's reduce-scatter: the one that it had, around gradients that were measured and weighted."""

    def __init__(self, contributions: ShardContributions, module: FSDPModule) -> None:
        self._contributions = contributions
        self._module = module
        groups = module._get_fsdp_state()._fsdp_param_groups
        self._inner: ReduceScatter | None = groups[0]._reduce_scatter_comm if groups else None
        if isinstance(self._inner, _WeighingReduceScatter):
            # Of a module that shares its parameters' group with another, or of an AdaScale before this one.
            self._inner = None if self._inner._contributions is contributions else self._inner._inner
        if self._inner is not None:
            module.set_custom_reduce_scatter(self)
            self._divide_by(1.0, sums=True)

    def allocate(self, size: Sequence[int | torch.SymInt], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Memory for inputs and outputs, as before."""
        assert self._inner is not None
        buffer: Tensor = self._inner.allocate(size, dtype=dtype, device=device)
        return buffer

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any,
        async_op: bool = False,
    ) -> dist.Work | None:
        """Scatter the sum; the weights have divided already."""
        assert self._inner is not None
        self._contributions.weigh(input_tensor)
        work = self._inner(output_tensor, input_tensor, group, dist.ReduceOp.SUM, False)
        self._contributions.scattered(output_tensor)
        return work

    def release(self) -> None:
        """Put the module's own reduce-scatter back."""
        if self._inner is not None:
            self._module.set_custom_reduce_scatter(self._inner)
            self._divide_by(None, sums=False)

    def _divide_by(self, factor: float | None, *, sums: bool) -> None:
        self._module.set_gradient_divide_factor(factor)  # type: ignore[arg-type]  # None is its own default
        self._module.set_force_sum_reduction_for_comms(sums)


def is_sharded(module: torch.nn.Module) -> bool:
    """Whether `fully_shard` was applied to the module or to a part of it."""
    return any(isinstance(part, FSDPModule) for part in module.modules())


def sharded_world_size(module: torch.nn.Module, parameters: Iterable[Tensor]) -> int:
    """Return how many ranks share a sharded model's gradients, or say why AdaScale cannot follow them."""
    sizes = set()
    if not isinstance(module, FSDPModule):
        raise ValueError("only parts of the model are sharded: call fully_shard(model) on the whole model too, last")
    for parameter in parameters:
        if not isinstance(parameter, DTensor):
            raise ValueError(
                "some of the optimizer's parameters are not sharded, so their gradients would never meet: call "
                "fully_shard(model) on the whole model, and make the optimizer after it"
            )
        mesh = parameter.device_mesh
        if mesh.ndim > 2 or not isinstance(parameter.placements[-1], Shard) or _shards_twice(parameter):
            raise ValueError(
                f"a parameter lies on a mesh of shape {tuple(mesh.shape)} as {parameter.placements}; supported: FSDP "
                "on a mesh of one dimension, and HSDP on one of two, without tensor parallelism"
            )
        if mesh.size() > 1 and mesh.size(mesh.ndim - 1) == 1:
            raise ValueError("the mesh has one rank per shard group, so nothing is sharded: use DDP instead")
        sizes.add(mesh.size())
    if len(sizes) > 1:
        raise ValueError(f"parameters lie on meshes of different sizes {sorted(sizes)}; use one mesh for all")
    return sizes.pop()


def _shards_twice(parameter: DTensor) -> bool:
    return any(isinstance(placement, Shard) for placement in parameter.placements[:-1])


def _groups(parameter: DTensor) -> list[dist.ProcessGroup]:
    """The groups over which numbers are summed, one after the other, to reach all ranks of the mesh."""
    mesh = parameter.device_mesh
    if mesh.size() == dist.get_world_size():
        assert dist.group.WORLD is not None
        return [dist.group.WORLD]
    return [mesh.get_group(dim) for dim in range(mesh.ndim)]
