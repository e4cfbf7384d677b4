"""Importers: what reads other programs' recordings of routing, one file each, found by existing.

A module here whose name does not begin with ``_`` is an importer. It has a docstring, whose first line the help of
``traces.convert`` shows, and two functions:

    recognise(path: Path) -> bool                   from a look at the file; cheap, never raises, executes nothing
    read(path: Path, options: Options) -> Trace     or TraceError: one sentence

Its name is the module's, with ``-`` for ``_``.
"""

from __future__ import annotations

import importlib
import pkgutil
from pathlib import Path
from typing import Protocol, cast

from traces.importers._options import Options
from traces.trace import Trace

__all__ = ["Importer", "Options", "importers"]


class Importer(Protocol):
    """What a module of this package offers."""

    __doc__: str | None

    @staticmethod
    def recognise(path: Path) -> bool: ...

    @staticmethod
    def read(path: Path, options: Options) -> Trace: ...


def importers() -> dict[str, Importer]:
    """Every importer by name, in alphabetical order."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))
    return {name.replace("_", "-"): cast(Importer, importlib.import_module(f"{__name__}.{name}")) for name in names}
