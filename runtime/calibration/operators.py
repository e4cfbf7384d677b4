"""Laws of a model's steps, fitted to engine runs, and their errors on runs that nothing was fitted to."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean as mean
from typing import TypeVar

from runtime.calibration.laws import error, fitted, grouped, law, predicted, residuals
from runtime.calibration.runs import HELD_OUT_WAIT_MS, POLICIES, Runs, Undisturbed
from runtime.calibration.steadiness import usual
from runtime.host_experts import computes_on_host
from runtime.observe import DenseSpan, Spans
from sim.machine import Operators
from sim.timing import of_policy

Errors = dict[str, float | None]
Cooling = tuple[float, float]  # share of a wait, at most so many seconds
Samples = list[tuple[tuple[int, ...], int]]
T = TypeVar("T")

LEAST_WAITED = 0.02  # of what loads take, that a visit must wait for waits to tell anything


def operators(runs: Runs) -> tuple[Operators, Errors]:
    """All laws of a model, and their held-out errors (MAPE) by operator; None where nothing was held out."""
    found = runs.undisturbed()
    laws, errors = _resident(runs, found)
    gates, of_gates = _gates(found)
    cooling, of_waits = _coolings(runs, found)
    laws = replace(laws, gates=gates, cooling=cooling, control_s=usual(runs.control.looks))
    host_s, displaced, of_planning = _planning(runs, found, laws)
    noise = residuals([((), h.ns) for s in found.policies["on_demand"] for h in s.host], (host_s["on_demand"],))
    laws = replace(laws, host_s=host_s, displaced=displaced, residuals=laws.residuals | {"host": noise})
    return laws, errors | of_waits | of_gates | of_planning


def _resident(runs: Runs, found: Undisturbed) -> tuple[Operators, Errors]:
    """Dense part, experts and head, with every expert in a slot."""
    errors: Errors = {}
    expert: dict[str, tuple[float, float]] = {}
    ratios: Samples = []
    for bits in runs.widths:
        one = fitted(_experts(found.resident[bits]))
        expert[str(bits)] = (one[0], one[1])
        errors[f"expert at {bits} bits"] = error(_experts(found.held_out[bits]), one)
        ratios += [((), round(ns / predicted(one, q))) for q, ns in _experts(found.resident[bits])]
    spans = [s for by_bits in found.resident.values() for s in by_bits]
    held = [s for by_bits in found.held_out.values() for s in by_bits]
    dense = fitted(_dense(spans))
    errors["dense part"] = error(_dense(held), dense)
    head = law((q, v, count**0.5) for q, v, count in _heads(spans, dense))
    wrong = [(abs(predicted(head, q) / v - 1), count) for q, v, count in _heads(held, dense)]
    errors["head"] = sum(e * count for e, count in wrong) / max(1, sum(count for _, count in wrong))
    laws = Operators(
        dense=(dense[0], dense[1], dense[2]),
        expert=expert,
        head=(head[0], head[1]),
        residuals={"dense": residuals(_dense(spans), dense), "expert": residuals(ratios, (1.0,))},
        reach={"tokens": max(d.tokens for s in spans for d in s.dense), "context": max(map(_context, spans))},
    )
    return laws, errors


def _gates(found: Undisturbed) -> tuple[tuple[float, ...], Errors]:
    """Lookahead gates by distance, without the routing's way to the host, which the dense part holds."""
    resident = next(iter(found.resident.values()))
    routing_s = mean(g.ns / 1e9 for s in resident for g in s.gates if g.tokens == 1)
    gates = tuple(max(0.0, mean(_looked(found.gates[d])) - routing_s) for d in sorted(found.gates))
    errors: Errors = {
        f"gates, {d} ahead": abs((gates[d - 1] + routing_s) / mean(_looked(of)) - 1)
        for d, of in found.gates_held_out.items()
    }
    return gates, errors


def _coolings(runs: Runs, found: Undisturbed) -> tuple[dict[str, Cooling], Errors]:
    """What waits cost, by kind of policy; empty where that was not measured, or nothing waited."""
    cooling: dict[str, Cooling] = {}
    errors: Errors = {}
    for policy in POLICIES:
        slowed = {ns: of for (text, ns), of in found.waits.items() if text == policy}
        waits = _cooling({0: found.policies[policy]} | slowed, runs.spec.top_k) if slowed else None
        errors[f"waits, {policy}"] = waits and waits[1]
        if waits:
            cooling[policy] = waits[0]
    return (_with_defaults(cooling) if len(cooling) == len(POLICIES) else cooling), errors


