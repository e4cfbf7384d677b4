"""Imports point left only: traces <- sim <- runtime, and inside sim from the registry to the commands."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FILES = sorted(p for package in ("traces", "sim", "runtime") for p in (ROOT / package).rglob("*.py"))
OURS = {"traces", "sim", "runtime"}
BASE = {"numpy", "safetensors", "simpy"}
OPTIONAL = {  # what else a package may use, inside functions
    "traces": {"torch", "matplotlib"},
    "sim": {"numba", "matplotlib", "pandas", "dask"},
}

# Each may import itself and what stands above it; modules not named here come last, with the commands.
SIM_ORDER = [
    {"sim.registry", "sim.plugin", "sim.presets", "sim.spec", "sim.link", "sim.machine", "sim.state", "sim.timing"},
    {"sim.predicting"},
    {"sim.caches", "sim.predictors", "sim.policies", "sim.misses"},
    {"sim.wire", "sim.decide", "sim.clock", "sim.guard"},
    {"sim.planner"},
    {"sim.ledger", "sim.timeline", "sim.bounds", "sim.simpy_driver", "sim.compiled"},
    {"sim.experiment", "sim.fast_planner"},
]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether it is imported when the file is), type-checking blocks left out."""
    tree = ast.parse(path.read_text())
    found: list[tuple[str, bool]] = []

    def walk(node: ast.AST, at_import: bool) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            if isinstance(child, ast.Import):
                found.extend((alias.name, at_import) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                assert child.level == 0, f"{path.name} line {child.lineno}: write the package's name"
                found.append((child.module or "", at_import))
                if (child.module or "").split(".")[0] in OURS:
                    names = [f"{child.module}.{alias.name}" for alias in child.names]
                    found.extend((n, at_import) for n in names if is_module(n))
            walk(child, at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda))

    walk(tree, True)
    return found


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.with_suffix(".py").is_file() or (path / "__init__.py").is_file()


def rank(module: str) -> int:
    for number, names in enumerate(SIM_ORDER):
        if any(module == n or module.startswith(f"{n}.") for n in names):
            return number
    return len(SIM_ORDER)


def test_the_packages_are_there() -> None:
    assert {module_name(p).split(".")[0] for p in FILES} == OURS
    for names in SIM_ORDER:
        assert any(is_module(n) for n in names)


@pytest.mark.parametrize("path", FILES, ids=module_name)
def test_imports_point_left(path: Path) -> None:
    package = module_name(path).split(".")[0]
    allowed = {"traces": {"traces"}, "sim": {"traces", "sim"}, "runtime": OURS}[package]
    for name, at_import in imports(path):
        top = name.split(".")[0]
        if top in OURS:
            assert top in allowed, f"{package} imports {name}"
        elif top not in sys.stdlib_module_names and package != "runtime":
            lazily = top in OPTIONAL[package] and (not at_import or module_name(path) == "sim.pointers")
            assert top in BASE or lazily, f"{package} imports {name}"
        if top == "simpy":
            assert module_name(path) == "sim.simpy_driver", "only sim/simpy_driver.py imports simpy"
        if top == "safetensors" and package != "runtime":
            assert package == "traces", "sim reads traces through the traces package"


@pytest.mark.parametrize("path", [p for p in FILES if module_name(p).startswith("sim.")], ids=module_name)
def test_inside_sim_imports_point_from_the_registry_to_the_commands(path: Path) -> None:
    mine = rank(module_name(path))
    for name, _ in imports(path):
        if name.startswith("sim.") and name != "sim":
            assert rank(name) <= mine, f"{module_name(path)} imports {name}, which comes after it"


@pytest.mark.parametrize("folder", ["caches", "predictors", "policies", "misses"])
def test_plugins_know_nothing_of_each_other_and_stay_small(folder: str) -> None:
    for path in (ROOT / "sim" / folder).glob("*.py"):
        ours = {name for name, _ in imports(path) if name.split(".")[0] in OURS}
        assert not any(name.startswith(("sim.caches", "sim.predictors", "sim.policies", "sim.misses")) for name in ours)
        assert len(path.read_text().splitlines()) <= 70
