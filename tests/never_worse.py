"""Seeded settings in which a guarded policy may be tempted to prefetch when it should not.

`python tests/never_worse.py 0 1000 --out FILE` runs a range of them and records how each compares with on_demand.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

from sim.experiment import Setting, quick_tpot_s
from sim.machine import load_machine
from sim.spec import options
from sim.timing import Timing
from traces import DECODE, ModelSpec, Trace
from traces.trace import rank

MACHINES = ("rtx3090", "h200", "t4", "rtx4090", "rtx3060-12gb")
QUALITIES = ("good", "medium", "poor", "wrong", "turns_bad", "turns_good")


class Case(NamedTuple):
    """A setting, what its predictor is like, and how much faster or slower than the machine's its link is."""

    setting: Setting
    predictor: str
    link: float


def routing(rng: np.random.Generator, tokens: int, layers: int, experts: int, top_k: int, kind: str) -> np.ndarray:
    """Routed experts [T, L, K]: ``random``, or ``sticky`` (liked experts, and a state that drifts)."""
    if kind == "random":
        return np.argsort(rng.random((tokens, layers, experts)), -1)[..., :top_k]
    liking = rng.gumbel(size=(layers, experts)) * rng.uniform(0, 1.5)
    state = rng.gumbel(size=(layers, experts))
    stays = rng.uniform(0.3, 0.95)
    found = np.empty((tokens, layers, top_k), int)
    for token in range(tokens):
        state = stays * state + np.sqrt(1 - stays**2) * rng.gumbel(size=(layers, experts))
        found[token] = np.argsort(-(state * 1.5 + liking), -1)[:, :top_k]
    return found


