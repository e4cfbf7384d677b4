"""Guesses as recorded in the trace by a named predictor of the engine."""

from __future__ import annotations

from typing import NamedTuple

from sim.spec import SpecError
from traces import GuessTable, Trace

SOURCE = "recorded beside the routing (see traces/README.md)"


class Params(NamedTuple):
    """``name``: the recorded predictor; empty for the only one, or ``router``."""

    name: str = ""


def table(params: Params, trace: Trace) -> GuessTable:
    """The recorded table itself.

    Raises:
        SpecError: the trace has no guesses of that name.
    """
    name = params.name or ("router" if "router" in trace.guesses else next(iter(trace.guesses), ""))
    if name not in trace.guesses:
        recorded = ", ".join(trace.guesses) or "none"
        raise SpecError(
            f"predictor {params.name or 'recorded'!r}: the trace records guesses of: {recorded}; name one of these, or "
            "a predictor that needs none (previous_token, popularity, transition)"
        )
    return trace.guesses[name]
