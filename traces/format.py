"""The trace file: safetensors with a JSON header, read with numpy alone (README.md specifies it field by field)."""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any, Final

import numpy as np
import numpy.typing as npt

from traces.trace import GuessTable, Trace, TraceError, check
from traces.vocabulary import ModelSpec

FORMAT: Final = "moe-routing-trace"
VERSION: Final = 1
MAX_HEADER_BYTES: Final = 16 << 20
_DTYPES: Final[dict[str, np.dtype[Any]]] = {
    "U8": np.dtype("u1"),
    "U16": np.dtype("<u2"),
    "I32": np.dtype("<i4"),
    "F16": np.dtype("<f2"),
}
_NAMES: Final = {dtype: name for name, dtype in _DTYPES.items()}
_REQUIRED: Final = ("routed_ids", "routed_weights", "sequence_lengths", "phase")
_BATCHES: Final = ("pass_lengths", "token_sequence")
_MAX_DEPTH: Final = 32  # of lists and objects inside provenance
_MAX_NAME: Final = len("guesses..scores") + 64  # of the longest predictor
_JSON: Final = {dict: "object", list: "list", str: "string"}
_HEADER: Final = {"model": dict, "provenance": dict, "routing": str, "domains": list, "predictors": dict}

Tensors = dict[str, npt.NDArray[Any]]


def shipped() -> Path:
    """The trace that comes with the project, the default input of every command.

    Raises:
        TraceError: this copy of the project has none.
    """
    path = Path(__file__).parent / "shipped" / "demo-12x8-top2.safetensors"
    if not path.is_file():
        raise TraceError(f"the shipped trace {path.name} is not in this copy of the project; name a trace file")
    return path


