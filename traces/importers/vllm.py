"""vLLM's returned routed experts (``--enable-return-routed-experts``): response JSON, .npy or .npz.

Format: vLLM's documents on routed experts, v0.21 and later. ``routed_experts`` is integers [tokens, MoE layers,
top_k]; in JSON nested lists, or a .npy file in base64. Older versions return the prompt's apart
(``prompt_routed_experts``), later ones prompt and generated tokens in one array; the last generated token was never
routed. -1 in the prompt marks tokens found in the prefix cache, which were not routed in this request. Weights are
not returned.
"""

from __future__ import annotations

import base64
import binascii
import re
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from traces.importers import _files
from traces.importers._build import Array, build, equal_lengths, phases, placed
from traces.importers._options import Options
from traces.trace import Trace, TraceError

_KEY: Final = re.compile(r"(prompt_)?routed_experts(?:_(\d{1,6}))?")


class _Sequence(NamedTuple):
    """One request's rows, and how many of them are the prompt's (None: not known)."""

    ids: Array
    prefill: int | None


def recognise(path: Path) -> bool:
    kind = _files.kind(path)
    if kind == "npz":
        return any(_KEY.fullmatch(name) for name in _files.npz_names(path))
    if kind == "json":
        return _files.mentions(path, "routed_experts")
    if kind != "npy":
        return False
    try:
        array = _files.read_npy(path)
    except TraceError:
        return False
    return array.ndim == 3 and array.dtype.kind in "iu"


def read(path: Path, options: Options) -> Trace:
    kind = _files.kind(path)
    facts: dict[str, Any] = {}
    if kind == "npy":
        rows = _checked(_files.read_npy(path), "the array")
        found = [_Sequence(part, None) for part in np.split(rows, len(equal_lengths(len(rows), options.sequences)))]
    elif kind == "npz":
        found = _of_npz(_files.read_npz(path))
    else:
        found, facts = _of_responses(_files.read_json(path))
    if len({sequence.ids.shape[1:] for sequence in found}) > 1:
        raise TraceError("the requests have different numbers of layers or experts; convert one model at a time")
    notes = ["requests that ran together stand one after the other"] if len(found) > 1 else []
    lengths, phase, cached = [], [], []
    for i, sequence in enumerate(found):
        prefill = options.prefill if sequence.prefill is None or options.prefill is not None else sequence.prefill
        if prefill is None:
            raise TraceError("the file does not say which tokens are the prompt's; give --prefill N (0: none)")
        skipped = _cached(sequence.ids, prefill, i)
        lengths.append(len(sequence.ids) - skipped)
        phase.append(phases([len(sequence.ids)], prefill)[skipped:])
        cached.append(skipped)
    if any(cached):
        notes.append(f"{sum(cached)} prompt tokens came from the prefix cache, unrouted: they are left out")
    ids = np.concatenate([s.ids[skipped:] for s, skipped in zip(found, cached, strict=True)])
    if min(lengths) < 1:
        raise TraceError("a request has no routed token; leave it out")
    ids, layers = _moe_layers(ids)
    name = facts.pop("model", None)
    shape = options.shape(name=name, num_layers=ids.shape[1], top_k=ids.shape[2])
    return build(
        shape,
        ids,
        None,
        lengths,
        np.concatenate(phase),
        provenance=facts | {"engine": "vLLM routed experts", **placed(layers), "first_position": cached},
        notes=notes,
        forced=options.forced,
    )


def _cached(ids: Array, prefill: int, request: int) -> int:
    """Leading tokens that are -1 throughout."""
    unrouted = (ids == -1).all(axis=(1, 2))
    skipped = int(unrouted.argmin()) if not unrouted.all() else len(ids)
    if skipped > prefill:
        raise TraceError(f"request {request} has {skipped} unrouted tokens, its prompt {prefill}; give --prefill N")
    return skipped


def _moe_layers(ids: Array) -> tuple[Array, Array]:
    """Without the layer slots of dense layers, where every row repeats one id (0 or -1); and the slots kept."""
    routed = ids.shape[2] == 1 or (ids != ids[:, :, :1]).any(axis=(0, 2))
    kept = np.flatnonzero(np.broadcast_to(routed, ids.shape[1]))
    if not len(kept):
        raise TraceError("no layer names different experts for a token; the routing was not recorded")
    return ids[:, kept], kept


def _of_npz(arrays: dict[str, Array]) -> list[_Sequence]:
    parts: dict[int, dict[bool, Array]] = {}
    for name, array in arrays.items():
        if match := _KEY.fullmatch(name):
            parts.setdefault(int(match[2] or 0), {})[bool(match[1])] = _checked(array, f"array {name!r}")
    if not parts or any(False not in part for part in parts.values()):
        raise TraceError("the .npz file has no routed_experts, or prompt_routed_experts alone; it needs the former")
    return [_joined(part[False], part.get(True), None) for _, part in sorted(parts.items())]


def _of_responses(document: Any) -> tuple[list[_Sequence], dict[str, Any]]:
    """The requests of one response or a list of them, and the model's name."""
    found: list[_Sequence] = []
    facts: dict[str, Any] = {}
    for response in document if isinstance(document, list) else [document]:
        choices = response.get("choices") if isinstance(response, dict) else None
        if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
            raise TraceError("'choices' is missing from a response; give vLLM's response as it came")
        if isinstance(name := response.get("model"), str) and facts.setdefault("model", name) != name:
            raise TraceError(
                f"the responses are of {facts['model']!r:.60} and {name!r:.60}; convert one model at a time"
            )
        prompt = _of_field(response.get("prompt_routed_experts"), "prompt_routed_experts")
        usage = response.get("usage") if len(choices) == 1 else None
        for choice in choices:
            ids = _of_field(choice.get("routed_experts"), "routed_experts")
            if ids is None:
                raise TraceError("a choice has no 'routed_experts' (a preempted request loses them); leave it out")
            found.append(_joined(ids, prompt, usage if isinstance(usage, dict) else None))
            prompt = prompt if prompt is None else prompt[:0]  # it ran once, for the first choice
    if not found:
        raise TraceError("the response has no choices; nothing was routed")
    return found, facts


def _joined(ids: Array, prompt: Array | None, usage: dict[str, Any] | None) -> _Sequence:
    if prompt is not None:
        if prompt.shape[1:] != ids.shape[1:]:
            raise TraceError(
                "routed_experts and prompt_routed_experts differ in layers or experts; they cannot be joined"
            )
        return _Sequence(np.concatenate([prompt, ids]), len(prompt))
    before, made = (usage.get(key) if usage else None for key in ("prompt_tokens", "completion_tokens"))
    if type(before) is int and type(made) is int:
        if len(ids) in (before + made - 1, before + made):
            return _Sequence(ids, before)
        if len(ids) in (made - 1, made):
            return _Sequence(ids, 0)
    return _Sequence(ids, None)


def _of_field(value: Any, what: str) -> Array | None:
    if value is None:
        return None
    if isinstance(value, str):
        try:
            data = base64.b64decode(value, validate=True)
        except (binascii.Error, ValueError):
            raise TraceError(f"{what} is no base64 text; give vLLM's response as it came") from None
        return _checked(_files.npy_from(data, what), what)
    with _files.decoding(what):
        array = np.array(value)
    return _checked(array, what) if array.size else None


def _checked(array: Array, what: str) -> Array:
    if array.ndim != 3 or array.dtype.kind not in "iu" or 0 in array.shape[1:]:
        raise TraceError(
            f"{what} has shape {list(array.shape)} of {array.dtype!s:.20}; it must be integers, [tokens, layers, top_k]"
        )
    return array
