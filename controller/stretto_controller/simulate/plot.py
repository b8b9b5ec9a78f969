"""The outcome of a simulation as a picture: who is done when, and who holds how many nodes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from stretto_controller.simulate.run import Outcome
from stretto_controller.simulate.trace import Trace

# Told apart by everybody (Okabe and Ito), and by their dashes in black and white.
_STYLES = (("#000000", ":"), ("#E69F00", "-."), ("#56B4E9", "--"), ("#D55E00", "-"), ("#009E73", (0, (1, 3))))


def draw(outcomes: Sequence[Outcome], trace: Trace, path: Path) -> None:
    """Write the picture; the ending says in which format. Raises ValueError for one that is not known."""
    figure = Figure(figsize=(9, 9), layout="constrained")
    done, load, cost = figure.subplots(3, 1, height_ratios=(3, 2, 2))
    for outcome, (colour, dashes) in zip(outcomes, _STYLES, strict=False):
        hours = sorted(seconds / 3600 for seconds in outcome.completion_s)
        shares = [(index + 1) / len(hours) for index in range(len(hours))]
        done.plot(hours, shares, color=colour, linestyle=dashes, label=outcome.policy)
        load.plot(
            [at_s / 3600 for at_s, _, _, _ in outcome.load],
            [used for _, used, _, _ in outcome.load],
            color=colour,
            linestyle=dashes,
            linewidth=1,
        )
    done.set(xlabel="completion time in hours", ylabel="share of jobs done", xscale="log")
    done.legend()
    there = outcomes[0].load
    load.fill_between(
        [at_s / 3600 for at_s, _, _, _ in there], [n for _, _, n, _ in there], color="#dddddd", step="post"
    )
    load.set(xlabel="hours", ylabel=f"nodes in use (of {trace.nodes}; grey: there)")
    names = [outcome.policy for outcome in outcomes]
    cost.barh(names, [outcome.efficiency for outcome in outcomes], color=[colour for colour, _ in _STYLES])
    cost.invert_yaxis()
    cost.set(xlabel="tau per worker-hour, as a share of what one worker alone brings")
    figure.savefig(path, dpi=120)
