"""Containers of foreign recordings, opened without unpickling and without trusting the sizes they claim.

Every function raises ``TraceError`` with one sentence for a file that cannot be read.
"""

from __future__ import annotations

import io
import json
import math
import os
import pickletools
import re
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Final

import numpy as np
import numpy.typing as npt

from traces.trace import TraceError

LIMIT_BYTES: Final = 1 << 30  # the most that the arrays of one source may take
LIMIT_JSON: Final = 256 << 20  # parsed, JSON takes about ten times its text
LIMIT_LINE: Final = 1 << 20
_LIMIT_HEADER: Final = 16 << 20
_DTYPES: Final = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "U32": "<u4", "I32": "<i4", "U64": "<u8",
    "I64": "<i8", "F16": "<f2", "F32": "<f4", "F64": "<f8", "BF16": "<u2",
}  # fmt: skip

Array = npt.NDArray[Any]


@contextmanager
def decoding(what: str) -> Iterator[None]:
    """Say in one sentence that a decoder failed; foreign decoders raise anything at all on damaged bytes."""
    try:
        yield
    except TraceError:
        raise
    except OSError as error:
        raise TraceError(f"{what} cannot be read ({error.strerror or error})") from None
    except Exception as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TraceError(f"{what} is damaged, or not what its first bytes say ({reason:.120})") from None


def kind(path: Path) -> str:
    """npy, npz, torch, safetensors, json or text, from the first bytes; empty for what cannot be opened."""
    try:
        with decoding("the file"), path.open("rb") as file:
            head = file.read(64)
            if head.startswith(b"PK\x03\x04"):
                names = zipfile.ZipFile(file).namelist()
                return "torch" if any(n.endswith("/data.pkl") for n in names) else "npz"
    except TraceError:
        return ""
    if head.startswith(b"\x93NUMPY"):
        return "npy"
    if len(head) > 8 and int.from_bytes(head[:8], "little") <= _LIMIT_HEADER and head[8:9] == b"{":
        return "safetensors"
    return "json" if head.lstrip()[:1] in (b"{", b"[") else "text"


def first_line(path: Path) -> bytes:
    """The first line, cut at the limit; empty for what cannot be opened."""
    try:
        with path.open("rb") as file:
            return file.readline(LIMIT_LINE)
    except OSError:
        return b""


