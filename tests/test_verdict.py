"""What a validation concludes from its cells."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the runtime extra")

from runtime import verdict


def cell(policy: str, measured: float, simulated: float, spread: float = 0.01, **other: Any) -> dict[str, Any]:
    """A cell as a validation stores it, TPOT in ms."""
    return {
        "policy": policy,
        "bits": 4,
        "slots": 4,
        "link_gb_s": 0.1,
        "regime": "link",
        "decisions": 100,
        "load_log_equal": True,
        "repeat_spread": spread,
        "undisturbed": {"passes": 9, "of": 10, "share": 0.9},
        "tpot_error": simulated / measured - 1,
        "measured": {"tpot_s": measured / 1e3, "stall_s": 0.0},
        "simulated": {"tpot_s": simulated / 1e3, "stall_s": 0.0, "link_busy": 0.8, "compute_busy": 0.5},
    } | other


def test_good_cells_pass_every_gate() -> None:
    found = verdict.judge([cell("a", 10, 10.2), cell("b", 12, 12.1), cell("c", 15, 14.8)])
    assert found["median_abs_tpot_error"] == pytest.approx(0.0133, abs=1e-4)
    assert found["kendall_tau"] == 1 and found["regret"] == 0
    assert all(found["gates"].values())
    assert verdict.locked(found["gates"]) == []
    assert found["scope"] == {
        "cells": 3,
        "decisions": 300,
        "policies": 3,
        "link_bound": 3,
        "near_balance": 3,
        "policy_matters": 3,
    }


@pytest.mark.parametrize(
    ("cells", "gate"),
    [
        ([cell("a", 10, 10, load_log_equal=False)], "load_logs"),
        ([cell("a", 10, 10.4), cell("b", 10, 9.6), cell("c", 10, 10)], "median_error"),
        ([cell("a", 10, 10.6), cell("b", 10, 10), cell("c", 10, 10)], "worst_error"),
        ([cell("a", 10, 10.5), cell("b", 10.5, 10.1)], "order"),
        ([cell("a", 10, 10.3), cell("b", 10.5, 10.2)], "choice"),
        ([cell("a", 10, 10, undisturbed={"passes": 6, "of": 10, "share": 0.4})], "quiet"),
    ],
)
def test_each_gate_fails_alone_and_locks_its_claim(cells: list[dict[str, Any]], gate: str) -> None:
    gates = verdict.judge(cells)["gates"]
    assert not gates[gate]
    assert verdict.CLAIMS[gate] in verdict.locked(gates)


def test_an_error_within_twice_the_spread_passes() -> None:
    assert verdict.judge([cell("a", 10, 10.6, spread=0.04), *(cell(p, 10, 10) for p in "bc")])["gates"]["worst_error"]


def test_differences_within_the_spread_are_ties_on_both_sides() -> None:
    """a and b are told apart by neither side; the order of the rest is right."""
    assert verdict.kendall_tau_b([10, 10.1, 20], [10.1, 10, 21], [0.02] * 3) == 1


def test_a_choice_within_the_spread_passes() -> None:
    """The simulator takes b, which is 5 % slower; where repeats differ by 6 % nobody can tell. The figure stays."""
    cells = [cell("a", 10, 10.2), cell("b", 10.5, 10.1)]
    assert not verdict.judge(cells)["gates"]["choice"]
    found = verdict.judge([c | {"repeat_spread": 0.06} for c in cells])
    assert found["regret"] == pytest.approx(0.05) and found["gates"]["choice"]


def test_one_policy_proves_nothing_about_order_and_choice() -> None:
    found = verdict.judge([cell("a", 10, 10)])
    assert found["gates"]["order"] is None and found["gates"]["choice"] is None
    assert verdict.locked(found["gates"]) == []
    assert "tau" not in verdict.table(found | {"cells": [cell("a", 10, 10, repeats=2)]}, ("a",))


def test_passes_count_where_nothing_disturbed_them() -> None:
    """Three passes, two repeats: the second was disturbed once, the third always."""
    means, spread = verdict.steady([[10, 20, 90], [30, 22, 80]], [[True, True, False], [False, True, False]])
    assert means == [10, 21, None]
    assert spread == pytest.approx(22 / 21 - 20 / 21)
    measured, simulated = verdict.over_passes({"tpot_s": 1.0}, {"tpot_s": 2.0}, means, [12, 20, 99])
    assert measured == {"tpot_s": 15.5e-9, "tokens_per_s": 1 / 15.5e-9, "tpot_all_s": 1.0}
    assert simulated["tpot_s"] == 16e-9 and simulated["tpot_all_s"] == 2.0


def test_where_everything_was_disturbed_everything_counts() -> None:
    assert verdict.steady([[10, 20], [12, 24]], [[False] * 2] * 2)[0] == [11, 22]
