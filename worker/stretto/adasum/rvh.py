"""Adasum by recursive vector halving and distance doubling (Maleki et al. 2020), for any number of ranks.

Two ranks that are combined each keep one half of the vector, send the other one away, and add up the dot products of
both halves; so the next level combines halves of halves. On the way back the parts are put together again. What is
sent is 2N(n-1)/n elements per rank at powers of two.

Otherwise the first ranks are paired, and each of the two stands for the pair in one half of the vector: every half is
a problem of its own over a power of two of slots, and no rank sends more than 2N.

From the second level on, what is combined was rounded to the gradients' dtype. Every level counts what that may have
done. Layers that cancelled so far that it shows are combined again from the gradients, by Gram matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from stretto.adasum.gram import reduce_by_gram
from stretto.adasum.memory import Memory
from stretto.adasum.segments import Segments
from stretto.adasum.statistics import Statistics
from stretto.adasum.transport import PeerTransport
from stretto.adasum.tree import Bools, Floats, coefficients

# Columns of the table that a level's ranks add up, per layer.
_DOT, _SQR_A, _SQR_B, _LEAVES_SQR, _ERROR_A, _ERROR_B = range(6)
_COLUMNS = 6
# Relative errors of a weighted sum in float64, and of a squared norm that comes from dot products.
_SUM_ERROR, _SQR_ERROR = 1e-15, 1e-15
# Relative errors of what the levels before have left over, above which a layer is combined again.
_ALLOWED_ERROR = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 8e-3, torch.float16: 1e-3}


@dataclass
class _Problem:
    """One range of the vector, with one rank per slot; `held`, `start` to `stop`, is what this rank has of it now."""

    number: int
    slots: Sequence[int]
    start: int
    stop: int
    held: Tensor
    given: list[tuple[int, int, int]] = field(default_factory=list)  # (rank, start, stop) of what others keep


def reduce_by_halving(
    flat: Tensor, segments: Segments, order: Sequence[int], transport: PeerTransport, memory: Memory
) -> Statistics:
    """Overwrite `flat` [elements] with the Adasum of all ranks' vectors. `order`: the ranks as the tree takes them."""
    return _Halving(flat, segments, order, transport, memory).run()


