"""Machines: what a profile file lacks is named, and what a refusal tells the user to write works as it stands."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import random_trace, round_machine

from sim.machine import HardwareProfile, load_machine, machine_from, override
from sim.spec import SpecError
from sim.timing import check_reach
from traces import ModelSpec, Trace

NAMES = ["plain", "a.b-c", "qwen1.5-moe-a2.7b", "with space.x", "it's.9", "reach.context"]


def near(name: str, reach: dict[str, float]) -> tuple[HardwareProfile, ModelSpec, Trace]:
    """A machine whose laws of a model reach that far; beside them those of models with names like it."""
    trace = random_trace(1, sequences=3, length=12, prefill=4)
    machine = round_machine()
    laws = machine.operators["tiny"]
    others = {name.partition(".")[0]: laws, f"{name}.reach": laws, "a": laws}
    operators = others | {name: replace(laws, reach=reach)}
    return replace(machine, operators=operators), replace(trace.model, name=name), trace


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("reach", [{"context": 7.0}, {"tokens": 2.0, "context": 7.0}])
def test_what_the_refusal_says_to_write_works_as_it_stands(name: str, reach: dict[str, float]) -> None:
    machine, model, trace = near(name, reach)
    with pytest.raises(SpecError) as told:
        check_reach(machine, model, trace)
    flags = re.findall(r"or extrapolate with (.+)$", str(told.value))
    words = shlex.split(flags[0])
    assert words[::2] == ["--set"] * len(reach)
    changed, same = override(machine, model, words[1::2])
    check_reach(changed, same, trace)
    assert changed.operators.pop(name).reach == {key: {"tokens": 4.0, "context": 12.0}[key] for key in reach}
    assert changed.operators == {model: laws for model, laws in machine.operators.items() if model != name}
    assert changed.evidence == "ESTIMATED"


@pytest.mark.parametrize(
    ("path", "says"),
    [
        ("operators.a.b-c.nothing", "there is no field 'nothing'; fields: dense, expert"),
        ("operators.z.reach.context", "there is no field 'z.reach.context'; fields: a.b-c"),
        ("operators", "there is no field 'operators'; fields: name, vram_gb"),
        ("link.", "there is no field ''; fields: h2d_gb_s"),
    ],
)
def test_a_path_to_nothing_is_told_how_far_it_leads(path: str, says: str) -> None:
    machine, model, _ = near("a.b-c", {"context": 7.0})
    machine = replace(machine, operators={"a.b-c": machine.operators["a.b-c"]})
    with pytest.raises(SpecError) as told:
        override(machine, model, [f"machine.{path}=1"])
    assert str(told.value).startswith(f"--set machine.{path}: {says}")


WRONG: list[tuple[str, Any, str]] = [
    ("", [], "machine is []; it must be an object"),
    ("vram_gb", ..., "machine.vram_gb is missing"),
    ("vram_gb", "much", "machine.vram_gb is 'much'"),
    ("colour", 1, "machine field 'colour' is unknown"),
    ("name", 3, "machine.name is 3; it must be a string"),
    ("link", 3, "machine.link is 3; it must be an object"),
    ("link.h2d_gb_s", ..., "machine.link.h2d_gb_s is missing"),
    ("link.h2d_host_gb_s", 1e-300, "a bandwidth must be above 0"),
    ("link.h2d_fixed_s", 1e9, "it must be at most 60"),
    ("link.colour", 1, "machine.link has the field 'colour'"),
    ("operators", [], "machine.operators is []; it must be an object"),
    ("operators.tiny", None, "machine.operators.tiny is None; it must be an object"),
    ("operators.tiny.head", ..., "machine.operators.tiny.head is missing"),
    ("operators.tiny.head", 1, "machine.operators.tiny.head is 1; it must be a list of 2 seconds"),
    ("operators.tiny.expert", 1, "machine.operators.tiny.expert is 1; it must be an object"),
    ("operators.tiny.host_s", [], "machine.operators.tiny.host_s is []; it must be an object"),
    ("operators.tiny.residuals", [], "machine.operators.tiny.residuals is []; it must be an object"),
]


@pytest.mark.parametrize(("path", "value", "says"), WRONG, ids=[f"{p} {v}" for p, v, _ in WRONG])
def test_what_is_wrong_with_a_profile_is_named(path: str, value: Any, says: str, tmp_path: Path) -> None:
    def changed(values: Any, keys: list[str]) -> Any:
        if keys == [""]:
            return value
        new = changed(values[keys[0]], keys[1:]) if keys[1:] else value
        return {k: v for k, v in values.items() if k != keys[0]} | ({} if new is ... else {keys[0]: new})

    found = round_machine().to_json()
    with pytest.raises(SpecError, match=re.escape(says)):
        machine_from(changed(found["machine"], path.split(".")), "MEASURED", {})
    for part, odd in (("evidence", 3), ("sources", [])):
        (tmp_path / "m.json").write_text(json.dumps(found | {part: odd}))
        with pytest.raises(SpecError, match=f"{part} is"):
            load_machine(str(tmp_path / "m.json"))


def test_a_mistake_of_our_own_is_no_wrong_profile(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sim.machine._reach", lambda *_: {}["ours"])
    with pytest.raises(KeyError, match="ours"):
        machine_from(round_machine().to_json()["machine"], "MEASURED", {})
