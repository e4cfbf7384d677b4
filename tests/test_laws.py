"""Laws fitted to durations, and what counts as undisturbed."""

from __future__ import annotations

import pytest

pytest.importorskip("torch", reason="needs the runtime extra")

from runtime.calibration import steadiness
from runtime.calibration.laws import error, fitted, law, predicted, residuals, trimmed_mean

SAMPLES = [((n, c), 1000 + 20 * n + 3 * c) for n in (1, 8, 64) for c in (0, 100, 500) for _ in range(3)]


def test_a_law_is_found_again() -> None:
    found = fitted(SAMPLES)
    assert found == pytest.approx((1e-6, 2e-8, 3e-9), rel=1e-6)
    assert predicted(found, (2, 50)) == pytest.approx(1.19e-6)
    assert error(SAMPLES, found) == pytest.approx(0, abs=1e-9)
    assert set(residuals(SAMPLES, found)) == {1.0}


def test_nothing_below_zero() -> None:
    """Durations that fall with the quantity: the slope is 0, not negative."""
    fixed, slope = law([((1.0,), 3e-6, 1.0), ((2.0,), 2e-6, 1.0), ((3.0,), 1e-6, 1.0)])
    assert slope == 0 and 1e-6 < fixed < 3e-6


def test_the_error_is_relative_and_counts_samples() -> None:
    """Three samples 10 % above the law, one on it; without samples there is no error."""
    assert error([((1,), 1100)] * 3 + [((2,), 1000)], (1e-6, 0.0)) == pytest.approx(0.75 * (1 - 1 / 1.1))
    assert error([], (1e-6,)) is None


def test_residuals_are_quantiles_of_measured_over_predicted() -> None:
    found = residuals([((), 900), ((), 1000), ((), 1100)], (1e-6,))
    assert found == tuple(sorted(found))
    assert found[0] == 0.9 and found[-1] <= 1.1


def test_the_largest_fiftieth_is_left_out() -> None:
    assert trimmed_mean([1.0] * 98 + [1000.0] * 2) == 1.0
    assert trimmed_mean([2.0]) == 2.0


def test_work_between_two_quick_looks_is_undisturbed() -> None:
    looks = [1.0, 1.02, 1.7, 1.0, 1.1, 1.0]
    assert steadiness.usual(looks) == 1.0
    assert steadiness.undisturbed(looks, 1.0) == [True, False, False, True, True]


def test_a_control_looks_whenever_it_is_asked() -> None:
    control = steadiness.Control()
    assert control.looks == []
    control.look()
    control.look()
    assert len(control.looks) == 2 and min(control.looks) > 0
