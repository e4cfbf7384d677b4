"""Routing JSONL of moe-cache-lab (``moe-cache-lab.routing-jsonl``, versions 1 and 2).

Format: TRACE_FORMAT.md of birkansit/moe-cache-lab. The first line is a ``metadata`` record, every later one a
``routing_selection`` of one token in one layer: phase, token_position, layer, selected_experts in the producer's order,
and selected_probabilities as many, or none. Prompt records come layer by layer, generated ones token by token.
"""

from __future__ import annotations

import json
from array import array
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.importers import _files
from traces.importers._build import build, placed, table
from traces.importers._options import Options
from traces.trace import Trace, TraceError
from traces.vocabulary import DECODE, PREFILL

_FORMAT: Final = "moe-cache-lab.routing-jsonl"
_PHASES: Final = {
    1: {"prompt": PREFILL, "generated": DECODE},
    2: {"decoder_prompt": PREFILL, "decoder_generated": DECODE},
}
_FACTS: Final = (
    "model_id", "model_revision", "capture_method", "created_at", "transformers_version", "source_text",
    "generated_text", "format_version",
)  # fmt: skip


def recognise(path: Path) -> bool:
    try:
        record = json.loads(_files.first_line(path))
    except (ValueError, RecursionError):
        return False
    return isinstance(record, dict) and record.get("format") == _FORMAT


def read(path: Path, options: Options) -> Trace:
    metadata: dict[str, Any] | None = None
    tokens, layers, slots, ids = (array("q") for _ in range(4))
    phase_of: dict[int, int] = {}
    weights = array("d")
    width = 0
    for number, line in _files.lines(path):
        record = _files.parse(line, f"line {number}")
        if not isinstance(record, dict):
            raise TraceError(f"line {number} is no JSON object; every line must be a record")
        if metadata is None:
            metadata = _metadata(record)
            continue
        position, layer, phase, experts, probabilities = _event(record, metadata["format_version"], number)
        if phase_of.setdefault(position, phase) != phase:
            raise TraceError(f"line {number} says of token {position} that it is prompt and generated; it is one")
        if width not in (0, len(experts)):
            raise TraceError(
                f"line {number} selects {len(experts)} experts, the lines before {width}; all must be equal"
            )
        width = len(experts)
        for slot, expert in enumerate(experts):
            tokens.append(position)
            layers.append(layer)
            slots.append(slot)
            ids.append(expert)
        weights.extend(probabilities)
    if metadata is None:
        raise TraceError("the file is empty; it must begin with a metadata record")
    if len(weights) not in (0, len(ids)):
        raise TraceError(f"{len(weights)} probabilities stand beside {len(ids)} experts; give all, or none")
    known = np.frombuffer(weights) if len(weights) else np.zeros(len(ids))
    positions_of, *rest = (np.frombuffer(column, np.int64) for column in (tokens, layers, slots, ids))
    cells = table(positions_of.reshape(-1, 1), rest[0], rest[1], rest[2], known)
    if (cells.ids < 0).any():
        token, layer, _ = np.argwhere(cells.ids < 0)[0]
        raise TraceError(f"token {cells.tokens[token, 0]} has no record for layer {cells.layers[layer]}; add it")
    positions = cells.tokens[:, 0].tolist()
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise TraceError("the token positions do not count up by one; tokens are missing")
    experts_of, width_of = _numbers(metadata)
    if width_of not in (None, cells.ids.shape[2]):
        raise TraceError(
            f"the records select {cells.ids.shape[2]} experts, the metadata says {width_of}; make them agree"
        )
    shape = options.shape(
        name=metadata["model_id"],
        num_layers=len(cells.layers),
        num_experts=experts_of,
        top_k=cells.ids.shape[2],
    )
    facts = {key: metadata[key] for key in _FACTS if metadata.get(key) is not None}
    return build(
        shape,
        cells.ids,
        cells.weights if len(weights) else None,
        [len(positions)],
        np.array([phase_of[position] for position in positions]),
        provenance=facts | {**placed(cells.layers), "first_position": positions[0]},
        notes=["token ids are left out"],
        forced=options.forced,
    )


def _metadata(record: dict[str, Any]) -> dict[str, Any]:
    if record.get("record_type") != "metadata" or record.get("format") != _FORMAT:
        raise TraceError(f"the first line is no metadata record of {_FORMAT}; this is another file")
    version = record.get("format_version")
    if type(version) is not int or version not in _PHASES:
        raise TraceError(f"format_version is {version!r:.20}; this program reads 1 and 2")
    name = record.get("model_id")
    if not isinstance(name, str) or not name.isprintable() or not name:
        raise TraceError(f"model_id is {name!r:.60}; it must be a printable string, not empty")
    return record


def _numbers(metadata: dict[str, Any]) -> tuple[int | None, int | None]:
    """Experts of a layer and experts of a token, as the metadata say them."""
    if metadata["format_version"] == 1:
        values = metadata.get("num_experts"), metadata.get("experts_per_token")
    else:
        stages = metadata.get("routing_stages")
        stages = [s for s in stages if isinstance(s, dict)] if isinstance(stages, list) else []
        decoder = [s for s in stages if s.get("routing_stage") == "decoder"]
        if len(decoder) != 1:
            raise TraceError("routing_stages describes no decoder, or two; it must describe one")
        values = decoder[0].get("num_experts"), decoder[0].get("assigned_experts_per_token")
    if any(v is not None and (type(v) is not int or v < 1) for v in values):
        raise TraceError(f"the metadata say {values!r:.60} experts and experts of a token; both must be integers")
    return values


def _event(record: dict[str, Any], version: int, number: int) -> tuple[int, int, int, list[int], list[float]]:
    """token_position, layer, phase, experts and probabilities of one record."""
    if record.get("record_type") != "routing_selection":
        raise TraceError(f"line {number} is a {record.get('record_type')!r:.40}; it must be a routing_selection")
    if version == 2 and record.get("routing_stage") != "decoder":
        raise TraceError(f"line {number} is of stage {record.get('routing_stage')!r:.20}; a trace holds decoders only")
    if version == 2 and record.get("assignment_state") != "assigned":
        raise TraceError(
            f"line {number} is a token that no expert took (capacity); a trace holds top_k for every token"
        )
    phase = record.get("phase")
    if not isinstance(phase, str) or phase not in _PHASES[version]:
        raise TraceError(f"line {number} has phase {phase!r:.40}; it must be {' or '.join(_PHASES[version])}")
    experts, probabilities = record.get("selected_experts"), record.get("selected_probabilities") or []
    if not isinstance(experts, list) or not experts:
        raise TraceError(f"line {number} has selected_experts {experts!r:.60}; it must be a list, not empty")
    for what, values in (("selected_experts", experts), *((k, [record.get(k)]) for k in ("token_position", "layer"))):
        if any(type(v) is not int or not 0 <= v < 2**31 for v in values):
            raise TraceError(f"line {number} has {what} {values!r:.60}; integers from 0 must stand there")
    if not isinstance(probabilities, list) or len(probabilities) not in (0, len(experts)):
        raise TraceError(
            f"line {number} has selected_probabilities {probabilities!r:.60}; give one per expert, or none"
        )
    if any(type(p) not in (int, float) for p in probabilities):
        raise TraceError(f"line {number} has selected_probabilities {probabilities!r:.60}; they must be numbers")
    return record["token_position"], record["layer"], _PHASES[version][phase], experts, probabilities
