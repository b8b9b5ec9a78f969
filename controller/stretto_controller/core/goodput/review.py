"""The hooks of the choice of a size in the core: settings."""

from __future__ import annotations

from stretto_controller.core.draft import Draft
from stretto_controller.core.goodput.autoscale import AutoscaleChange, words


def set_autoscale(draft: Draft, change: AutoscaleChange) -> None:
    """A person says how the size is chosen. Raises Rejected for what is not allowed."""
    changed = change.applied(draft.record.autoscale)
    if changed != draft.record.autoscale:
        draft.update(autoscale=changed)
        draft.log("autoscale_set", f"the size is chosen anew: {words(changed)}")