def save(trace: Trace, path: str | os.PathLike[str]) -> None:
    """Write a trace; the same trace gives the same bytes, and a failure leaves what was at ``path``.

    Raises:
        TraceError: a trace that breaks the format, or provenance that is not plain JSON.
        OSError: the file cannot be written.
    """
    path = Path(path)
    check(trace)
    tensors = _tensors(trace)
    header = _header(trace)
    offset = 0
    table: dict[str, Any] = {}
    metadata = {"format": FORMAT, "header": header, "sha256": _digest(header, tensors), "version": str(VERSION)}
    for name, array in tensors.items():
        end = offset + array.nbytes
        table[name] = {"dtype": _NAMES[array.dtype], "shape": list(array.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps({"__metadata__": metadata, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES:
        raise TraceError(f"the header takes {len(text)} bytes; allowed are {MAX_HEADER_BYTES}: shorten provenance")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for array in tensors.values():
                file.write(array.data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load(path: str | os.PathLike[str], verify: bool = True) -> Trace:
    """Map a trace file into memory; its arrays are read-only views of the file.

    Args:
        path: the file.
        verify: compare the checksum and examine every value, which reads the whole file. Without it only the header,
            shapes, sequences, passes and phases are examined: for a file that this run has verified before (a worker
            of a sweep, say), because what is computed on a damaged file is worth nothing.

    Raises:
        TraceError: a file that cannot be read, or is truncated, foreign, newer or inconsistent; one sentence.
    """
    try:
        return _load(path, verify)
    except TraceError as error:
        raise TraceError(f"{os.fspath(path)}: {error}") from None


def _load(path: str | os.PathLike[str], verify: bool) -> Trace:
    try:
        if os.stat(path).st_size < 8:
            raise TraceError("the file is shorter than 8 bytes; it is truncated, or not a trace")
        data: npt.NDArray[np.uint8] = np.memmap(path, np.uint8, "r").view(np.ndarray)
    except OSError as error:
        raise TraceError(f"the file cannot be read ({error.strerror}); name an existing trace file") from None
    length = int.from_bytes(data[:8].tobytes(), "little")
    if length > MAX_HEADER_BYTES:
        raise TraceError(
            f"the header length is {length} bytes; allowed are {MAX_HEADER_BYTES}: the file is damaged, or not a trace"
        )
    if 8 + length > len(data):
        raise TraceError(
            f"the header ends at byte {8 + length}, but the file at {len(data)}: it is truncated, or not a trace"
        )
    table = _parse("header", data[8 : 8 + length].tobytes())
    metadata = _metadata(table.pop("__metadata__", None))
    header = _parse("metadata 'header'", metadata["header"].encode("utf-8", "surrogatepass"))
    tensors = _views(table, data[8 + length :])
    trace = _trace(header, tensors)
    if verify:
        if (digest := _digest(metadata["header"], tensors)) != metadata["sha256"]:
            raise TraceError(
                f"metadata 'sha256' is {metadata['sha256']!r:.80}, but the contents give {digest!r}: the file is "
                "damaged; copy or record it again"
            )
        check(trace)
    return trace


def _tensors(trace: Trace) -> Tensors:
    """Little-endian and contiguous, wider elements first (so that every tensor is aligned), then by name."""
    arrays: Tensors = {
        "routed_ids": trace.ids,
        "routed_weights": trace.weights,
        "sequence_lengths": trace.sequence_lengths,
        "phase": trace.phase,
    }
    if trace.pass_lengths is not None and trace.token_sequence is not None:
        arrays |= {"pass_lengths": trace.pass_lengths, "token_sequence": trace.token_sequence}
    if trace.logits is not None:
        arrays["router_logits"] = trace.logits
    for name, guesses in trace.guesses.items():
        arrays |= {f"guesses.{name}.ids": guesses.ids, f"guesses.{name}.scores": guesses.scores}
    order = sorted(arrays, key=lambda name: (-arrays[name].itemsize, name))
    return {name: np.ascontiguousarray(arrays[name], arrays[name].dtype.newbyteorder("<")) for name in order}


def _header(trace: Trace) -> str:
    provenance = trace.provenance
    try:
        plain = json.loads(json.dumps(provenance, allow_nan=False)) == provenance
    except (TypeError, ValueError, RecursionError):
        plain = False
    if not plain:
        raise TraceError(
            "provenance does not survive JSON; use only objects with string keys, lists, strings, finite numbers, "
            "booleans and null"
        )
    _check_depth(provenance)
    header = {
        "model": trace.model.to_json(),
        "provenance": provenance,
        "routing": trace.routing,
        "domains": list(trace.domains),
        "predictors": {name: {"wrap": guesses.wrap} for name, guesses in trace.guesses.items()},
    }
    return json.dumps(header, sort_keys=True, separators=(",", ":"))


def _check_depth(provenance: dict[str, Any]) -> None:
    level: list[Any] = [provenance]
    for _ in range(_MAX_DEPTH + 1):
        nested = [value for value in level if isinstance(value, dict | list)]
        level = [inner for value in nested for inner in (value.values() if isinstance(value, dict) else value)]
    if level:
        raise TraceError(f"provenance holds lists or objects more than {_MAX_DEPTH} deep; flatten it")


def _digest(header: str, tensors: Tensors) -> str:
    """sha256 over the header's text, then each tensor by name: a line ``name dtype shape`` and its bytes."""
    sha = hashlib.sha256(header.encode("utf-8", "surrogatepass"))
    for name in sorted(tensors):
        array = tensors[name]
        shape = ",".join(map(str, array.shape))
        sha.update(f"\n{name} {_NAMES[array.dtype]} {shape}\n".encode())
        sha.update(array.data)
    return sha.hexdigest()


def _parse(what: str, text: bytes) -> dict[str, Any]:
    """A JSON object in which no key stands twice and every number is finite."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        values: dict[str, Any] = {}
        for key, value in pairs:
            if key in values:
                raise TraceError(f"{what} has the key {key!r:.80} twice; the file is damaged")
            values[key] = value
        return values

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise TraceError(f"{what} holds {number:.20}; numbers must be finite")
        return value

    try:
        values = json.loads(text.decode(), object_pairs_hook=unique, parse_float=finite, parse_constant=finite)
    except TraceError:
        raise
    except (ValueError, RecursionError):
        raise TraceError(f"{what} is not valid JSON; the file is damaged, or not a trace") from None
    if not isinstance(values, dict):
        raise TraceError(f"{what} is a JSON {type(values).__name__}; it must be an object")
    return values


def _metadata(values: Any) -> dict[str, str]:
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        found = values.get("format") if isinstance(values, dict) else None
        raise TraceError(
            f"metadata 'format' is {found!r:.80}; it must be {FORMAT!r}: this safetensors file holds something else"
        )
    for key in ("version", "header", "sha256"):
        if not isinstance(values.get(key), str):
            raise TraceError(f"metadata {key!r} is {values.get(key)!r:.80}; it must be a string")
    version = values["version"]
    if version != str(VERSION):
        newer = version.isdecimal() and len(version) < 10 and int(version) > VERSION
        todo = "update this program" if newer else "record the trace again"
        raise TraceError(f"metadata 'version' is {version!r:.80}; this program reads version {VERSION}: {todo}")
    return values


def _views(table: dict[str, Any], data: npt.NDArray[np.uint8]) -> Tensors:
    """Arrays over the data part of the file; its tensors must cover it without gap or overlap."""
    spans: list[tuple[int, int, str]] = []
    tensors: Tensors = {}
    for name, entry in table.items():
        if len(name) > _MAX_NAME:
            raise TraceError(f"tensor {name!r:.80} is unknown: its name has {len(name)} characters; remove it")
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            raise TraceError(f"tensor {name!r} is described by {entry!r:.80}; give dtype, shape and data_offsets")
        if entry["dtype"] not in list(_DTYPES):
            raise TraceError(f"tensor {name!r} has dtype {entry['dtype']!r:.20}; allowed are {', '.join(_DTYPES)}")
        dtype, shape = _DTYPES[entry["dtype"]], _sizes(name, "shape", entry["shape"], least=1)
        offsets = _sizes(name, "data_offsets", entry["data_offsets"], least=0)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * dtype.itemsize:
            raise TraceError(
                f"tensor {name!r} has data_offsets {offsets}; they must span the {math.prod(shape) * dtype.itemsize} "
                f"bytes of shape {shape}"
            )
        begin, end = offsets
        if end > len(data):
            raise TraceError(f"tensor {name!r} ends at data byte {end}, but the file at {len(data)}: it is truncated")
        spans.append((begin, end, name))
        tensors[name] = data[begin:end].view(dtype).reshape(shape)
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            raise TraceError(
                f"tensor {name!r} begins at data byte {begin}; it must begin at {covered}, without gap or overlap"
            )
        covered = end
    if covered != len(data):
        raise TraceError(f"the file has {len(data) - covered} bytes after its last tensor; it must end there")
    return tensors


def _sizes(name: str, key: str, values: Any, least: int) -> list[int]:
    integers = isinstance(values, list) and len(values) <= 4 and all(type(v) is int for v in values)
    if not integers or not all(least <= v < 2**48 for v in values):
        raise TraceError(
            f"tensor {name!r} has {key} {values!r:.80}; it must be at most 4 integers, {least} to 2**48 - 1"
        )
    sizes: list[int] = values
    return sizes


def _trace(header: dict[str, Any], tensors: Tensors) -> Trace:
    for key, kind in _HEADER.items():
        if not isinstance(header.get(key), kind):
            raise TraceError(f"header field {key!r} is {header.get(key)!r:.80}; it must be of JSON type {_JSON[kind]}")
    if unknown := sorted(set(header) - set(_HEADER)):
        raise TraceError(f"header field {unknown[0]!r:.80} is unknown; known are {', '.join(_HEADER)}")
    wraps = {name: _wrap(name, options) for name, options in header["predictors"].items()}
    guessed = [f"guesses.{name}.{part}" for name in wraps for part in ("ids", "scores")]
    for name in (*_REQUIRED, *guessed):
        if name not in tensors:
            raise TraceError(f"tensor {name!r:.100} is missing; record the trace again")
    for name in tensors:
        if name not in (*_REQUIRED, *_BATCHES, "router_logits", *guessed):
            raise TraceError(f"tensor {name!r} is unknown, and so is a predictor of that name; remove it")
    try:
        model = ModelSpec.from_json(header["model"])
    except ValueError as error:
        raise TraceError(f"{error!s:.300}") from None
    _check_depth(header["provenance"])
    return Trace(
        model=model,
        ids=tensors["routed_ids"],
        weights=tensors["routed_weights"],
        sequence_lengths=tensors["sequence_lengths"],
        phase=tensors["phase"],
        logits=tensors.get("router_logits"),
        guesses={
            name: GuessTable(tensors[f"guesses.{name}.ids"], tensors[f"guesses.{name}.scores"], wrap)
            for name, wrap in wraps.items()
        },
        provenance=header["provenance"],
        domains=tuple(header["domains"]),
        pass_lengths=tensors.get("pass_lengths"),
        token_sequence=tensors.get("token_sequence"),
        routing=header["routing"],
    )


def _wrap(name: str, options: Any) -> bool:
    if not isinstance(options, dict) or set(options) != {"wrap"} or not isinstance(options["wrap"], bool):
        raise TraceError(f"header field 'predictors' says {options!r:.80} of {name!r:.80}; say wrap, true or false")
    return options["wrap"]
