"""A network that is broken between nodes: who can train with whom, as far as their workers said."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from stretto_controller.core.draft import Draft
from stretto_controller.core.model import Apart, Node


def keep_apart(draft: Draft, nodes: Sequence[Node], holding: Collection[str]) -> list[Node]:
    """The nodes that can all reach each other, as far as they said: who is complained of most goes first.

    holding: ids of those that keep the newest state; of two equals they go last.
    """
    pairs = [pair for pair, apart in draft.live.apart.items() if apart.until_s > draft.now_s]
    kept = list(nodes)
    while pairs:
        ids = {n.node_id for n in kept}
        complaints = {n.node_id: sum(n.node_id in pair and pair <= ids for pair in pairs) for n in kept}
        rank = {n.node_id: (complaints[n.node_id], n.node_id not in holding, i) for i, n in enumerate(kept)}
        worst = max(kept, key=lambda n: rank[n.node_id], default=None)
        if worst is None or complaints[worst.node_id] == 0:
            return kept
        kept.remove(worst)
    return kept


def note(draft: Draft, one: str, other: str) -> None:
    """Workers of these nodes cannot reach each other. Each time that this is found anew they stay apart for longer: to
    try it again costs all the others a pause.
    """
    limits, pair = draft.limits, frozenset((one, other))
    known, for_s = draft.live.apart.get(pair), limits.apart_s
    if known is not None and draft.now_s < known.until_s:
        for_s = known.for_s
    elif known is not None and draft.now_s < known.until_s + known.for_s:
        for_s = min(2 * known.for_s, limits.apart_limit_s)
    draft.set_live(apart={**draft.live.apart, pair: Apart(draft.now_s + for_s, for_s)})


def forget(draft: Draft, node_id: str) -> None:
    """Whom the node's workers could not reach, those who come after them may."""
    draft.set_live(apart={pair: apart for pair, apart in draft.live.apart.items() if node_id not in pair})
