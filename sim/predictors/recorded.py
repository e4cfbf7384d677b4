"""Guesses as recorded in the trace by a named predictor of the engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from sim.spec import SpecError
from traces import Guesses, Trace, Visit

SOURCE = "recorded beside the routing (see traces/README.md)"


class Params(NamedTuple):
    """``name``: the recorded predictor; empty for the only one, or ``router``."""

    name: str = ""


def make(params: Params, trace: Trace) -> Callable[[Visit, int], list[Guesses]]:
    """Guesses for single-token passes; passes of several tokens get none.

    Raises:
        SpecError: the trace has no guesses of that name.
    """
    name = params.name or ("router" if "router" in trace.guesses else next(iter(trace.guesses), ""))
    if name not in trace.guesses:
        recorded = ", ".join(trace.guesses) or "none"
        raise SpecError(f"predictor {params.name or 'recorded'!r}: the trace records guesses of: {recorded}")
    table = trace.guesses[name]
    ids = table.ids.tolist()
    scores = table.scores.tolist()
    pad = trace.model.num_layers

    def guess(visit: Visit, row: int) -> list[Guesses]:
        if visit.tokens != 1:
            return []
        layer = visit.layer
        reach = min(len(ids[row][layer]), pad - 1 - layer)
        return [Guesses(ids[row][layer][d], scores[row][layer][d]) for d in range(reach)]

    return guess
