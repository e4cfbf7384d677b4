"""The true routing of the next layers of the same token, with probability 1. Needs the future: a reference."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from traces import Guesses, Trace, Visit

SOURCE = "bound on any predictor"
NEEDS_FUTURE = True


class Params(NamedTuple):
    """``reach``: how many layers ahead it speaks."""

    reach: int = 8


def make(params: Params, trace: Trace) -> Callable[[Visit, int], list[Guesses]]:
    """Routed experts of layers + 1 ... + reach in router order; passes of several tokens get none."""
    ids = trace.ids.tolist()
    layers = trace.model.num_layers
    certain = [1.0] * trace.model.top_k

    def guess(visit: Visit, row: int) -> list[Guesses]:
        if visit.tokens != 1:
            return []
        last = min(visit.layer + params.reach, layers - 1)
        return [Guesses(ids[row][layer], certain) for layer in range(visit.layer + 1, last + 1)]

    return guess
