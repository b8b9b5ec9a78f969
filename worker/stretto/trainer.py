"""ElasticTrainer: one loop that trains the same at any number of workers, and while that number changes."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Generator, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from stretto_proto.v1 import types_pb2
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import Dataset

from stretto.adascale import AdaScale
from stretto.checkpoint import Checkpointer
from stretto.checkpoint.timetable import Interval
from stretto.chronicle import Chronicle
from stretto.combining import Combining
from stretto.errors import Fatal
from stretto.feed import Feed, Share, StepPlan, check_dataset
from stretto.live import Generation, GivenUp, LiveSession
from stretto.membership import open_membership
from stretto.position import Position
from stretto.progress_report import StepFigures
from stretto.rules import Rule
from stretto.sample_record import SampleRecord
from stretto.sampler import ElasticSampler
from stretto.saver import Saver, with_save
from stretto.schedule import LrAt
from stretto.step import LossFunction, Outcome, Stepper
from stretto.trainer_settings import TrainerSettings, check_sizes
from stretto.transfer import fingerprint
from stretto.warm_up import warm_up
from stretto.world import World, chosen_device

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class StepReport:
    """One step, the same on every rank. `loss`: the mean over its samples; `samples`: used so far."""

    step: int
    tau: float
    gain: float
    scale: float
    loss: float
    effective_lr: tuple[float, ...]
    world_size: int
    generation: int
    samples: int


class ElasticTrainer:
    """Trains until tau reaches `target_tau`; iterate over it, one StepReport per step.

    `optimizer`: any torch optimizer of the model's parameters; AdaScale goes around it. `dataset`: map-style.
    `loss_fn(model, batch) -> loss`: the mean over the batch's samples. `base_batch_size`: what the schedule was
    written for. `batch_size`: samples per worker and step, so that S follows the workers; at most so many per
    micro-batch where `global_batch_size` is given, which fixes S. `scheduler`: of the optimizer, stepped once
    per integer of tau; or a function of tau. `checkpoint`: a Checkpointer, or where to make one.

    Start the script with torchrun for several workers. With `--rdzv-backend=stretto` workers come and go: in
    in-process mode this process lives through it, and the most advanced worker gives its state to all; in restart
    mode the agents start new processes, which go on from a checkpoint that was written at an agreed step. The loop's
    body is a step boundary: evaluate, log, or `break` there (on every rank at the same step).
    """

    def __init__(
        self,
        model: torch.nn.Module,
        optimizer: Optimizer,
        dataset: Dataset[Any],
        loss_fn: LossFunction,
        *,
        base_batch_size: int,
        batch_size: int,
        target_tau: float,
        global_batch_size: int | None = None,
        scheduler: LRScheduler | LrAt | None = None,
        checkpoint: Checkpointer | str | os.PathLike[str] | None = None,
        rule: str | Rule = "adascale",
        settings: TrainerSettings | None = None,
    ) -> None:
        self._settings = settings or TrainerSettings()
        self._settings.validate()
        check_sizes(base_batch_size, batch_size, global_batch_size, target_tau)
        self._sampler = ElasticSampler(check_dataset(dataset), seed=self._settings.seed, shuffle=self._settings.shuffle)
        self._dataset = dataset
        self._loss_fn = loss_fn
        self._base_batch_size = base_batch_size
        self._batch_size, self._global_batch_size, self._target_tau = batch_size, global_batch_size, float(target_tau)
        self._chronicle = Chronicle(self._target_tau)
        self._position = Position(seed=self._settings.seed, base_batch_size=base_batch_size)
        self._skipped, self._iterated, self._save_wanted, self._over = 0, False, False, False
        self._record = SampleRecord(self._settings.sample_log, self._position, self._sampler)
        self._feed: Feed | None = None
        self._saver = Saver(
            checkpoint,
            interval=Interval(
                self._settings.checkpoint_interval_s,
                self._settings.checkpoint_interval_steps,
                self._settings.checkpoint_interval_tau,
            ),
            told=lambda saved: self._membership.checkpoint_committed(saved),
            warned=lambda failed: self._membership.checkpoint_failed(failed),
        )
        self.device = chosen_device(self._settings.device)
        spec = types_pb2.JobSpec(
            base_batch_size=base_batch_size,
            batch_size=batch_size,
            global_batch_size=global_batch_size or 0,
            target_tau=self._target_tau,
        )
        self._membership = open_membership(
            spec, self._settings, self.device, saves=checkpoint is not None, on_commit=self._record.committed
        )
        try:
            self.model = model.to(self.device)
            self._combining = Combining(rule, optimizer, self._settings.adasum_mean_in_node)
            self._optimizer = AdaScale(
                self._combining.optimizer,
                self.model,
                base_batch_size=base_batch_size,
                batch_size=batch_size,
                scheduler=scheduler,
                rule=rule,
                grad_scaler=self._settings.mixed_precision.grad_scaler,
                settings=replace(self._settings.adascale, target_tau=self._target_tau),
            )
            if isinstance(self._membership, LiveSession) and self._settings.warm_up:
                self._optimizer.unbind()
                warm_up(self.model, loss_fn, dataset, batch_size, self._settings, self.device)
            self._enter()
        except BaseException:
            self._membership.close()
            raise

    @property
    def rank(self) -> int:
        """Of this worker, in the present generation."""
        return self._world.rank

    @property
    def world_size(self) -> int:
        return self._world.world_size

    @property
    def step(self) -> int:
        """Steps done so far, over all generations."""
        return self._position.step

    @property
    def tau(self) -> float:
        """Scale-invariant iterations so far."""
        return self._optimizer.tau

    @property
    def epoch(self) -> int:
        """The epoch of the next sample, from 0."""
        return self._sampler.epoch

    def save(self) -> None:
        """Write a checkpoint of the latest step; nothing where none was asked for. On all ranks at the same step.

        In in-process mode it begins at the end of the next step, when all ranks are known to have done it, or when the
        loop is left. So it does where not all ranks call this within settings.save_meeting_s.
        """
        if isinstance(self._membership, LiveSession):
            if self._over:
                raise RuntimeError("the workers have parted: call save() in the loop's body, before `break`")
            self._membership.save_soon()
            return
        assert isinstance(self._world, World), "there is one for good"
        if self._world.meet(f"save-{self._position.step}", self._settings.save_meeting_s):
            self._save(wait=True)
        else:
            _log.warning("not all ranks called save() after step %d: it follows the next step", self._position.step)
            self._save_wanted = True

    def __iter__(self) -> Iterator[StepReport]:
        """Train on from where the state stands; ends when the target is reached. Once per trainer.

        When the controller asks this generation to leave, the step's report still comes. In in-process mode the loop
        then goes on in the next generation; in restart mode the state is saved, and this process waits here until
        its agent stops it. After a failure, a step that not all ranks had done may be reported twice.
        """
        if self._iterated:
            raise RuntimeError("this trainer was iterated over before; make a new one, it goes on from the checkpoint")
        self._iterated = True
        failed = False
        try:
            while not (yield from self._live_through()):
                self._enter()
        except GeneratorExit:  # `break`: nothing follows that could save what was asked for
            self._save_before_the_end()
            raise
        except GivenUp:
            self._saver.save_at_last(self._state(), step=self._position.step, tau=self.tau)
            raise
        except Exception:
            failed = True
            raise
        finally:
            self._over = True
            self._saver.close(failed=failed)
            self._membership.close()
            self._close_feed()
            self._record.close()

    def _enter(self) -> None:
        """Take a place in the next generation, with the state and everything else that belongs to it."""
        self._close_feed()
        self._record.close()
        self._stepper: Stepper | None = None  # it holds the last generation's model
        joined = False
        while not joined:
            self._world = self._membership.enter()
            with self._world:
                self._join(self._world)
                joined = True

    def _join(self, world: World | Generation) -> None:
        """Hold the generation's state, and be ready for its first step."""
        state = self._state()
        self._combining.before_synchronise()
        step = world.synchronise(state, restore=lambda: self._saver.restore(state, world.number))
        self._combining.after_synchronise(world, self.device)
        if step:
            _log.info("going on after step %d, tau %.1f", step, self.tau)
        self._share = share = Share(
            world.rank,
            world.world_size,
            self._global_batch_size or self._batch_size * world.world_size,
            self._batch_size,
        )
        wrapped = world.wrap(
            self.model,
            self._optimizer,
            ddp=self._settings.ddp,
            batch_size=-(-share.size // (share.world_size * share.micro_batches)),
            accumulation_steps=share.micro_batches,
            **self._combining.options(),
        )
        self._verify(world, state)
        self._saver.begin(world, step=step, tau=self.tau)
        self._record.begin(world)
        seed, precision = self._position.seed, self._settings.mixed_precision
        self._stepper = Stepper(wrapped, self._optimizer, self._loss_fn, share, seed=seed, precision=precision)

    def _verify(self, world: World | Generation, state: dict[str, Any]) -> None:
        """Raise Fatal unless all ranks hold the same state, bit by bit."""
        if not (self._settings.verify and isinstance(world, Generation)):
            return
        # Each rank's buffers may come from its own samples; rank 0's count.
        bits = self._combining.shared(state)
        del bits["chronicle"]  # with each rank's own times
        bits["model"] = {name: parameter.detach() for name, parameter in self.model.named_parameters()}
        if not world.check_equal(fingerprint(bits)):
            raise Fatal(
                f"the workers of generation {world.number} hold different states at step {self.step}: something in "
                "the script changes model, optimizer or extra_state on some ranks only, outside the step"
            )

    def _live_through(self) -> Generator[StepReport, None, bool]:
        """Train in the present generation; whether the target is reached. False: another generation follows."""
        finished = left = False
        with self._world as world:
            while self.tau < self._target_tau:
                yield self._train_step(world)
                self._check_scale()
                if world.saving:
                    world.commit()
                    self._save(wait=world.leaving)
                if world.leaving and self.tau < self._target_tau:
                    left = True
                    self._saver.settle()
                    world.leave()
                    break
            else:
                world.commit()
                self._save(wait=True)
                world.finish(self.tau)
                finished = True
        if not (finished or left):
            self._saver.abandon()
        return finished

    def _save_before_the_end(self) -> None:
        """All ranks leave the loop after the same step: what was asked for and has not begun is saved now."""
        if self._world.saving or (isinstance(self._membership, LiveSession) and self._membership.wants_save):
            with self._world as world:
                world.commit()
                self._save(wait=True)

    def _train_step(self, world: World | Generation) -> StepReport:
        """One optimizer step of all ranks."""
        if self._feed is None:
            self._feed = Feed(
                self._dataset,
                self._sampler,
                self._share,
                seed=self._position.seed,
                options=self._settings.dataloader,
                device=self.device,
            )
        assert self._stepper is not None, "steps are taken in a generation"
        plan, batches = self._feed.next_step()
        self._saver.poll(lambda: self._combining.saved(self._state()), step=self._position.step, tau=self.tau)
        due = self._save_wanted or self._saver.due(self._position.step + 1, self.tau)
        with world.guarded():
            outcome = self._stepper.take(
                self._position.step, len(plan.indices), batches, lambda: with_save(world.wishes(), due)
            )
        self._count_skipped(outcome.skipped)
        self._position.advance(plan, self._sampler)
        report = self._report(world, outcome)
        figures = self._figures(report, plan, outcome)
        self._chronicle.note(figures, generation=world.number, workers=world.world_size, time_s=time.time())
        world.stepped(outcome.agreed, figures)
        return report

    def _count_skipped(self, skipped: bool) -> None:
        self._skipped = self._skipped + 1 if skipped else 0
        if self._skipped >= self._settings.max_skipped_steps:
            raise Fatal(
                f"the gradient was not finite in {self._skipped} steps in a row, at tau {self.tau:.1f}: the "
                "training has diverged; lower the learning rate, or look at the data (settings.max_skipped_steps)"
            )

    def _report(self, world: World | Generation, outcome: Outcome) -> StepReport:
        optimizer = self._optimizer
        return StepReport(
            step=self._position.step,
            tau=optimizer.tau,
            gain=optimizer.gain,
            scale=optimizer.scale,
            loss=outcome.loss,
            effective_lr=tuple(optimizer.effective_lr),
            world_size=world.world_size,
            generation=world.number,
            samples=self._position.samples,
        )

    def _figures(self, report: StepReport, plan: StepPlan, outcome: Outcome) -> StepFigures:
        return StepFigures(
            step=report.step,
            tau=report.tau,
            tau_before=outcome.tau_before,
            gain=report.gain,
            scale=report.scale,
            loss=report.loss,
            effective_lr=report.effective_lr,
            base_lr=outcome.base_lr,
            variance=self._optimizer.variance,
            sqr_norm=self._optimizer.sqr_norm,
            samples=report.samples,
            epoch=plan.epoch,
            step_s=outcome.step_s,
            orthogonality=self._combining.orthogonality(),
        )

    def _check_scale(self) -> None:
        """S is the controller's; workers that use another one have been given other batch sizes."""
        theirs, ours = self._world.scale, self._share.size / self._base_batch_size
        if theirs is not None and not math.isclose(theirs, ours, rel_tol=1e-9):
            raise Fatal(
                f"the controller says S = {theirs:g} for generation {self._world.number}, but "
                f"{self._world.world_size} workers use {self._share.size} samples per step, which is S = {ours:g}: "
                "give the same base_batch_size, batch_size and global_batch_size as the job's"
            )

    def _state(self) -> dict[str, Any]:
        return {
            "model": self.model,
            "optimizer": self._optimizer,
            "sampler": self._sampler,
            "training": self._position,
            "chronicle": self._chronicle,
            **self._combining.state(),
            **self._settings.named_state(),
        }

    def _save(self, *, wait: bool) -> None:
        """Begin a checkpoint of the latest step, and perhaps wait for it. On all ranks."""
        self._save_wanted = False
        self._combining.gather()
        save = self._saver.save if wait else self._saver.start
        save(self._combining.saved(self._state()), step=self._position.step, tau=self.tau)
        self._combining.written()

    def _close_feed(self) -> None:
        if self._feed is not None:
            self._feed.close()
            self._feed = None
