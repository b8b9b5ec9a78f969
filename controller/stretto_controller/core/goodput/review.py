"""A job's size is looked at: what was measured is taken in, sizes are predicted, one is recommended, or taken.

A review is an event like any other. What it decides is durable: the points and the pause in `Record.measured`, the
size in `Record.desired_nodes`, by the same path as a person's `scale`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from stretto_controller.core.draft import Draft
from stretto_controller.core.goodput.autoscale import AutoscaleChange, AutoscaleMode, words
from stretto_controller.core.goodput.choice import Choice, choose
from stretto_controller.core.goodput.measured import Measured, window
from stretto_controller.core.goodput.prediction import Recommendation
from stretto_controller.core.goodput.review_state import Review
from stretto_controller.core.goodput.situation import Batches, Moments, Situation, better_batches
from stretto_controller.core.goodput.step_time import fitted
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import Cause, Phase
from stretto_controller.core.report import Progress

_SIZE_CHANGES = (Cause.GROW, Cause.SHRINK, Cause.DRAIN)
# The reported gain may differ so much from the one that the moments give; more, and the job's rule is another.
_GAIN_TOLERANCE = 0.25
# Without a target a job is taken to go on for this long.
_ENDLESS_S = 3600.0


@dataclass(frozen=True, slots=True)
class Circumstances:
    """What a review cannot know from the job: the deadline's clock and what other jobs leave."""

    # Wall-clock seconds since the Unix epoch: deadlines are given in them.
    wall_s: float
    share: int


def set_autoscale(draft: Draft, change: AutoscaleChange) -> None:
    """A person says how the size is chosen. Raises Rejected for what is not allowed."""
    changed = change.applied(draft.record.autoscale)
    if changed != draft.record.autoscale:
        draft.update(autoscale=changed)
        draft.log("autoscale_set", f"the size is chosen anew: {words(changed)}")


def scaled_by_hand(draft: Draft) -> None:
    """A person has said how many nodes there should be: the controller goes on recommending, and acts no more."""
    if draft.record.autoscale.mode is AutoscaleMode.ACT:
        draft.update(autoscale=replace(draft.record.autoscale, mode=AutoscaleMode.RECOMMEND))
        draft.log(
            "autoscale_set",
            "scaled by hand: from now on sizes are only recommended; "
            f"`stretto jobs autoscale {draft.record.name} act` has the controller choose again",
        )


def review(draft: Draft, circumstances: Circumstances) -> None:
    """Measure, predict, recommend; in mode act, change how many nodes are wanted."""
    progress = draft.live.progress
    generation = draft.record.generation
    if draft.record.phase is not Phase.RUNNING or generation is None or draft.record.change is not None:
        draft.set_live(review=replace(draft.live.review, progress=None, wish_since_s=None))
        return
    if progress is None or progress.generation != generation.number:
        return
    _measure(draft, progress)
    situation = _situation(draft, progress, circumstances)
    if isinstance(situation, str):
        draft.set_live(recommendation=Recommendation(reason=situation, points=len(_measured(draft).points)))
        return
    sizes = situation.predictions()
    autoscale = draft.record.autoscale
    if autoscale.mode is AutoscaleMode.OFF:
        reason = "sizes are predicted only: the mode is off"
        draft.set_live(recommendation=Recommendation(0, reason, sizes, len(situation.model.points)))
        return
    alone = replace(situation, share=2**31)
    wish = choose(alone, sizes, autoscale, draft.limits.resize_margin).nodes
    choice = choose(situation, sizes, autoscale, draft.limits.resize_margin)
    choice = _worth_its_pause(situation, choice)
    batches = better_batches(situation, choice.nodes)
    draft.set_live(
        recommendation=Recommendation(
            nodes=choice.nodes,
            reason=choice.reason,
            sizes=sizes,
            points=len(situation.model.points),
            remaining_s=situation.remaining_s(choice.nodes),
            batch_size=batches.local if batches else 0,
            accumulation=batches.accumulation if batches else 0,
            wish=wish,
        ),
    )
    _follow(draft, situation, choice)


def _measured(draft: Draft) -> Measured:
    return draft.live.review.measured or draft.record.measured


def _measure(draft: Draft, progress: Progress) -> None:
    """Take in the steps since the last review. A generation's first ones, up to its first review, are its warm-up."""
    state, generation, record = draft.live.review, draft.record.generation, draft.record
    assert generation is not None
    measured = _measured(draft)
    if state.generation != generation.number:
        state = Review(generation=generation.number, resized_s=draft.now_s, measured=measured, told=state.told)
    progress_s = draft.live.progress_s
    seen = window(state.progress, state.progress_s, progress, progress_s) if state.progress is not None else None
    batches = _batches(draft, progress)
    if seen is not None and batches.known:
        step_s, steps = seen
        shape = batches.shape(generation.world_size)
        measured = measured.with_steps(shape, len(generation.members), step_s, steps)
        state = replace(state, steps=state.steps + steps)
    if not state.pause_known and draft.live.pause_s is not None:
        state = replace(state, pause_known=True)
        if draft.live.cause in _SIZE_CHANGES:
            measured = measured.with_pause(draft.live.pause_s)
    state = replace(state, progress=progress, progress_s=progress_s, measured=measured)
    due = state.saved_s is None or draft.now_s - state.saved_s >= draft.limits.measured_saved_s
    if state.steps >= draft.limits.observed_steps and due and measured != record.measured:
        draft.update(measured=measured)
        state = replace(state, saved_s=draft.now_s)
    draft.set_live(review=state)


