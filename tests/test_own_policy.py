"""A policy is one file: put beside the others, it is in the help, the table, and under the contract tests."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import random_trace, round_machine

from sim import policies, registry, run
from sim.experiment import Experiment, Setting
from sim.spec import options

MINE = '''"""Prefetch the likeliest guess for the next layer, and no other."""

from typing import NamedTuple

from sim.plugin import Guess, LinkView

SOURCE = "a test"
OPTIONS = {"landing_slots": 2}


class Params(NamedTuple):
    """``lookahead``: layers ahead."""

    lookahead: int = 1


def worth(params: Params, guess: Guess, link: LinkView) -> float:
    """The score of the first guess."""
    return guess.score if guess.rank == 0 else 0.0
'''


@pytest.fixture
def mine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    (tmp_path / "zz_mine.py").write_text(MINE)
    monkeypatch.setattr(policies, "__path__", [*policies.__path__, str(tmp_path)])
    registry.plugins.cache_clear()
    yield "zz_mine"
    registry.plugins.cache_clear()


def test_it_is_in_the_help_and_in_the_table(mine: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert f"{mine}: Prefetch the likeliest guess" in run.parser().format_help()
    args = run.parser().parse_args(["--tokens", "20", "--policy", mine, "--policy", "on_demand"])
    document = run.run(args)
    assert [r["policy"] for r in document["runs"]] == [mine, "on_demand"]
    assert f"\n{mine} " in capsys.readouterr().out
    json.dumps(document)


def test_it_stands_under_the_contract(mine: str) -> None:
    assert mine in registry.plugins("policy")
    trace = random_trace(3)
    setting = Setting(trace, round_machine(), trace.model, 4, 3, options(mine))
    found = Experiment().run(setting)
    assert found["hits"] + found["late"] + found["misses"] == found["accesses"]
    assert found["prefetch_loads"] > 0
