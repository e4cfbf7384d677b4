"""Forced routing: the engine loads what the simulator loads for the same trace, and every expert has its own bytes."""

from __future__ import annotations

import io
from dataclasses import replace
from functools import cache

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
pytest.importorskip("transformers", reason="the engine needs the runtime extra")
pytest.importorskip("hqq", reason="the engine needs the runtime extra")

from runtime import forced  # noqa: E402 (after the check above)
from runtime.devices import open_device  # noqa: E402
from runtime.forced import Checked, ForcedEngine, ForcedError, forced_trace, with_sweep  # noqa: E402
from runtime.quantize import ExpertLayout, views  # noqa: E402
from runtime.rows import ExpertRows  # noqa: E402
from sim.experiment import Setting, replay  # noqa: E402
from sim.machine import HardwareProfile, LinkProfile  # noqa: E402
from sim.spec import SpecError, comparable, options  # noqa: E402
from traces.presets import Statistics  # noqa: E402
from traces.synthesize import synthesize  # noqa: E402

MACHINE = HardwareProfile(
    "test", 1, 1, LinkProfile(0.2, 0.0, 0.2, 0.0, 0.2), memory_gb_s=8, tflops=0.05, layer_fixed_s=4e-4, host_s=1e-4
)
SHAPES = ("mixtral-toy", "gpt-oss-toy")
POLICIES = (
    "on_demand",
    "on_demand:cache=heat",
    "mixtral_offloading",
    "mixtral_offloading_copy_stream",
    "mixtral_offloading_paper",
    "speculative",
    "speculative:guard=0,trust=0",
    "speculative:landing_slots=0,guard=0,trust=0,lookahead=2",
)


@pytest.fixture(scope="module", params=SHAPES)
def engine(request):
    made = forced.dense(request.param, torch.device("cpu"), torch.float32)
    with ForcedEngine(made, 4, open_device("cpu"), compiled=False) as engine:
        yield engine


@cache
def synthetic(spec, tokens=10, layers=0):
    model = replace(spec, num_layers=layers or spec.num_layers)
    statistics = Statistics(distances=model.num_layers - 1, recall=(0.8,))
    return synthesize(model, statistics, tokens)


@pytest.mark.parametrize("policy", POLICIES)
def test_the_load_log_is_the_simulators_and_every_expert_has_its_own_bytes(engine, policy) -> None:
    """Routing and guesses forced from a trace: replaying that trace issues the same loads in the same order."""
    trace = forced_trace(synthetic(engine.spec), engine.spec, 10)
    run = options(policy)
    checked = []

    def check(experts, pool):
        checked.append(Checked(experts, pool, engine.store))
        return checked[0]

    slots = engine.spec.top_k + 1
    found = engine.run(trace, run, slots, MACHINE, first=2, wrap=check)
    log = io.StringIO()
    twin = replay(Setting(trace, MACHINE, engine.spec, 4, slots, run), log)
    assert found.log.splitlines() == log.getvalue().splitlines()
    assert checked[0].compared == twin.phases[1].accesses == 10 * engine.spec.num_layers * engine.spec.top_k
    assert found.counts.accesses == 8 * engine.spec.num_layers * engine.spec.top_k
    assert len(found.ledger.decode_ns) == 10


def test_a_slot_with_foreign_bytes_is_found(engine) -> None:
    trace = forced_trace(synthetic(engine.spec), engine.spec, 3)
    row = engine.store.row(0).clone()

    class Spoiled(Checked):
        def compute(self, layer, expert, slot, *where):
            self._pool.row(slot)[7] += 1
            return super().compute(layer, expert, slot, *where)

    with pytest.raises(ForcedError, match=r"slot \d+ does not hold the bytes of expert \d+ of layer 0"):
        engine.run(
            trace, options("on_demand"), engine.spec.top_k, MACHINE, wrap=lambda e, pool: Spoiled(e, pool, engine.store)
        )
    assert torch.equal(engine.store.row(0), row)


def test_no_two_rows_are_alike_and_none_overlap(engine) -> None:
    rows = engine.store.block
    assert len({row.numpy().tobytes() for row in rows}) == engine.store.count == rows.shape[0]
    places = [engine.store.row(i).data_ptr() for i in range(engine.store.count)]
    assert min(np.diff(places)) >= engine.store.expert_bytes