def mentions(path: Path, *keys: str) -> bool:
    """Whether a JSON document names one of the keys, from a search through its text."""
    wanted = re.compile(b"|".join(b'"%s"' % key.encode() for key in keys))
    overlap = max(map(len, keys)) + 2
    try:
        with path.open("rb") as file:
            tail = b""
            for _ in range(LIMIT_JSON >> 20):
                if not (block := file.read(1 << 20)):
                    return False
                if wanted.search(tail + block):
                    return True
                tail = block[-overlap:]
    except OSError:
        pass
    return False


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Numbered lines, from 1, without their ends; blank ones are left out."""
    with decoding("the file"), path.open("rb") as file:
        number = 0
        while line := file.readline(LIMIT_LINE + 1):
            number += 1
            if len(line) > LIMIT_LINE:
                raise TraceError(f"line {number} is longer than {LIMIT_LINE} bytes; this is not such a file")
            try:
                text = line.decode().strip()
            except UnicodeDecodeError:
                raise TraceError(f"line {number} is not UTF-8 text; the file is damaged") from None
            if text:
                yield number, text


def parse(text: str, what: str) -> Any:
    """A JSON value in which every number is finite."""

    def finite(number: str) -> float:
        if not math.isfinite(value := float(number)):
            raise TraceError(f"{what} holds {number:.20}; numbers must be finite")
        return value

    try:
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except TraceError:
        raise
    except (ValueError, RecursionError):
        raise TraceError(f"{what} is not valid JSON; the file is truncated or damaged") from None


def read_json(path: Path) -> Any:
    with decoding("the file"):
        if (size := path.stat().st_size) > LIMIT_JSON:
            raise TraceError(f"the JSON document takes {size} bytes; allowed are {LIMIT_JSON}: split it")
        text = path.read_text("utf-8")
    return parse(text, "the document")


def read_npy(path: Path) -> Array:
    """The array of a .npy file, mapped."""
    with decoding("the .npy file"):
        return _numeric("the array", np.load(path, mmap_mode="r", allow_pickle=False).view(np.ndarray))


def npy_from(data: bytes, what: str) -> Array:
    """The array in the bytes of a .npy file."""
    with decoding(what):
        _claim(io.BytesIO(data), len(data), what)
        return _numeric(what, np.load(io.BytesIO(data), allow_pickle=False))


def npz_names(path: Path) -> list[str]:
    """The names of the arrays of a .npz file; none for what cannot be opened."""
    try:
        with decoding("the .npz file"), zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except TraceError:
        return []


def read_npz(path: Path) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    with decoding("the .npz file"), zipfile.ZipFile(path) as archive:
        if (total := sum(member.file_size for member in archive.infolist())) > LIMIT_BYTES:
            raise TraceError(f"the .npz file unpacks to {total} bytes; allowed are {LIMIT_BYTES}: split it")
        for member in archive.infolist():
            name = member.filename.removesuffix(".npy")
            if name in arrays:
                raise TraceError(f"array {name!r:.80} stands twice in the .npz file; keep one")
            with archive.open(member) as file:
                _claim(file, member.file_size, f"array {name!r:.80}")
            with archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
            arrays[name] = _numeric(f"array {name!r:.80}", array)
    return arrays


def _claim(file: IO[bytes], size: int, what: str) -> None:
    """Compare the size that a .npy header claims with the bytes there are, before numpy allocates it."""
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, _, dtype = header(file)
    if math.prod(shape) * dtype.itemsize > size:
        raise TraceError(f"{what} claims shape {list(shape)!s:.80} of {dtype!s:.20}, more than its {size} bytes")


def _numeric(what: str, array: Array) -> Array:
    if array.dtype.kind not in "iuf":
        raise TraceError(f"{what} has dtype {array.dtype!s:.40}; it must hold integers or floats")
    return array


def _safetensors(path: Path) -> tuple[dict[str, Any], Array]:
    """The table of tensors and the bytes behind the header."""
    with decoding("the safetensors file"):
        data = np.memmap(path, np.uint8, "r").view(np.ndarray)
        start = 8 + int.from_bytes(data[:8].tobytes(), "little")
        table = json.loads(data[8:start].tobytes().decode())
        table.pop("__metadata__", None)
        return table, data[start:]


def safetensors_shapes(path: Path) -> dict[str, list[int]]:
    """The shapes that the header of a safetensors file gives its tensors."""
    table, _ = _safetensors(path)
    with decoding("the safetensors file"):
        return {name: list(entry["shape"]) for name, entry in table.items()}


def read_safetensors(path: Path) -> dict[str, Array]:
    """The tensors of a safetensors file as views of the mapped file; bfloat16 becomes float32."""
    table, data = _safetensors(path)
    with decoding("the safetensors file"):
        arrays: dict[str, Array] = {}
        total = 0
        for name, entry in table.items():
            begin, end = entry["data_offsets"]
            if entry["dtype"] not in _DTYPES:
                raise TraceError(f"tensor {name!r:.80} has dtype {entry['dtype']!r:.20}; it cannot be read")
            if not 0 <= begin <= end <= len(data):
                raise TraceError(f"tensor {name!r:.80} ends outside the file; it is truncated")
            if (total := total + end - begin) > LIMIT_BYTES:
                raise TraceError(f"the tensors take more than {LIMIT_BYTES} bytes; split the file")
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            array = data[begin:end].view(dtype).reshape(entry["shape"])
            if entry["dtype"] == "BF16":
                array = (array.astype(np.uint32) << 16).view(np.float32)
            arrays[name] = array
        return arrays


def torch_strings(path: Path) -> set[str] | None:
    """The strings in the pickle of a torch file, read as opcodes without executing it; None if that cannot be done.

    A dictionary's keys are among them; ``{}`` stands for any dictionary.
    """
    found: set[str] = set()
    try:
        with decoding("the torch file"), zipfile.ZipFile(path) as archive:
            name = next(n for n in archive.namelist() if n.endswith("/data.pkl"))
            with archive.open(name) as file:
                text = file.read(_LIMIT_HEADER)
            for opcode, argument, _ in pickletools.genops(text):
                if opcode.name in ("BINUNICODE", "SHORT_BINUNICODE", "UNICODE"):
                    found.add(str(argument))
                elif opcode.name in ("SETITEM", "SETITEMS"):
                    found.add("{}")
    except TraceError:
        return None
    return found


def read_torch(path: Path) -> Any:
    """What ``torch.load`` makes of a file with ``weights_only=True``, mapped; tensors inside stay torch's."""
    try:
        import torch
    except ImportError:
        raise TraceError("reading a torch file needs torch; install the runtime extra, or save as .npz") from None
    with decoding("the torch file"):
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
        if any(m.compress_type != zipfile.ZIP_STORED for m in members):
            raise TraceError("the torch file is compressed inside, which torch.save never does; save it again")
        if sum(m.file_size for m in members) > max(os.stat(path).st_size, 0):
            raise TraceError("the torch file's parts are larger than the file; it is damaged")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file is refused, not commented on
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)


def numpy_of(tensor: Any, what: str) -> Array:
    """A torch tensor of numbers as an array; bfloat16 becomes float32."""
    import torch

    if not isinstance(tensor, torch.Tensor):
        raise TraceError(f"{what} is a {type(tensor).__name__}; it must be a tensor")
    if tensor.numel() * tensor.element_size() > LIMIT_BYTES:
        raise TraceError(f"{what} has shape {list(tensor.shape)!s:.80}, more than {LIMIT_BYTES} bytes; split it")
    with decoding(what):
        tensor = tensor.detach()
        array: Array = (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
    return _numeric(what, array)
