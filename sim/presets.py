"""Named systems: each a policy with its options, as anybody could write it on the command line."""

from __future__ import annotations

from typing import NamedTuple


class Preset(NamedTuple):
    """``spec`` is the string the name stands for; ``source`` says what it describes and where that was read."""

    spec: str
    source: str


PRESETS = {
    "mixtral_offloading": Preset(
        "on_demand:cache=lru,write_back=1,copy_stream=0,chunk_bytes=0",
        "as released (dvmazur/mixtral-offloading @ ce545188): per-layer LRU, every victim copied "
        "back to the host, both copies on the compute stream, no speculative loading",
    ),
}
