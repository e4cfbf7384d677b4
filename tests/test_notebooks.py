"""Notebooks: stored without outputs, without functions of their own, and they run from top to bottom."""

from __future__ import annotations

import ast
import json
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
LABELS = ("MEASURED", "SIMULATED", "ESTIMATED")
FIGURE = re.compile(r"\d\s*(%|ms\b|tokens/s|points\b)|\d\.\d")


def cells(path: Path, kind: str) -> list[dict[str, Any]]:
    return [cell for cell in json.loads(path.read_text())["cells"] if cell["cell_type"] == kind]


def source(cell: dict[str, Any]) -> str:
    return "".join(cell["source"])


def test_there_are_five_and_the_readme_lists_them() -> None:
    text = (FOLDER / "README.md").read_text()
    assert [p.name[:2] for p in NOTEBOOKS] == ["01", "02", "03", "04", "05"]
    assert re.findall(r"\]\((\d\d_\w+\.ipynb)\)", text) == [p.name for p in NOTEBOOKS]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_outputs_and_without_functions(path: Path) -> None:
    for cell in cells(path, "code"):
        assert cell["outputs"] == [] and cell["execution_count"] is None
        for node in ast.walk(ast.parse(source(cell))):
            assert not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Lambda)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_prose_has_no_figures_and_its_links_exist(path: Path) -> None:
    for cell in cells(path, "markdown"):
        assert not FIGURE.search(source(cell)), "a figure is computed and printed, not typed"
        for target in re.findall(r"\]\(([^)#:]+)\)", source(cell)):
            assert (FOLDER / target).exists(), target


def executed(path: Path) -> list[Any]:
    """The code cells after a run in the folder of the notebooks."""
    nbformat = pytest.importorskip("nbformat")
    nbclient = pytest.importorskip("nbclient")
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    nbclient.NotebookClient(notebook, timeout=900, resources={"metadata": {"path": str(FOLDER)}}).execute()
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_they_run_and_every_picture_says_what_it_rests_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All five, two at a time; a plain-text form stands beside each picture and carries its caption."""
    for package in ("nbclient", "nbformat", "ipykernel", "matplotlib"):
        pytest.importorskip(package, reason="needs the extras 'notebooks' and 'plots'")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    for name in ("IPYTHONDIR", "JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    before = sorted(FOLDER.rglob("*"))
    with ThreadPoolExecutor(2) as pool:
        found = dict(zip(NOTEBOOKS, pool.map(executed, NOTEBOOKS), strict=True))
    for path, code in found.items():
        outputs = [output for cell in code for output in cell.outputs]
        assert [o.text for o in outputs if o.output_type == "stream" and o.name == "stderr"] == [], path.name
        pictures = [o.data for o in outputs if "image/png" in o.get("data", {})]
        assert len(pictures) >= 2, path.name
        for data in pictures:
            assert any(label in data["text/plain"] for label in LABELS), path.name
            assert "routing" in data["text/plain"] or "held-out text" in data["text/plain"], path.name
    assert sorted(FOLDER.rglob("*")) == before
