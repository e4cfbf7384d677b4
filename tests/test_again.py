"""The timeline of a stored result, simulated anew: what a file lacks is told, and no mistake of our own is hidden."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import random_trace, round_machine

from sim.experiment import Experiment, Setting
from sim.report import __main__ as command
from sim.report import again, events
from sim.spec import options
from traces import save

ROOT = Path(__file__).parent.parent
SLOTS = ROOT / "notebooks/sweeps/equal_slots.jsonl"
VALIDATION = ROOT / "notebooks/validation/cpu-2core.json"
ODD: list[Any] = [..., None, "x", "\0", [], {}, True, -1, 10**6, 1e-300, float("nan"), 10**400]


def changed(value: dict[str, Any], name: str, new: Any) -> dict[str, Any]:
    """A copy with something else there; without it for Ellipsis."""
    return {k: v for k, v in value.items() if k != name} | ({} if new is ... else {name: new})


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.setattr(again, "TOKENS", 3)
    found: dict[str, Any] = json.loads(SLOTS.read_text().splitlines()[0])
    return found


@pytest.fixture
def document(tmp_path: Path) -> dict[str, Any]:
    """A validation of one cell, its trace beside it."""
    trace, machine = random_trace(3), round_machine()
    save(trace, tmp_path / "cell0.safetensors")
    sets = {"landing_slots": 2, "chunk_bytes": -4}
    run = options("next_layer", **sets).replace(predictor="router", extra_slots=1)
    setting = Setting(trace, again.paced(machine, 0.5), trace.model, 4, 3, run)
    simulated = {"load_log_sha256": Experiment(references=False).run(setting)["load_log_sha256"]}
    cell = {"trace": "cell0.safetensors", "policy": "next_layer", "options": sets, "extra_slots": 1}
    cell |= {"bits": 4, "slots": 3, "link_gb_s": 0.5, "simulated": simulated}
    found: dict[str, Any] = json.loads(json.dumps({"cells": [cell], "profile": machine.to_json()}))
    return found


def told(simulate: Callable[[], events.Process]) -> str:
    """Why there is no timeline; empty if there is one. Any other error is one of ours."""
    try:
        assert simulate().ends_ns
    except again.NotHereError as error:
        assert "\n" not in str(error)
        return str(error)
    return ""


def test_whatever_a_record_holds_there_is_a_timeline_or_one_reason(record: dict[str, Any]) -> None:
    found: Counter[str] = Counter()
    for name in again.RECORD:
        for value in ODD:
            found[told(lambda name=name, value=value: again.of_record(changed(record, name, value)))] += 1
    assert all(found[f"the setting has no {name!r}"] == 1 for name in again.RECORD)
    assert 0 < found[""] < 10


def test_whatever_a_cell_holds_there_is_a_timeline_or_one_reason(document: dict[str, Any], tmp_path: Path) -> None:
    cell, found = document["cells"][0], Counter[str]()
    ways: list[tuple[str, ...]] = [(name,) for name in again.CELL]
    ways += [("options", name) for name in (*cell["options"], "colour")] + [("simulated", "load_log_sha256")]
    for outer, *inner in ways:
        for value in ODD:
            new = changed(cell[outer], inner[0], value) if inner else value
            odd = changed(cell, outer, new)
            found[told(lambda odd=odd: again.of_cell(document, odd, tmp_path))] += 1
    needed = [name for name, kind in again.CELL.items() if not kind.optional]
    assert all(found[f"the cell has no {name!r}"] == 1 for name in needed)
    assert found["the cell sets 'colour', which is no option of a run"] == len(ODD) - 1
    assert 0 < found[""] < 20


@pytest.mark.parametrize("name", ["profile", "clock"])
def test_whatever_a_validations_machine_holds_there_is_a_timeline_or_one_reason(
    name: str, document: dict[str, Any], tmp_path: Path
) -> None:
    cell, found = document["cells"][0], Counter[str]()
    stored = document.get(name) or document["profile"]
    machine, law = stored["machine"], next(iter(stored["machine"]["operators"]))
    for value in ODD:
        odd = [changed(stored, key, value) for key in stored]
        for key in ("name", "link", "vram_gb", "operators"):
            odd.append(stored | {"machine": changed(machine, key, value)})
        for key in machine["link"]:
            odd.append(stored | {"machine": machine | {"link": changed(machine["link"], key, value)}})
        for key in machine["operators"][law]:
            laws = machine["operators"] | {law: changed(machine["operators"][law], key, value)}
            odd.append(stored | {"machine": machine | {"operators": laws}})
        for one in odd:
            profile = json.loads(json.dumps(one))
            found[told(lambda profile=profile: again.of_cell(document | {name: profile}, cell, tmp_path))] += 1
    assert len(found) > 50


def test_a_trace_that_is_not_there_is_named(document: dict[str, Any], tmp_path: Path) -> None:
    assert "does not lie beside the file" in told(
        lambda: again.of_cell(document, document["cells"][0], tmp_path / "elsewhere")
    )


@pytest.mark.parametrize("error", [KeyError("ours"), TypeError("ours"), ValueError("ours"), OSError("ours")])
@pytest.mark.parametrize("source", [SLOTS, VALIDATION])
def test_a_mistake_of_our_own_is_no_missing_timeline(
    error: Exception, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def mistaken(*_: Any, **__: Any) -> None:
        raise error

    monkeypatch.setattr(again.Experiment, "run", mistaken)
    with pytest.raises(type(error), match="ours"):
        command.run(command.parser().parse_args([str(source), "--out", str(tmp_path / "r.html")]))
    assert not list(tmp_path.iterdir())


EVENT = {"ph": "X", "pid": 1, "tid": 1, "name": "head", "ts": 0, "dur": 1}


@pytest.mark.parametrize(
    "content",
    [
        b"\x1f\x8b\x08\0\0\0\0\0\0\xffnot deflated",
        b"[" * 100_000,
        b"[]",
        b'{"traceEvents": {}}',
        b'{"traceEvents": [1]}',
        b'{"traceEvents": [{"pid": 1}]}',
        *(
            json.dumps({"traceEvents": [EVENT, one]}).encode()
            for one in (
                EVENT | {"ts": "0"},
                EVENT | {"ts": float("nan")},
                EVENT | {"tid": []},
                EVENT | {"pid": "1"},
                {"ph": "M", "pid": 1, "name": "process_name", "args": {}},
                {"ph": "M", "pid": 1, "name": "thread_name", "args": {"name": "compute"}},
                {"ph": "s", "pid": 1, "ts": 0},
            )
        ),
    ],
)
def test_what_is_no_timeline_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "t.json.gz"
    path.write_bytes(content)
    with pytest.raises(command.SpecError, match="is no timeline; name a file"):
        events.read(str(path))


def test_a_mistake_of_our_own_is_no_damaged_timeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "t.json"
    track = {"ph": "M", "pid": 1, "tid": 1, "name": "thread_name", "args": {"name": "compute"}}
    path.write_text(json.dumps({"traceEvents": [track, EVENT, {"ph": "C", "pid": 1, "anything": []}]}))
    assert [one.ends_ns for one in events.read(str(path))] == [[1000]]
    monkeypatch.setattr(events, "uses", lambda *_: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        events.read(str(path))
