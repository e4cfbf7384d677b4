"""Misses are split between link and host so that both are done soonest."""

from __future__ import annotations

from typing import NamedTuple

from sim.plugin import Misses

SOURCE = "after FreeToken's split q = m * B_link / B_host, computed from times and with what the link has to do already"


class Params(NamedTuple):
    """No parameters."""


def loads(params: Params, misses: Misses) -> int:
    """The number of loads with the earliest end; the fewest of equals."""
    best = 0
    soonest = -1
    for number in range(misses.number + 1):
        link_ns = 0
        if number > 0:
            link_ns = misses.backlog_ns + (misses.loads + number) * misses.load_ns + misses.compute_ns
        host_ns = misses.host_shared_ns if misses.loads + number > 0 else misses.host_ns
        end_ns = max(link_ns, (misses.number - number) * host_ns)
        if soonest < 0 or end_ns < soonest:
            best, soonest = number, end_ns
    return best
