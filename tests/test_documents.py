"""What the documents beside the README name exists, and what they tell people to type works."""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sim import registry, sweep
from sim.spec import Options

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / name for name in ("CONTRIBUTING.md", "CHANGELOG.md", "sim/README.md")]
SIM = (ROOT / "sim/README.md").read_text()


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.name)
def test_files_and_parts_that_are_linked_exist(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text()):
        file, _, part = target.partition("#")
        assert (path.parent / file).exists(), target
        if part:
            headings = re.findall(r"^#+ (.+)$", (path.parent / file).read_text(), re.MULTILINE)
            assert part in [h.lower().replace(" ", "-") for h in headings], target


def test_plug_in_table_names_what_plug_ins_define() -> None:
    declared = {"POOLED", "WANTS_GUESSES", "NEEDS_FUTURE", "WANTS_TRUST", "WHOLE_LAYER", "OPTIONS"}
    functions = {"score", "touch", "admit", "fit", "sizes", "table", "worth", "loads"}
    used = {
        name for kind in registry.PACKAGES for module in registry.plugins(kind).values() for name in vars(module)
    } & (declared | functions)
    assert used == declared | functions
    assert all(f"`{name}" in SIM for name in used)


def test_every_option_of_a_run_is_named() -> None:
    fields = {f.name for f in dataclasses.fields(Options)} - {"policy", "text", "extra_slots"}
    assert all(f"`{name}" in SIM for name in fields)


def test_modules_that_are_named_can_be_run() -> None:
    text = "\n".join(path.read_text() for path in DOCUMENTS)
    for module in set(re.findall(r"python -m ([a-z_.]+)", text)) - {"pytest", "venv"}:
        path = ROOT.joinpath(*module.split("."))
        assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file(), module


def test_the_commands_of_the_report_run(tmp_path: Path) -> None:
    """The sweep's flags are parsed (compiling its drivers takes minutes); the report is made of a committed sweep."""
    block = re.search(r"```sh\n(.*?)```", SIM, re.DOTALL)
    assert block is not None
    first, second = (shlex.split(line) for line in block[1].splitlines())
    args = sweep.parser().parse_args(first[3:])
    shutil.copy(ROOT / "notebooks/sweeps/equal_slots.jsonl", tmp_path / args.out)
    done = subprocess.run(
        [sys.executable, *second[1:]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout.splitlines()[-1])["bytes"] == (tmp_path / "report.html").stat().st_size


def test_the_paper_is_cited_and_ours_named_a_reconstruction() -> None:
    text = (ROOT / "CITATION.cff").read_text()
    for line in ("cff-version: 1.2.0", "doi: 10.1016/j.csi.2025.103996", "  - type: article", "family-names: Ou"):
        assert line in text
    assert "reconstruction" in text
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None and f"\nversion: {version[1]}\n" in text
    assert f"## {version[1]}" in (ROOT / "CHANGELOG.md").read_text()
