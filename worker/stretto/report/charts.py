"""Line charts as SVG text: pure functions of numbers."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 640.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 64.0, 12.0, 12.0, 26.0
# More points than pixels only make the file longer.
_MOST_POINTS = 1200
_Place = Callable[[float], float]


@dataclass(frozen=True, slots=True)
class Line:
    """values: beside the chart's times; what is not finite is a gap. stepped: a value holds until the next."""

    label: str
    values: Sequence[float]
    dashed: bool = False
    stepped: bool = False


def chart(title: str, times_s: Sequence[float], lines: Sequence[Line], marks_s: Sequence[float] = ()) -> str:
    """A figure with its caption. times_s: seconds since the run's beginning; marks_s: where to draw upright lines."""
    finite = [value for line in lines for value in line.values if math.isfinite(value)]
    if not times_s or not finite:
        return f"<figure><figcaption><b>{escape(title)}</b></figcaption><p>nothing was reported</p></figure>"
    low, high = _bounds(min(finite), max(finite))
    last_s = max(times_s[-1], 1e-9)

    def x(time_s: float) -> float:
        return _LEFT + (_WIDTH - _LEFT - _RIGHT) * min(1.0, max(0.0, time_s / last_s))

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [_grid(low, high, last_s, x, y)]
    parts += [
        f'<line class="mark" x1="{x(mark):.1f}" x2="{x(mark):.1f}" y1="{_TOP:g}" y2="{_HEIGHT - _BOTTOM:g}"/>'
        for mark in marks_s
    ]
    stride = max(1, math.ceil(len(times_s) / _MOST_POINTS))
    for number, line in enumerate(lines):
        dash = ' stroke-dasharray="6 5" stroke-width="1"' if line.dashed else ""
        path = _path(times_s, line, stride, x, y)
        parts.append(f'<path class="line c{number}" d="{path}"{dash}/>')
    latest = [f'<span class="c{n}">{escape(line.label)} {_latest(line)}</span>' for n, line in enumerate(lines)]
    return (
        f"<figure><figcaption><b>{escape(title)}</b> {' '.join(latest)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH:g} {_HEIGHT:g}" role="img" aria-label="{escape(title, quote=True)} over time">'
        f"{''.join(parts)}</svg></figure>"
    )


def number(value: float) -> str:
    """Short, for people."""
    if not math.isfinite(value):
        return "-" if math.isnan(value) else str(value)
    if value and (abs(value) < 1e-3 or abs(value) >= 1e7):
        return f"{value:.2e}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.3g} s"
    if seconds < 3600:
        return f"{seconds // 60:.0f} min {seconds % 60:.0f} s"
    return f"{seconds // 3600:.0f} h {seconds % 3600 // 60:.0f} min"


def _latest(line: Line) -> str:
    finite = [value for value in line.values if math.isfinite(value)]
    return number(finite[-1]) if finite else "-"


def _bounds(low: float, high: float) -> tuple[float, float]:
    if low == high:
        return (0.0, 2 * high) if high > 0 else (2 * low, 0.0) if low < 0 else (0.0, 1.0)
    # From 0 where that wastes less than half of the height.
    return (0.0 if 0 < low < high - low else low, high)


def _ticks(low: float, high: float) -> list[float]:
    step = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step)
    return [index * step for index in range(first, math.floor(high / step + 1e-9) + 1)]


def _grid(low: float, high: float, last_s: float, x: _Place, y: _Place) -> str:
    across = "".join(
        f'<line class="grid" x1="{_LEFT:g}" x2="{_WIDTH - _RIGHT:g}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        f'<text x="{_LEFT - 6:g}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in _ticks(low, high)
    )
    upright = "".join(
        f'<text x="{x(tick):.1f}" y="{_HEIGHT - 8:g}" text-anchor="{_anchor(x(tick))}">{duration(tick)}</text>'
        for tick in _ticks(0.0, last_s)
    )
    return across + upright


def _anchor(x: float) -> str:
    """Of a label below the chart: at its right edge it would be cut off."""
    return "end" if x > _WIDTH - 3 * _RIGHT else "middle"


def _path(times_s: Sequence[float], line: Line, stride: int, x: _Place, y: _Place) -> str:
    pieces, drawing, before = list[str](), False, 0.0
    indices = [*range(0, len(times_s), stride)]
    if indices[-1] != len(times_s) - 1:
        indices.append(len(times_s) - 1)
    for index in indices:
        value = line.values[index]
        if not math.isfinite(value):
            drawing = False
            continue
        if drawing and line.stepped:
            pieces.append(f"L{x(times_s[index]):.1f} {before:.1f}")
        before = y(value)
        pieces.append(f"{'L' if drawing else 'M'}{x(times_s[index]):.1f} {before:.1f}")
        drawing = True
    return "".join(pieces)
