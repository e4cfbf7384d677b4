"""Which differences between settings a trace can tell: its tokens in blocks, drawn again with replacement.

Two settings replay the same tokens, so their difference is resampled in pairs: the same blocks for both. Profiles carry
no residuals of their timings yet; so far the noise is that of the sequences alone, and `SOURCE_OF_NOISE` says so.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from traces import DECODE, Trace

BLOCKS = 32
MOST_BLOCKS = 64
SEEDS = 200
SOURCE_OF_NOISE = "sequence resampling only; the profile has no residuals of its timings"

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


def differences(records: list[dict[str, Any]], reference: int, seed: int = 0) -> list[Difference]:
    """Of every record from that at index ``reference``; all must have replayed the same tokens."""
    block_ns = np.array([record["blocks"]["ns"] for record in records], np.float64)
    tokens = np.array(records[reference]["blocks"]["tokens"], np.float64)
    means = block_ns.sum(axis=1) / max(1.0, tokens.sum())
    relative = means / means[reference] - 1
    if len(tokens) < 2:
        return [Difference(float(value), None, None) for value in relative]
    drawn = resampled(block_ns, tokens, seed)
    low, high = np.percentile(drawn / drawn[reference] - 1, [2.5, 97.5], axis=1)
    rows = zip(relative.tolist(), low.tolist(), high.tolist(), strict=True)
    return [Difference(*row) for row in rows]
