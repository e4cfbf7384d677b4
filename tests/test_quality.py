"""Which widths, group sizes and ways of quantizing ``runtime.bench --quality`` measures."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from runtime.quality import cells
from traces import ModelSpec

SPEC = ModelSpec("demo", 12, 8, 2, 192, 256)


def test_16_bits_stand_once_and_sizes_that_do_not_fit_are_left_out():
    assert cells(SPEC, [16, 4], [128, 64, 32], fast=True) == [
        (16, 64, True),
        (4, 64, True),
        (4, 64, False),
        (4, 32, True),
        (4, 32, False),
    ]
    with pytest.raises(ValueError, match=r"no group size of \[128\] fits 3 bits of demo; these do: 64, 32, 16, 8"):
        cells(SPEC, [3], [128], fast=False)
