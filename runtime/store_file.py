"""A store on disk: the rows first, so that a descriptor maps them as they are, then what they are.

    rows      count * row_bytes bytes
    header    UTF-8 JSON, one object
    length    of the header, 8 bytes, little-endian
    magic     8 bytes, b"EXPERTS1"

While it is built the rows stand in ``NAME.partial`` and ``NAME.progress`` says which are done: a line of JSON with the
header's identity fields, then a line of JSON for each row: its number, crc32 and relative error.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import torch

from runtime.checkpoint import StoreError
from runtime.rows import ExpertRows

MAGIC = b"EXPERTS1"
VERSION = 2
VERIFY_UP_TO = 4_000_000_000  # bytes of rows that are hashed on every start unless told otherwise
REBUILD = "remove it, or name another file, to build it again"
_NAMES = {
    "version": "format version",
    "spec": "model shape",
    "source": "source model",
    "bits": "bits per layer",
    "group_size": "group size",
    "optimize": "quantization way",
    "order": "order of codes (rows on a GPU with triton, else hqq)",
    "row_bytes": "row size",
}


def sha256(rows: ExpertRows) -> str:
    digest = hashlib.sha256()
    for row in rows.block:
        digest.update(row.numpy())
    return digest.hexdigest()


def read_header(path: Path) -> dict[str, Any]:
    """Header of a finished store.

    Raises:
        StoreError: no store, or a truncated one.
    """
    tail = len(MAGIC) + 8
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            file.seek(max(0, size - tail))
            end = file.read()
            length = int.from_bytes(end[:8], "little")
            if len(end) < tail or end[8:] != MAGIC or length > size - tail:
                raise StoreError(f"{path} is not a whole expert store (its last bytes are missing); {REBUILD}")
            file.seek(size - tail - length)
            header = json.loads(file.read(length))
        if not isinstance(header, dict):
            raise TypeError("its header is not an object")
        rows = header["count"] * header["row_bytes"]
    except OSError as error:
        raise StoreError(f"{path} cannot be read ({error.strerror}); name an expert store") from None
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(f"{path} is no expert store of this version (header: {error}); {REBUILD}") from None
    if size != rows + length + tail:
        raise StoreError(f"{path} has {size:,} bytes, but its header says {rows + length + tail:,}; {REBUILD}")
    return header


def check_identity(path: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Compare what two stores are of; ``wanted`` may leave fields out.

    Raises:
        StoreError: they differ; names the first difference.
    """
    for key, value in wanted.items():
        if found.get(key) != value:
            shown = "is of another model" if key == "source" else f"has {_NAMES[key]} {found.get(key)!r}, not {value!r}"
            raise StoreError(f"{path} {shown}; {REBUILD}")


class Progress:
    """Which rows of ``path`` are already built; survives a kill.

    Attributes:
        partial: the file the rows go into.
        done: row number -> relative error of rows found whole.
    """

    def __init__(self, path: Path, identity: dict[str, Any], count: int, expert_bytes: int, row_bytes: int) -> None:
        self.path = path
        self.partial = path.with_name(path.name + ".partial")
        self._log_path = path.with_name(path.name + ".progress")
        self.done: dict[int, float] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        logged = self._logged(identity)
        fd = os.open(self.partial, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            os.ftruncate(fd, count * row_bytes)
            if hasattr(os, "posix_fallocate"):  # a full disk is said now, not by a signal while rows are written
                os.posix_fallocate(fd, 0, count * row_bytes)
        except OSError as error:
            os.close(fd)
            raise StoreError(f"{self.partial} cannot be written ({error.strerror}); name another file") from None
        self.rows = ExpertRows(count, expert_bytes, fd=fd)
        for index, (crc, error) in logged.items():
            if index < count and zlib.crc32(self.rows.row(index).numpy()) == crc:
                self.done[index] = error
        lines = [json.dumps(identity)]
        lines += [self._line(index, error) for index, error in self.done.items()]
        self._log_path.write_text("".join(line + "\n" for line in lines))
        self._log: BinaryIO = self._log_path.open("ab", buffering=0)

    def _logged(self, identity: dict[str, Any]) -> dict[int, tuple[int, float]]:
        """Rows an earlier build of the same store logged; a torn last line is passed over."""
        if not (self._log_path.is_file() and self.partial.is_file()):
            return {}
        found: dict[int, tuple[int, float]] = {}
        first, *lines = self._log_path.read_text(errors="replace").split("\n")
        if first != json.dumps(identity):
            return {}
        for line in lines[:-1]:
            index, crc, error = json.loads(line)
            found[index] = crc, error
        return found

    def _line(self, index: int, error: float) -> str:
        return json.dumps([index, zlib.crc32(self.rows.row(index).numpy()), error])

    def finished(self, index: int, error: float) -> None:
        """Row ``index`` is written."""
        self.done[index] = error
        self._log.write(self._line(index, error).encode() + b"\n")

    def publish(self, header: dict[str, Any]) -> None:
        """Append the header and take the final name."""
        text = json.dumps(header).encode()
        with self.partial.open("r+b") as file:
            file.seek(0, os.SEEK_END)
            file.write(text + len(text).to_bytes(8, "little") + MAGIC)
            file.flush()
            os.fsync(file.fileno())
        self._log.close()
        os.replace(self.partial, self.path)
        self._log_path.unlink()

    def close(self) -> None:
        """Leave what is done for the next start."""
        self._log.close()
        self.rows.close()


def map_rows(path: Path, header: dict[str, Any], expert_bytes: int, verify: bool | None) -> tuple[int, bool]:
    """Descriptor of a finished store's file, and whether its bytes were hashed.

    Raises:
        StoreError: the rows are not what was written.
    """
    size = header["count"] * header["row_bytes"]
    check = size <= VERIFY_UP_TO if verify is None else verify
    try:
        fd = os.open(path, os.O_RDWR)
    except OSError as error:  # the copier maps what it is given writable
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        fd = _copied(path, size)
    if check:
        with ExpertRows(header["count"], expert_bytes, fd=os.dup(fd), private=True) as rows:
            found = sha256(rows)
        if found != header["sha256"]:
            os.close(fd)
            raise StoreError(f"{path} is damaged (sha256 of its experts differs); {REBUILD}")
    return fd, check


def _copied(path: Path, size: int) -> int:
    from runtime.rows import anonymous_file

    fd = anonymous_file(size)
    block = torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    with os.fdopen(os.dup(fd), "wb") as file:
        file.write(block.numpy())
    return fd
