"""What plug-ins are given: scalars, and tables of scalars, so that the same functions run in every driver.

Plug-in functions use int and float, + - * /, comparisons and explicit loops only; then they give the same bits in plain
Python and compiled. ``power`` and ``hashed`` stand in for exponentials and random numbers.
"""

from __future__ import annotations

from typing import NamedTuple


class Experts(NamedTuple):
    """What an eviction rule may know: one number for each expert, indexed by x = layer * num_experts + expert.

    Attributes:
        last_use: position of its last routed access in the run's order of accesses (larger is more recent; -1 never).
        uses: tokens routed to it so far, resident or not.
        uses_sequence: the same within the present sequence.
        uses_resident: accesses since it was loaded, the one it was loaded for included.
        loaded: position in the run's order of admissions to the caches.
        memory: what the rule's own ``touch`` returned at its last access; 0.0 before.
        visits: visits of its layer up to its last access, that one included.
        guess_score, guess_visit: best score of a guess about it and the visit it speaks of (rules that declare
            ``WANTS_GUESSES``).
        next_use: number of the next visit that routes it (rules that declare ``NEEDS_FUTURE``).
        table: the rule's own numbers by x, fitted to a trace beforehand (rules that define ``fit``).
    """

    last_use: list[int]
    uses: list[int]
    uses_sequence: list[int]
    uses_resident: list[int]
    loaded: list[int]
    memory: list[float]
    visits: list[int]
    guess_score: list[float]
    guess_visit: list[int]
    next_use: list[int]
    table: list[float]


class Now(NamedTuple):
    """The moment at which an eviction rule is asked.

    Attributes:
        visit: running number of the visit.
        layer_visits: visits of the layer planned so far, this one included.
        accesses: routed accesses so far, this visit's not included.
    """

    visit: int
    layer_visits: int
    accesses: int


class Guess(NamedTuple):
    """A predicted expert that is not resident, as a prefetch policy sees it.

    Attributes:
        score: probability that the target visit routes it.
        distance: MoE layers ahead, 1 = next.
        rank: its place among the guesses for that layer, 0 = best.
        missing_rank: its place among those not resident.
        missing_nearer: experts of nearer layers that are not resident and rank among that layer's first top_k.
        mass_before: sum of the scores ranked before it.
        agreed: visits, this one included, whose guesses rank it among the first top_k of the target visit.
        seen, right, claimed: earlier guesses of this distance and rank scored against the routing (policies that
            declare ``WANTS_TRUST``): their number, how many were right, and the sum of their scores, each fading.
        top_k: routed experts of one token.
    """

    score: float
    distance: int
    rank: int
    missing_rank: int
    missing_nearer: int
    mass_before: float
    agreed: int
    seen: float
    right: float
    claimed: float
    top_k: int


class LinkView(NamedTuple):
    """The planner's virtual link clock at the end of this plan, in nanoseconds.

    Attributes:
        backlog_ns: until the link is through with all that goes before the guess: demand loads, and prefetches for the
            same or nearer layers, those accepted in this plan included.
        queued_ns: until it is through with everything.
        load_ns: one whole load on an idle link.
        chunk_ns: one full chunk.
        max_submitted: chunks that a demand load may have to wait for.
        window_ns: expected time until the target visit's routing is known, without stalls but this visit's own; 0 where
            no copy runs beside compute.
    """

    backlog_ns: int
    queued_ns: int
    load_ns: int
    chunk_ns: int
    max_submitted: int
    window_ns: int


class Misses(NamedTuple):
    """The missing experts of one visit, as a rule for misses sees them.

    Attributes:
        number: how many have neither a copy on its way nor a free slot.
        loads: copies that are demanded anyway, because they find a free slot.
        backlog_ns: until the link is through with demand loads queued before.
        load_ns: one whole load on an idle link.
        compute_ns: one of them on the device, once it is there.
        host_ns, host_shared_ns: one of them on the host, with the link idle or busy.
    """

    number: int
    loads: int
    backlog_ns: int
    load_ns: int
    compute_ns: int
    host_ns: int
    host_shared_ns: int


def power(base: float, exponent: int) -> float:
    """``base ** exponent`` for an exponent of 0 or more, by squaring: the same bits everywhere."""
    result = 1.0
    while exponent > 0:
        if exponent & 1:
            result = result * base
        base = base * base
        exponent = exponent >> 1
    return result


def hashed(seed: int, first: int, second: int) -> float:
    """A number in [0, 1) that depends on three integers and looks random (32-bit multiply and xor-shift)."""
    mask = 0xFFFFFFFF
    h = (seed * 0x9E3779B1 + 0x85EBCA6B) & mask
    for value in (first, second):
        h = ((h ^ (value & mask)) * 0x85EBCA6B) & mask
        h = ((h ^ (h >> 13)) * 0xC2B2AE35) & mask
        h = h ^ (h >> 16)
    return h / 4294967296.0