def _planning(
    runs: Runs, found: Undisturbed, laws: Operators
) -> tuple[dict[str, float], dict[str, tuple[float, float]], Errors]:
    """Planning by policy, and what it displaces by kind: beyond what ``laws`` say of dense part, gates and experts."""
    top_k, gates = runs.spec.top_k, laws.gates
    expert = laws.expert[str(runs.widths[0])]

    def beyond(text: str, of: Sequence[Spans]) -> tuple[float, float]:
        """How much longer than the laws say a visit's dense part takes, and an expert; seconds."""
        run = runs.policies[text]
        gates_s = gates[min(run.lookahead, len(gates)) - 1] if run.lookahead and gates else 0.0
        cooling = of_policy(laws.cooling, run) or (0.0, 0.0)
        return _beyond_dense(of, laws.dense, gates_s), _beyond_expert(of, expert, cooling)

    host_s = {text: mean(_host(of)) for text, of in found.policies.items()}
    displaced = _pooled({text: beyond(text, of) for text, of in found.policies.items()}, runs)
    visit_s = predicted(laws.dense, (1, runs.lengths[1])) + top_k * sum(expert)
    errors: Errors = {}
    for text, of in found.policies_held_out.items():
        dense_s, expert_s = displaced["prefetching" if runs.policies[text].prefetches else "default"]
        said = visit_s + host_s[text] + dense_s + top_k * expert_s
        dense_s, expert_s = beyond(text, of)
        errors[f"visit, {text}"] = abs(said / (visit_s + mean(_host(of)) + dense_s + top_k * expert_s) - 1)
    displaced = {kind: (max(0.0, dense_s), max(0.0, expert_s)) for kind, (dense_s, expert_s) in displaced.items()}
    return _with_defaults(host_s), displaced, errors


def spread(runs: Runs) -> float | None:
    """How far rounds differ in a visit with every expert resident: (largest - smallest) / mean; None for one."""
    rounds = [of for of in runs.rounds_resident() if of]
    if runs.rounds < 2 or len(rounds) < 2:
        return None
    visits = [_visit_s(of, runs.spec.top_k) for of in rounds]
    return (max(visits) - min(visits)) / mean(visits)


def wake_s(runs: Runs) -> float:
    """Seconds from the end of a load until the engine that waits for it goes on, less those for which the host goes on
    planning after the copier has a plan's demand loads; on_demand, means.
    """
    of = [s for (text, _), spans in runs.undisturbed().waits.items() if text == "on_demand" for s in spans]
    notice = [ns / 1e9 for s in of for ns in s.notice_ns]
    after = [h.after_ns / 1e9 for s in of for h in s.host if h.after_ns]
    return max(0.0, mean(notice) - mean(after)) if notice and after else 0.0


def serial_s(runs: Runs) -> float:
    """Seconds by which a visit's serial copies in one direction take longer than the link, beginning included; mean."""
    longer = []
    for load_ns, of in runs.undisturbed().serial.items():
        longer += [e.wait_ns % load_ns / 1e9 for s in of for e in s.expert if e.wait_ns >= load_ns]
    return mean(longer) if longer else 0.0


def _with_defaults(by_policy: dict[str, T]) -> dict[str, T]:
    """With ``default`` for policies that were not measured, and ``prefetching`` for those of them that look ahead."""
    return by_policy | {"default": by_policy["on_demand"], "prefetching": by_policy["speculative"]}


def _pooled(by_policy: dict[str, tuple[float, float]], runs: Runs) -> dict[str, tuple[float, float]]:
    """Means over the policies that look ahead, and over the others: single ones differ by less than their noise.

    Without those that compute on the host, whose threads take something from the device's.
    """
    found = {}
    for kind, prefetches in (("default", False), ("prefetching", True)):
        alike = [
            text for text, run in runs.policies.items() if run.prefetches == prefetches and not computes_on_host(run)
        ]
        dense, expert = zip(*(by_policy[text] for text in alike), strict=True)
        found[kind] = (mean(dense), mean(expert))
    return found


