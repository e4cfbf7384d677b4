"""Prefetch the best guesses of each layer until their probabilities sum to a share of all."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "re-implementation from its description: FineMoE (Yu et al. 2025), in the order of probability / distance"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead; ``mass``: share of top_k, the sum of all probabilities, that is enough."""

    lookahead: int = 3
    mass: float = 0.7


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """Probability per layer of distance."""
    return guess.score / guess.distance if guess.mass_before < params.mass * guess.top_k else 0.0
