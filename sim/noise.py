"""Which differences between settings can be told: tokens in blocks drawn again with replacement, and jittered timings.

Two settings replay the same tokens on the same machine, so their difference is resampled in pairs: the same blocks, and
the same error of every operator, for both. An operator's error is drawn from the profile's residuals
(`sim.machine.Operators.residuals`), or, where it has none, from a normal distribution `DEFAULT_WIDTH` wide. It
stretches the operator's share of the time per token; what waiting then moves behind compute or out again is left out.
"""

from __future__ import annotations

from functools import lru_cache
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from sim.machine import RESIDUALS
from traces import DECODE, Trace

BLOCKS = 32
MOST_BLOCKS = 64
SEEDS = 200
OPERATORS = RESIDUALS
QUANTILES = 21
DEFAULT_WIDTH = 0.03  # standard deviation of measured / predicted, assumed where a profile has no residuals
DEFAULT_RATIOS = tuple(NormalDist(1.0, DEFAULT_WIDTH).inv_cdf((k + 0.5) / QUANTILES) for k in range(QUANTILES))

Floats = npt.NDArray[np.float64]


def block_starts(trace: Trace) -> npt.NDArray[np.int64]:
    """First decode pass of every block, counted among the decode passes.

    One block a sequence (neighbours together above `MOST_BLOCKS`); where there are fewer than 20 sequences, or they
    decode together, `BLOCKS` blocks of consecutive passes.
    """
    passes = [p for p in trace.passes() if p.phase == DECODE]
    sequences = [i for i, p in enumerate(passes) if i == 0 or p.sequence != passes[i - 1].sequence]
    if trace.token_sequence is None and len(sequences) >= 20:
        step = -(-len(sequences) // MOST_BLOCKS)
        return np.array(sequences[::step], np.int64)
    count = max(1, min(BLOCKS, len(passes) // 2))
    return np.arange(count, dtype=np.int64) * len(passes) // count


def block_sums(starts: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """``values`` of all decode passes summed by block."""
    return np.add.reduceat(values, starts) if len(values) else np.zeros(0, np.int64)


class Difference(NamedTuple):
    """Relative difference in TPOT of one setting from another: 0.1 is 10 % slower; a 95 % interval around it.

    Without blocks enough to resample the interval is None.
    """

    mean: float
    low: float | None
    high: float | None

    @property
    def real(self) -> bool:
        """Whether the interval leaves out zero; unknown counts as no."""
        return self.low is not None and self.high is not None and (self.low > 0 or self.high < 0)


@lru_cache(maxsize=16)
def draws(blocks: int, seed: int) -> Floats:
    """How often each block is drawn in every resample, [B, SEEDS]."""
    weights = np.empty((blocks, SEEDS))
    for k in range(SEEDS):
        drawn = np.random.default_rng([seed, k]).integers(0, blocks, blocks)
        weights[:, k] = np.bincount(drawn, minlength=blocks)
    return weights


def resampled(block_ns: Floats, block_tokens: Floats, seed: int) -> Floats:
    """TPOT in ns of every setting in every resample, [N, SEEDS], from its blocks' times [N, B] and tokens [B]."""
    weights = draws(len(block_tokens), seed)
    return (block_ns @ weights) / np.maximum(1, block_tokens @ weights)


def jitter(residuals: dict[str, list[float]], seed: int) -> Floats:
    """Ratio of measured to predicted time of every operator in every resample, [OPERATORS, SEEDS]."""
    drawn = np.random.default_rng([seed, SEEDS]).random((len(OPERATORS), SEEDS))
    ratios = np.empty_like(drawn)
    for k, name in enumerate(OPERATORS):
        quantiles = residuals.get(name) or DEFAULT_RATIOS
        ratios[k] = np.interp(drawn[k], np.linspace(0, 1, len(quantiles)), quantiles)
    return ratios


def source(record: dict[str, Any]) -> str:
    """What the noise is made of, in words."""
    if "shares" not in record:
        return "sequence resampling only"
    measured = [name for name in OPERATORS if record.get("residuals", {}).get(name)]
    assumed = [name for name in OPERATORS if name not in measured]
    parts = [f"residuals of {', '.join(measured)} from the profile"] if measured else []
    parts += [f"{DEFAULT_WIDTH:.0%} assumed for {', '.join(assumed)}"] if assumed else []
    return f"sequence resampling and timing jitter: {'; '.join(parts)}"


def differences(records: list[dict[str, Any]], reference: int, seed: int = 0) -> list[Difference]:
    """Of every record from that at index ``reference``; all must have replayed the same tokens on one machine."""
    block_ns = np.array([record["blocks"]["ns"] for record in records], np.float64)
    tokens = np.array(records[reference]["blocks"]["tokens"], np.float64)
    means = block_ns.sum(axis=1) / max(1.0, tokens.sum())
    relative = means / means[reference] - 1
    if len(tokens) < 2:
        return [Difference(float(value), None, None) for value in relative]
    drawn = resampled(block_ns, tokens, seed)
    shares = np.array([[record.get("shares", {}).get(name, 0.0) for name in OPERATORS] for record in records])
    drawn *= 1 + shares @ (jitter(records[reference].get("residuals", {}), seed) - 1)
    low, high = np.percentile(drawn / drawn[reference] - 1, [2.5, 97.5], axis=1)
    rows = zip(relative.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Difference(*row) for row in rows]
