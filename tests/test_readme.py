"""What the README tells people to type works, and what it says of files is true."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from sim import presets, registry

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
LINES = [line.strip() for block in BLOCKS for line in block.replace("\\\n", " ").splitlines()]
SETUP = [line for line in LINES if "-m venv" in line]
COMMANDS = [line for line in LINES if line.startswith("python -m ")]
NOT_RUN = {"runtime.train"}  # hours; its flags are parsed
TIMING = {"runtime.calibrate", "runtime.validate"}  # a busy machine is refused, or fails a gate: not a test's business


def test_two_commands_do_all_the_setup() -> None:
    assert len(SETUP) == 2
    assert all(line.startswith("python3 -m venv .venv && ") for line in SETUP)
    assert SETUP[0].endswith("-m sim.run --policy speculative")


def test_ci_runs_the_readmes_test_command() -> None:
    assert SETUP[1] in (ROOT / ".ci" / "run").read_text().splitlines()


@pytest.mark.parametrize("line", COMMANDS)
def test_command_runs_and_ends_in_one_json_document(line: str, tmp_path: Path) -> None:
    words = shlex.split(line, comments=True)
    module = words[2]
    if module.startswith("runtime."):
        pytest.importorskip("torch", reason="needs the runtime extra")
    if module in NOT_RUN:
        parser = __import__(module, fromlist=["parser"]).parser()
        parser.parse_args(words[3:])
        return
    if module in TIMING:
        words.append("--allow-busy")
    result = subprocess.run(
        [sys.executable, *words[1:]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    document = json.loads(result.stdout.splitlines()[-1]) if result.stdout else {}
    assert result.returncode in ((0, 1) if "gates" in document else (0,)), result.stderr[-2000:]
    assert document.get("gates", {}).get("load_logs", True)


def test_output_shown_is_the_true_output() -> None:
    """The text block under the first command is what it prints before its JSON line."""
    shown = re.search(r"```text\n(.*?)```", README, re.DOTALL)
    result = subprocess.run(
        [sys.executable, "-m", "sim.run", "--policy", "speculative"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=True,
    )
    printed = result.stdout.rstrip().splitlines()
    assert shown is not None
    assert shown.group(1).strip().splitlines() == "\n".join(printed[:-1]).strip().splitlines()


def test_files_the_readme_names_exist() -> None:
    for path in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("table", [*map(registry.table, registry.PACKAGES), presets.table()])
def test_tables_are_the_registrys(table: str) -> None:
    assert table in README


VALIDATIONS = sorted((ROOT / "notebooks/validation").glob("*.json"))
SHOWN = ("on_demand", "speculative", "speculative:cache=heat", "next_layer", "mixtral_offloading")


@pytest.mark.parametrize("path", VALIDATIONS, ids=lambda p: p.stem)
def test_simulated_against_measured_is_made_from_the_file(path: Path) -> None:
    """Table and figures of every stored validation, its worst case included."""
    verdict = pytest.importorskip("runtime.verdict", reason="needs the runtime extra")
    shown = SHOWN if path == VALIDATIONS[0] else ()
    assert verdict.table(json.loads(path.read_text()), shown) in README


@pytest.mark.parametrize("path", VALIDATIONS, ids=lambda p: p.stem)
def test_stored_validations_come_again(path: Path) -> None:
    """Every cell is simulated anew from its trace, without the machine it was measured on; what is locked is told."""
    verdict = pytest.importorskip("runtime.verdict", reason="needs the runtime extra")
    found = verdict.recheck(path)
    assert found["differences"] == []
    assert all("locks the claim" in README for _ in verdict.locked(found["gates"]))
    assert path != VALIDATIONS[0] or all(found["gates"].values())
