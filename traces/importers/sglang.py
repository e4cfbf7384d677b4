"""SGLang's expert distribution recorder in per_token mode (a .pt file of one rank).

Format: ``expert_distribution.py`` of sgl-project/sglang. ``{"records": [...], "last_physical_to_logical_map": [layers,
physical experts]}``; a record is one forward pass: forward_pass_id, rank, gatherer_key, input_ids, positions,
extend_seq_lens, forward_mode and topk_ids_of_layer, int32 [layers, tokens, 8], *physical* ids, -1 in layers without
experts and behind the model's own top_k. Weights are not recorded, and neither is which request a token belongs to:
it is found by its position and the batch's order, and where that leaves a choice the file is refused.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.importers import _files
from traces.importers._build import Array, build, placed
from traces.importers._options import Options
from traces.trace import Trace, TraceError
from traces.vocabulary import DECODE, PREFILL

_EXTEND, _DECODE, _IDLE = 1, 2, 4  # ForwardMode of sglang's forward_batch_info.py
_MODES: Final = {3: "mixes prefill and decode", 5: "verifies a draft", 6: "extends a draft"}


def recognise(path: Path) -> bool:
    return _files.kind(path) == "torch" and "topk_ids_of_layer" in (_files.torch_strings(path) or ())


@dataclass
class _Passes:
    """Rows of all passes, and the sequence of each.

    Attributes:
        ids: by pass, [tokens, layers, ranks].
        modes: the phase of every pass.
        sequence: of every row.
        running: sequences that the next decode pass may hold, in the order of the scheduler's batch, which requests
            leave when they end and join at its end.
        following: by sequence, the position of its next token.
        first_position: by sequence.
    """

    ids: list[Array] = field(default_factory=list)
    modes: list[int] = field(default_factory=list)
    sequence: list[int] = field(default_factory=list)
    running: list[int] = field(default_factory=list)
    following: list[int] = field(default_factory=list)
    first_position: list[int] = field(default_factory=list)

    def prefill(self, ids: Array, positions: list[int], lengths: list[int], where: str) -> None:
        if sum(lengths) != len(positions) or min(lengths) < 1:
            raise TraceError(f"{where} has extend_seq_lens {lengths!s:.60} for {len(positions)} tokens; record again")
        begin = 0
        for length in lengths:
            part = positions[begin : begin + length]
            begin += length
            if part != list(range(part[0], part[0] + length)):
                raise TraceError(f"{where} prefills positions that do not count up by one; record again")
            chunk = self.modes and self.modes[-1] == PREFILL and self.following[self.sequence[-1]] == part[0]
            sequence = self.sequence[-1] if chunk and begin == length else self._start(part[0])
            self.sequence += [sequence] * length
            self.following[sequence] += length
        self.ids.append(ids)
        self.modes.append(PREFILL)

    def decode(self, ids: Array, positions: list[int], where: str) -> None:
        """Find the sequences by their positions: the batch keeps its order, and what is missing has ended."""
        if not self.following:
            self.running = [self._start(position) for position in positions]
        found = self._matched(positions, self.running)
        if len(found) < len(positions):
            raise TraceError(
                f"{where} decodes position {positions[len(found)]}, which no request got to; record all passes"
            )
        if found != self._matched(positions[::-1], self.running[::-1])[::-1]:
            raise TraceError(
                f"{where} decodes the positions {positions!s:.60}, and which requests these are cannot be told: the "
                "recorder does not say; record one request at a time"
            )
        self.running = found
        for sequence in found:
            self.following[sequence] += 1
        self.sequence += found
        self.ids.append(ids)
        self.modes.append(DECODE)

    def _start(self, position: int) -> int:
        self.following.append(position)
        self.first_position.append(position)
        self.running.append(len(self.following) - 1)
        return self.running[-1]

    def _matched(self, positions: list[int], running: list[int]) -> list[int]:
        """The first sequences in order of which these are the next positions; cut where there is none."""
        found: list[int] = []
        left = iter(running)
        for position in positions:
            sequence = next((s for s in left if self.following[s] == position), None)
            if sequence is None:
                break
            found.append(sequence)
        return found

    def passes(self) -> tuple[list[int], list[int]] | None:
        """Tokens of every pass and the sequence of every row; None if sequences stand one after the other, each with
        one prefill."""
        tokens = [len(ids) for ids in self.ids]
        changes = sum(a != b for a, b in zip(self.sequence, self.sequence[1:], strict=False)) + 1
        prefills = sum(mode == PREFILL for mode in self.modes)
        begins = np.cumsum([0, *tokens[:-1]])
        prefilled = {self.sequence[b] for b, mode in zip(begins, self.modes, strict=True) if mode == PREFILL}
        together = any(t > 1 for t, mode in zip(tokens, self.modes, strict=True) if mode == DECODE)
        plain = changes == len(self.following) and prefills == len(prefilled) and not together
        several = any(len(set(self.sequence[b : b + t])) > 1 for b, t in zip(begins, tokens, strict=True))
        return None if plain and not several else (tokens, self.sequence)


def read(path: Path, options: Options) -> Trace:
    document = _files.read_torch(path)
    if not isinstance(document, dict) or not isinstance(document.get("records"), list):
        raise TraceError("'records' is missing or no list; this is no recording of SGLang in per_token mode")
    logical = _files.numpy_of(document.get("last_physical_to_logical_map"), "last_physical_to_logical_map")
    if logical.ndim != 2 or logical.dtype.kind not in "iu" or not logical.size or logical.min() < 0:
        raise TraceError(
            f"last_physical_to_logical_map has shape {list(logical.shape)} of {logical.dtype}; it must be integers "
            "from 0, [layers, physical experts]"
        )
    passes = _Passes()
    sources: set[tuple[Any, Any]] = set()
    last = -1
    for number, record in enumerate(document["records"]):
        where = f"record {number}"
        if not isinstance(record, dict):
            raise TraceError(f"{where} is a {type(record).__name__}; it must be a dictionary")
        sources.add((str(record.get("rank")), str(record.get("gatherer_key"))))
        if (pass_id := _integer(record, "forward_pass_id", where)) <= last:
            raise TraceError(f"{where} has forward_pass_id {pass_id} after {last}; passes must be in order")
        last = pass_id
        _add(record, where, len(logical), passes)
    if not passes.ids:
        raise TraceError("the recording holds no pass with tokens; record some requests")
    if len(sources) > 1:
        raise TraceError(
            f"the records are of {len(sources)} ranks or gatherers; convert one rank's file, of one gatherer"
        )
    if len({ids.shape[2] for ids in passes.ids}) > 1:
        raise TraceError("the records rank different numbers of experts; they must be of one model")
    physical, layers = _routed(np.concatenate(passes.ids))
    if physical.max() >= logical.shape[1]:
        raise TraceError(f"a physical expert is {physical.max()}; last_physical_to_logical_map has {logical.shape[1]}")
    ids = logical[layers[None, :, None], physical]
    shape = options.shape(num_layers=len(layers), num_experts=int(logical.max()) + 1, top_k=ids.shape[2])
    moved = not (logical == np.arange(logical.shape[1])).all()
    return build(
        shape,
        ids,
        None,
        np.bincount(passes.sequence).tolist(),
        np.repeat(passes.modes, [len(rows) for rows in passes.ids]),
        passes=passes.passes(),
        provenance={
            "engine": "SGLang expert distribution recorder, per_token",
            **placed(layers),
            "physical_experts": logical.shape[1],
            "physical_is_logical": not moved,
            "first_position": passes.first_position,
        },
        notes=["physical ids were mapped back by the map in force at the end of the recording"] if moved else [],
        forced=options.forced,
    )


def _add(record: dict[str, Any], where: str, layers: int, passes: _Passes) -> None:
    """Add one record's pass to the others."""
    mode = _integer(record, "forward_mode", where)
    positions = _integers(record.get("positions"), f"{where} positions")
    ids = _files.numpy_of(record.get("topk_ids_of_layer"), f"{where} topk_ids_of_layer")
    if ids.ndim != 3 or ids.dtype.kind != "i" or ids.shape[:2] != (layers, len(positions)):
        raise TraceError(
            f"{where} has topk_ids_of_layer of shape {list(ids.shape)}, {ids.dtype}; it must be integers, "
            f"[{layers} layers, {len(positions)} tokens, ranks]"
        )
    rows = ids.transpose(1, 0, 2)
    if mode == _IDLE or not positions:
        return
    if mode == _DECODE:
        passes.decode(rows, positions, where)
    elif mode == _EXTEND:
        lengths = record.get("extend_seq_lens") or [len(positions)]
        passes.prefill(rows, positions, _integers(lengths, f"{where} extend_seq_lens"), where)
    else:
        raise TraceError(f"{where} {_MODES.get(mode, f'has forward_mode {mode}')}; record prefill and decode only")


def _integers(values: Any, what: str) -> list[int]:
    if not isinstance(values, list) or any(type(value) is not int for value in values):
        raise TraceError(f"{what} is {values!r:.60}; it must be a list of integers")
    return values


def _routed(ids: Array) -> tuple[Array, Array]:
    """Ids [T, layers, ranks] without layers and last ranks that are -1 throughout, and the layers' numbers."""
    layers = np.flatnonzero((ids != -1).any(axis=(0, 2)))
    top_k = int((ids != -1).any(axis=(0, 1)).sum())
    if not len(layers):
        raise TraceError("no layer routed anything; the model has no experts, or the recorder did not see them")
    routed = ids[:, layers, :top_k]
    if (routed < 0).any():
        token, layer, rank = np.argwhere(routed < 0)[0]
        raise TraceError(
            f"token {token}, layer {layers[layer]} has no expert at rank {rank}, though others have; record again"
        )
    return routed, layers


def _integer(record: dict[str, Any], key: str, where: str) -> int:
    if type(value := record.get(key)) is not int:
        raise TraceError(f"{where} has {key} {value!r:.40}; it must be an integer")
    return int(value)
