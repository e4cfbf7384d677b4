"""REFUSED: counts without order (SGLang stat, EPLB expert loads, MoE-Infinity matrices)."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NoReturn

import numpy as np

from traces.importers import _files
from traces.importers._options import Options
from traces.trace import TraceError

_KEYS = {
    "logical_count": "an SGLang expert distribution in stat mode",
    "global_physical_count": "an SGLang expert distribution in per_pass mode",
    "expert_load": "EPLB expert loads",
    "expert_loads": "EPLB expert loads",
    "expert_load_pass": "vLLM EPLB expert loads",
    "expert_load_window": "vLLM EPLB expert loads",
    "physical_expert_load": "vLLM EPLB expert loads",
    "logical_expert_load": "vLLM EPLB expert loads",
    "trace_collection": "a MoE-Infinity expert activation matrix",
}
_ITERATION = re.compile(r"\d+_\d+")


def recognise(path: Path) -> bool:
    return bool(_what(path))


def read(path: Path, options: Options) -> NoReturn:
    """Refuse the file by the name of its format."""
    what = _what(path) or "a table of expert counts"
    raise TraceError(
        f"this is {what}: it counts how often each expert was used, not in which order, and no cache can be replayed "
        "from that; record the routing of every token instead"
    )


def _what(path: Path) -> str:
    kind = _files.kind(path)
    if kind == "torch":
        strings = _files.torch_strings(path) or set()
        return next((what for key, what in _KEYS.items() if key in strings and "topk_ids_of_layer" not in strings), "")
    if kind == "npz":
        return next((_KEYS[name] for name in _files.npz_names(path) if name in _KEYS), "")
    if kind == "json" and not _files.mentions(path, "routed_experts", "router_data", "moe-cache-lab.routing-jsonl"):
        return (
            next((what for key, what in _KEYS.items() if _files.mentions(path, key)), "")
            if _files.mentions(path, *_KEYS)
            else ""
        )
    try:
        if kind == "npy":
            return _of_array(_files.read_npy(path))
        if kind == "safetensors":
            shapes = _files.safetensors_shapes(path)
            named = all(_ITERATION.fullmatch(name) and len(shape) == 1 for name, shape in shapes.items())
            return "TensorRT-LLM expert statistics" if shapes and named else ""
    except TraceError:
        pass
    return ""


def _of_array(array: _files.Array) -> str:
    """MoE-Infinity saves float [sequences, layers, experts]; the EPLB of DeepSeek takes loads [layers, replicas]."""
    if array.dtype.kind == "f" and array.ndim in (2, 3) and array.size:
        sample = array[tuple(slice(0, 64) for _ in array.shape)]
        if not (np.isfinite(sample).all() and (sample >= 0).all() and (sample == np.round(sample)).all()):
            return ""
        return "a MoE-Infinity expert activation matrix" if array.ndim == 3 else "EPLB expert loads"
    return "EPLB expert loads" if array.dtype.kind in "iu" and array.ndim == 2 else ""
