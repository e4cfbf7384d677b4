"""A sample of `tests/stress.py`, and that its check would notice."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

pytest.importorskip("torch", reason="the engine needs the runtime extra")

import stress

from runtime.copier import CopierError
from runtime.executor import Executor


def test_every_policy_computes_experts_on_their_own_bytes() -> None:
    """Two runs of each policy and preset under random delays."""
    draw = stress.cases(random.Random(5))
    with stress.Store() as store:
        for seed in range(2 * len(stress.POLICIES)):
            loads, computed = stress.run(next(draw), seed, 12, 2e-4, store)
            assert loads and computed


def test_the_check_sees_foreign_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    """If experts were computed without waiting for their bytes, the check would say so."""
    monkeypatch.setattr(Executor, "_next_arrived", lambda self, waiting: next(iter(waiting)))
    monkeypatch.setattr(Executor, "_take", lambda self, number: None)
    with stress.Store() as store, pytest.raises(AssertionError, match="foreign bytes"):
        stress.run("on_demand:chunk_bytes=0", 0, 12, 2e-4, store)


def test_a_load_that_never_comes_ends_with_who_waits_for_what(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("runtime.copier.Copier.apply", lambda self, *plan: None)
    with stress.Store() as store, pytest.raises(CopierError, match=r"layer 0, waits for expert \d \(load \d+\)"):
        stress.run("on_demand", 0, 12, 2e-4, store)


def test_the_record_says_what_ran() -> None:
    """The long run was made once, with every policy, and found nothing."""
    record = json.loads((Path(__file__).parent.parent / "notebooks/stress.json").read_text())
    assert record["loads"] >= 100_000 and record["foreign_bytes"] == record["deadlocks"] == 0
