"""Load an expert when it is routed and not resident; never earlier."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "the baseline every system has; copies on their own stream, nothing is written back"


class Params(NamedTuple):
    """No parameters."""
