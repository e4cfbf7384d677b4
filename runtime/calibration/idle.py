"""Whether others use this machine's processor while something is measured."""

from __future__ import annotations

import os
import time
from pathlib import Path

BUSY_SHARE = 0.1  # of the cores, used by others, above which nothing is measured, or the profile is labelled
LOOK_S = 1.0  # how long others are watched beforehand


class OtherWork:
    """Share of all cores that other processes used since it was made; None where the system does not tell."""

    def __init__(self) -> None:
        self._start = self._read()

    @staticmethod
    def _read() -> tuple[float, float, float] | None:
        try:
            fields = [int(x) for x in Path("/proc/stat").read_text().split("\n")[0].split()[1:9]]
        except (OSError, ValueError):
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        busy = (sum(fields) - fields[3] - fields[4]) / ticks
        own = os.times()
        return busy, own.user + own.system + own.children_user + own.children_system, time.monotonic()

    def share(self) -> float | None:
        """Ask when our own children have ended; those that still run count as others."""
        end = self._read()
        if self._start is None or end is None:
            return None
        wall = (end[2] - self._start[2]) * (os.cpu_count() or 1)
        return max(0.0, (end[0] - self._start[0]) - (end[1] - self._start[1])) / wall


def check_idle(allow_busy: bool = False) -> None:
    """Watch for a second what others do.

    Raises:
        ValueError: they use more than `BUSY_SHARE` of the processor, and that is not allowed.
    """
    others = OtherWork()
    time.sleep(LOOK_S)
    share = others.share()
    if share is not None and share > BUSY_SHARE and not allow_busy:
        raise ValueError(
            f"other processes use {share:.0%} of the processor; at most {BUSY_SHARE:.0%} is allowed: end them, or "
            "take a profile labelled as of a busy machine with --allow-busy"
        )
