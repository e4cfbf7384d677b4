"""Route traces of BigMoeOnEdge, a llama.cpp-based engine (``# route_trace v1`` CSV).

Format: docs of Helldez/BigMoeOnEdge. A ``#`` preamble, then one row per routed expert, columns by name: turn, phase
(0 prefill, 1 decode), step (position of the token), layer, slot (rank), expert, weight (``nan`` where the engine did
not see it), and optionally residency, expert_bytes, dropped.

Before the last layer's experts llama.cpp keeps only the tokens whose logits are asked for. So where a model gathers
them there, the last layer routes the last prompt token alone while all other layers route the whole prompt: nothing is
lost from the file, that layer did no more. A trace needs every layer of every token, so such a prefill is left out.
"""

from __future__ import annotations

import math
import re
from array import array
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from traces.importers import _files
from traces.importers._build import Table, build, placed, table
from traces.importers._options import Options
from traces.trace import Trace, TraceError
from traces.vocabulary import DECODE, PREFILL

_MAGIC: Final = "# route_trace v1"
_MODEL: Final = re.compile(
    r"# model=(?P<model>.*) arch=(?P<arch>\S+) n_layer=(?P<layers>\d{1,6}) n_expert=(?P<experts>\d{1,6}) "
    r"n_expert_used=(?P<top_k>\d{1,6})"
)
_LAYER: Final = re.compile(r"# layer=(\d{1,6}) expert_bytes=(\d{1,15}) dense_bytes=(\d{1,15})")
_NEEDED: Final = ("turn", "phase", "step", "layer", "slot", "expert", "weight")
# num_experts_per_tok of the published configurations, by architecture and number of experts: the file says only what
# the engine used, which --n-expert-used overrides.
_OWN_TOP_K: Final = {("qwen3moe", 128): 8, ("gemma4", 128): 8, ("gpt-oss", 128): 4, ("gpt-oss", 32): 4}


def recognise(path: Path) -> bool:
    return _files.first_line(path).rstrip() == _MAGIC.encode()


def read(path: Path, options: Options) -> Trace:
    facts, columns = _rows(_files.lines(path))
    turn, phase, step, layer, slot, expert = (np.frombuffer(columns[c], np.int64) for c in _NEEDED[:-1])
    if len(step) and step.min() < 0:
        raise TraceError("a step is negative: the engine could not say which token it is; record one output at a time")
    if len(phase) and not np.isin(phase, (PREFILL, DECODE)).all():
        raise TraceError(f"a phase is {phase[~np.isin(phase, (PREFILL, DECODE))][0]}; it must be 0 or 1")
    weights = np.frombuffer(columns["weight"])
    cells = table(np.stack([turn, phase, step], axis=1), layer, slot, expert, weights)
    if cells.ids.shape[2] != facts["top_k"]:
        raise TraceError(
            f"rows rank {cells.ids.shape[2]} experts, but n_expert_used is {facts['top_k']}; rows are missing"
        )
    if cells.layers[-1] >= facts["layers"]:
        raise TraceError(f"a layer is {cells.layers[-1]}; the model's layers are 0 to {facts['layers'] - 1}")
    kept, dropped = _complete(cells)
    if not kept.any():
        raise TraceError("no token has all layers; a prompt alone cannot be converted: let the engine decode")
    lengths = np.bincount(np.unique(cells.tokens[kept, 0], return_inverse=True)[1].reshape(-1)).tolist()
    notes = [
        f"turn {t}: prefill of {n} tokens left out, because the engine's last layer routed only the last of them"
        for t, n in dropped.items()
    ]
    notes.append("residency and expert_bytes, which are the engine's own cache, are left out")
    unknown = np.isnan(weights)
    if unknown.any() and not unknown.all():
        raise TraceError(f"{int(unknown.sum())} of {len(weights)} weights are nan; all must be known, or none")
    dropping = "dropped" in columns and any(columns["dropped"])
    if dropping:
        notes.append("the engine dropped experts that were not resident: routing is FORCED")
    own = None if options.model else _OWN_TOP_K.get((facts["arch"], facts["experts"]))
    shape = options.shape(
        name=facts["model"], num_layers=len(cells.layers), num_experts=facts["experts"], top_k=facts["top_k"]
    )
    if own is not None and own != facts["top_k"]:
        shape = shape._replace(own_top_k=own)
    elif own is None and not options.model and not options.forced:
        notes.append("the file does not say whether the engine overrode top_k; --forced says that it did")
    tokens = cells.tokens[kept]
    first = np.flatnonzero(np.diff(tokens[:, 0], prepend=-1))
    return build(
        shape,
        cells.ids[kept],
        None if unknown.all() else cells.weights[kept],
        lengths,
        tokens[:, 1],
        provenance={
            "engine": "BigMoeOnEdge route_trace v1",
            "file_model": facts["model"],
            "arch": facts["arch"],
            **placed(cells.layers),
            "first_position": tokens[first, 2].tolist(),
            "prefill_tokens_left_out": sum(dropped.values()),
            "expert_bytes": facts["expert_bytes"],
            "dense_bytes": facts["dense_bytes"],
        },
        notes=notes,
        forced=options.forced or dropping,
    )


