"""The GPU programme at toy size, its result file, its watcher and its targets."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the engine needs the runtime extra")
pytest.importorskip("transformers", reason="the engine needs the runtime extra")
pytest.importorskip("hqq", reason="the engine needs the runtime extra")

from runtime.bench import forced_cells, programme, targets
from runtime.bench.__main__ import BUDGET_S, PARTS, main, parser
from runtime.bench.book import Book, DeviceLostError, UnavailableError

ROOT = Path(__file__).parents[1]
HEADER = {"programme": "runtime.bench", "device": "cpu", "smoke": True}


def test_every_part_runs_and_a_second_call_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    """All parts give cells, none fails, load logs are the simulator's; what was dropped is all that is done again."""
    out = tmp_path / "smoke.json"
    command = [sys.executable, "-m", "runtime.bench", "--smoke", "--out", out, "--budget-s", "99999"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    summary = json.loads(done.stdout.splitlines()[-1])
    content = json.loads(out.read_text())
    assert list(content["parts"]) == list(PARTS)
    cells = content["cells"]
    for part in PARTS:
        assert any(n.startswith(f"{part}/") and c["state"] == "done" for n, c in cells.items()), part
    assert summary["failed"] == [] and set(summary["cells"]) <= {"done", "refused"}
    equal, compared = summary["load_logs_equal"]
    assert equal == compared >= 8
    assert cells["forced/mixtral-toy/4b/own_bytes"]["result"]["experts_compared"] == 3 * 4 * 2
    rows = [c["result"] for n, c in cells.items() if n.startswith("forced/") and "tpot_s" in c.get("result", {})]
    assert {(row["evidence"], row["routing"]) for row in rows} == {("MEASURED", "SYNTHETIC"), ("MEASURED", "FORCED")}
    assert content["conditions"][0]["versions"]["torch"]
    assert not list(tmp_path.glob("*.partial"))

    del content["cells"]["link/chunks/4096"]
    seconds = {name: cell.get("seconds") for name, cell in content["cells"].items() if cell["state"] == "done"}
    out.write_text(json.dumps(content))
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # which main() sets
    assert main(["--smoke", "--out", str(out), "--part", "link", "--budget-s", "99999"]) == 0, capsys.readouterr().err
    again = json.loads(out.read_text())
    assert again["cells"]["link/chunks/4096"]["state"] == "done"
    assert {name: again["cells"][name].get("seconds") for name in seconds} == seconds
    assert len(again["conditions"]) == 2


def test_bad_input_is_one_sentence(tmp_path: Path, capsys) -> None:
    foreign = tmp_path / "foreign.json"
    foreign.write_text('{"cells": 3}')
    bad = [
        ([], "say what to measure"),
        (["--smoke", "--device", "cuda"], "leave one of the two out"),
        (["--device", "cpu"], "add --smoke"),
        (["--smoke", "--budget-s", "0"], "--budget-s is 0.0"),
        (["--smoke", "--out", str(foreign)], "foreign.json is no result of this programme"),
        (["--smoke", "--out", str(tmp_path / "nowhere" / "x.json")], "its folder does not exist"),
        (["--expect", "abacus"], "machine 'abacus' not found"),
    ]
    for words, message in bad:
        assert main(words) == 2
        assert message in capsys.readouterr().err
    assert foreign.read_text() == '{"cells": 3}'
    assert len([a for a in parser()._actions if a.option_strings]) <= 25
    assert sum(programme.BUDGETS_S.values()) + programme.START_S <= BUDGET_S == programme.BUDGET_S
    assert tuple(sorted(programme.BUDGETS_S)) == tuple(sorted(PARTS))


def crash() -> dict:
    raise ZeroDivisionError("of the cell's own")


def refuse() -> dict:
    raise UnavailableError("not here")


def test_a_book_keeps_what_was_done_and_says_why_the_rest_was_not(tmp_path: Path) -> None:
    path = tmp_path / "book.json"
    said: list[str] = []
    book = Book(path, HEADER, say=said.append)
    assert book.cell("a/good", lambda: {"x": 1}) == {"x": 1}
    assert book.cell("a/bad", crash) is None
    assert book.cell("a/refused", refuse) is None
    book.deadline = time.monotonic() + 5
    assert book.cell("a/late", lambda: {"x": 2}, needs_s=60) is None
    book.skip("a/skipped", "nobody wanted it")
    found = json.loads(path.read_text())["cells"]
    assert {n: c["state"] for n, c in found.items()} == {
        "a/good": "done",
        "a/bad": "failed",
        "a/refused": "refused",
        "a/late": "skipped",
        "a/skipped": "skipped",
    }
    assert "ZeroDivisionError" in found["a/bad"]["traceback"] and "in crash" in found["a/bad"]["traceback"]
    assert found["a/late"]["reason"].startswith("time: needs about 60 s")
    assert book.failed == 1 and len(said) == 4

    kept = Book(path, HEADER, again=("skipped", "refused"))
    assert set(kept.cells) == {"a/good", "a/bad"}
    assert kept.cell("a/bad", lambda: {"x": 3}) is None and kept.cell("a/good", crash) == {"x": 1}
    retried = Book(path, HEADER)
    assert set(retried.cells) == {"a/good"}
    with pytest.raises(ValueError, match="device 'cpu', this is 'cuda'"):
        Book(path, HEADER | {"device": "cuda"})


def test_a_cell_whose_process_ended_has_failed(tmp_path: Path) -> None:
    path = tmp_path / "book.json"
    code = (
        "import os, sys; from pathlib import Path; from runtime.bench.book import Book\n"
        f"book = Book(Path(sys.argv[1]), {HEADER!r})\n"
        "book.cell('a/good', lambda: {'x': 1}); book.cell('a/dies', lambda: os._exit(9))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, timeout=120, check=False)
    assert done.returncode == 9
    assert json.loads(path.read_text())["cells"]["a/dies"]["state"] == "running"
    book = Book(path, HEADER, again=())
    assert book.cells["a/dies"]["state"] == "failed" and "its process ended" in book.cells["a/dies"]["reason"]
    assert book.result("a/good") == {"x": 1}


def test_a_lost_device_ends_the_work_and_an_interrupted_cell_is_forgotten(tmp_path: Path) -> None:
    def gone() -> None:
        raise DeviceLostError("it answers no more")

    book = Book(tmp_path / "lost.json", HEADER, alive=gone)
    with pytest.raises(DeviceLostError):
        book.cell("a/bad", crash)
    assert book.cells["a/bad"]["state"] == "failed"

    def stop() -> dict:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        book.cell("a/stopped", stop)
    assert "a/stopped" not in json.loads((tmp_path / "lost.json").read_text())["cells"]


def test_a_part_that_breaks_does_not_cost_the_others(tmp_path: Path) -> None:
    """Its traceback is kept as a failed cell."""
    from runtime.devices import open_device

    book = Book(tmp_path / "book.json", HEADER)

    def broken(book: Book) -> None:
        crash()

    work = {"link": broken, "kernels": lambda book: book.cell("kernels/x", lambda: {"y": 1})}
    programme.in_turn(book, open_device("cpu"), ["link", "kernels"], work, 480, time.monotonic())
    assert book.cells["link/part"]["state"] == "failed" and "in crash" in book.cells["link/part"]["traceback"]
    assert book.result("kernels/x") == {"y": 1}
    assert book.content["parts"]["link"]["failure"].startswith("ZeroDivisionError")


def test_the_watcher_ends_what_stands_still_and_tells_why(tmp_path: Path, monkeypatch) -> None:
    out = tmp_path / "x.json"
    sleeper = [sys.executable, "-c", "import time; time.sleep(60)"]
    code, why = programme.attend(subprocess.Popen(sleeper), out, time.monotonic() + 1)
    assert (code, why) == (-1, "the time was up")
    monkeypatch.setattr(programme, "STILL_S", 0.5)
    code, why = programme.attend(subprocess.Popen(sleeper), out, time.monotonic() + 60)
    assert code == -1 and why.startswith("nothing was written")
    monkeypatch.setattr(programme, "STILL_S", 60.0)
    quick = [sys.executable, "-c", "raise SystemExit(75)"]
    assert programme.attend(subprocess.Popen(quick), out, time.monotonic() + 60)[0] == programme.LOST


def test_after_a_crash_another_process_goes_on(tmp_path: Path, monkeypatch, capsys) -> None:
    """The first process loses the device in a cell; the second finds it failed, does the rest, and all is told."""
    out = tmp_path / "x.json"
    header = {"schema": 1, **HEADER, "device": "cuda", "smoke": False, "parts": {}}
    first = header | {"cells": {"a/dies": {"state": "running"}, "a/late": {"state": "skipped", "reason": "time"}}}
    (tmp_path / "first.json").write_text(json.dumps(first))
    python = tmp_path / "python"
    python.write_text(
        '#!/bin/sh\necho "$@" >> calls\nif [ -e x.json ]; then exit 0; fi\ncp first.json x.json\nexit 75\n'
    )
    python.chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(programme.sys, "executable", str(python))
    args = parser().parse_args(["--device", "cuda", "--out", str(out), "--part", "link", "--budget-s", "60"])
    assert programme.run(args) == 1
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 2 and "--keep-failed" not in calls[0] and "--keep-failed" in calls[1]
    assert all("--child" in call and "--part link" in call for call in calls)
    cells = json.loads(out.read_text())["cells"]
    assert cells["a/dies"]["state"] == "failed" and cells["a/late"]["state"] == "skipped"
    summary = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert summary["failed"] == ["a/dies"] and summary["broken"] == ["the measuring process ended with code 75"]


def cell(tpot_ms: float, copied: float = 100, resident_ms: float = 10, own_ms: float = 40) -> dict:
    return {
        "tpot_s": tpot_ms / 1e3,
        "copied": copied,
        "lru_loads": 100,
        "resident_tpot_s": resident_ms / 1e3,
        "own_loads_s": own_ms / 1e3,
    }


def test_targets_are_judged_by_the_best_of_each_side() -> None:
    gen4 = {
        "mixtral_offloading": cell(100),
        "mixtral_offloading_copy_stream": cell(50),
        "mixtral_offloading_paper": cell(55),
        "speculative": cell(43, copied=101),
        "on_demand:cache=heat": cell(44, copied=100),
        "speculative:miss=split": cell(41),
    }
    groups = {"forced/mixtral-8x7b/4b/4s/gen4": gen4, "forced/mixtral-8x7b/4b/2s/gen4": {"speculative": cell(1)}}
    groups["forced/mixtral-8x7b/4b/4s/balance3"] = {"mixtral_offloading_paper": cell(50), "speculative": cell(40)}
    found = {t.name: t for t in targets.judged(targets.mixtral(groups), (4,))}
    assert found["a, 4 bits, link floor 1 x compute"].passed is None
    assert found["a, 4 bits, link floor 3 x compute"].passed is True
    assert found["b, 4 bits, split, over the best repaired rung"].passed is False
    assert "1.22 x" in found["b, 4 bits, split, over the best repaired rung"].why
    assert found["b, 4 bits, split, over the rung as released"].passed is False
    near = found["c, 4 bits, near the floor"]
    assert near.passed is True and near.why.startswith("on_demand:cache=heat: 1.10 x")
    assert targets.lines([near])[0].startswith("target c, 4 bits, near the floor: pass; ")


def test_what_is_planned_can_be_asked_for() -> None:
    """Every policy parses, names are one cell's each, and the shares of time are all of it."""
    for small in (True, False):
        blocks = forced_cells.blocks(small)
        names = [name for block in blocks for name in block.names()]
        assert len(names) == len(set(names))
        assert sum(block.share for block in blocks) == pytest.approx(1)
        assert forced_cells.policies_of(blocks)
    widths = {b.bits for b in forced_cells.blocks(False) if b.shape == "mixtral-8x7b"}
    assert widths == set(programme.LADDER_BITS)
