"""Prefetch the guessed experts of the next layers while that is expected to save more time than it costs.

At every visit the lookahead gates' guesses for the next ``lookahead`` layers are valued. A guess of probability p is
worth p times the part of its copy that can be done before its routing is known, less (1 - p) times the chunks a demand
load may have to wait for; p is the guess's score times how often guesses of that distance and rank, scored against the
routing so far, came true for each point of score. Guesses the link cannot get to in time are worth nothing. The
worthiest are issued, each valued again once others go before it, as many as there are landing slots; they give way to
every demand load between two chunks, and are dropped when their layer is routed without them, so a wrong guess costs
at most ``max_submitted`` chunks. A guard (`sim.guard`) keeps on_demand's time beside the run's own and lets it prefetch
only while that is not slower.
"""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "our reconstruction of the speculative expert scheduling of Ou et al. 2025 (doi 10.1016/j.csi.2025.103996)"
OPTIONS = {"landing_slots": 2, "stale": "retract", "guard": True}
WANTS_TRUST = True


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``min_score``: guesses less likely than this are never issued; ``trust``: scores are
    corrected by how such guesses did so far, and nothing is issued before ``evidence`` of them were scored (0: taken
    as they are)."""

    lookahead: int = 3
    min_score: float = 0.3
    trust: bool = True
    evidence: float = 16.0


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """Expected nanoseconds saved by issuing ``guess`` now."""
    p = guess.score
    if params.trust:
        if guess.seen < params.evidence or guess.claimed <= 0.0:
            return 0.0
        p = min(1.0, p * guess.right / guess.claimed)
    if p < params.min_score:
        return 0.0
    hidden_ns = min(link.load_ns, link.window_ns - link.backlog_ns)
    if hidden_ns <= 0:
        return 0.0
    blocked_ns = link.chunk_ns * link.max_submitted
    return p * hidden_ns - (1.0 - p) * blocked_ns
