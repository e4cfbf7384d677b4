"""Load every expert of a layer at each visit, compute, and keep nothing.

There is room for one layer's experts; no copy runs beside compute.
"""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "the `naive` row of Mixtral-offloading's table (Eliseev and Mazur 2023): offloading as for a dense model"
OPTIONS = {"copy_stream": False, "chunk_bytes": 0}
WHOLE_LAYER = True


class Params(NamedTuple):
    """No parameters."""
