"""What a synthetic trace is like: its statistics, and presets of them with their sources and targets."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.vocabulary import ModelSpec

Floats = npt.NDArray[np.float64]

_MOST_EXPERTS: Final = 1 << 18


class StatisticsError(ValueError):
    """Statistics that no trace can have; one sentence says which and what is allowed."""


@dataclass(frozen=True)
class Statistics:
    """What the routing of a synthetic trace, and the guesses in it, are like.

    Attributes:
        recent: share of accesses to the n experts of the layer used most recently before the visit, n = 1, 2, ...;
            the hit curve of a visit-atomic LRU cache. Entry top_k is the repeat probability.
        tail: how fast use falls beyond the last entry of ``recent``: depth i has a share in proportion to
            exp(-tail * i / experts).
        skew: exponent of the Zipf law of popularity, from 0 (even); recency is fitted with it in place.
        domains: kinds of text; sequences take turns.
        drift: share of popularity that is each domain's own, 0 to 1.
        sequence_length: decode tokens of a sequence.
        distances: lookahead distances the predictor guesses at; 0 for no predictor.
        guesses: guesses of one distance; 0 for twice top_k.
        recall: recall@top_k one layer ahead, by the layer that is guessed, from layer 1 on; the last one also stands
            for all layers after it.
        recall_step: what each further layer of lookahead takes from that.
    """

    recent: tuple[float, ...] = ()
    tail: float = 4.0
    skew: float = 0.3
    domains: int = 4
    drift: float = 0.5
    sequence_length: int = 256
    distances: int = 4
    guesses: int = 0
    recall: tuple[float, ...] = (0.85,)
    recall_step: float = 0.04

    def check(self, model: ModelSpec) -> None:
        """Refuse what no trace of this shape can have.

        Raises:
            StatisticsError: the value, named, with what is allowed.
        """
        experts, layers = model.num_experts, model.num_layers
        if experts * layers > _MOST_EXPERTS:
            raise StatisticsError(f"the model has {layers} layers of {experts} experts; at most {_MOST_EXPERTS} in all")
        allowed = (
            ("tail", 0, 50), ("skew", 0, 4), ("domains", 1, 1000), ("drift", 0, 1), ("sequence_length", 1, 1 << 20),
            ("distances", 0, layers - 1), ("guesses", 0, experts), ("recall_step", 0, 1),
        )  # fmt: skip
        for name, least, most in allowed:
            value = getattr(self, name)
            if not least <= value <= most:
                raise StatisticsError(f"{name} is {value}; for this model it must be {least} to {most}")
        for value in self.recall:
            if not 0 < value < 1:
                raise StatisticsError(f"recall holds {value}; each must lie between 0 and 1, both excluded")
        if not self.recall or model.top_k >= experts:
            raise StatisticsError(
                f"recall has {len(self.recall)} entries and the model routes {model.top_k} of {experts} experts; "
                "there must be at least 1 entry, and an expert that is not routed"
            )
        shares = np.diff(self.recent, prepend=0, append=1 if len(self.recent) == experts - 1 else [])
        if len(self.recent) >= experts or any(not 0 < share < 1 / model.top_k for share in shares):
            raise StatisticsError(
                f"recent is {list(self.recent)}; give at most {experts - 1} shares for this model, each higher than "
                "the one before by less than 1 / top_k, and below 1"
            )

    def depth_shares(self, model: ModelSpec) -> Floats:
        """Share of accesses at every depth of the LRU stack, float64 [E], summing to 1."""
        known = np.diff(self.recent, prepend=0)
        depths = np.arange(len(known), model.num_experts)
        tail = np.exp(-self.tail * depths / model.num_experts)
        return np.concatenate([known, tail / tail.sum() * (1 - known.sum())])

    def recall_at(self, distance: int, target: int) -> float:
        """Recall@top_k of the guesses for layer ``target`` made ``distance`` layers before."""
        return self.recall[min(target, len(self.recall)) - 1] - self.recall_step * (distance - 1)


class Target(NamedTuple):
    """A figure, by its name in ``traces.synthesize.measure``, and how near a trace must come; None: only shown."""

    figure: str
    value: float
    tolerance: float | None


@dataclass(frozen=True)
class Preset:
    """A model's shape, the statistics of its synthetic traces, where they come from, and what to compare with."""

    model: ModelSpec
    statistics: Statistics
    sources: dict[str, str]
    targets: tuple[Target, ...] = field(default=())


