"""Adasum as plainly as it can be written: the whole tree in float64, and Horovod's, for powers of two."""

from __future__ import annotations

import decimal
import math
from collections.abc import Sequence
from decimal import Decimal

import numpy as np
import numpy.typing as npt

Vector = npt.NDArray[np.float64]

SMALLEST = math.sqrt(2.2250738585072014e-308)


def combine(vectors: Sequence[Vector]) -> Vector:
    """Any number of ranks: the first ones are paired until a power of two is left, then a balanced tree."""
    slots = 2 ** int(math.log2(len(vectors)))
    surplus = len(vectors) - slots
    nodes = [(vector.astype(np.float64), 1) for vector in vectors]
    head = [_pair(nodes[2 * i], nodes[2 * i + 1]) for i in range(surplus)]
    nodes = head + nodes[2 * surplus :]
    while len(nodes) > 1:
        nodes = [_pair(nodes[i], nodes[i + 1]) for i in range(0, len(nodes), 2)]
    return nodes[0][0]


def horovod(vectors: Sequence[Vector]) -> Vector:
    """The recursion of Horovod's adasum.h: partners at distance 1, 2, 4, ...; powers of two only."""
    values = [vector.astype(np.float64) for vector in vectors]
    distance = 1
    while distance < len(values):
        pairs = [
            (values[min(rank, rank ^ distance)], values[max(rank, rank ^ distance)]) for rank in range(len(values))
        ]
        values = [_horovod_pair(a, b) for a, b in pairs]
        distance *= 2
    return values[0]


def _horovod_pair(a: Vector, b: Vector) -> Vector:
    dot, sqr_a, sqr_b = float(a @ b), float(a @ a), float(b @ b)
    of_a = 1.0 - dot / sqr_a * 0.5 if sqr_a >= SMALLEST else 1.0
    of_b = 1.0 - dot / sqr_b * 0.5 if sqr_b >= SMALLEST else 1.0
    return of_a * a + of_b * b


def _pair(first: tuple[Vector, int], second: tuple[Vector, int]) -> tuple[Vector, int]:
    (a, m), (b, n) = first, second
    dot, sqr_a, sqr_b = float(a @ b), float(a @ a), float(b @ b)
    of_a = 1.0 - m / (m + n) * dot / sqr_a if sqr_a >= SMALLEST else 1.0
    of_b = 1.0 - n / (m + n) * dot / sqr_b if sqr_b >= SMALLEST else 1.0
    return of_a * a + of_b * b, m + n


def exact(vectors: Sequence[Vector], digits: int = 120) -> Vector:
    """The tree in decimal numbers of so many digits, rounded to float64 at the end; what cancels is zero."""
    with decimal.localcontext() as context:
        context.prec, context.Emin, context.Emax = digits, -(10**6), 10**6
        slots = 2 ** int(math.log2(len(vectors)))
        surplus = len(vectors) - slots
        nodes = [([Decimal(float(value)) for value in vector], 1) for vector in vectors]
        nodes = [_exact_pair(nodes[2 * i], nodes[2 * i + 1]) for i in range(surplus)] + nodes[2 * surplus :]
        while len(nodes) > 1:
            nodes = [_exact_pair(nodes[i], nodes[i + 1]) for i in range(0, len(nodes), 2)]
        return np.array([float(value) for value in nodes[0][0]])


def _exact_pair(first: tuple[list[Decimal], int], second: tuple[list[Decimal], int]) -> tuple[list[Decimal], int]:
    (a, m), (b, n) = first, second
    dot, sqr_a, sqr_b = (_exact_dot(*both) for both in ((a, b), (a, a), (b, b)))
    of_a = 1 - Decimal(m) / (m + n) * dot / sqr_a if sqr_a >= Decimal(SMALLEST) else Decimal(1)
    of_b = 1 - Decimal(n) / (m + n) * dot / sqr_b if sqr_b >= Decimal(SMALLEST) else Decimal(1)
    return [of_a * x + of_b * y for x, y in zip(a, b, strict=True)], m + n


def _exact_dot(a: list[Decimal], b: list[Decimal]) -> Decimal:
    return sum((x * y for x, y in zip(a, b, strict=True)), Decimal(0))
