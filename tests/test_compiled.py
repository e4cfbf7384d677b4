"""The compiled driver decides and times exactly as the SimPy driver does: counts, nanoseconds and load logs."""

from __future__ import annotations

import random
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from conftest import random_setting, random_trace, round_machine

from sim import compiled
from sim.experiment import Experiment, Setting, compiled_replay, replay
from sim.ledger import Ledger
from sim.spec import options

pytest.importorskip("numba", reason="the compiled driver needs the extra 'fast'")

# a driver is compiled for each combination of rules: these few stand for all
COMBINATIONS = [("on_demand", "lru", "load"), ("speculative", "belady", "split"), ("speculative", "lru", "load")]


def all_of(ledger: Ledger) -> dict[str, Any]:
    return {
        "phases": [asdict(counts) for counts in ledger.phases],
        "decode_ns": ledger.decode_ns,
        "timed": ledger.timed,
        "ttft_ns": ledger.ttft_ns,
        "log": ledger.log.sha256,
    }


def settings_of(combination: tuple[str, str, str], number: int) -> list[Setting]:
    """The first random settings with these rules."""
    found = []
    seed = 0
    while len(found) < number:
        setting = random_setting(seed)
        run = setting.options
        if (run.policy.name, run.cache.name, run.miss) == combination:
            found.append(setting)
        seed += 1
    return found


@pytest.mark.parametrize("combination", COMBINATIONS, ids="-".join)
def test_equal_to_simpy_to_the_nanosecond(combination: tuple[str, str, str]) -> None:
    for setting in settings_of(combination, 70):
        assert all_of(compiled_replay(setting)) == all_of(replay(setting)), setting.options.text


def test_a_result_says_which_driver_it_comes_from() -> None:
    setting = settings_of(("on_demand", "lru", "load"), 1)[0]
    fast = Experiment(references=False, driver="compiled").run(setting)
    slow = Experiment(references=False).run(setting)
    assert (fast.pop("driver"), slow.pop("driver")) == ("compiled", "simpy")
    assert fast == slow


def test_a_changed_rule_is_a_new_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A plug-in file edited in place changes the source text, and with it the key and what is decided."""
    from sim import registry

    rule = tmp_path / "zz_rule.py"
    text = (
        '"""A rule of a test."""\nfrom typing import NamedTuple\nfrom sim.plugin import Experts, Now\n'
        'SOURCE = "a test"\nclass Params(NamedTuple):\n    """None."""\n'
        "def score(params: Params, experts: Experts, x: int, now: Now) -> float:\n"
        "    return float(experts.last_use[x])\n"
    )
    rule.write_text(text)
    package = __import__("sim.caches", fromlist=["__path__"])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry.plugins.cache_clear()
    try:
        from sim.spec import options

        run = options("on_demand:cache=zz_rule")
        before = compiled.source(run)
        rule.write_text(text.replace("experts.last_use[x]", "-experts.last_use[x]"))
        assert compiled.source(run) != before
    finally:
        registry.plugins.cache_clear()


def test_what_numba_cannot_compile_runs_in_simpy_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from sim import registry
    from sim.spec import options

    (tmp_path / "zz_slow.py").write_text(
        '"""A rule of a test."""\nimport json\nfrom typing import NamedTuple\nfrom sim.plugin import Experts, Now\n'
        'SOURCE = "a test"\nclass Params(NamedTuple):\n    """None."""\n'
        "def score(params: Params, experts: Experts, x: int, now: Now) -> float:\n"
        "    return float(json.loads(json.dumps(experts.last_use[x])))\n"
    )
    package = __import__("sim.caches", fromlist=["__path__"])
    monkeypatch.setattr(package, "__path__", [*package.__path__, str(tmp_path)])
    registry.plugins.cache_clear()
    try:
        setting = settings_of(("on_demand", "lru", "load"), 1)[0]
        odd = Setting(**{**vars(setting), "options": options("on_demand:cache=zz_slow")})
        found = Experiment(references=False, driver="compiled").run(odd)
    finally:
        registry.plugins.cache_clear()
    assert found["driver"] == "simpy"
    assert "numba cannot compile" in capsys.readouterr().err


SPECIALISED = [("next_layer", 0), ("speculative:lookahead=2,min_score=0.05", 1)]


def specialised_setting(policy: str, guard: int, seed: int) -> Setting:
    """A random setting of one shape, with the usual switches: what a driver of its own is compiled for."""
    draw = random.Random(seed)
    prefill = draw.choice([0, 3, 6])
    trace = random_trace(seed, sequences=3, length=12, prefill=prefill, layers=3, experts=6, top_k=2)
    keys = {
        "guard": guard,
        "landing_slots": draw.choice([1, 2, 5]),
        "stream_slots": draw.choice([1, 2, 3]),
        "chunk_bytes": draw.choice([0, -16, -3, 1000, 5000, 13824]),
    }
    text = policy + ("," if ":" in policy else ":") + ",".join(f"{key}={value}" for key, value in keys.items())
    machine = round_machine(
        cooling=draw.choice([(0.0, 0.0), (0.1, 9e-6)]),
        displaced=draw.choice([(0.0, 0.0), (7e-7, 3e-7)]),
        wake_s=draw.choice([0.0, 2e-7, 5e-6, 3e-5]),
    )
    return Setting(trace, machine, trace.model, 4, draw.randint(2, 6), options(text), draw.random() < 0.4)


@pytest.mark.parametrize(("policy", "guard"), SPECIALISED)
def test_a_specialised_driver_is_equal_too(policy: str, guard: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Long runs get a driver with their shape as literals; here short ones do, and the general driver is not used."""
    used: dict[str, None] = {}
    general = compiled.source
    monkeypatch.setattr(compiled, "SPECIALISED_FROM", 0)
    monkeypatch.setattr(
        compiled, "source", lambda run, fixed=None: used.setdefault(general(run, fixed)) or general(run, fixed)
    )
    for seed in range(40):
        setting = specialised_setting(policy, guard, seed)
        assert all_of(compiled_replay(setting)) == all_of(replay(setting)), setting.options.text
    assert len(used) == 1
    assert not any(general(options(policy)) == text for text in used)
