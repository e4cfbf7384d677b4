"""Laws that were planted into spans are found again: dense part, experts, gates, planning, what it displaces, waits."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("torch", reason="needs the runtime extra")

from runtime.calibration.operators import operators, serial_s, spread, wake_s
from runtime.calibration.runs import HELD_OUT_WAIT_MS, WAITS_MS, Undisturbed
from runtime.observe import DenseSpan, ExpertSpan, GatesSpan, HostSpan, Span, Spans
from sim.spec import options

LAYERS, TOP_K = 3, 2
DENSE_NS, TOKEN_NS, CONTEXT_NS = 300_000, 2_000, 50
EXPERT_NS, EXPERT_TOKEN_NS = 100_000, 5_000
ROUTING_NS, HEAD_NS, FIRST_NS = 10_000, 400_000, 100_000  # the first layer's part holds embedding and masks too
GATES_NS = {1: 80_000, 2: 90_000, 3: 100_000, 4: 110_000}
HOST_NS = {"on_demand": 50_000, "speculative": 90_000}
LONGER_NS = {"on_demand": (12_000, 1_000), "speculative": (30_000, 8_000)}  # dense part, each expert
COOLING = {"on_demand": 0.1, "speculative": 0.15}
MOST_NS = 600_000
NOTICE_NS, AFTER_NS, SERIAL_NS = 40_000, 15_000, 70_000


def one_pass(
    tokens: int,
    context: int,
    host_ns: int,
    *,
    longer: tuple[int, int] = (0, 0),
    gates_ns: int | None = None,
    waits_ns: Sequence[int] = (),
    cooling: float = 0.0,
    sends: bool = False,
) -> Spans:
    """A pass in which every step takes what the planted laws say; ``waits_ns`` come before a visit's first expert, in
    turn, and make it longer."""
    spans = Spans()
    for layer in range(LAYERS):
        dense = DENSE_NS - ROUTING_NS + TOKEN_NS * tokens + CONTEXT_NS * (context + tokens) + longer[0]
        spans.dense.append(DenseSpan(layer, tokens, context, dense + FIRST_NS * (layer == 0)))
        spans.gates.append(GatesSpan(tokens, gates_ns is not None, ROUTING_NS + (gates_ns or 0)))
        spans.host.append(HostSpan(tokens, AFTER_NS if sends else 0, host_ns))
        for k in range(TOP_K):
            wait_ns = waits_ns[layer % len(waits_ns)] if waits_ns and k == 0 else 0
            cooled = min(MOST_NS, round(cooling * wait_ns))
            spans.expert.append(ExpertSpan(tokens, wait_ns, EXPERT_NS + EXPERT_TOKEN_NS * tokens + longer[1] + cooled))
            if wait_ns:
                spans.notice_ns.append(NOTICE_NS)
    spans.head.append(Span(tokens, HEAD_NS))
    return spans


def decoded(length: int, decode: int, host_ns: int, **planted: Any) -> list[Spans]:
    """Decode passes after a prompt of ``length`` tokens."""
    return [one_pass(1, length + i, host_ns, **planted) for i in range(decode)]


def run_of(length: int, decode: int, host_ns: int) -> list[Spans]:
    """The same with every expert in a slot, prefill included."""
    return [one_pass(length, 0, host_ns), *decoded(length, decode, host_ns)]


def planted() -> SimpleNamespace:
    """What `Runs` would have measured on a machine that obeys the laws above."""
    resident = [s for length in (8, 60, 200) for s in run_of(length, 40, 30_000)]
    policies, held, waits = {}, {}, {}
    for text, host_ns in HOST_NS.items():
        common = {"longer": LONGER_NS[text], "gates_ns": GATES_NS[3] if text == "speculative" else None, "sends": True}
        policies[text] = decoded(24, 20, host_ns, **common)
        held[text] = decoded(40, 10, host_ns, **common)
        for ms in (*WAITS_MS, HELD_OUT_WAIT_MS):
            slowed = {"waits_ns": [round(0.9e6 * ms)], "cooling": COOLING[text]}
            waits[text, round(ms * 1e6)] = decoded(24, 10, host_ns, **common, **slowed)
    found = Undisturbed(
        resident={4: resident},
        held_out={4: run_of(24, 10, 30_000)},
        waits=waits,
        policies=policies,
        policies_held_out=held,
        serial={400_000: decoded(24, 10, 30_000, waits_ns=[400_000 + SERIAL_NS, 800_000 + SERIAL_NS, 0])},
        gates={d: decoded(24, 10, 60_000, gates_ns=ns) for d, ns in GATES_NS.items()},
        gates_held_out={d: decoded(40, 10, 60_000, gates_ns=ns) for d, ns in GATES_NS.items()},
    )
    return SimpleNamespace(
        undisturbed=lambda: found,
        rounds_resident=lambda: iter([decoded(8, 5, 30_000), decoded(8, 5, 30_000 + 24_000)]),
        rounds=2,
        widths=[4],
        lengths=(8, 60, 200),
        spec=SimpleNamespace(top_k=TOP_K),
        policies={text: options(text) for text in HOST_NS},
        control=SimpleNamespace(looks=[3e-4] * 9),
    )


def test_planted_laws_are_found_again() -> None:
    laws, errors = operators(planted())  # type: ignore[arg-type]
    assert laws.expert["4"] == pytest.approx((EXPERT_NS / 1e9, EXPERT_TOKEN_NS / 1e9), rel=1e-6)
    assert laws.dense == pytest.approx((DENSE_NS / 1e9, TOKEN_NS / 1e9, CONTEXT_NS / 1e9), rel=5e-3)
    assert sum(laws.head) == pytest.approx((HEAD_NS + FIRST_NS) / 1e9, rel=1e-2)
    assert laws.gates == pytest.approx([ns / 1e9 for ns in GATES_NS.values()])
    assert laws.reach == {"tokens": 200, "context": 240}
    assert max(e for e in errors.values() if e is not None) < 0.01


def test_planning_and_what_it_displaces_are_told_apart_from_the_laws() -> None:
    laws, _ = operators(planted())  # type: ignore[arg-type]
    for kind, text in (("default", "on_demand"), ("prefetching", "speculative")):
        assert laws.host_s[kind] == laws.host_s[text] == pytest.approx(HOST_NS[text] / 1e9)
        dense_s, expert_s = LONGER_NS[text]
        assert laws.displaced[kind] == pytest.approx((dense_s / 1e9, expert_s / 1e9), abs=1e-6)


def test_what_a_wait_costs_is_a_share_of_it_up_to_a_limit() -> None:
    laws, _ = operators(planted())  # type: ignore[arg-type]
    for kind, text in (("default", "on_demand"), ("prefetching", "speculative")):
        share, most_s = laws.cooling[kind]
        assert share == pytest.approx(COOLING[text], rel=1e-2)
        assert most_s == pytest.approx(MOST_NS / 1e9, rel=1e-2)


def test_arrivals_and_serial_copies_are_known_late() -> None:
    runs: Any = planted()
    assert wake_s(runs) == pytest.approx((NOTICE_NS - AFTER_NS) / 1e9)
    assert serial_s(runs) == pytest.approx(SERIAL_NS / 1e9)


def test_rounds_are_compared_by_whole_visits() -> None:
    """The second round's planning takes 24 us longer."""
    visit_s = (DENSE_NS + TOKEN_NS + TOP_K * (EXPERT_NS + EXPERT_TOKEN_NS) + 30_000 + 12_000) / 1e9
    assert spread(planted()) == pytest.approx(24e-6 / visit_s, rel=0.02)  # type: ignore[arg-type]


