"""The result file of the programme: cells that are done, skipped, refused or failed, written after each one."""

from __future__ import annotations

import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SCHEMA = 1
DONE, RUNNING, SKIPPED, REFUSED, FAILED = "done", "running", "skipped", "refused", "failed"


class UnavailableError(Exception):
    """What this machine or engine has not got; one sentence. The cell is refused, the part goes on."""


class DeviceLostError(Exception):
    """The device answers no more: nothing further can be measured by this process."""


class Book:
    """Cells by name, in a JSON file that is complete after every cell.

    A cell that is done stays; one that was running when its process ended has failed; one in a state of ``again`` is
    forgotten, to be tried again.

    Args:
        path: the file; made, or gone on with if ``header`` is the same.
        header: what all cells depend on.
        refusals: exceptions that refuse a cell (`UnavailableError` always does).
        alive: called after a failure; raises if the device is lost.
        say: gets one line a cell.

    Raises:
        ValueError: a file that is no result of this programme, or of other settings.
    """

    def __init__(
        self,
        path: Path,
        header: dict[str, Any],
        *,
        refusals: tuple[type[Exception], ...] = (),
        again: tuple[str, ...] = (SKIPPED, REFUSED, FAILED),
        alive: Callable[[], None] = lambda: None,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.path = path
        self.deadline = float("inf")  # of the part that runs now, `time.monotonic`
        self._refusals = (UnavailableError, *refusals)
        self._alive = alive
        self._say = say
        self.failed = 0  # cells that this process tried and that failed
        header = {"schema": SCHEMA, **header}
        self.content: dict[str, Any] = header | {"cells": {}, "parts": {}}
        if path.exists():
            self.content = _read(path, header)
        for cell in self.cells.values():
            if cell["state"] == RUNNING:
                cell |= {"state": FAILED, "reason": "its process ended, or was ended because it stood still"}
        self.content["cells"] = {n: c for n, c in self.cells.items() if c["state"] not in again}
        self.write()

    @property
    def cells(self) -> dict[str, dict[str, Any]]:
        cells: dict[str, dict[str, Any]] = self.content["cells"]
        return cells

    def result(self, name: str) -> dict[str, Any] | None:
        """What a cell found; None unless it is done."""
        cell = self.cells.get(name, {})
        return cell["result"] if cell.get("state") == DONE else None

    @property
    def left_s(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def cell(self, name: str, work: Callable[[], dict[str, Any]], needs_s: float = 0.0) -> dict[str, Any] | None:
        """Do ``work`` unless it is done; its result, None if there is none.

        Raises:
            DeviceLostError: the work failed and took the device with it.
        """
        if name in self.cells:
            return self.result(name)
        if needs_s > self.left_s or self.left_s <= 0:
            self.skip(name, f"time: needs about {needs_s:.0f} s, {max(0.0, self.left_s):.0f} s are left to it")
            return None
        start = time.monotonic()
        self._enter(name, {"state": RUNNING, "started": time.time()})
        try:
            entry = {"state": DONE, "result": work()}
        except self._refusals as error:
            entry = {"state": REFUSED, "reason": f"{type(error).__name__}: {error}"}
        except KeyboardInterrupt:
            del self.cells[name]
            self.write()
            raise
        except BaseException as error:  # a crash in one cell must not cost the others; it is told, and the exit code 1
            self.failed += 1
            entry = {"state": FAILED, "reason": f"{type(error).__name__}: {error}", "traceback": traceback.format_exc()}
        self._enter(name, entry | {"seconds": time.monotonic() - start})
        if entry["state"] == FAILED:
            self._say(f"{name}: FAILED, {entry['reason']}".split("\n")[0])
            self._alive()
        elif entry["state"] == REFUSED:
            self._say(f"{name}: refused, {entry['reason']}")
        return self.result(name)

    def guard(self, name: str, work: Callable[[], object]) -> str | None:
        """Do ``work``, which fills cells; what breaks it between two cells is kept as the failed cell ``name``, and
        told in a sentence.

        Raises:
            DeviceLostError: from a cell.
        """
        try:
            work()
        except DeviceLostError:
            raise
        except Exception as error:  # other work goes on; the traceback is kept and the exit code is 1
            self.failed += 1
            reason = f"{type(error).__name__}: {error}"
            self._enter(name, {"state": FAILED, "reason": reason, "traceback": traceback.format_exc()})
            self._say(f"{name}: FAILED, {reason}".split("\n")[0])
            return reason
        return None

    def skip(self, name: str, reason: str) -> None:
        """Note why a cell is not measured."""
        if name not in self.cells:
            self._enter(name, {"state": SKIPPED, "reason": reason})
            self._say(f"{name}: skipped, {reason}")

    def note(self, key: str, value: Any) -> None:
        """Keep something beside the cells."""
        self.content[key] = value
        self.write()

    def say(self, line: str) -> None:
        """One line for people."""
        self._say(line)

    def states(self) -> dict[str, int]:
        """How many cells are in each state."""
        found = [cell["state"] for cell in self.cells.values()]
        return {state: found.count(state) for state in (DONE, SKIPPED, REFUSED, FAILED) if state in found}

    def write(self) -> None:
        """The whole file, complete or as it was."""
        partial = self.path.with_name(self.path.name + ".partial")
        partial.write_text(json.dumps(self.content, indent=1, default=_plain) + "\n")
        os.replace(partial, self.path)

    def _enter(self, name: str, entry: dict[str, Any]) -> None:
        self.cells[name] = entry
        self.write()


def _plain(value: Any) -> Any:
    """A numpy scalar or array as JSON has it, anything else by its text."""
    return value.tolist() if hasattr(value, "tolist") else str(value)


def _read(path: Path, header: dict[str, Any]) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
        found = {key: content[key] for key in header}
        cells = content["cells"]
    except (OSError, ValueError, KeyError, TypeError):
        raise ValueError(f"--out {path.name} is no result of this programme; name another file") from None
    if json.loads(json.dumps(header)) != found or not isinstance(cells, dict):
        differs = next((k for k in header if header[k] != found[k]), "cells")
        raise ValueError(
            f"--out {path.name} holds results with {differs} {found.get(differs)!r}, this is {header.get(differs)!r}; "
            "name another file"
        )
    return dict(content)
