"""From what an importer found to a Trace: ranges are checked before ids are narrowed and weights rounded.

Shape letters as in ``traces.trace``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from traces.importers._options import Shape
from traces.trace import Halves, Trace, TraceError, id_dtype

_LARGEST: Final = 65504.0  # the largest finite float16

Array = npt.NDArray[Any]


class Table(NamedTuple):
    """Cells of separate records, put in order; an id of -1 marks a cell that no record holds.

    Attributes:
        tokens: int64 [T, keys], the tokens in ascending order.
        layers: int64 [L], the layers in ascending order.
        ids: int64 [T, L, K].
        weights: float64 [T, L, K].
    """

    tokens: Array
    layers: Array
    ids: Array
    weights: Array


def table(tokens: Array, layers: Array, slots: Array, ids: Array, weights: Array) -> Table:
    """Order records by token, layer and rank.

    Args:
        tokens: int64 [records, keys]; equal keys are one token, and ascending keys their order.
        layers, slots, ids, weights: [records].

    Raises:
        TraceError: no record, two records of one cell, or so few that no layer is nearly complete.
    """
    if not len(ids):
        raise TraceError("the file holds no routing; record some tokens")
    token_keys, token = np.unique(tokens, axis=0, return_inverse=True)
    layer_keys, layer = np.unique(layers, return_inverse=True)
    if ids.min() < 0:
        raise TraceError(f"a record names expert {ids.min()}; experts count from 0")
    if slots.min() < 0:
        raise TraceError(f"a rank is {slots.min()}; ranks count from 0")
    shape = (len(token_keys), len(layer_keys), int(slots.max()) + 1)
    if shape[0] * shape[1] * shape[2] > 4 * len(ids) + 1024:
        raise TraceError(
            f"{len(ids)} records cannot fill {shape[0]} tokens x {shape[1]} layers x {shape[2]} ranks; rows are missing"
        )
    cell = np.ravel_multi_index((token.reshape(-1), layer.reshape(-1), slots), shape)
    if len(np.unique(cell)) != len(cell):
        twice = np.unravel_index(int(np.flatnonzero(np.bincount(cell) > 1)[0]), shape)
        key = token_keys[twice[0]].tolist()
        raise TraceError(f"token {key} has rank {twice[2]} of layer {layer_keys[twice[1]]} twice; give each once")
    all_ids = np.full(shape, -1, np.int64)
    all_weights = np.zeros(shape)
    all_ids.reshape(-1)[cell] = ids
    all_weights.reshape(-1)[cell] = weights
    return Table(token_keys, layer_keys, all_ids, all_weights)


def build(
    shape: Shape,
    ids: Array,
    weights: Array | None,
    lengths: Sequence[int],
    phase: Array,
    *,
    provenance: dict[str, Any],
    notes: Sequence[str] = (),
    logits: Halves | None = None,
    domains: tuple[str, ...] = (),
    passes: tuple[Sequence[int], Sequence[int]] | None = None,
    forced: bool = False,
) -> Trace:
    """The trace of routed ids [T, L, K] in router order, of any integer type, and weights of any float type.

    Without weights every weight is 0, and provenance says so. ``notes`` say what the file lacks or what was left out.
    ``passes`` gives the tokens of every pass and the sequence of every token where sequences ran together.

    Raises:
        TraceError: an id that is not an expert, a weight that is not finite, negative or too large for float16, or
            what ``Trace`` refuses.
    """
    experts = shape.model.num_experts
    dtype = id_dtype(experts)
    outside = (ids < 0) | (ids >= experts)
    if outside.any():
        where = np.unravel_index(int(np.argmax(outside)), ids.shape)
        at = [int(i) for i in where]
        raise TraceError(
            f"token {at[0]}, layer {at[1]} names expert {ids[where]}; the model's experts are 0 to {experts - 1}"
        )
    if max(map(abs, lengths)) >= 2**31:
        raise TraceError("a sequence length does not fit 32 bits; the file is damaged")
    said = list(notes)
    if weights is None:
        halves = np.zeros(ids.shape, np.float16)
        how = "not recorded; every weight is 0"
        said.append("the file holds no weights: every weight is 0")
    else:
        halves, how = _rounded(weights)
    if shape.own_top_k is not None:
        said.append(f"top_k was {shape.model.top_k}, the model's own is {shape.own_top_k}: routing is FORCED")
        forced = True
    return Trace(
        model=shape.model,
        ids=np.ascontiguousarray(ids.astype(dtype)),
        weights=halves,
        sequence_lengths=np.array(lengths, np.int32),
        phase=phase.astype(np.uint8),
        logits=logits,
        provenance=provenance | {"weights": how, "notes": said},
        domains=domains,
        pass_lengths=None if passes is None else np.array(passes[0], np.int32),
        token_sequence=None if passes is None else np.array(passes[1], np.int32),
        routing="FORCED" if forced else "RECORDED",
    )


def _rounded(weights: Array) -> tuple[Halves, str]:
    bad = ~(np.isfinite(weights) & (weights >= 0) & (weights <= _LARGEST))
    if bad.any():
        where = np.unravel_index(int(np.argmax(bad)), weights.shape)
        raise TraceError(
            f"token {int(where[0])}, layer {int(where[1])} has the weight {weights[where]}; it must be a number from 0 "
            f"to {_LARGEST:.0f}"
        )
    halves = weights.astype(np.float16) + np.float16(0)  # the sum makes a negative zero positive
    change = float(np.max(np.abs(halves - weights.astype(np.float64)), initial=0))
    if change == 0:
        return halves, "exactly as in the file"
    return halves, f"rounded to float16, by at most {change:.1e}"


def phases(lengths: Sequence[int], prefill: int) -> Array:
    """0 for the first ``prefill`` tokens of every sequence, 1 for the rest; uint8 [T].

    Raises:
        TraceError: a sequence is shorter than that.
    """
    if prefill < 0 or prefill > min(lengths, default=0):
        raise TraceError(f"--prefill is {prefill}; the sequences have {min(lengths, default=0)} tokens or more")
    return np.concatenate([np.arange(length) >= prefill for length in lengths]).astype(np.uint8)


def placed(layers: Array) -> dict[str, Any]:
    """Provenance of the layers' numbers in the model, where they are not 0, 1, ..."""
    numbers: list[int] = layers.tolist()
    return {} if numbers == list(range(len(numbers))) else {"moe_layers": numbers}


def equal_lengths(tokens: int, sequences: int) -> list[int]:
    """The lengths of ``sequences`` equally long sequences of altogether ``tokens``."""
    if sequences < 1 or tokens % sequences or not tokens:
        raise TraceError(f"--sequences is {sequences}; it does not divide the {tokens} tokens into equal sequences")
    return [tokens // sequences] * sequences
