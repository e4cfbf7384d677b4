"""Hit curves and reuse distances, against slow caches that follow the rules and an exhaustive search."""

from __future__ import annotations

from dataclasses import replace
from itertools import combinations, pairwise

import numpy as np
import pytest

from traces import GuessTable, ModelSpec, Trace, stats
from traces.trace import rank


def decoded(ids: np.ndarray, lengths: list[int], experts: int, batch: int = 0) -> Trace:
    """Decode tokens only, from ids [T, L, K]; with ``batch``, equally long sequences that decode together."""
    tokens, layers, top_k = ids.shape
    batches = {}
    if batch:
        assert lengths == [tokens // batch] * batch
        batches = {
            "pass_lengths": np.full(tokens // batch, batch, np.int32),
            "token_sequence": np.tile(np.arange(batch, dtype=np.int32), tokens // batch),
        }
    return Trace(
        ModelSpec("made-up", layers, experts, top_k, 64, 64),
        ids.astype(np.uint8),
        np.ones(ids.shape, np.float16),
        np.array(lengths, np.int32),
        np.ones(tokens, np.uint8),
        routing="SYNTHETIC",
        **batches,
    )


def random_trace(
    tokens: int, layers: int, experts: int, top_k: int, lengths: list[int], seed: int, batch: int = 0
) -> Trace:
    rng = np.random.default_rng(seed)
    liking = rng.normal(size=(layers, experts))
    return decoded(
        np.argsort(rng.gumbel(size=(tokens, layers, experts)) + liking)[..., :top_k], lengths, experts, batch
    )


def visits_of(trace: Trace, layer: int, cold: bool) -> list[list[list[int]]]:
    """The visits of one layer, cut into the stretches over which caches keep their contents."""
    stretches: list[list[list[int]]] = [[]]
    for visit in trace.visits():
        if visit.starts_sequence and cold:
            stretches.append([])
        if visit.layer == layer:
            stretches[-1].append(visit.experts)
    return [s for s in stretches if s]


def slow_lru_one_by_one(visits: list[list[int]], slots: int) -> int:
    recent: list[int] = []
    hits = 0
    for expert in (e for visit in visits for e in visit):
        if expert in recent:
            hits += 1
            recent.remove(expert)
        elif len(recent) == slots:
            recent.pop(0)
        recent.append(expert)
    return hits


def slow_belady(visits: list[list[int]], slots: int) -> int:
    """Misses load one by one in router order; the victim is outside the visit, its next use last, then the lower id."""
    held: list[int] = []
    hits = 0
    for index, visit in enumerate(visits):

        def next_use(expert: int, after: int = index) -> int:
            return next((i for i in range(after + 1, len(visits)) if expert in visits[i]), len(visits))

        hits += sum(expert in held for expert in visit)
        for expert in visit:
            if expert not in held:
                if len(held) == slots:
                    held.remove(max((e for e in held if e not in visit), key=lambda e: (next_use(e), -e)))
                held.append(expert)
    return hits


def most_hits(visits: list[list[int]], slots: int, experts: int, bypass: bool) -> int:
    """The best of all schedules, by dynamic programming over the cache's contents."""
    best: dict[frozenset[int], int] = {frozenset(): 0}
    for visit in visits:
        after: dict[frozenset[int], int] = {}
        routed = frozenset(visit)
        for held, hits in best.items():
            reached = held | routed
            must = frozenset() if bypass else routed
            for size in range(slots - len(must) + 1):
                for others in combinations(sorted(reached - must), size):
                    contents = must | frozenset(others)
                    after[contents] = max(after.get(contents, 0), hits + len(held & routed))
        best = after
    return max(best.values())


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize(("batch", "lengths"), [(0, [25, 1, 34]), (3, [20, 20, 20])])
def test_lru_one_by_one_equals_a_slow_cache(cold: bool, batch: int, lengths: list[int]) -> None:
    trace = random_trace(60, 2, 9, 3, lengths, 0, batch)
    hits = stats.hits_by_slots(stats.depths(trace, cold, "access"), 9)
    starts = np.append(0, np.cumsum(lengths)) if cold and not batch else [0, 60]
    for layer in range(2):
        parts = [trace.ids[a:b, layer].tolist() for a, b in pairwise(starts)]
        assert hits[layer].tolist() == [sum(slow_lru_one_by_one(p, slots) for p in parts) for slots in range(1, 10)]


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("batch", "lengths"), [(0, [30, 1, 41]), (4, [18] * 4)])
def test_belady_with_forced_admission_equals_a_slow_cache(
    cold: bool, seed: int, batch: int, lengths: list[int]
) -> None:
    trace = random_trace(72, 2, 10, 3, lengths, seed, batch)
    widest = stats.depths(trace).shape[2]
    hits = stats.belady_hits(trace, False, cold)
    assert widest == 3 or (batch and 3 < widest <= 10)
    for layer in range(2):
        parts = visits_of(trace, layer, cold)
        assert hits[layer, widest - 1 :].tolist() == [sum(slow_belady(p, n) for p in parts) for n in range(widest, 11)]
        assert not hits[layer, : widest - 1].any()


@pytest.mark.parametrize(("top_k", "batch", "lengths"), [(1, 0, [14]), (2, 0, [5, 9]), (2, 2, [7, 7])])
@pytest.mark.parametrize("seed", range(3))
def test_belady_is_the_best_of_all_schedules(top_k: int, batch: int, lengths: list[int], seed: int) -> None:
    trace = random_trace(14, 1, 5, top_k, lengths, seed, batch)
    [visits] = visits_of(trace, 0, False)
    widest = max(map(len, visits))
    assert stats.belady_hits(trace, True)[0].tolist() == [most_hits(visits, n, 5, True) for n in range(1, 6)]
    forced = stats.belady_hits(trace, False)[0, widest - 1 :]
    assert forced.tolist() == [most_hits(visits, n, 5, False) for n in range(widest, 6)]


@pytest.mark.parametrize("batch", [0, 2])
def test_lru_visits_of_several_tokens_equal_a_slow_cache(batch: int) -> None:
    """Slots that hold every visit; recency afterwards is router order, first appearance."""
    trace = random_trace(60, 2, 9, 2, [30, 30], 5, batch)
    depths = stats.depths(trace)
    hits = stats.hits_by_slots(depths, 9)
    for layer in range(2):
        for slots in range(depths.shape[2], 10):
            recent: list[int] = []
            found = 0
            for visit in (v.experts for v in trace.visits() if v.layer == layer):
                found += sum(e in recent for e in visit)
                recent = ([e for e in recent if e not in visit] + visit)[-slots:]
            assert hits[layer, slots - 1] == found


def test_no_cache_beats_one_that_knows_more() -> None:
    trace = random_trace(300, 3, 12, 2, [300], 7)
    lru = stats.lru_hits(trace)
    forced, bypass = (stats.belady_hits(trace, by)[:, 1:] for by in (False, True))
    assert (lru <= forced).all() and (forced <= bypass).all()
    assert (lru[:, 0] == forced[:, 0]).all() and (forced[:, -1] == bypass[:, -1]).all()
    assert (np.diff(forced, axis=1) >= 0).all()


def test_next_uses_and_reuse_by_hand() -> None:
    """0 1 | 1 2 | 0 1: expert 1 comes back after 1 visit, with none and then one expert used since; 0 after 2."""
    trace = decoded(np.array([[[0, 1]], [[1, 2]], [[0, 1]]]), [2, 1], 4)
    never = 1 << 30
    assert stats.next_uses(trace)[0][:, 0].tolist() == [[2, 1], [2, never], [never, never]]
    assert stats.next_uses(trace, True)[0][:, 0].tolist() == [[never, 1], [never, never], [never, never]]
    assert stats.depths(trace)[:, 0].tolist() == [[4, 4], [0, 4], [2, 1]]
    assert stats.depths(trace, replay="access")[:, 0].tolist() == [[4, 4], [0, 4], [2, 2]]
    reuse = stats.reuse(trace, stats.depths(trace))
    assert [column.tolist() for column in reuse] == [[1], [2], [1], [2], [0.5]]
    cold = stats.reuse(trace, stats.depths(trace, True), True)
    assert [column.tolist() for column in cold] == [[1], [1], [0], [0], [5 / 6]]


def test_figures_of_sequences_that_decode_together_are_those_of_the_same_sequences_apart() -> None:
    together = random_trace(40, 2, 6, 2, [20, 20], 3, batch=2)
    order = np.concatenate([together.rows_of(0), together.rows_of(1)])
    apart = decoded(together.ids[order], [20, 20], 6)
    for one, other in zip(stats.repeat(together), stats.repeat(apart), strict=True):
        assert np.allclose(one, other)
    guesses = rank(np.random.default_rng(4).random((40, 2, 2, 6)), 3, wrap=True)
    reordered = GuessTable(guesses.ids[order], guesses.scores[order], wrap=True)
    together, apart = replace(together, guesses={"any": guesses}), replace(apart, guesses={"any": reordered})
    assert np.allclose(stats.recall(together, "any"), stats.recall(apart, "any"))
    named = ("code", "prose")
    divergences = [stats.domain_divergence(replace(trace, domains=named)) for trace in (together, apart)]
    assert np.allclose(*divergences)