@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_random_experts_are_proper_ones(bits) -> None:
    """Codes in their range, scales finite, and weights about as large as those they stand for."""
    layout = ExpertLayout(128, 192, bits)
    with ExpertRows(3, layout.expert_bytes) as rows:
        forced.fill(rows, layout, seed=1)
        first = rows.row(0).clone()
        forced.fill(rows, layout, seed=1)
        assert torch.equal(rows.row(0), first)
        for index in range(3):
            expert = views(rows.row(index), layout)
            assert bool(expert.scale.isfinite().all()) and float(expert.scale.min()) > 0
            if bits == 3:
                assert int((expert.codes >> 30).abs().max()) == 0
            codes = expert.codes.view(torch.uint8).numpy()
            assert len(np.unique(codes)) > 60


def test_a_shallow_trace_is_laid_over_a_deep_model() -> None:
    """Layers of one copy are the source's, copies differ, and nothing is guessed across a seam."""
    made = forced.dense("mixtral-toy", torch.device("cpu"), torch.float32)
    source = synthetic(made.spec, tokens=40, layers=2)
    trace = forced_trace(source, made.spec, 12)
    assert trace.ids.shape == (12, 4, 2)
    assert trace.routing == "SYNTHETIC"
    assert np.array_equal(trace.ids[:, :2], source.ids[:12])
    assert np.array_equal(trace.ids[:, 2:], source.ids[20:32])
    table = trace.guesses[forced.GUESSES]
    assert np.array_equal(table.scores[:, 2, 0], source.guesses["synthetic"].scores[20:32, 0, 0])
    assert (table.scores[:, [1, 3]] == 0).all()
    recorded = forced_trace(replace(source, routing="RECORDED"), made.spec, 12)
    assert recorded.routing == "FORCED"


def test_perfect_guesses_are_the_routing() -> None:
    made = forced.dense("gpt-oss-toy", torch.device("cpu"), torch.float32)
    trace = forced_trace(synthetic(made.spec), made.spec, 10, forced.PERFECT)
    table = trace.guesses[forced.GUESSES]
    for layer in range(2):
        best = table.ids[:, layer, 0]
        assert np.array_equal(np.sort(best, -1), np.sort(trace.ids[:, layer + 1], -1))
        assert (table.scores[:, layer, 0] == 1).all()


def test_a_sweep_touches_every_expert() -> None:
    made = forced.dense("mixtral-toy", torch.device("cpu"), torch.float32)
    trace, count = with_sweep(forced_trace(synthetic(made.spec), made.spec, 5))
    assert count == 4 and trace.num_tokens == 9
    assert all(len(np.unique(trace.ids[:count, layer])) == 8 for layer in range(4))


def test_what_cannot_be_forced_is_refused(engine) -> None:
    trace = synthetic(engine.spec)
    with pytest.raises(ForcedError, match="10 decode tokens, 11 are wanted"):
        forced_trace(trace, engine.spec, 11)
    with pytest.raises(ForcedError, match="not of 'aligned'"):
        forced_trace(trace, engine.spec, 5, "aligned")
    with pytest.raises(ForcedError, match="16 bits have no codes"):
        forced.random_store(engine.spec, 16)
    with pytest.raises(ForcedError, match="shape 'gpt-9' is unknown"):
        forced.dense("gpt-9", torch.device("cpu"), torch.float32)
    short = forced_trace(trace, engine.spec, 5)
    with pytest.raises(ForcedError, match="5 of 5 decode tokens"):
        engine.run(short, options("on_demand"), 2, MACHINE, first=5)
    with pytest.raises(SpecError, match="belady needs the future"):
        engine.run(short, options("on_demand:cache=belady"), 2, MACHINE)


def test_compared_policies_share_their_slots(engine) -> None:
    """Cache and landing slots together are equal over the ladder, so its loads may be compared."""
    runs = comparable(["on_demand", "mixtral_offloading_paper", "speculative"])
    trace = forced_trace(synthetic(engine.spec), engine.spec, 6)
    for run in runs:
        log = io.StringIO()
        replay(Setting(trace, MACHINE, engine.spec, 4, 5, run), log)
        assert engine.run(trace, run, 5, MACHINE).log == log.getvalue()
