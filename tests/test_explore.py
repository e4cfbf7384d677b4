"""Sweeps by function call: the records of sim.sweep, recall beside them, routing and a choice for a machine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from sim import explore, sweep
from sim.results import Store
from sim.settings import FitError
from sim.spec import SpecError
from traces import load, stats
from traces.format import shipped

FEW: dict[str, Any] = {"tokens": 12}
LADDER = str(shipped().with_name("demo-12x8-top2-ladder.safetensors"))


def test_the_records_are_those_of_sim_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = explore.sweep(["on_demand", "speculative"], {"slots": (2, 4)}, FEW, ["machine.link.h2d_gb_s=12.4"])
    assert capsys.readouterr() == ("", "")
    out = str(tmp_path / "results.jsonl")
    flags = "--policy on_demand --policy speculative --grid slots=2,4 --tokens 12 --driver simpy --jobs 1"
    sweep.run(sweep.parser().parse_args([*flags.split(), "--set", "machine.link.h2d_gb_s=12.4", "--out", out]))
    with Store(out) as store:
        assert {r["key"]: r for r in found} == store.known
    assert [(r["policy"], r["slots"]) for r in found] == [(p, n) for p in ("on_demand", "speculative") for n in (2, 4)]


def test_what_cannot_be_swept_is_one_sentence() -> None:
    with pytest.raises(SpecError, match="no policy"):
        explore.sweep([])
    with pytest.raises(FitError, match="need more than 1 GB"):
        explore.sweep(["on_demand"], {"slots": (2,)}, FEW, vram_gb=1)
    with pytest.raises(SpecError, match="does not fit t4"):
        explore.for_machine("t4", "mixtral-8x7b", ["on_demand"], str(shipped()), tokens=12, bits=[16])


def test_a_link_scales_in_all_its_rates() -> None:
    assert explore.link("rtx3090", None) == explore.link("rtx3090", 25.5) == []
    assert explore.link("rtx3090", 12.75) == [
        "machine.link.h2d_gb_s=12.75", "machine.link.d2h_gb_s=13", "machine.link.h2d_duplex_gb_s=9.3",
    ]  # fmt: skip
    with pytest.raises(SpecError, match="above 0"):
        explore.link("rtx3090", 0.0)


def test_routing_is_the_shipped_one_where_it_fits_and_synthetic_elsewhere(tmp_path: Path) -> None:
    assert explore.routing("mixtral-8x7b", tmp_path) == str(shipped()) and not list(tmp_path.iterdir())
    made = load(explore.routing("gpt-oss-20b", tmp_path, tokens=3))
    assert (made.routing, made.num_decode_tokens, made.model.num_experts, made.model.top_k) == ("SYNTHETIC", 3, 32, 4)
    with pytest.raises(SpecError):
        explore.routing("no-such-model", tmp_path)


def test_recalls_are_those_of_the_trace_and_of_what_plug_ins_guess() -> None:
    trace = load(shipped()).head(40)
    report = explore.recalls(explore.with_guesses(trace, ["previous_token", "oracle"]))
    assert set(report["recall"]) == {*trace.guesses, "previous_token", "oracle"} and report["tokens"] == 40
    table = np.array(report["recall"]["router"]["all"], float)
    np.testing.assert_allclose(table, stats.recall(trace, "router"), atol=1e-4)
    perfect = np.array(report["recall"]["oracle"]["all"], float)[:, :, 1]
    assert set(perfect[~np.isnan(perfect)]) == {1.0}
    repeats = np.array(report["recall"]["previous_token"]["all"], float)[0, :-1, 1]
    in_order = stats.repeat(trace).in_order[1:]
    np.testing.assert_allclose(repeats, in_order, atol=0.05)  # of 40 tokens, but for the first


def test_recall_stands_beside_each_run_with_guesses() -> None:
    policies = ["on_demand", *(f"speculative:predictor={p}" for p in ("aligned", "oracle"))]
    runs = explore.sweep(policies, fixed=FEW | {"trace": LADDER, "model": "mixtral-8x7b"})
    found = explore.with_recall(runs, LADDER)
    wanted = np.nanmean(stats.recall(load(LADDER).head(12), "aligned")[0, :, 1])
    assert [r["recall"] for r in found] == [None, pytest.approx(wanted), 1.0]
    assert all("recall" not in run for run in runs)
    with pytest.raises(SpecError, match="name its own trace"):
        explore.with_recall(runs, shipped())


def test_a_machine_gets_a_front_and_a_choice_that_fits() -> None:
    policies = ["on_demand", "speculative"]
    found = explore.for_machine("rtx3060-12gb", "mixtral-8x7b", policies, str(shipped()), 12.4, tokens=12, bits=[4, 2])
    assert len({r["key"] for r in found}) == len(found)
    assert {r["bits"] for r in found} == {2, 4} and max(r["scaled"]["vram_bytes"] for r in found) <= 12e9
    text, best = explore.recommendation(found), explore.chosen(found)
    assert f"{best['policy']}, {best['bits']} bits, {best['slots']} slots" in text.splitlines()[-1]
    with pytest.raises(SpecError, match="of 2 traces, machines or models"):
        explore.recommendation([*found, found[0] | {"machine_sha256": "another"}])
    with pytest.raises(SpecError, match="--best"):
        explore.recommendation(found, "prettiest")