def _complete(cells: Table) -> tuple[_files.Array, dict[int, int]]:
    """Which tokens to keep, and by turn how many prefill tokens are left out.

    Raises:
        TraceError: a token lacks a layer for another reason than a last layer that routes only the prompt's end.
    """
    there: _files.Array = np.all(cells.ids >= 0, axis=2)
    kept = np.ones(len(cells.tokens), bool)
    dropped: dict[int, int] = {}
    for turn in np.unique(cells.tokens[:, 0]).tolist():
        of_turn = np.flatnonzero(cells.tokens[:, 0] == turn)
        steps = cells.tokens[of_turn, 2]
        if (gap := np.flatnonzero(np.diff(steps) != 1)).size:
            raise TraceError(f"turn {turn} goes from step {steps[gap[0]]} to {steps[gap[0] + 1]}; rows are missing")
        prompt = of_turn[cells.tokens[of_turn, 1] == PREFILL]
        only_end = len(prompt) > 1 and there[prompt[-1], -1] and (cells.ids[prompt[:-1], -1] < 0).all()
        if only_end and there[prompt, :-1].all():
            kept[prompt] = False
            dropped[turn] = len(prompt)
    if not (whole := there[kept]).all():
        token, layer = np.argwhere(~whole)[0]
        turn, _, step = cells.tokens[kept][token].tolist()
        raise TraceError(f"turn {turn}, step {step} lacks experts of layer {cells.layers[layer]}; rows are missing")
    return kept, dropped


def _rows(lines: Iterator[tuple[int, str]]) -> tuple[dict[str, Any], dict[str, array[Any]]]:
    """The preamble's facts and the columns."""
    facts: dict[str, Any] = {"expert_bytes": [], "dense_bytes": []}
    names: list[str] = []
    columns: dict[str, array[Any]] = {}
    readers: list[tuple[int, array[Any], Any]] = []
    for number, line in lines:
        if line.startswith("#"):
            _preamble(line, facts)
        elif not names:
            names = line.split(",")
            if missing := [name for name in _NEEDED if name not in names]:
                raise TraceError(f"line {number} names no column {missing[0]!r}; a route trace has it")
            for name in (*_NEEDED, *(["dropped"] if "dropped" in names else [])):
                columns[name] = array("d" if name == "weight" else "q")
                readers.append((names.index(name), columns[name], float if name == "weight" else int))
        else:
            cells = line.split(",")
            if len(cells) != len(names):
                raise TraceError(f"line {number} has {len(cells)} cells; the header names {len(names)} columns")
            try:
                for place, column, number_of in readers:
                    column.append(number_of(cells[place]))
            except (ValueError, OverflowError):
                raise TraceError(f"line {number} holds {line!r:.80}; its cells must be numbers") from None
            if math.isinf(columns["weight"][-1]):
                raise TraceError(f"line {number} has an infinite weight; weights are finite, or nan where unknown")
    if "model" not in facts:
        raise TraceError("the line '# model=... arch=... n_layer=... n_expert=... n_expert_used=...' is missing")
    if not names:
        raise TraceError("the line of column names is missing; the file is truncated")
    return facts, columns


def _preamble(line: str, facts: dict[str, Any]) -> None:
    if match := _MODEL.fullmatch(line):
        facts["model"] = PurePosixPath(match["model"].replace("\\", "/")).name.removesuffix(".gguf") or "unnamed"
        facts["arch"] = match["arch"]
        facts |= {key: int(match[key]) for key in ("layers", "experts", "top_k")}
    elif match := _LAYER.fullmatch(line):
        facts["expert_bytes"].append(int(match[2]))
        facts["dense_bytes"].append(int(match[3]))
