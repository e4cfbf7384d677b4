"""What no schedule can beat: compute alone, and the fewest bytes any schedule must copy."""

from __future__ import annotations

from collections.abc import Sequence
from heapq import heapify, heappop, heappush

from sim.machine import HardwareProfile
from sim.timing import Timing, copy_ns
from traces import Trace


def timed_passes(trace: Trace) -> list[int]:
    """For every forward pass, how many of its tokens count into TPOT: decode, but not a sequence's very first pass."""
    return [forward.following for forward in trace.passes()]


def all_resident_ns(trace: Trace, timing: Timing) -> int:
    """Compute of all timed passes when every expert is on the device: no copies, no host, no lookahead gates.

    A pass counts once for each of its tokens that counts into TPOT.
    """
    timed = timed_passes(trace)
    layers = trace.model.num_layers
    total = 0
    visits = trace.visits()
    for forward, counts in zip(trace.passes(), timed, strict=True):
        for _ in range(layers):
            visit = next(visits)
            if counts:
                total += counts * (timing.dense_ns(visit.tokens, visit.context) + timing.shared_ns)
                total += counts * sum(timing.undisturbed_expert_ns(n) for n in visit.counts)
        if counts:
            total += counts * timing.head_ns(forward.tokens)
    return total


def fewest_loads(trace: Trace, sizes: Sequence[int], landing_slots: int) -> int:
    """Loads within timed passes that no schedule avoids.

    The larger of two relaxations, each Belady with bypass from the best possible content at the start of every run of
    consecutive timed passes: every layer alone with its cache slots and all landing slots; and all slots as one pool.
    Where all layers share one pool (one size), the second alone.
    Keeping an expert from one use to the next occupies one place over that interval; dropping the interval that ends
    last whenever too many overlap keeps the most of them.
    """
    timed = timed_passes(trace)
    layers = trace.model.num_layers
    experts = trace.model.num_experts
    per_layer: list[list[list[list[int]]]] = [[] for _ in range(layers)]  # [layer][segment][visit][expert]
    pooled: list[list[list[int]]] = []
    visits = trace.visits()
    previous = 0
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
    together = sum(_segment_loads(segment, sum(sizes) + landing_slots) for segment in pooled)
    if len(sizes) < layers:
        return together
    alone = sum(
        _segment_loads(segment, sizes[layer] + landing_slots) for layer in range(layers) for segment in per_layer[layer]
    )
    return max(alone, together) if landing_slots else alone


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


def with_host_ns(trace: Trace, timing: Timing, resident_ns: int, link_ns: int, loads: int) -> tuple[int, int]:
    """Both floors when the host may compute experts: (compute, link), each at the best split between the two.

    The host takes the work that is cheapest for it compared with the device, or with the link, at that rate throughout.
    """
    most = max((forward.tokens for forward in trace.passes() if forward.following), default=1)
    rates = [timing.undisturbed_expert_ns(n) / max(1, timing.host_expert_ns(n)) for n in range(1, most + 1)]
    quickest_ns = min(timing.host_expert_ns(n) for n in range(1, most + 1))
    compute_ns = int(resident_ns / (1 + max(rates)))
    if not loads or not quickest_ns:
        return compute_ns, 0
    return compute_ns, int(loads / (loads / link_ns + 1 / quickest_ns)) if link_ns else 0


def link_floor_ns(loads: int, machine: HardwareProfile, expert_bytes: int) -> int:
    """Time the link needs for ``loads`` experts with the fastest chunking: one copy each."""
    return loads * copy_ns(expert_bytes, machine.link.h2d_gb_s, machine.link.h2d_fixed_s)


def next_uses(trace: Trace) -> tuple[list[int], list[int]]:
    """The future: the first visit that routes each x = layer * experts + expert, and for every access of the replay, in
    order, the next visit that routes that expert; 1 << 40 for never."""
    never = 1 << 40
    experts = trace.model.num_experts
    upcoming = [never] * (trace.model.num_layers * experts)
    following: list[int] = []
    for visit in reversed(list(trace.visits())):
        base = visit.layer * experts
        for expert in reversed(visit.experts):
            following.append(upcoming[base + expert])
            upcoming[base + expert] = visit.index
    following.reverse()
    return upcoming, following