def test_nothing_waits_where_nothing_was_measured() -> None:
    """On a device whose waits are not measured, their terms are 0 and say no error."""
    runs: Any = planted()
    found = runs.undisturbed()._replace(waits={}, serial={})
    runs.undisturbed = lambda: found
    laws, errors = operators(runs)
    assert laws.cooling == {}
    assert errors["waits, on_demand"] is None
    assert wake_s(runs) == serial_s(runs) == 0.0


def test_waits_that_do_not_grow_tell_nothing() -> None:
    """A link that makes nobody wait: no share, and no error, rather than one of a thousand per cent."""
    runs: Any = planted()
    same = {key: decoded(24, 10, HOST_NS[key[0]], waits_ns=[10_000]) for key in runs.undisturbed().waits}
    found = runs.undisturbed()._replace(waits=same)
    runs.undisturbed = lambda: found
    laws, errors = operators(runs)
    assert laws.cooling == {} and errors["waits, speculative"] is None


def test_a_policy_that_computes_on_the_host_slows_no_other_down() -> None:
    runs: Any = planted()
    plain, _ = operators(runs)
    text = "on_demand:miss=cpu"
    runs.policies[text] = options(text)
    found = runs.undisturbed()
    slow = decoded(24, 10, 60_000, longer=(1_000_000, 1_000_000))
    found.policies[text], found.policies_held_out[text] = slow, slow
    laws, _ = operators(runs)
    assert laws.displaced == plain.displaced
    assert laws.host_s[text] == pytest.approx(60e-6)
