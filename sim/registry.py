"""Plug-ins are found by existing: every module of `sim.caches`, `sim.predictors`, `sim.policies`
and `sim.misses` is one. A file that breaks what a plug-in promises is left out, and who names it is told why."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import pkgutil
import sys
import traceback
from functools import cache
from types import ModuleType
from typing import Any

from sim.presets import PRESETS

PACKAGES = {"cache": "sim.caches", "predictor": "sim.predictors", "policy": "sim.policies", "miss": "sim.misses"}
FUNCTIONS = {  # of each kind, with their arguments
    "cache": {
        "score": "params, experts, x, now",
        "touch": "params, experts, x, tokens, now",
        "admit": "params, experts, x, victim, now",
        "fit": "params, trace",
        "sizes": "params, trace, slots",
    },
    "predictor": {"table": "params, trace"},
    "policy": {"worth": "params, guess, link"},
    "miss": {"loads": "params, misses"},
}
NEEDED = {"cache": "score", "predictor": "table"}  # without it a plug-in of the kind can do nothing


class Plugins(dict[str, ModuleType]):
    """Modules of one kind by name, in alphabetical order.

    Attributes:
        left_out: the files that cannot be used, by name: one sentence that says which, why, and what to do.
    """

    def __init__(self) -> None:
        super().__init__()
        self.left_out: dict[str, str] = {}
        self._said = False

    def say_left_out(self) -> None:
        """On standard error, once: a command goes on without these files."""
        for sentence in () if self._said else self.left_out.values():
            print(f"left out: {sentence}", file=sys.stderr)
        self._said = True


@cache
def plugins(kind: str) -> Plugins:
    """All plug-ins of one kind."""
    package = importlib.import_module(PACKAGES[kind])
    found = Plugins()
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        name = f"{package.__name__}.{info.name}"
        path = str(getattr(importlib.util.find_spec(name), "origin", name))
        try:
            module = importlib.import_module(name)
        except Exception as error:  # a file that somebody is at work on may raise anything
            where, reason = _raised(path, error)
            reason = f"{reason} (python -c 'import {name}' shows all of it)"
        else:
            where, reason = "", _fault(kind, info.name, module)
        if reason:
            found.left_out[info.name] = (
                f"{kind} {info.name!r} cannot be used: {path}{where}: {reason}; mend the file, or move it elsewhere"
            )
        else:
            found[info.name] = module
    return found


def _raised(path: str, error: Exception) -> tuple[str, str]:
    """The line of a file that raised when it was imported, and what it raised."""
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == path]
    said = str(error)
    if isinstance(error, SyntaxError) and error.filename == path:
        lines, said = [error.lineno or 0], error.msg
    where = f", line {lines[-1]}" if lines and lines[-1] else ""
    return where, f"{type(error).__name__}: {' '.join(said.split())}"


def _fault(kind: str, name: str, module: ModuleType) -> str:
    """What a plug-in lacks of what its kind promises; empty for nothing."""
    if not (module.__doc__ or "").strip():
        return "it has no docstring, whose first line says what it does"
    source = getattr(module, "SOURCE", None)
    if not (isinstance(source, str) and source.strip()):
        return "it has no text SOURCE, which says where it comes from"
    if kind == "policy" and name in PRESETS:
        return "a preset has the same name; call it otherwise"
    return _faulty_params(module) or _faulty_functions(kind, module)


def _faulty_params(module: ModuleType) -> str:
    found = getattr(module, "Params", None)
    if not (isinstance(found, type) and issubclass(found, tuple) and hasattr(found, "_field_defaults")):
        return "it has no class Params(NamedTuple), which holds its parameters, or none"
    params: Any = found
    for field in params._fields:
        if not isinstance(params._field_defaults.get(field), bool | int | float | str):
            return f"Params.{field} has no default that is an int, float, bool or str"
    return ""


def _faulty_functions(kind: str, module: ModuleType) -> str:
    for name, arguments in FUNCTIONS[kind].items():
        function = getattr(module, name, None)
        if function is None and name != NEEDED.get(kind):
            continue
        if not callable(function):
            return f"it has no function {name}({arguments})"
        if not _takes(function, arguments.count(",") + 1):
            return f"its function {name} must take ({arguments})"
    if kind == "policy":
        ahead = module.Params._field_defaults.get("lookahead")
        if hasattr(module, "worth") and type(ahead) is not int:
            return "it has a function worth, so its Params must have an int lookahead"
        if ahead is not None and not hasattr(module, "worth"):
            return f"its Params have lookahead, so it must have a function worth({FUNCTIONS[kind]['worth']})"
    return ""


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*range(arguments))
    except (TypeError, ValueError):  # other arguments; or none that Python knows of
        return False
    return True


def name_plugin(error: Exception, otherwise: str) -> None:
    """Note on an error which plug-in's function raised it, and where; ``otherwise`` for one raised elsewhere, as by
    what a plug-in returned. The traceback stays as it is."""
    kinds = {package: kind for kind, package in PACKAGES.items()}
    note = otherwise
    for frame, line in traceback.walk_tb(error.__traceback__):
        package, _, name = str(frame.f_globals.get("__name__")).rpartition(".")
        if package in kinds:
            note = f"raised in {kinds[package]} {name!r}, {frame.f_code.co_filename}, line {line}"
    error.add_note(f"{note}; what plug-ins are given, and must return, stands in sim/plugin.py and sim/README.md")


def describe(kind: str) -> str:
    """One line per plug-in, for help texts: name, first line of its docstring, parameters with defaults; or why it is
    left out."""
    lines = []
    for name, module in plugins(kind).items():
        params = ", ".join(f"{k}={v}" for k, v in module.Params._field_defaults.items())
        lines.append(f"  {name}: {(module.__doc__ or '').splitlines()[0]}" + (f" [{params}]" if params else ""))
    return "\n".join([*lines, *(f"  left out: {sentence}" for sentence in plugins(kind).left_out.values())])


def table(kind: str) -> str:
    """The same as a Markdown table, with each plug-in's source."""
    lines = [f"| {kind} | what it does | parameters | source |", "| --- | --- | --- | --- |"]
    for name, module in plugins(kind).items():
        what = (module.__doc__ or "").splitlines()[0]
        params = ", ".join(f"{k}={v}" for k, v in module.Params._field_defaults.items())
        lines.append(f"| `{name}` | {what} | {params} | {module.SOURCE} |")
    return "\n".join(lines)