def quality(kind: str, tokens: int) -> Callable[[int], np.ndarray]:
    """For a distance, by token: how often a guess is right; below 0 it is always wrong."""
    good = {"good": 0.95, "medium": 0.70, "poor": 0.2, "wrong": -1.0}
    halves = {"turns_bad": ("good", "wrong"), "turns_good": ("wrong", "good")}.get(kind, (kind, kind))

    def of(distance: int) -> np.ndarray:
        first, second = (good[k] - 0.06 * (distance - 1) for k in halves)
        return np.where(np.arange(tokens) < tokens // 2, first, second)

    return of


def scores_of(rng: np.random.Generator, ids: np.ndarray, experts: int, distances: int, kind: str) -> np.ndarray:
    """Scores [T, L, D, E] of a predictor of that quality; a wrong one is sure of experts that are not routed."""
    tokens, layers, _ = ids.shape
    right = quality(kind, tokens)
    scores = rng.random((tokens, layers, distances, experts)) * 0.3
    for distance in range(1, distances + 1):
        sure = right(distance)[:, None]
        for layer in range(layers - distance):
            routed = np.zeros((tokens, experts))
            np.put_along_axis(routed, ids[:, layer + distance], 1, -1)
            noise = scores[:, layer, distance - 1]
            told = np.where(rng.random((tokens, experts)) < sure, routed * 0.9 + (1 - routed) * noise * 0.3, noise)
            scores[:, layer, distance - 1] = np.where(sure < 0, (1 - routed) * (0.5 + noise), told)
    return np.clip(scores, 0, 1)


def case(seed: int) -> Case:
    """Setting number ``seed``: random and sticky routing, six predictors, links from 100 x slower to 10 x faster."""
    rng, draw = np.random.default_rng(seed), random.Random(seed)
    layers = draw.choice([2, 4, 8, 12])
    experts, top_k = draw.choice([(4, 1), (8, 2), (8, 2), (16, 4), (32, 4)])
    tokens = draw.choice([500, 600])
    layers = min(layers, 200 // experts)
    ids = routing(rng, tokens, layers, experts, top_k, draw.choice(["random", "sticky", "sticky", "sticky"]))
    predictor = draw.choice(QUALITIES)
    table = rank(scores_of(rng, ids, experts, min(4, layers - 1), predictor), min(experts, 2 * top_k))
    model = ModelSpec(
        "shape",
        layers,
        experts,
        top_k,
        draw.choice([1024, 2048, 4096]),
        draw.choice([768, 1408, 14336]),
        attention_bytes=draw.choice([20, 80]) * 10**6,
        kv_bytes=4096,
        head_bytes=10**8,
        dense_bytes=10**9,
    )
    trace = Trace(
        model,
        ids.astype(np.uint8),
        np.ones(ids.shape, np.float16),
        np.array([tokens], np.int32),
        np.full(tokens, DECODE, np.uint8),
        guesses={"router": table},
        routing="SYNTHETIC",
    )
    machine = load_machine(draw.choice(MACHINES))
    factor = draw.choice([0.01, 0.1, 0.3, 1, 1, 3, 10])
    link = machine.link
    faster = {name: getattr(link, name) * factor for name in ("h2d_gb_s", "d2h_gb_s", "h2d_duplex_gb_s")}
    machine = replace(machine, link=replace(link, **faster))
    slots = draw.randint(top_k, max(top_k, experts - 1))
    spec = f"speculative:lookahead={draw.randint(1, 4)},landing_slots={draw.choice([1, 2, 2, 2, 4])}"
    run = options(spec, draw.choice(["lru", "lru", "heat"]))
    return Case(Setting(trace, machine, model, draw.choice([16, 8, 4, 3, 2]), slots, run), predictor, factor)


def compare(seed: int) -> dict[str, Any]:
    """TPOT of a case and of on_demand with the same total slots; ``over`` is what it exceeds the limit by, if it does.

    The limit: 1 % above on_demand, plus one chunk for every change of the predictor's quality.
    """
    found = case(seed)
    setting = found.setting
    plain = options(f"on_demand:landing_slots={setting.options.landing_slots}", setting.options.cache.text())
    own, other = quick_tpot_s(setting), quick_tpot_s(replace(setting, options=plain))
    assert own is not None and other is not None
    chunk_s = Timing(setting.machine, setting.model, setting.bits, setting.options).chunks.full_ns / 1e9
    changes = found.predictor.startswith("turns")
    limit = other * 1.01 + changes * chunk_s / setting.trace.num_tokens
    return {
        "seed": seed,
        "predictor": found.predictor,
        "link": found.link,
        "policy": setting.options.text,
        "cache": setting.options.cache.text(),
        "tpot_s": own,
        "on_demand_s": other,
        "ratio": own / other,
        "over": max(0.0, own / limit - 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare guarded prefetching with on_demand in seeded settings.")
    parser.add_argument("first", type=int)
    parser.add_argument("last", type=int)
    parser.add_argument("--out", required=True)
    args = parser.parse_args()
    rows = []
    for seed in range(args.first, args.last):
        rows.append(compare(seed))
        if len(rows) % 50 == 0:
            print(f"{len(rows)} settings, worst {max(r['ratio'] for r in rows):.4f}", file=sys.stderr)
    ratios = sorted(r["ratio"] for r in rows)
    by_predictor = {
        kind: {
            "settings": len(own),
            "best": min(own),
            "median": float(np.median(own)),
            "worst": max(own),
        }
        for kind in QUALITIES
        if (own := [r["ratio"] for r in rows if r["predictor"] == kind])
    }
    document = {
        "command": f"python tests/never_worse.py {args.first} {args.last}",
        "evidence": "SIMULATED on ESTIMATED profiles, SYNTHETIC routing",
        "settings": len(rows),
        "over_the_limit": [r for r in rows if r["over"] > 0],
        "ratio": {"best": ratios[0], "median": ratios[len(ratios) // 2], "worst": ratios[-1]},
        "by_predictor": by_predictor,
        "worst": sorted(rows, key=lambda r: -r["ratio"])[:20],
    }
    Path(args.out).write_text(json.dumps(document, indent=1) + "\n")
    print(json.dumps(document["ratio"]))


if __name__ == "__main__":
    main()