class _Halving:
    def __init__(
        self, flat: Tensor, segments: Segments, order: Sequence[int], transport: PeerTransport, memory: Memory
    ) -> None:
        self._flat = flat
        self._segments = segments
        self._order = order
        self._transport = transport
        self._kernel = memory.kernel(2, flat.device)
        self._memory = memory
        # Halves, quarters and so on, rounded up, of one range or two: the gradients in `flat` stay until the end.
        self._received = memory.take("received", segments.total + 4 * len(order), flat)
        self._used = 0
        slots = 1 << (len(order).bit_length() - 1)
        surplus = len(order) - slots
        self._slots = [tuple(order[2 * index : 2 * index + 2]) for index in range(surplus)]
        self._slots += [(rank,) for rank in order[2 * surplus :]]
        self._slot = next(index for index, ranks in enumerate(self._slots) if transport.rank in ranks)
        self._mine = self._slots[self._slot]
        self._leaves = np.array([len(ranks) for ranks in self._slots], dtype=np.float64)
        middle = segments.total // 2 if surplus else segments.total
        halves = [(0, middle), (middle, segments.total)][: 2 if surplus else 1]
        self._problems = [
            _Problem(number, [ranks[min(number, len(ranks) - 1)] for ranks in self._slots], *half, flat[slice(*half)])
            for number, half in enumerate(halves)
            if self._mine[min(number, len(self._mine) - 1)] == transport.rank
        ]
        self._halves = halves
        # Per layer: the sum of |g_i|^2 over this slot's leaves, once it is known; and |result|^2 so far.
        self._leaves_sqr: Floats | None = None
        self._result_sqr: Floats = np.zeros(len(segments))
        # Per layer: the squared error that this slot's vector may have; infinite where it cannot be used.
        self._error: Floats = np.zeros(len(segments))

    def run(self) -> Statistics:
        if len(self._mine) == 2:
            self._pair_up()
        distance = 1
        while distance < len(self._slots):
            self._halve(distance)
            distance *= 2
        again = ~np.isfinite(self._error)
        where, originals = None, self._flat[:0]
        if again.any():
            where = torch.from_numpy(np.repeat(again, self._segments.sizes)).to(self._flat.device)
            originals = self._flat[where]
        for problem in self._problems:
            problem.given.reverse()
            self._flat[problem.start : problem.stop].copy_(problem.held)
        while distance > 1:
            distance //= 2
            self._put_together()
        if len(self._mine) == 2:
            self._share_halves()
        if where is not None:
            self._flat[where] = self._combined_again(originals, again)
        count = len(self._leaves)
        two_single = count == 2 and self._leaves.sum() == 2
        leaves_sqr = self._leaves_sqr if self._leaves_sqr is not None else np.zeros(len(self._segments))
        return Statistics(leaves_sqr, np.maximum(self._result_sqr, 0.0), self._mean_sqr if two_single else None)

    def _combined_again(self, originals: Tensor, again: Bools) -> Tensor:
        """These layers' elements, one after the other, from all ranks' own."""
        segments = Segments(self._segments.sizes[again].tolist())
        leaves = tuple((rank,) for rank in self._order)
        found = reduce_by_gram(originals, segments, leaves, self._transport, self._memory)
        self._result_sqr[again] = found.result_sqr_norms
        return originals

    def _take(self, elements: int) -> Tensor:
        self._used += elements
        return self._received[self._used - elements : self._used]

    def _pair_up(self) -> None:
        """The two ranks of this slot combine their own gradients: each in one half."""
        rank = self._transport.rank
        own = self._mine.index(rank)
        other = self._mine[1 - own]
        (start, stop), (away, away_stop) = self._halves[own], self._halves[1 - own]
        received = self._take(stop - start)
        self._transport.exchange([(other, self._flat[away:away_stop])], [(other, received)])
        rows = [self._flat[start:stop], received] if own == 0 else [received, self._flat[start:stop]]
        sums = np.zeros((len(self._segments), _COLUMNS))
        self._add_dots(sums, rows, start, stop)
        theirs = np.empty_like(sums)
        self._transport.exchange([(other, torch.from_numpy(sums))], [(other, torch.from_numpy(theirs))])
        sums += theirs
        self._leaves_sqr = sums[:, _SQR_A] + sums[:, _SQR_B]
        weights = self._weights(sums, 1.0, 1.0)
        (problem,) = self._problems
        problem.held = self._combine(rows, start, stop, weights, received)

    def _halve(self, distance: int) -> None:
        """One level: this slot's `distance` neighbours and the partner's combine what they have become."""
        lower = not self._slot & distance
        partner = self._slot ^ distance
        sends, receives, places = [], [], []
        for problem in self._problems:
            middle = (problem.start + problem.stop) // 2
            kept, away = (problem.start, middle), (middle, problem.stop)
            if not lower:
                kept, away = away, kept
            peer = problem.slots[partner]
            received = self._take(kept[1] - kept[0])
            own, given = (problem.held[start - problem.start : stop - problem.start] for start, stop in (kept, away))
            sends.append((peer, given))
            receives.append((peer, received))
            problem.given.append((peer, *away))
            problem.start, problem.stop = kept
            problem.held = received
            places.append(([own, received] if lower else [received, own], kept))
        self._transport.exchange(sends, receives)
        sums = np.zeros((len(self._segments), _COLUMNS))
        for rows, (start, stop) in places:
            self._add_dots(sums, rows, start, stop)
        # Every rank of the group adds its share of what its side knows already.
        shares = distance * len(self._mine)
        if self._leaves_sqr is not None:
            sums[:, _LEAVES_SQR] = self._leaves_sqr / shares
        sums[:, _ERROR_A if lower else _ERROR_B] = self._error / shares
        self._sum_over_slots(sums, distance)
        if distance == 1:
            single_a, single_b = (len(self._slots[slot]) == 1 for slot in sorted((self._slot, partner)))
            self._leaves_sqr = sums[:, _LEAVES_SQR] + single_a * sums[:, _SQR_A] + single_b * sums[:, _SQR_B]
        else:
            self._leaves_sqr = sums[:, _LEAVES_SQR]
        first = self._slot & ~(2 * distance - 1)
        leaves_a = float(self._leaves[first : first + distance].sum())
        leaves_b = float(self._leaves[first + distance : first + 2 * distance].sum())
        weights = self._weights(sums, leaves_a, leaves_b)
        for problem, (rows, (start, stop)) in zip(self._problems, places, strict=True):
            self._combine(rows, start, stop, weights, problem.held)

    def _sum_over_slots(self, sums: Floats, distance: int) -> None:
        """Add up over the 2 * distance slots that are combined, in place: the same bits on all their ranks."""
        if len(self._mine) == 2:
            other = self._mine[1 - self._mine.index(self._transport.rank)]
            self._add_exchanged(sums, [other], [other])
        step = 1
        while step <= distance:
            theirs = self._slots[self._slot ^ step]
            if len(self._mine) == len(theirs) == 2:
                pair = [theirs[self._mine.index(self._transport.rank)]]
                self._add_exchanged(sums, pair, pair)
            elif len(theirs) == 2:
                self._add_exchanged(sums, list(theirs), [theirs[0]])
            elif len(self._mine) == 2 and self._mine[1] == self._transport.rank:
                self._add_exchanged(sums, [], [theirs[0]])
            else:
                self._add_exchanged(sums, [theirs[0]], [theirs[0]])
            step *= 2

    def _add_exchanged(self, sums: Floats, targets: list[int], sources: list[int]) -> None:
        sent, theirs = torch.from_numpy(sums), torch.empty(sums.shape, dtype=torch.float64)
        self._transport.exchange([(rank, sent) for rank in targets], [(rank, theirs) for rank in sources])
        sums += theirs.numpy()

    def _add_dots(self, sums: Floats, rows: list[Tensor], start: int, stop: int) -> None:
        part = self._segments.part(start, stop)
        sqr_a, dots, sqr_b = self._kernel.dots(rows, part)
        sums[part.layers, _DOT] += dots
        sums[part.layers, _SQR_A] += sqr_a
        sums[part.layers, _SQR_B] += sqr_b

    def _weights(self, sums: Floats, leaves_a: float, leaves_b: float) -> Floats:
        """[2, layers]: the factors of a and b; notes what the result's squared norm and error are."""
        dots, sqr_a, sqr_b = sums[:, _DOT], sums[:, _SQR_A], sums[:, _SQR_B]
        of_a, of_b = coefficients(dots, sqr_a, sqr_b, leaves_a, leaves_b)
        with np.errstate(all="ignore"):
            self._result_sqr = of_a**2 * sqr_a + 2.0 * of_a * of_b * dots + of_b**2 * sqr_b
            self._mean_sqr = float((sqr_a + 2.0 * dots + sqr_b).sum()) / 4.0
            parts_sqr = (np.abs(of_a) * np.sqrt(sqr_a) + np.abs(of_b) * np.sqrt(sqr_b)) ** 2
            # A factor may be 0 where the vectors' own directions still count.
            carried = np.maximum(of_a**2, 0.25) * sums[:, _ERROR_A] + np.maximum(of_b**2, 0.25) * sums[:, _ERROR_B]
            self._error = self._after(carried, parts_sqr)
        return np.stack([of_a, of_b])

    def _after(self, carried: Floats, parts_sqr: Floats) -> Floats:
        """The squared error of this level's result, rounded; infinite where what was carried there is too much of it.

        Two ranks' gradients themselves are combined as well as float64 can.
        """
        info = torch.finfo(self._flat.dtype)
        error = carried + _SUM_ERROR**2 * parts_sqr
        surely = self._result_sqr - _SQR_ERROR * parts_sqr
        good = error <= _ALLOWED_ERROR[self._flat.dtype] ** 2 * surely
        if len(self._leaves) == self._leaves.sum() == 2:
            good = np.isfinite(parts_sqr)
        # Rounding errs by a quarter of eps of each value, or of the smallest number there is, as a root mean square.
        smallest = info.tiny * info.eps / 4
        surely = np.maximum(surely, 0.0)
        rounding = (info.eps / 4) ** 2 * surely + np.minimum(smallest**2 * self._segments.sizes, surely)
        return np.where(good, error + rounding, np.inf)

    def _combine(self, rows: list[Tensor], start: int, stop: int, weights: Floats, out: Tensor) -> Tensor:
        part = self._segments.part(start, stop)
        self._kernel.weighted_sum(rows, part, weights[:, part.layers], out)
        return out

    def _put_together(self) -> None:
        """One level back: get what the partner keeps, give what is here."""
        sends, receives = [], []
        for problem in self._problems:
            peer, start, stop = problem.given.pop(0)
            sends.append((peer, self._flat[problem.start : problem.stop]))
            receives.append((peer, self._flat[start:stop]))
            problem.start, problem.stop = min(problem.start, start), max(problem.stop, stop)
        self._transport.exchange(sends, receives)

    def _share_halves(self) -> None:
        own = self._mine.index(self._transport.rank)
        other = self._mine[1 - own]
        give, get = slice(*self._halves[own]), slice(*self._halves[1 - own])
        self._transport.exchange([(other, self._flat[give])], [(other, self._flat[get])])