def _batches(draft: Draft, progress: Progress) -> Batches:
    spec, generation = draft.record.spec, draft.record.generation
    assert generation is not None
    nominal = spec.scale(generation.world_size)
    accumulation = 1
    if nominal > 0 and progress.scale > 0 and not spec.global_batch_size:
        # Known from the workers alone: micro-batches are their own affair.
        accumulation = max(1, round(progress.scale / nominal))
    return Batches(spec.base_batch_size, spec.batch_size, spec.global_batch_size, accumulation)


def _situation(draft: Draft, progress: Progress, circumstances: Circumstances) -> Situation | str:
    """What the choice rests on; or, in words, why there is no choice."""
    record, generation = draft.record, draft.record.generation
    assert generation is not None
    spec, batches, moments = record.spec, _batches(draft, progress), Moments(progress.variance, progress.sqr_norm)
    if not batches.known:
        return "no size is predicted: the workers have not said their base batch size and batch size"
    model = fitted(_measured(draft).points)
    if model is None or draft.live.review.steps < draft.limits.observed_steps:
        return f"no size is predicted yet: {draft.limits.observed_steps} steps at the present size are needed"
    assumed = _blind(draft, batches) and (not moments.known or _long_alone(draft))
    if assumed:
        moments = Moments(1.0, 0.0)
    elif not moments.known:
        return (
            "no size is predicted: the gradient's noise is not known; AdaScale measures it with two workers or "
            "micro-batches, other rules never"
        )
    expected = moments.gain(progress.scale or generation.scale)
    if not assumed and abs(progress.gain / expected - 1) > _GAIN_TOLERANCE:
        return (
            f"no size is predicted: the workers report a gain of {progress.gain:.3g} where the gradient's moments "
            f"give {expected:.3g}, so the job's rule is not AdaScale's"
        )
    return Situation(
        min_nodes=spec.min_nodes,
        max_nodes=spec.max_nodes,
        nodes=record.wanted_nodes,
        slots=generation.world_size / len(generation.members),
        batches=batches,
        moments=moments,
        model=model,
        remaining_tau=max(0.0, spec.target_tau - progress.tau) if spec.target_tau else math.nan,
        pause_s=_pause_s(draft),
        deadline_s=record.autoscale.deadline_s - circumstances.wall_s if record.autoscale.deadline_s else math.nan,
        share=max(circumstances.share, spec.min_nodes),
        assumed=assumed,
    )


def _blind(draft: Draft, batches: Batches) -> bool:
    """One gradient a step says nothing about the noise: what is known of it is as old as this size."""
    generation = draft.record.generation
    return generation is not None and generation.world_size == batches.shape(1).accumulation == 1


def _long_alone(draft: Draft) -> bool:
    """Whether it is time to look again, where that is the controller's to do."""
    act = draft.record.autoscale.mode is AutoscaleMode.ACT
    return act and draft.now_s - draft.live.review.resized_s >= draft.limits.remeasure_s


def _pause_s(draft: Draft) -> float:
    """What a change of size costs; before the first, what it usually costs."""
    usual_s = draft.limits.live_pause_s if draft.record.in_process else draft.limits.restart_pause_s
    return _measured(draft).pause_s or usual_s


def _worth_its_pause(situation: Situation, choice: Choice) -> Choice:
    """The present size where a larger one would not make up for the pause before the end; twice for an unseen one."""
    now, then = situation.rate(situation.nodes), situation.rate(choice.nodes)
    if choice.nodes <= situation.nodes or situation.nodes > situation.share:
        return choice
    left_s = situation.remaining_s(situation.nodes)
    left_s = _ENDLESS_S if math.isnan(left_s) else left_s
    seen = any(point.nodes == choice.nodes for point in situation.model.points)
    pauses_s = situation.pause_s * (1 if seen else 2)
    if (then - now) * max(0.0, left_s - pauses_s) > now * pauses_s:
        return choice
    return Choice(
        situation.nodes,
        f"as now: {choice.nodes} nodes would not make up for {'a pause' if seen else 'two pauses'} of "
        f"{situation.pause_s:.2g} s in the {left_s:.0f} s that are left",
    )


def _follow(draft: Draft, situation: Situation, choice: Choice) -> None:
    """Tell of, or take, a size that has been the better one for long enough."""
    state, limits = draft.live.review, draft.limits
    direction = (choice.nodes > situation.nodes) - (choice.nodes < situation.nodes)
    if direction == 0:
        draft.set_live(review=replace(state, direction=0, wish_since_s=None, told=None))
        return
    if state.direction != direction or state.wish_since_s is None:
        state = replace(state, direction=direction, wish_since_s=draft.now_s)
    draft.set_live(review=state)
    assert state.wish_since_s is not None
    # Beyond the share others are waiting for the nodes.
    urgent = situation.nodes > situation.share
    confirmed = draft.now_s - state.wish_since_s >= limits.resize_confirm_s
    if not confirmed and not urgent:
        return
    if draft.record.autoscale.mode is AutoscaleMode.ACT:
        if urgent or draft.now_s - state.resized_s >= _interval_s(situation, limits):
            draft.update(desired_nodes=choice.nodes)
            draft.log("size_chosen", choice.reason)
            draft.set_live(review=replace(state, direction=0, wish_since_s=None, resized_s=draft.now_s))
    elif state.told != choice.nodes:
        draft.log("size_recommended", choice.reason)
        draft.set_live(review=replace(state, told=choice.nodes))


def _interval_s(situation: Situation, limits: Limits) -> float:
    """Between two changes: so long that pauses take no more than their share of the time."""
    return max(limits.resize_interval_s, situation.pause_s / limits.pause_share)
