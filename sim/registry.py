"""Plug-ins are found by existing: every module of `sim.caches`, `sim.predictors`, `sim.policies`
and `sim.misses` is one."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache
from types import ModuleType

PACKAGES = {"cache": "sim.caches", "predictor": "sim.predictors", "policy": "sim.policies", "miss": "sim.misses"}


@cache
def plugins(kind: str) -> dict[str, ModuleType]:
    """Modules of one kind by name, in alphabetical order.

    Raises:
        TypeError: a plug-in file without docstring, ``SOURCE`` or ``Params``.
    """
    package = importlib.import_module(PACKAGES[kind])
    found = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        module = importlib.import_module(f"{package.__name__}.{info.name}")
        for needed in ("__doc__", "SOURCE", "Params"):
            if not getattr(module, needed, None):
                raise TypeError(f"{kind} plug-in {info.name} lacks {needed}")
        found[info.name] = module
    return found


def describe(kind: str) -> str:
    """One line per plug-in, for help texts: name, first line of its docstring, parameters with defaults."""
    lines = []
    for name, module in plugins(kind).items():
        params = ", ".join(f"{k}={v}" for k, v in module.Params._field_defaults.items())
        lines.append(f"  {name}: {(module.__doc__ or '').splitlines()[0]}" + (f" [{params}]" if params else ""))
    return "\n".join(lines)


def table(kind: str) -> str:
    """The same as a Markdown table, with each plug-in's source."""
    lines = [f"| {kind} | what it does | parameters | source |", "| --- | --- | --- | --- |"]
    for name, module in plugins(kind).items():
        what = (module.__doc__ or "").splitlines()[0]
        params = ", ".join(f"{k}={v}" for k, v in module.Params._field_defaults.items())
        lines.append(f"| `{name}` | {what} | {params} | {module.SOURCE} |")
    return "\n".join(lines)
