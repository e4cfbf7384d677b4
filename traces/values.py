"""What the single values of a trace may be: ids, weights, logits, guesses. ``traces.trace`` says how they fit together.

Everything goes block by block, so that examining a mapped file takes little memory. Shape letters as in
``traces.trace``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import numpy.typing as npt

_MAX_EXPERTS: Final = 65535  # the largest uint16 marks a guess that does not exist
_LARGEST: Final = 0x7BFF  # bits of the largest finite float16; non-negative float16 order like their bits
_ONE: Final = 0x3C00  # bits of 1.0
_BLOCK: Final = 1 << 17  # values examined at once

Ids = npt.NDArray[np.unsignedinteger[Any]]
Halves = npt.NDArray[np.float16]


class TraceError(ValueError):
    """A trace, or a file that should hold one, that breaks a rule of the format; one sentence says which."""


def id_dtype(num_experts: int) -> np.dtype[Any]:
    """The dtype of expert ids: uint8 up to 255 experts, else uint16; its largest value stands for no expert.

    Raises:
        TraceError: more experts than uint16 can name.
    """
    if num_experts > _MAX_EXPERTS:
        raise TraceError(f"model field 'num_experts' is {num_experts}; a trace holds at most {_MAX_EXPERTS}")
    return np.dtype(np.uint8 if num_experts <= 255 else np.uint16)


def padding(num_experts: int) -> int:
    """The id that stands for no expert: all bits one."""
    return int(np.iinfo(id_dtype(num_experts)).max)


def check_routed(ids: Ids, weights: Halves, experts: int) -> None:
    """Ids [T, L, K] below ``experts``, none twice in a (token, layer); weights [T, L, K] finite and not negative."""
    for first, block in _blocks(ids):
        _check_ids("routed_ids", block, experts, first)
    for first, block in _blocks(weights):
        _check_halves("routed_weights", block, _LARGEST, "finite and not negative", first)


def check_logits(logits: Halves) -> None:
    """No NaN among the logits [T, L, E]."""
    for first, block in _blocks(logits):
        if np.isnan(block.max()):
            where = _at(np.isnan(block), first)[1]
            raise TraceError(f"router_logits{where} is nan; record the routing again, with logits that are numbers")


def check_guesses(name: str, ids: Ids, scores: Halves, wrap: bool, experts: int) -> None:
    """Ids and scores [T, L, D, M]: in range, ranked best first, and padded where there is no target."""
    for distance in range(1, ids.shape[2] + 1):
        targets = ids.shape[1] if wrap else ids.shape[1] - distance
        column = f"guesses.{name} at distance {distance}: "
        for (first, some_ids), (_, some_scores) in zip(_blocks(ids), _blocks(scores), strict=True):
            block_ids, block_scores = some_ids[:, :, distance - 1], some_scores[:, :, distance - 1]
            if (block_ids[:, targets:] != padding(experts)).any() or block_scores[:, targets:].view(np.uint16).any():
                raise TraceError(
                    f"{column}a guess from layer {targets} or later has no target; pad it with id {padding(experts)} "
                    "and score 0, or declare wrap"
                )
            if targets:
                _check_ranked(column, block_ids[:, :targets], block_scores[:, :targets], experts, first)


def _check_ranked(column: str, ids: Ids, scores: Halves, experts: int, first: int) -> None:
    _check_ids(f"{column}ids", ids, experts, first)
    _check_halves(f"{column}scores", scores, _ONE, "between 0 and 1", first)
    bits = scores.view(np.uint16)
    unranked = (bits[..., 1:] > bits[..., :-1]) | ((bits[..., 1:] == bits[..., :-1]) & (ids[..., 1:] < ids[..., :-1]))
    if unranked.any():
        where, at = _at(unranked.any(axis=-1), first)
        raise TraceError(
            f"{column}scores{at} {scores[where].tolist()} of ids {ids[where].tolist()} are not ranked; put the "
            "highest score first and equal scores by lower id"
        )


def _check_ids(name: str, ids: Ids, experts: int, first: int) -> None:
    """Every id below ``experts``, and none twice in the last dimension."""
    if ids.max() >= experts:
        where, at = _at(ids >= experts, first)
        raise TraceError(f"{name}{at} is {ids[where]}; the model's experts are 0 to {experts - 1}")
    ranks = np.ascontiguousarray(ids.reshape(-1, ids.shape[-1]).T)
    twice = np.zeros(ranks.shape[1], bool)
    for later in range(1, len(ranks)):
        twice |= (ranks[:later] == ranks[later]).any(axis=0)
    if twice.any():
        where, at = _at(twice.reshape(ids.shape[:-1]), first)
        raise TraceError(f"{name}{at} names an expert twice, {ids[where].tolist()}; name each once")


def _check_halves(name: str, values: Halves, largest: int, allowed: str, first: int) -> None:
    """Every float16 has bits up to ``largest``: not negative (negative zero included), not NaN, not above it."""
    bits = values.view(np.uint16)
    if bits.max() > largest:
        where, at = _at(bits > largest, first)
        raise TraceError(f"{name}{at} is {values[where]}; it must be {allowed}")


def _blocks(array: npt.NDArray[Any]) -> Iterator[tuple[int, npt.NDArray[Any]]]:
    """Whole tokens of an array [T, ...], about ``_BLOCK`` values at a time, each with its first row."""
    tokens = max(1, _BLOCK // int(np.prod(array.shape[1:])))
    for first in range(0, len(array), tokens):
        yield first, array[first : first + tokens]


def _at(wrong: npt.NDArray[np.bool_], first: int) -> tuple[tuple[np.intp, ...], str]:
    """The index of the first True in a block, and how the sentence writes it, counted from the trace's start."""
    where = np.unravel_index(int(np.argmax(wrong)), wrong.shape)
    return where, str([first + int(where[0]), *(int(i) for i in where[1:])])
