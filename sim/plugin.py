"""What plug-ins are given: scalars only, so that the same functions run in every driver and can be compiled."""

from __future__ import annotations

from typing import NamedTuple


class Resident(NamedTuple):
    """A resident expert, as an eviction rule sees it.

    Attributes:
        expert: its id within the layer.
        last_use: position of its last routed access in the run's order of accesses (larger is more recent).
        uses: routed accesses so far, resident or not.
        loaded: position at which it was loaded.
        next_use: next visit of its layer that routes it, counted in visits of that layer; -1 unless the plug-in
            declares ``NEEDS_FUTURE``.
    """

    expert: int
    last_use: int
    uses: int
    loaded: int
    next_use: int


class Guess(NamedTuple):
    """A predicted expert that is not resident, as a prefetch policy sees it.

    Attributes:
        score: probability that the target visit routes it.
        distance: MoE layers ahead, 1 = next.
        rank: its place among the guesses for that layer, 0 = best.
        missing_rank: its place among those not resident.
        mass_before: sum of the scores ranked before it.
    """

    score: float
    distance: int
    rank: int
    missing_rank: int
    mass_before: float


class LinkView(NamedTuple):
    """The planner's virtual link clock at the end of this plan, in nanoseconds.

    Attributes:
        backlog_ns: until the link is through with all it has, this visit's demand loads included.
        load_ns: one whole load on an idle link.
        chunk_ns: one full chunk.
        max_submitted: chunks that a demand load may have to wait for.
        window_ns: expected time until the target visit's routing is known, without stalls but this visit's own.
    """

    backlog_ns: int
    load_ns: int
    chunk_ns: int
    max_submitted: int
    window_ns: int
