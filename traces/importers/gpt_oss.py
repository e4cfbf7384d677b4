"""Public gpt-oss decode traces: raw JSON of one sequence, and the .npz sample of 64.

Format of AmanPriyanshu/GPT-OSS-MoE-ExpertFingerprinting. JSON: ``router_data`` lists ``{"token_<position>":
{"layer_<i>": {"selected_experts": [K], "selected_probs": [K]}}}``, ``full_text`` the tokens and ``generated_only`` the
last of them. npz: ``experts`` [T, L, K], ``probs`` [T, L, K], ``lens`` [S], ``seq_index`` [S]. The probabilities are a
softmax over the chosen experts.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.importers import _files
from traces.importers._build import build
from traces.importers._options import Options, Shape
from traces.trace import Trace, TraceError
from traces.vocabulary import ModelSpec

# num_local_experts, num_experts_per_tok, hidden_size, intermediate_size of the published configurations, by layers
_KNOWN: Final = {
    24: ModelSpec("gpt-oss-20b", 24, 32, 4, 2880, 2880, expert_bias=8640),
    36: ModelSpec("gpt-oss-120b", 36, 128, 4, 2880, 2880, expert_bias=8640),
}
_NUMBERED: Final = re.compile(r"(token|layer)_(\d{1,9})")


def recognise(path: Path) -> bool:
    kind = _files.kind(path)
    if kind == "npz":
        return {"experts", "probs", "lens"} <= set(_files.npz_names(path))
    return kind == "json" and _files.mentions(path, "router_data")


def read(path: Path, options: Options) -> Trace:
    return _read_npz(path, options) if _files.kind(path) == "npz" else _read_json(path, options)


def _shape(options: Options, layers: int, top_k: int) -> Shape:
    return options.shape(_KNOWN.get(layers), num_layers=layers, top_k=top_k)


def _read_npz(path: Path, options: Options) -> Trace:
    arrays = _files.read_npz(path)
    if missing := [name for name in ("experts", "probs", "lens") if name not in arrays]:
        raise TraceError(f"array {missing[0]!r} is missing from the .npz file; it needs experts, probs and lens")
    ids, weights, lengths = arrays["experts"], arrays["probs"], arrays["lens"]
    if ids.ndim != 3 or ids.dtype.kind not in "iu" or ids.shape != weights.shape or not ids.size:
        raise TraceError(
            f"experts has shape {list(ids.shape)} of {ids.dtype} and probs {list(weights.shape)}; both must be "
            "[tokens, layers, top_k], the experts integers"
        )
    if lengths.ndim != 1 or lengths.dtype.kind not in "iu" or lengths.sum(dtype=np.float64) != len(ids):
        raise TraceError(f"lens must be integers that sum to the {len(ids)} tokens; they do not")
    provenance: dict[str, Any] = {}
    if "seq_index" in arrays and arrays["seq_index"].shape == lengths.shape:
        provenance["sequence_index"] = arrays["seq_index"].tolist()
    return build(
        _shape(options, *ids.shape[1:]),
        ids,
        weights,
        lengths.tolist(),
        np.ones(len(ids)),
        provenance=provenance,
        notes=["the file holds decode tokens only: no prefill"],
        forced=options.forced,
    )


def _read_json(path: Path, options: Options) -> Trace:
    document = _files.read_json(path)
    if not isinstance(document, dict) or not isinstance(document.get("router_data"), list):
        raise TraceError("'router_data' is missing or no list; this is not a raw gpt-oss trace")
    positions: list[int] = []
    ids: list[list[list[int]]] = []
    weights: list[list[list[float]]] = []
    for entry in document["router_data"]:
        for position, layers in _numbered(entry, "token", "router_data").items():
            where = f"token_{position}"
            cells = _numbered(layers, "layer", where)
            if sorted(cells) != list(range(len(ids[0]) if ids else len(cells))):
                raise TraceError(f"{where} has the layers {sorted(cells)!s:.60}; every token must have 0, 1, ... alike")
            rows = [_cell(cells[layer], f"{where} layer_{layer}") for layer in range(len(cells))]
            positions.append(position)
            ids.append([row[0] for row in rows])
            weights.append([row[1] for row in rows])
    if not ids or not ids[0]:
        raise TraceError("'router_data' holds no routing; record some tokens")
    top_k = len(ids[0][0])
    if any(len(row) != top_k for token in ids for row in token):
        raise TraceError(f"the tokens choose different numbers of experts; each must choose {top_k}, as the first does")
    if positions != list(range(positions[0], positions[0] + len(positions))):
        raise TraceError("the token positions do not count up by one; tokens are missing or out of order")
    prompt, said = _prompt(document)
    facts = {key: document[key] for key in ("row_index", "dataset", "category") if key in document}
    category = facts.get("category")
    return build(
        _shape(options, len(ids[0]), top_k),
        np.array(ids, np.int64),
        np.array(weights),
        [len(ids)],
        np.array(positions) >= prompt,
        provenance=facts | {"first_position": positions[0]},
        notes=[said] if said else [],
        domains=(category,) if isinstance(category, str) and category and category.isprintable() else (),
        forced=options.forced,
    )


def _prompt(document: dict[str, Any]) -> tuple[int, str]:
    """Tokens before the generated ones, and a note where the file does not say."""
    texts = [document.get(key) for key in ("full_text", "generated_only")]
    if all(isinstance(text, list) for text in texts):
        return len(texts[0] or ()) - len(texts[1] or ()), ""
    return 0, "the file does not say which tokens are the prompt's: all are taken for decode tokens"


def _numbered(values: Any, word: str, where: str) -> dict[int, Any]:
    """An object whose keys are ``word_<number>``, by number, in the order of the file."""
    if not isinstance(values, dict):
        raise TraceError(f"{where} holds {values!r:.60}; it must hold objects")
    found: dict[int, Any] = {}
    for key, value in values.items():
        match = _NUMBERED.fullmatch(key)
        if not match or match[1] != word:
            raise TraceError(f"{where} has the key {key!r:.40}; it must be {word}_<number>")
        found[int(match[2])] = value
    return found


def _cell(values: Any, where: str) -> tuple[list[int], list[float]]:
    experts = values.get("selected_experts") if isinstance(values, dict) else None
    probabilities = values.get("selected_probs") if isinstance(values, dict) else None
    if not isinstance(experts, list) or any(type(e) is not int or abs(e) >= 2**31 for e in experts):
        raise TraceError(f"{where} has selected_experts {experts!r:.60}; it must be a list of integers")
    if not isinstance(probabilities, list) or any(type(p) not in (int, float) for p in probabilities):
        raise TraceError(f"{where} has selected_probs {probabilities!r:.60}; it must be a list of numbers")
    if len(experts) != len(probabilities) or not experts:
        raise TraceError(f"{where} has {len(experts)} experts and {len(probabilities)} probabilities; give as many")
    return experts, probabilities
