"""Guesses of later layers' routing from one layer's router input.

The training-free predictor: the router of layer l + d as it is, on the input of layer l's router (the speculative
loading of Eliseev and Mazur 2023, for d = 1).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

from traces import Guesses
from traces.trace import merged

NUM_GUESSES = 4


def inclusion(logits: torch.Tensor, top_k: int) -> torch.Tensor:
    """Probability of each expert to be among the routed ``top_k``, from router logits [..., E]; sums to ``top_k``.

    The softmax times top_k, what exceeds 1 given to the others in proportion.
    """
    probabilities = logits.float().softmax(-1) * top_k
    for _ in range(top_k - 1):
        full = probabilities >= 1
        if not bool(full.any()):
            break
        rest = probabilities.masked_fill(full, 0.0)
        left = top_k - full.sum(-1, keepdim=True)
        scale = left / rest.sum(-1, keepdim=True).clamp_min(1e-9)
        probabilities = torch.where(full, 1.0, rest * scale)
    return probabilities.clamp(0.0, 1.0)


class RouterGates:
    """The routers of the next layers, stacked so that one product gives all guesses of a visit.

    Args:
        routers: router weights [E, H] of every MoE layer.
        top_k: routed experts per token.
        lookahead: largest distance wanted.
    """

    def __init__(self, routers: Sequence[torch.Tensor], top_k: int, lookahead: int) -> None:
        self.lookahead = lookahead
        self._top_k = top_k
        self._experts = routers[0].shape[0]
        self._stacked = [
            torch.cat([w.float() for w in routers[layer + 1 : layer + 1 + lookahead]])
            if layer + 1 < len(routers)
            else None
            for layer in range(len(routers))
        ]

    def scores(self, layer: int, hidden: torch.Tensor) -> npt.NDArray[np.float16]:
        """P(routed) for layer + 1, ...: hidden [T, H] -> float16 [T, D, E], D cut at the last layer."""
        stacked = self._stacked[layer]
        if stacked is None:
            return np.zeros((hidden.shape[0], 0, self._experts), np.float16)
        logits = torch.nn.functional.linear(hidden.float(), stacked)
        logits = logits.view(hidden.shape[0], -1, self._experts)
        return inclusion(logits, self._top_k).numpy().astype(np.float16)


def ranked(scores: npt.NDArray[np.float16]) -> list[Guesses]:
    """The best guesses for each distance from one token's scores [D, E]; equal scores by the lower id."""
    order = np.argsort(-scores, axis=-1, kind="stable")[:, :NUM_GUESSES]
    best = np.take_along_axis(scores, order, axis=-1)
    return [Guesses(ids, values) for ids, values in zip(order.tolist(), best.tolist(), strict=True)]


def merged_guesses(scores: npt.NDArray[np.float16]) -> list[Guesses]:
    """The guesses of a visit from the scores of its tokens [T, D, E]: of several, P(any token is routed there)."""
    tokens = [ranked(rows) for rows in scores]
    if len(tokens) == 1:
        return tokens[0]
    return [merged([t[d].experts for t in tokens], [t[d].scores for t in tokens]) for d in range(scores.shape[1])]
