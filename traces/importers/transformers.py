"""Router logits of transformers (``output_router_logits``): .npz, .npy, safetensors or .pt.

Format: the models of huggingface/transformers. One forward pass gives a tuple with, for every layer that has experts,
the raw logits [tokens, experts], of a batch one sequence after the other. Accepted: that tuple (or {"router_logits":
it}), or a list of such tuples, one per forward pass; arrays named so that their numbers order them (layer, or pass and
layer), of [tokens, experts] or [sequences, tokens, experts]; or one array [layers, tokens, experts].

A tuple of one pass is one prefill of all its tokens, unless --prefill says otherwise. Of several passes the first is
prefill if it has more than one token of a sequence, and the rest are decode, the sequences of a batch together.

The routed experts are the top_k highest logits, highest first, equal ones by the lower id. Their weights are computed
in float32, one of two ways:

    renormalised  softmax over all experts, the chosen ones divided by their sum; the same as a softmax over the chosen
                  (mixtral, qwen3_moe, gpt_oss, granitemoe, minimax)
    softmax       softmax over all experts, as it is: norm_topk_prob is false (qwen2_moe, olmoe)

Where a correction, groups or noise take part in the choice (deepseek_v2, deepseek_v3, glm4_moe, ernie4_5_moe, phimoe),
the logits alone do not determine it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

import numpy as np

from traces.importers import _files
from traces.importers._build import Array, build, equal_lengths, phases
from traces.importers._options import Options
from traces.trace import Trace, TraceError

_NUMBER: Final = re.compile(r"\d{1,9}")
_WAYS: Final = ("renormalised", "softmax")
_BY_NAME: Final = {
    "mixtral": "renormalised", "qwen3": "renormalised", "gpt-oss": "renormalised", "granite": "renormalised",
    "olmoe": "softmax", "qwen1.5-moe": "softmax", "qwen2-57b": "softmax",
}  # fmt: skip
_MORE_THAN_LOGITS: Final = ("deepseek", "glm-4", "glm4", "ernie", "phi")
_LARGEST: Final = 65504.0
_ROWS: Final = 1 << 10


def recognise(path: Path) -> bool:
    kind = _files.kind(path)
    if kind == "torch":
        strings = _files.torch_strings(path)
        return strings is not None and ("router_logits" in strings or "{}" not in strings)
    try:
        if kind == "npz":
            names = _files.npz_names(path)
            return bool(names) and all("router_logits" in n or re.fullmatch(r"(arr|layer)_?\d+", n) for n in names)
        if kind == "safetensors":
            names = list(_files.safetensors_shapes(path))
            return any("router_logits" in n for n in names) and "routed_ids" not in names
        if kind == "npy":
            array = _files.read_npy(path)
            sample = np.asarray(array[tuple(slice(0, 64) for _ in array.shape)])
            return array.dtype.kind == "f" and array.ndim == 3 and bool((sample != np.round(sample)).any())
    except TraceError:
        pass
    return False


def read(path: Path, options: Options) -> Trace:
    passes = _passes(path)
    layers = len(passes[0])
    if any(len(one) != layers for one in passes):
        raise TraceError(f"the passes have different numbers of layers; each must have {layers}, as the first does")
    experts = passes[0][0].shape[-1]
    lengths, phase, together = _sequences(passes, options)
    logits = _joined(passes, experts)
    shape = options.shape(num_layers=layers, num_experts=experts)
    top_k = shape.model.top_k
    way = _way(options, shape.model.name)
    probabilities = _are_probabilities(logits)
    if probabilities:
        with np.errstate(divide="ignore"):
            np.log(logits, out=logits)
    ids, weights, equal, undecided = _chosen(logits, top_k, way)
    notes = []
    if equal:
        notes.append(
            f"{equal} of {ids.shape[0] * layers} rankings had equal logits, {undecided} of them at the last expert "
            "chosen: the lower id went first"
        )
    if probabilities:
        notes.append("the file holds probabilities, not logits: they are used as such, and no logits are stored")
    halves, change = (None, 0.0) if probabilities else _halves(logits)
    return build(
        shape,
        ids,
        weights,
        lengths,
        phase,
        logits=halves,
        passes=together,
        provenance={
            "engine": "transformers output_router_logits",
            "weights_from_logits": way,
            "equal_logits": {"rankings": equal, "last_chosen": undecided},
            "logits_rounded_by": change,
        },
        notes=notes,
        forced=options.forced,
    )


def _passes(path: Path) -> list[list[Array]]:
    """The arrays of every forward pass, by layer."""
    kind = _files.kind(path)
    if kind == "torch":
        return _of_torch(_files.read_torch(path))
    if kind == "npy":
        return [_by_layer(_files.read_npy(path))]
    if kind not in ("npz", "safetensors"):
        raise TraceError("this is no .npz, .npy, safetensors or .pt file; save the router logits in one of these")
    arrays = _files.read_npz(path) if kind == "npz" else _files.read_safetensors(path)
    if len(arrays) == 1 and next(iter(arrays.values())).ndim == 3 and not _NUMBER.search(next(iter(arrays))):
        return [_by_layer(next(iter(arrays.values())))]
    numbered: dict[tuple[int, ...], Array] = {}
    for name, array in arrays.items():
        place = tuple(map(int, _NUMBER.findall(name)))
        if len(place) not in (1, 2) or place in numbered:
            raise TraceError(f"the array {name!r:.60} is not numbered by its layer, or by pass and layer; rename it")
        numbered[place] = array
    if not numbered or len({len(place) for place in numbered}) > 1:
        raise TraceError("the arrays are none, or numbered in different ways; name each by layer, or by pass and layer")
    passes: dict[int, list[Array]] = {}
    for place in sorted(numbered):
        passes.setdefault(place[0] if len(place) == 2 else 0, []).append(numbered[place])
    return [_checked(arrays) for arrays in passes.values()]


def _of_torch(value: Any) -> list[list[Array]]:
    if isinstance(value, dict):
        value = value.get("router_logits")
    if hasattr(value, "ndim"):
        return [_by_layer(_files.numpy_of(value, "the tensor"))]
    if not isinstance(value, list | tuple) or not value:
        raise TraceError("the file holds no tuple of tensors, and no dictionary with one as 'router_logits'")
    if not isinstance(value[0], list | tuple):
        value = [value]
    if any(not isinstance(one, list | tuple) for one in value):
        raise TraceError("tensors and tuples of them stand side by side; give one tuple per forward pass")
    return [_checked(_files.numpy_of(tensor, f"layer {i}") for i, tensor in enumerate(one)) for one in value]


def _by_layer(array: Array) -> list[Array]:
    if array.ndim not in (3, 4):
        raise TraceError(f"the array has shape {list(array.shape)}; it must be [layers, tokens, experts]")
    return _checked(array)


def _checked(arrays: Iterable[Array]) -> list[Array]:
    """Float arrays of one pass, [tokens, experts] or [sequences, tokens, experts], all alike."""
    layers = list(arrays)
    for i, array in enumerate(layers):
        if array.ndim not in (2, 3) or array.dtype.kind != "f" or array.shape != layers[0].shape or not array.size:
            raise TraceError(
                f"layer {i} has shape {list(array.shape)} of {array.dtype}; every layer must be floats, [tokens, "
                f"experts] or [sequences, tokens, experts], shaped like the first, {list(layers[0].shape)}"
            )
    if not layers:
        raise TraceError("a pass has no layers; were the router logits asked for?")
    return layers


def _sequences(passes: list[list[Array]], options: Options) -> tuple[list[int], Array, tuple[Any, Any] | None]:
    """Sequence lengths, the phase of every token, and the passes where sequences ran together."""
    first = passes[0][0]
    batch = len(first) if first.ndim == 3 else options.sequences
    tokens = [one[0].size // one[0].shape[-1] for one in passes]
    each = [equal_lengths(n, batch)[0] for n in tokens]
    if any(n != 1 for n in each[1:]):
        raise TraceError("a pass after the first has more than one token of a sequence; save such passes apart")
    lengths = [sum(each)] * batch
    if batch == 1 or (len(passes) == 1 and options.prefill is not None):
        whole = each[0] if each[0] > 1 or len(passes) == 1 else 0
        return lengths, phases(lengths, whole if options.prefill is None else options.prefill), None
    if options.prefill not in (None, each[0]):
        raise TraceError(
            f"--prefill is {options.prefill}, but the first pass has {each[0]} tokens of each sequence; omit it"
        )
    decode_first = len(passes) > 1 and each[0] == 1
    phase = np.repeat([decode_first, *[True] * (len(passes) - 1)], tokens)
    return lengths, phase, (tokens, np.concatenate([np.repeat(np.arange(batch), n) for n in each]))


def _joined(passes: list[list[Array]], experts: int) -> Array:
    """float32 [T, L, E]."""
    if any(one[0].shape[-1] != experts for one in passes):
        raise TraceError("the passes have different numbers of experts; they must be of one model")
    tokens = [one[0].size // experts for one in passes]
    needed = 4 * sum(tokens) * len(passes[0]) * experts
    if needed > _files.LIMIT_BYTES:
        raise TraceError(
            f"the logits take {needed} bytes; allowed are {_files.LIMIT_BYTES}: convert fewer tokens at once"
        )
    logits = np.empty((sum(tokens), len(passes[0]), experts), np.float32)
    begin = 0
    for one, count in zip(passes, tokens, strict=True):
        for layer, array in enumerate(one):
            with np.errstate(over="ignore"):  # what is too large for float32 is refused below
                logits[begin : begin + count, layer] = array.reshape(count, experts)
        begin += count
    if not np.isfinite(logits).all():
        token, layer, expert = np.argwhere(~np.isfinite(logits))[0]
        raise TraceError(
            f"the logit of token {token}, layer {layer}, expert {expert} is not a finite number; record again"
        )
    return logits


def _way(options: Options, name: str) -> str:
    if options.weights:
        return options.weights
    for start, way in _BY_NAME.items():
        if name.lower().startswith(start):
            return way
    why = "the logits alone do not determine its routing" if name.lower().startswith(_MORE_THAN_LOGITS) else "not known"
    raise TraceError(
        f"how {name!r} makes weights of logits: {why}; say --weights {_WAYS[0]} (mixtral, qwen3_moe, gpt_oss, "
        f"granitemoe) or --weights {_WAYS[1]} (norm_topk_prob is false: qwen2_moe, olmoe)"
    )


def _are_probabilities(logits: Array) -> bool:
    """Some versions of transformers return the softmax under the name of logits."""
    return logits.shape[-1] > 1 and bool((logits >= 0).all()) and bool(np.allclose(logits.sum(axis=-1), 1, atol=0.02))


def _chosen(logits: Array, top_k: int, way: str) -> tuple[Array, Array, int, int]:
    """Ids uint16 and weights float32 [T, L, K]; rankings with equal logits; those where it decides who is chosen."""
    shape = (*logits.shape[:2], top_k)
    ids, weights = np.empty(shape, np.uint16), np.empty(shape, np.float32)
    equal = undecided = 0
    for begin in range(0, len(logits), _ROWS):
        part = slice(begin, begin + _ROWS)
        scores = logits[part]
        order = np.argsort(-scores, axis=-1, kind="stable")[..., : top_k + 1]
        ranked = np.take_along_axis(scores, order, axis=-1)
        same = ranked[..., 1:] == ranked[..., :-1]
        equal += int(same.any(axis=-1).sum())
        undecided += int(same[..., top_k - 1 :].sum())
        highest = ranked[..., :1]
        chosen = np.exp(ranked[..., :top_k] - highest)
        over = chosen if way == "renormalised" else np.exp(scores - highest)
        ids[part] = order[..., :top_k]
        weights[part] = chosen / over.sum(axis=-1, keepdims=True)
    return ids, weights, equal, undecided


def _halves(logits: Array) -> tuple[Array, float]:
    """The logits as float16, and the most by which rounding changed one."""
    if (largest := float(np.abs(logits).max())) > _LARGEST:
        raise TraceError(f"a logit is {largest}; router logits are stored as float16, at most {_LARGEST:.0f}")
    halves = logits.astype(np.float16)
    return halves, float(np.abs(halves - logits).max())
