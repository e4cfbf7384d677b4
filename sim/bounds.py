"""What no schedule can beat: compute alone, and the fewest bytes any schedule must copy."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from heapq import heapify, heappop, heappush

import numpy as np
import numpy.typing as npt

from sim.machine import HardwareProfile
from sim.timing import Timing, copy_ns
from traces import PREFILL, Trace


def timed_passes(trace: Trace) -> list[bool]:
    """For every forward pass, whether it counts into TPOT: decode, but not a sequence's very first pass."""
    seen: set[int] = set()
    timed = []
    for forward in trace.passes():
        timed.append(forward.phase != PREFILL and forward.sequence in seen)
        seen.add(forward.sequence)
    return timed


def all_resident_ns(trace: Trace, timing: Timing) -> int:
    """Compute of all timed passes when every expert is on the device: no copies, no host, no lookahead gates."""
    timed = timed_passes(trace)
    layers = trace.model.num_layers
    total = 0
    visits = trace.visits()
    for forward, counts in zip(trace.passes(), timed, strict=True):
        for _ in range(layers):
            visit = next(visits)
            if counts:
                total += timing.dense_ns(visit.tokens, visit.context) + timing.shared_ns
                total += sum(timing.expert_ns(n) for n in visit.counts)
        if counts:
            total += timing.head_ns(forward.tokens)
    return total


def fewest_loads(trace: Trace, sizes: Sequence[int], landing_slots: int) -> int:
    """Loads within timed passes that no schedule avoids.

    The larger of two relaxations, each Belady with bypass from the best possible content at the start of every run of
    consecutive timed passes: every layer alone with its cache slots and all landing slots; and all slots as one pool.
    Keeping an expert from one use to the next occupies one place over that interval; dropping the interval that ends
    last whenever too many overlap keeps the most of them.
    """
    timed = timed_passes(trace)
    layers = trace.model.num_layers
    experts = trace.model.num_experts
    per_layer: list[list[list[list[int]]]] = [[] for _ in range(layers)]  # [layer][segment][visit][expert]
    pooled: list[list[list[int]]] = []
    visits = trace.visits()
    previous = False
    for counts in timed:
        if counts and not previous:
            pooled.append([])
            for segments in per_layer:
                segments.append([])
        for layer in range(layers):
            visit = next(visits)
            if counts:
                per_layer[layer][-1].append(visit.experts)
                pooled[-1].append([layer * experts + e for e in visit.experts])
        previous = counts
    alone = sum(
        _segment_loads(segment, sizes[layer] + landing_slots) for layer in range(layers) for segment in per_layer[layer]
    )
    if not landing_slots:
        return alone
    return max(alone, sum(_segment_loads(segment, sum(sizes) + landing_slots) for segment in pooled))


def _segment_loads(visits: list[list[int]], capacity: int) -> int:
    """Accesses less the most that can be kept by ``capacity`` places from the best initial content."""
    end_of: list[dict[int, int]] = []
    upcoming: dict[int, int] = {}
    for index in range(len(visits) - 1, -1, -1):
        end_of.append({e: upcoming[e] for e in visits[index] if e in upcoming})
        for expert in visits[index]:
            upcoming[expert] = index
    end_of.reverse()
    first_uses = sorted((index, expert) for expert, index in upcoming.items())[:capacity]
    kept = {expert: index for index, expert in first_uses}
    latest = [(-index, expert) for index, expert in first_uses]
    heapify(latest)
    loads = 0
    for index, experts in enumerate(visits):
        for expert in experts:
            if kept.pop(expert, None) is None:
                loads += 1
        for expert, end in end_of[index].items():
            kept[expert] = end
            heappush(latest, (-end, expert))
        while len(kept) > capacity:
            negative, expert = heappop(latest)
            if kept.get(expert) == -negative:
                del kept[expert]
    return loads


def link_floor_ns(loads: int, machine: HardwareProfile, expert_bytes: int) -> int:
    """Time the link needs for ``loads`` experts with the fastest chunking: one copy each."""
    return loads * copy_ns(expert_bytes, machine.link.h2d_gb_s, machine.link.h2d_fixed_s)


def next_use_tables(trace: Trace) -> list[npt.NDArray[np.int64]]:
    """For every layer, int64 [visits + 1, experts]: the first visit of that layer, from this one on, routing it."""
    model = trace.model
    experts: list[list[list[int]]] = [[] for _ in range(model.num_layers)]
    for visit in trace.visits():
        experts[visit.layer].append(visit.experts)
    return [_next_use(visits, model.num_experts) for visits in experts]


def _next_use(visits: Sequence[Iterable[int]], num_experts: int) -> npt.NDArray[np.int64]:
    never = 1 << 40
    table = np.full((len(visits) + 1, num_experts), never, np.int64)
    for index in range(len(visits) - 1, -1, -1):
        table[index] = table[index + 1]
        table[index, list(visits[index])] = index
    return table
