"""Text for training and held-out evaluation: any files, cut into blocks of which every 32nd is held out."""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

BLOCK_BYTES = 65_536
HELD_OUT_EVERY = 32


@dataclass(frozen=True)
class Domain:
    """One text file (or group of files): its training and held-out bytes, block by block.

    Attributes:
        name: short label, from the file name.
        train: blocks of at most ``BLOCK_BYTES`` bytes used for training.
        held_out: every ``HELD_OUT_EVERY``-th block, never trained on.
    """

    name: str
    train: tuple[bytes, ...]
    held_out: tuple[bytes, ...]


def split(name: str, data: bytes) -> Domain:
    """Cut ``data`` into blocks ending at a line end; hold out blocks 31, 63, ... (the last one of a short text)."""
    blocks = []
    start = 0
    while start < len(data):
        end = min(start + BLOCK_BYTES, len(data))
        newline = data.rfind(b"\n", start, end)
        if end < len(data) and newline > start:
            end = newline + 1
        blocks.append(data[start:end])
        start = end
    held = {i for i in range(len(blocks)) if i % HELD_OUT_EVERY == HELD_OUT_EVERY - 1} or {len(blocks) - 1}
    return Domain(
        name,
        tuple(b for i, b in enumerate(blocks) if i not in held),
        tuple(b for i, b in enumerate(blocks) if i in held),
    )


def standard_library() -> Domain:
    """The source text of this machine's own Python standard library: a corpus that is always there."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files = sorted(p for p in root.rglob("*.py") if "site-packages" not in p.parts and "test" not in p.parts)
    return split("stdlib", b"\n".join(p.read_bytes() for p in files))


def load(paths: Iterable[Path]) -> list[Domain]:
    """One domain per file in ``paths``; the standard library's source when there are none.

    Raises:
        ValueError: a file is missing, empty, or shorter than two blocks.
    """
    domains = []
    for path in paths:
        if not path.is_file():
            raise ValueError(f"corpus file {path} not found; name existing text files with --corpus")
        domain = split(path.stem.split(".")[0], path.read_bytes())
        if not domain.train:
            raise ValueError(f"corpus file {path} is shorter than two blocks of {BLOCK_BYTES} bytes; use a longer text")
        domains.append(domain)
    return domains or [standard_library()]
