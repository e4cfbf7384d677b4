"""Results as JSON lines: one record per setting, known by what it depends on, appended as they come.

``sim.results.load(path)`` is a pandas DataFrame of all records, one row each.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib
import json
import os
import time
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from sim import compiled, registry
from sim.spec import Options, SpecError, parse, plugin
from traces import TraceError

SCHEMA = 1
SYNC_S = 0.5  # between two writes that must have reached the disk
TIMES = ("bounds", "compiled", "experiment", "ledger", "link", "machine", "noise", "planner", "spec", "timing", "trial")


@lru_cache(maxsize=64)
def trace_sha256(path: str) -> str:
    """The digest a trace file says it has; loading verifies it.

    Raises:
        TraceError: no trace file.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, 1 << 28)))
        return str(header["__metadata__"]["sha256"])
    except OSError as error:
        raise TraceError(f"{path}: the file cannot be read ({error.strerror}); name an existing trace file") from None
    except (ValueError, KeyError, TypeError):
        raise TraceError(f"{path} has no trace's header; name a trace file, or make one with traces.convert") from None


@lru_cache(maxsize=1)
def _times_sha256() -> str:
    sha = hashlib.sha256()
    for name in TIMES:
        sha.update((Path(__file__).parent / f"{name}.py").read_bytes())
    return sha.hexdigest()


def version(options: Options) -> str:
    """sha256 of the code that decides and times a run with these options: a plug-in's file counts for its own users."""
    predictor = parse(options.predictor).name if options.prefetches else ""
    return _version(options.policy.module, options.cache.module, options.miss_rule.module, predictor, options)


_VERSIONS: dict[tuple[Any, ...], str] = {}


def _version(policy: Any, cache: Any, miss: Any, predictor: str, options: Options) -> str:
    key = (policy, cache, miss, predictor)
    if key not in _VERSIONS:
        sha = hashlib.sha256(compiled.source(options).encode())
        sha.update(_times_sha256().encode())
        if hasattr(cache, "fit") or hasattr(cache, "sizes"):
            sha.update(Path(str(cache.__file__)).read_bytes())
        if predictor:
            found = registry.plugins("predictor").get(predictor) or plugin("predictor", "recorded")
            for module in (found, importlib.import_module("sim.predicting")):
                sha.update(Path(str(module.__file__)).read_bytes())
        _VERSIONS[key] = sha.hexdigest()
    return _VERSIONS[key]


def records(path: str | os.PathLike[str]) -> Iterator[dict[str, Any]]:
    """All records of a file; a last line that was cut off is left out, of two with one key the later one wins.

    Raises:
        SpecError: not a result file.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(_lines(path), 1):
        try:
            record = json.loads(line)
            found[record["key"]] = record
        except (ValueError, KeyError, TypeError):
            raise SpecError(
                f"{os.fspath(path)} line {number} is no record of a sweep; name a file made by sim.sweep"
            ) from None
    yield from found.values()


def _lines(path: str | os.PathLike[str]) -> list[bytes]:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise SpecError(f"results {os.fspath(path)}: {error.strerror}; name a file made by sim.sweep") from None
    return content[: content.rfind(b"\n") + 1].splitlines()


def load(path: str | os.PathLike[str]) -> Any:
    """All records as a `pandas.DataFrame`; nested objects become columns such as ``bounds.joint_floor_s``.

    Raises:
        SpecError: not a result file, or pandas is not installed.
    """
    try:
        pandas = importlib.import_module("pandas")
    except ImportError:
        raise SpecError("sim.results.load needs pandas, which is not installed; install the extra 'plots'") from None
    return pandas.json_normalize(list(records(path)))


class Store:
    """A result file open for appending; without a path, records are kept in memory alone.

    A line reaches the operating system with `append` and the disk at most `SYNC_S` later, so what is lost to a kill is
    the work in progress, and to a power failure `SYNC_S` more.

    Attributes:
        known: records by key, those found in the file first.

    Raises:
        SpecError: not a result file, cannot be written, or another sweep writes it now.
    """

    def __init__(self, path: str | None) -> None:
        self.known: dict[str, dict[str, Any]] = {}
        self._file: BinaryIO | None = None
        self._synced = time.monotonic()
        if path is None:
            return
        try:
            self._file = open(path, "ab")  # noqa: SIM115 - closed by `close`
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise SpecError(f"--out {path}: another sweep is writing it; wait for it, or name another file") from None
        except OSError as error:
            raise SpecError(f"--out {path}: {error.strerror}; name a file that can be written") from None
        self.known = {record["key"]: record for record in records(path)}
        self._file.truncate(sum(len(line) + 1 for line in _lines(path)))

    def append(self, found: list[dict[str, Any]]) -> None:
        """Keep records whose keys are new."""
        fresh = [record for record in found if record["key"] not in self.known]
        for record in fresh:
            self.known[record["key"]] = record
        if self._file is None or not fresh:
            return
        self._file.write(b"".join(json.dumps(record).encode() + b"\n" for record in fresh))
        self._file.flush()
        if time.monotonic() - self._synced > SYNC_S:
            self.sync()

    def sync(self) -> None:
        """Everything so far is on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
        self._synced = time.monotonic()

    def close(self) -> None:
        """Sync and let other sweeps write."""
        if self._file is not None:
            self.sync()
            self._file.close()
            self._file = None

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
