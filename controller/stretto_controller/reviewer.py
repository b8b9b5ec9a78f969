"""Looks at the sizes of all jobs every few seconds: shares nodes among those that share them, then asks the core.

The decisions are the core's (`core.goodput`); this brings them the wall clock and what other jobs leave.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable

from stretto_controller.core.errors import Rejected
from stretto_controller.core.events import SizeReviewed
from stretto_controller.core.goodput.allocation import Bid, allocate, few_changes
from stretto_controller.core.goodput.autoscale import AutoscaleMode
from stretto_controller.core.goodput.bids import bid
from stretto_controller.core.limits import Limits
from stretto_controller.core.model import JobState
from stretto_controller.runner import Runner, Unavailable
from stretto_controller.settings import ServiceLimits

_log = logging.getLogger("stretto.controller")


class Reviewer:
    """Of one controller's jobs, while it leads."""

    def __init__(self, runner: Runner, service: ServiceLimits, limits: Limits) -> None:
        self._runner = runner
        self._service = service
        self._pause_share = limits.pause_share

    async def review_on(self) -> None:
        """Review every review_interval_s, for ever: an error of ours costs one job's review, and is logged."""
        while True:
            await asyncio.sleep(self._service.review_interval_s)
            if self._runner.ready:
                try:
                    await self.review()
                except Unavailable as error:
                    _log.debug("sizes were not reviewed: %s", error)
                except Exception:  # noqa: BLE001 - else nothing would be reviewed any more, and nobody told
                    _log.exception("sizes were not reviewed")

    async def review(self) -> None:
        """Review every job once. Others have their turn between two of them: a fit takes a millisecond."""
        states = self._runner.states()
        shares = self._shares(states)
        for state in states:
            name = state.record.name
            try:
                self._runner.submit(name, SizeReviewed(self._runner.wall_s(), shares.get(name, 2**31)))
            except Rejected as rejection:
                _log.debug("job %s: its size was not reviewed: %s", name, rejection.message)
            except Unavailable:
                raise
            except Exception:  # noqa: BLE001 - the others are reviewed all the same
                _log.exception("job %s: its size was not reviewed", name, extra={"job": name})
            await asyncio.sleep(0)

    def _shares(self, states: Iterable[JobState]) -> dict[str, int]:
        """What each job in mode act may have, where the nodes that all share are not enough for every wish."""
        acting, others = [], 0
        for state in states:
            wish = self._bid(state) if state.record.autoscale.mode is AutoscaleMode.ACT else None
            if wish is not None:
                acting.append(wish)
            else:
                others += state.record.wanted_nodes
        return shares(acting, self._service.shared_nodes - others, self._service)

    def _bid(self, state: JobState) -> Bid | None:
        """None: it cannot be told, and the job keeps what it has."""
        try:
            return bid(state, self._pause_share)
        except Exception:  # noqa: BLE001 - the others share all the same
            name = state.record.name
            _log.exception("job %s: what its sizes are worth is not known", name, extra={"job": name})
            return None


def shares(bids: list[Bid], capacity: int, service: ServiceLimits) -> dict[str, int]:
    """Nodes by job. Empty where all wishes fit: then each job's own choice decides."""
    if sum(bid.most for bid in bids) <= capacity:
        return {}
    target = allocate(bids, max(0, capacity))
    return few_changes(bids, target, capacity, changes=service.changes_per_review, worth=service.worthwhile_log_speedup)