def _cooling(slowed: dict[int, list[Spans]], top_k: int) -> tuple[Cooling, float] | None:
    """How much longer a visit takes for the waits in it, and the error on a visit, waits not counted, where held out.

    Args:
        slowed: one policy's decode passes by ns that a load took (0: as good as none).

    Returns None where next to nothing waits.
    """
    visit = {ns: _visit_s(of, top_k) for ns, of in slowed.items()}
    waited = {ns: _waited_s(of) for ns, of in slowed.items()}
    held, longest = round(HELD_OUT_WAIT_MS * 1e6), max(slowed)
    fitted_to = [ns for ns in slowed if ns not in (0, held, longest)]
    longer_s = sum(visit[ns] - visit[0] for ns in fitted_to)
    waited_s = sum(waited[ns] - waited[0] for ns in fitted_to)
    times = _waits(slowed[longest])
    if waited_s < LEAST_WAITED * sum(fitted_to) / 1e9 or not times:
        return None
    share = min(1.0, max(0.0, longer_s / waited_s))
    most = max(0.0, (visit[longest] - visit[0]) / times)
    said = visit[0] + share * (waited[held] - waited[0])
    return (share, most), abs(said / visit[held] - 1)


def _waits(of: Sequence[Spans]) -> float:
    """Waits in a decode visit, mean."""
    return sum(e.wait_ns > 0 for s in of for e in s.expert) / max(1, len(_host(of)))


def _waited_s(of: Sequence[Spans]) -> float:
    """Seconds of waiting in a decode visit, mean."""
    return sum(e.wait_ns for s in of for e in s.expert) / 1e9 / max(1, len(_host(of)))


def _beyond_dense(of: Sequence[Spans], dense: Sequence[float], gates_s: float) -> float:
    return mean(
        ns / 1e9 - predicted(dense, (1, d.context + 1)) - gates_s * looks for d, looks, ns in _routed(of) if d.layer
    )


def _beyond_expert(of: Sequence[Spans], expert: tuple[float, float], cooling: Cooling) -> float:
    share, most = cooling
    longer = [e.ns / 1e9 - sum(expert) - min(most, share * e.wait_ns / 1e9) for s in of for e in s.expert]
    return mean(longer) if longer else 0.0


def _routed(of: Sequence[Spans]) -> Iterator[tuple[DenseSpan, bool, int]]:
    """Every visit's dense part, whether the planner looks ahead, and ns until the routing (and guesses) are known."""
    for s in of:
        for d, g in zip(s.dense, s.gates, strict=True):
            yield d, g.looks, d.ns + g.ns


def _experts(of: Sequence[Spans]) -> Samples:
    return [((e.tokens,), e.ns) for s in of for e in s.expert]


def _dense(of: Sequence[Spans]) -> Samples:
    """By tokens and context (in steps of 16); without the first layer, which follows the head."""
    return [((d.tokens, d.context // 16 * 16 + 8 + d.tokens), ns) for d, _, ns in _routed(of) if d.layer]


def _heads(of: Sequence[Spans], dense: Sequence[float]) -> list[tuple[tuple[int, ...], float, int]]:
    """Head by tokens, with what the first layer takes beyond the dense law: embedding, masks."""
    extra = [
        ((d.tokens,), ns - round(1e9 * predicted(dense, (d.tokens, d.context + d.tokens))))
        for d, _, ns in _routed(of)
        if not d.layer
    ]
    first = {q: seconds for q, seconds, _ in grouped(extra)}
    heads = grouped(((h.tokens,), h.ns) for s in of for h in s.head)
    return [(q, max(1e-9, seconds + first.get(q, 0.0)), count) for q, seconds, count in heads]


def _host(of: Sequence[Spans]) -> list[float]:
    return [h.ns / 1e9 for s in of for h in s.host]


def _looked(of: Sequence[Spans]) -> list[float]:
    return [g.ns / 1e9 for s in of for g in s.gates if g.looks]


def _context(spans: Spans) -> int:
    return max(d.tokens + d.context for d in spans.dense)


def _visit_s(of: Sequence[Spans], top_k: int) -> float:
    """A decode visit, waits not counted."""
    dense = [ns / 1e9 for d, _, ns in _routed(of) if d.layer]
    expert = [e.ns / 1e9 for s in of for e in s.expert]
    return mean(dense) + mean(_host(of)) + top_k * mean(expert)