def repeating(repeat: float, top_k: int) -> tuple[float, ...]:
    """``recent`` of a model of which only the repeat probability is known: the last visit's experts are used alike."""
    return tuple(repeat * n / top_k for n in range(1, top_k + 1))


def _rising(first: tuple[float, ...], start: float, best: float, mean: float, layers: int) -> tuple[float, ...]:
    """``first``, then a power law from ``start`` up to ``best`` at the last of ``layers``, with this mean over all."""
    steps = np.linspace(1, 0, layers - len(first))
    low, high = 0.01, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        rest = best - (best - start) * steps**middle
        if sum(first) + rest.sum() > mean * layers:
            high = middle
        else:
            low = middle
    return (*first, *(round(float(value), 4) for value in rest))


_MIXTRAL_RECALL: Final = _rising((0.566, 0.721, 0.789), 0.815, 0.939, 0.866, 31)
_ADAPMOE: Final = "AdapMoE's accuracy of next-layer prediction"
_ASSUMED_REST: Final = "ASSUMED: skew, domains, drift and tail; no publication gives them"

PRESETS: Final = {
    "mixtral-8x7b": Preset(
        ModelSpec("mixtral-8x7b", 32, 8, 2, 4096, 14336),
        # The pairs of visit-atomic depths that these give meet the published curve of access-by-access replay.
        Statistics(recent=(0.2128, 0.3748, 0.4886, 0.6116, 0.7109, 0.8076, 0.9166), recall=_MIXTRAL_RECALL),
        {
            "recency": "PUBLISHED: LRU hits of Mixtral-8x7B-Instruct, 577 tokens replayed access by access; fitted",
            "recall": f"PUBLISHED: {_ADAPMOE}, layers 1 to 3, best and mean, taken as recall@2; the layers between "
            "ASSUMED to rise steadily, and each further layer of lookahead to cost 0.04",
            "popularity": _ASSUMED_REST,
        },
        (
            *(Target(f"lru_access_{n}", v, 0.01) for n, v in enumerate((0.317, 0.457, 0.588, 0.696, 0.798), 2)),
            Target("repeat", 0.375, 0.01),
            Target("lru_visit_4", 0.61, 0.01),
            Target("belady_4", 0.74, None),
            *(Target(f"recall_d1_layer_{n}", v, 0.02) for n, v in enumerate(_MIXTRAL_RECALL[:3], 1)),
            Target("recall_d1_mean", 0.866, 0.01),
            Target("recall_d1_best", 0.939, 0.01),
        ),
    ),
    "qwen3-30b-a3b": Preset(
        ModelSpec("qwen3-30b-a3b", 48, 128, 8, 2048, 768),
        Statistics(recent=repeating(0.43, 8), recall=(0.886,), recall_step=0.0375),
        {
            "recency": "PUBLISHED: repeat probability 0.43 (BigMoeOnEdge); the rest of the curve ASSUMED to fall as "
            "that of a recorded gpt-oss-20b",
            "recall": "PUBLISHED: slot overlap 0.886 one layer ahead, 0.035 to 0.04 less for each more (BigMoeOnEdge); "
            "ASSUMED alike in all layers",
            "popularity": _ASSUMED_REST,
        },
        (Target("repeat", 0.43, 0.01), Target("recall_d1_mean", 0.886, 0.01), Target("recall_d2_mean", 0.8485, 0.01)),
    ),
    "deepseek-v2-lite": Preset(
        ModelSpec("deepseek-v2-lite", 26, 64, 6, 2048, 1408),
        Statistics(recent=repeating(0.35, 6), recall=(0.85,)),
        {
            "all": "ASSUMED: repeat probability 0.35, recall 0.85 one layer ahead and 0.04 less for each more, "
            "skew, domains, drift and tail",
        },
        (Target("repeat", 0.35, 0.01), Target("recall_d1_mean", 0.85, 0.01)),
    ),
}
