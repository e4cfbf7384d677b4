"""A fixed piece of work, timed again and again: it tells when something outside slows this machine down.

On a machine that others use too (a neighbour on the same processor, out of this system's sight) everything takes half
as long again for a second or so, many times a minute. Work between two looks that were both as quick as usual was
undisturbed.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

SIZE, TIMES = 256, 30  # a float32 matrix of 256 kB, which a core's own cache holds, and how often it is multiplied
PIECES, PIECE, READ = 12, 1 << 18, 3  # pieces of 1 MB, which only the shared cache holds, and how many a look reads
USUAL = 0.25  # quantile of the looks that is taken as usual
SLACK = 1.15  # times the usual, above which a look was disturbed


class Control:
    """Times its work whenever it is asked to, about 0.4 ms each.

    Attributes:
        looks: seconds of every look so far.
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._matrix = torch.randn(SIZE, SIZE, generator=generator)
        self._vector = torch.randn(SIZE, generator=generator)
        self._out = torch.empty(SIZE)
        self._pieces = torch.randn(PIECES, PIECE, generator=generator)
        self._next = 0
        self.looks: list[float] = []
        for _ in range(2 * PIECES):
            self.look()
        self.looks.clear()

    def begin(self) -> None:
        """The first look of a series: one before it, that nobody counts, makes the caches warm."""
        self.look()
        self.looks.pop()
        self.look()

    @torch.inference_mode()
    def look(self) -> None:
        """Do the work once more."""
        start = time.perf_counter()
        for _ in range(TIMES):
            torch.mv(self._matrix, self._vector, out=self._out)
        for _ in range(READ):
            self._pieces[self._next].sum()
            self._next = (self._next + 1) % PIECES
        self.looks.append(time.perf_counter() - start)


@contextmanager
def uncollected() -> Iterator[None]:
    """Python's garbage is collected before and after, not meanwhile: a collection takes as long as many tokens."""
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def usual(looks: Sequence[float]) -> float:
    """Seconds of a look on the machine as it mostly is."""
    ordered = sorted(looks)
    return ordered[int(USUAL * (len(ordered) - 1))]


def undisturbed(looks: Sequence[float], usual_s: float) -> list[bool]:
    """Of the work between each look and the next, whether it was."""
    quick = [look <= SLACK * usual_s for look in looks]
    return [before and after for before, after in itertools.pairwise(quick)]
