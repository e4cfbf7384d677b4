"""A guarded policy is never worse than on_demand with the same slots: a sample of the recorded thousand settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from never_worse import compare

RECORDED = Path(__file__).parent.parent / "notebooks" / "never_worse.json"


@pytest.mark.parametrize("seed", range(0, 1000, 10))
def test_never_worse(seed: int) -> None:
    """At most 1 % above on_demand, plus one chunk for every change of the predictor's quality."""
    found = compare(seed)
    assert found["over"] == 0, found


def test_the_recorded_run_has_a_thousand_settings_and_none_is_worse() -> None:
    recorded = json.loads(RECORDED.read_text())
    assert recorded["settings"] == 1000
    assert recorded["over_the_limit"] == []
    assert recorded["ratio"]["worst"] <= 1.011
