"""Every miss is loaded to the device."""

from __future__ import annotations

from typing import NamedTuple

SOURCE = "Mixtral-offloading (Eliseev and Mazur 2023) and most others"


class Params(NamedTuple):
    """No parameters."""
