"""A predictor of synthetic routing: its recall is set, its scores are calibrated, its nearer guesses know more.

For every expert of a visit the predictor sees a noisy number: z = t * y + sqrt(t) * noise, with y = 1 if the expert is
routed, else 0. It knows that K experts are routed, and nothing else. The score is the probability that the expert is
one of them, given all numbers of the visit, by Bayes' rule. The more information t, the higher the recall; from one
distance to the next nearer one, information is added to what there was.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from traces.presets import Statistics
from traces.trace import GuessTable, Ids, rank

Floats = npt.NDArray[np.float64]
_BYTES = 1 << 26  # of working memory


def guess(ids: Ids, num_experts: int, statistics: Statistics, rng: np.random.Generator) -> GuessTable:
    """Guesses for all later layers within reach of every visit of ids [T, L, K]."""
    tokens, layers, top_k = ids.shape
    distances = statistics.distances
    kept = statistics.guesses or min(num_experts, 2 * top_k)
    levels = _levels(statistics, layers, num_experts, top_k)
    step = max(1, _BYTES // (8 * num_experts * (top_k + 1) * layers))
    tables = []
    for start in range(0, tokens, step):
        block = ids[start : start + step].astype(np.int64)
        routed = np.zeros((len(block), layers, num_experts))
        np.put_along_axis(routed, block, 1.0, axis=-1)
        scores = np.zeros((len(block), layers, distances, num_experts), np.float16)
        seen = np.zeros(routed.shape)
        known = np.zeros(layers)
        for distance in range(distances, 0, -1):
            more = levels[distance - 1] - known
            known = levels[distance - 1]
            noise = rng.standard_normal(routed.shape)
            seen += more[:, None] * routed + np.sqrt(more)[:, None] * noise
            targets = seen[:, distance:].reshape(-1, num_experts)
            found = membership(targets, top_k).reshape(len(block), layers - distance, num_experts)
            scores[:, : layers - distance, distance - 1] = found
        tables.append(rank(scores, kept))
    return GuessTable(np.concatenate([t.ids for t in tables]), np.concatenate([t.scores for t in tables]))


def membership(log_odds: Floats, size: int) -> Floats:
    """Probability that each item is in a set of ``size`` items, [N, E], if sets weigh the product of their odds.

    Sums of products over all sets, and their derivatives, by two passes over the items (the elementary symmetric
    polynomials of conditional Poisson sampling).
    """
    count, items = log_odds.shape
    odds = np.exp(log_odds - log_odds.max(axis=1, keepdims=True))
    before = np.zeros((items + 1, count, size + 1))  # sums over the sets of j among the first i items
    before[0, :, 0] = 1
    for i in range(items):
        before[i + 1] = before[i]
        before[i + 1, :, 1:] += odds[:, i, None] * before[i, :, :-1]
    total = before[items, :, size]
    after = np.zeros((count, size + 1))  # entry j: sums over the sets of size - j among the items after i
    after[:, size] = 1
    result = np.empty(log_odds.shape)
    for i in range(items - 1, -1, -1):
        result[:, i] = odds[:, i] * (before[i, :, :-1] * after[:, 1:]).sum(axis=1) / total
        after[:, :-1] += odds[:, i, None] * after[:, 1:]
    return np.minimum(result, 1.0)


def _levels(statistics: Statistics, layers: int, num_experts: int, top_k: int) -> Floats:
    """Information of the guesses by distance and target layer, [D, L]; none is more than that of a nearer one's."""
    amounts = np.linspace(0, 8, 161)
    recalls = _recall_of(amounts, num_experts, top_k)
    wanted = [
        [statistics.recall_at(distance, max(1, target)) for target in range(layers)]
        for distance in range(1, statistics.distances + 1)
    ]
    levels: Floats = np.interp(wanted, recalls, amounts) ** 2
    return levels


def _recall_of(amounts: Floats, num_experts: int, top_k: int) -> Floats:
    """Recall@top_k of a predictor by the square root of its information, [N].

    A routed expert with the number x is found if fewer than top_k of the others have a higher one: top_k - 1 of them
    routed too, the others not; integrated over x.
    """
    x = np.linspace(-6, 6, 241)
    above_routed = np.broadcast_to(_normal_tail(x), (len(amounts), len(x)))
    above_other = np.array([_normal_tail(x + a) for a in amounts])
    counts = np.zeros((top_k, len(amounts), len(x)))  # probability that so many are higher
    counts[0] = 1
    for i in range(num_experts - 1):
        higher = above_routed if i < top_k - 1 else above_other
        moved = counts[:-1] * higher
        counts *= 1 - higher
        counts[1:] += moved
    density = np.exp(-(x**2) / 2)
    recalls: Floats = (counts.sum(axis=0) * density).sum(axis=1) / density.sum()
    return recalls


def _normal_tail(x: npt.NDArray[np.float64]) -> Floats:
    return np.array([math.erfc(value / math.sqrt(2)) / 2 for value in x])
