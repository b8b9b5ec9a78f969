"""Non-negative least squares for a handful of coefficients, in plain Python (Lawson and Hanson 1974, chapter 23).

The controller fits four numbers to at most some dozens of points; scipy, at 35 MB, would be there for this alone
(docs/decisions/0041).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

# Relative to the largest column's correlation: less is rounding.
_TOLERANCE = 1e-10
_PIVOT = 1e-12

Row = Sequence[float]


@dataclass(frozen=True, slots=True)
class Fit:
    """coefficients: >= 0. covariance: of those above 0, by `support`, for residuals of variance 1."""

    coefficients: tuple[float, ...]
    support: tuple[int, ...]
    covariance: tuple[tuple[float, ...], ...]

    def variance_at(self, row: Row) -> float:
        """Of the prediction for a row, for residuals of variance 1."""
        picked = [row[index] for index in self.support]
        return sum(
            a * b * c
            for a, line in zip(picked, self.covariance, strict=True)
            for b, c in zip(picked, line, strict=True)
        )


def non_negative(rows: Sequence[Row], values: Sequence[float]) -> Fit:
    """The x >= 0 with the least |rows x - values|^2. Columns that the rows cannot tell apart: the first takes all.

    rows: at least one, all of the same length; they carry their weights already.
    """
    count = len(rows[0])
    gram = [[sum(row[i] * row[j] for row in rows) for j in range(count)] for i in range(count)]
    moment = [sum(row[i] * value for row, value in zip(rows, values, strict=True)) for i in range(count)]
    # With columns of length 1 the tolerances mean the same for all of them.
    lengths = [math.sqrt(gram[i][i]) or 1.0 for i in range(count)]
    gram = [[gram[i][j] / (lengths[i] * lengths[j]) for j in range(count)] for i in range(count)]
    moment = [moment[i] / lengths[i] for i in range(count)]
    support: list[int] = []
    solution = [0.0] * count
    least = _TOLERANCE * max(map(abs, moment))
    barred: set[int] = set()
    while True:
        slopes = {
            i: moment[i] - sum(gram[i][j] * solution[j] for j in support)
            for i in range(count)
            if i not in support and i not in barred
        }
        # The first of equals: which of two like columns is taken must not depend on rounding.
        steepest = max(slopes.values(), default=0.0)
        if steepest <= least:
            break
        support.append(next(i for i, slope in slopes.items() if slope >= steepest * (1 - 1e-9)))
        if not _enter(gram, moment, support, solution):
            barred.add(support.pop())
    support.sort()
    inverse = _inverse([[gram[i][j] for j in support] for i in support]) or []
    return Fit(
        tuple(value / length for value, length in zip(solution, lengths, strict=True)),
        tuple(support),
        tuple(
            tuple(inverse[a][b] / (lengths[i] * lengths[j]) for b, j in enumerate(support))
            for a, i in enumerate(support)
        ),
    )


def _enter(gram: list[list[float]], moment: list[float], support: list[int], solution: list[float]) -> bool:
    """Solve on the support, whose last column is new; columns that would be negative leave it.

    False: the new column adds nothing that the others do not say, and nothing has changed.
    """
    newest = support[-1]
    while True:
        inverse = _inverse([[gram[i][j] for j in support] for i in support])
        if inverse is None:
            return False
        wanted = [sum(c * moment[j] for c, j in zip(line, support, strict=True)) for line in inverse]
        if all(value > 0 for value in wanted):
            for index in range(len(solution)):
                solution[index] = wanted[support.index(index)] if index in support else 0.0
            return True
        if wanted[support.index(newest)] <= 0 and solution[newest] == 0.0:
            return False
        # As far towards it as all stay at or above 0.
        share = min(solution[i] / (solution[i] - value) for i, value in zip(support, wanted, strict=True) if value <= 0)
        for i, value in zip(support, wanted, strict=True):
            solution[i] += share * (value - solution[i])
        for i in [i for i in support if solution[i] <= _PIVOT]:
            solution[i] = 0.0
            support.remove(i)


def _inverse(matrix: list[list[float]]) -> list[list[float]] | None:
    """By Gauss and Jordan with partial pivoting; None for one that is singular."""
    size = len(matrix)
    work = [[*line, *(float(i == j) for j in range(size))] for i, line in enumerate(matrix)]
    for column in range(size):
        pivot = max(range(column, size), key=lambda row: abs(work[row][column]))
        if abs(work[pivot][column]) < _PIVOT * 1e3:
            return None
        work[column], work[pivot] = work[pivot], work[column]
        divisor = work[column][column]
        work[column] = [value / divisor for value in work[column]]
        for row in range(size):
            if row != column and (factor := work[row][column]):
                work[row] = [a - factor * b for a, b in zip(work[row], work[column], strict=True)]
    return [line[size:] for line in work]
