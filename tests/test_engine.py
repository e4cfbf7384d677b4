"""The engine computes what the model computes, whatever is resident; and it loads what the simulator loads."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Iterator
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="the engine needs the runtime extra")

from tiny import tiny_mixtral  # noqa: E402

from runtime import models  # noqa: E402 (after the check above)
from runtime.engine import Engine  # noqa: E402
from runtime.executor import check_options  # noqa: E402
from runtime.prompts import BUILT_IN  # noqa: E402
from runtime.quantize import dequantize, views  # noqa: E402
from runtime.record import UNPACED, record  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from sim import registry  # noqa: E402
from sim.experiment import Setting, replay  # noqa: E402
from sim.ledger import LoadLog  # noqa: E402
from sim.machine import HardwareProfile, LinkProfile  # noqa: E402
from sim.presets import PRESETS  # noqa: E402
from sim.spec import SpecError, options  # noqa: E402

PROMPT = [5, 17, 3, 99, 42, 7, 250, 11]
MACHINE = HardwareProfile(
    "test", 1, 1, LinkProfile(0.05, 0.0, 0.05, 0.0, 0.05), memory_gb_s=8, tflops=0.05, layer_fixed_s=4e-4, host_s=1e-4,
    host_memory_gb_s=0.1,
)  # fmt: skip
ON_HOST = [
    "on_demand:miss=cpu",
    "on_demand:miss=split",
    "on_demand:miss=cpu,copy_stream=0",
    "speculative:miss=cpu,guard=0,trust=0",
    "speculative:miss=split,cache=heat",
    "speculative:miss=split,guard=0,trust=0,landing_slots=1,stale=keep",
    "on_demand:miss=split,cache=sequence_heat",
]


def runs_here(policy: str) -> bool:
    try:
        check_options(options(policy))
    except SpecError:
        return False
    return True


POLICIES = [name for name in (*registry.plugins("policy"), *PRESETS) if runs_here(name)]
VARIANTS = [
    *POLICIES,
    "speculative:landing_slots=0",
    "speculative:landing_slots=1,stale=keep",
    "speculative:landing_slots=0,stale=keep,lookahead=2",
    "speculative:chunk_bytes=0,max_submitted=1,lookahead=1",
    "speculative:copy_stream=0",
    "speculative:guard=0,trust=0",
    "confidence:cache=global_lru",
    "on_demand:cache=sequence_heat",
    *ON_HOST,
]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(model_dir: Path) -> Iterator[HostStore]:
    with HostStore.build(model_dir, models.spec_of(model_dir), 4, progress=False) as built:
        yield built


def generate(model_dir: Path, store: HostStore, policy: str, slots: int, tokens: int = 12):
    """Tokens, logits of every pass [passes][T, V], the load log, and the trace of a greedy run."""
    seen: list[torch.Tensor] = []
    log = io.StringIO()
    with Engine(
        model_dir, bits=4, slots=slots, options=options(policy), machine=MACHINE, store=store, record=4
    ) as engine:
        engine.ledger.log = LoadLog(log)
        engine.model.register_forward_hook(lambda module, inputs, out: seen.append(out.logits[0].clone()))
        tokens_out = list(engine.generate([t % 250 for t in PROMPT], tokens))
        tokens_out += list(engine.generate([9, 8, 7], tokens))
        ledger = engine.finish()
        trace = engine.recorder.trace({}, "router")
    return tokens_out, seen, log.getvalue(), trace, ledger


@pytest.fixture(scope="module")
def resident(model_dir: Path, store: HostStore):
    return generate(model_dir, store, "on_demand", 6)


@pytest.mark.parametrize("policy", VARIANTS)
@pytest.mark.parametrize("slots", [2, 4])
def test_offloading_never_changes_a_bit(model_dir, store, resident, policy, slots) -> None:
    """Logits of prefill and decode are bit-equal to those with every expert resident."""
    tokens, logits, *_ = generate(model_dir, store, policy, slots)
    assert tokens == resident[0]
    assert all(torch.equal(a, b) for a, b in zip(logits, resident[1], strict=True))


def test_logits_are_the_models_own(model_dir, store, resident) -> None:
    """Against transformers' own experts holding the same quantized weights: float32 rounding only."""
    model, _ = models.load(model_dir)
    for layer, found in enumerate(models.moe_blocks(model)):
        for expert in range(6):
            gate, up, down = dequantize(views(store.row(layer * 6 + expert), store.layout))
            with torch.no_grad():
                found.block.experts.gate_up_proj[expert] = torch.cat([gate, up])
                found.block.experts.down_proj[expert] = down
    tokens = [t % 250 for t in PROMPT] + resident[0][:11]
    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([tokens])).logits[0]
    ours = torch.cat(resident[1][:12])
    assert float((ours - reference).abs().max()) <= 1e-5 * max(1.0, float(reference.abs().max()))


@pytest.mark.parametrize("policy", VARIANTS)
@pytest.mark.parametrize("slots", [2, 3])
def test_load_log_equals_the_simulators(model_dir, store, policy, slots) -> None:
    """The simulator, replaying the engine's routing and guesses, issues the same loads in the same order."""
    _, _, log, trace, ledger = generate(model_dir, store, policy, slots)
    chosen = dataclasses.replace(options(policy), predictor="router")
    simulated = io.StringIO()
    twin = replay(Setting(trace, MACHINE, trace.model, 4, slots, chosen), simulated)
    assert log.splitlines() == simulated.getvalue().splitlines()
    for mine, theirs in zip(ledger.phases, twin.phases, strict=True):
        assert mine.hits + mine.late + mine.misses == mine.accesses == theirs.accesses
        assert (mine.misses, mine.host_computed, mine.prefetch_loads, mine.prefetch_used, mine.retracted) == (
            theirs.misses,
            theirs.host_computed,
            theirs.prefetch_loads,
            theirs.prefetch_used,
            theirs.retracted,
        )
        if "copy_stream=0" in policy:
            assert (mine.late, mine.hits) == (0, theirs.hits)


def test_serial_copies_are_stalls_not_latency(model_dir, store) -> None:
    """Without a copy stream every copy stands in ``stall_miss``, and every prefetch that is used is a hit."""
    *_, ledger = generate(model_dir, store, "mixtral_offloading", 2)
    decode = ledger.phases[1]
    assert decode.stall_miss_ns >= decode.demand_loads * store.expert_bytes / 0.05
    assert decode.latency_ns < decode.stall_miss_ns


@pytest.mark.parametrize(
    "policy", ["on_demand", "speculative", "mixtral_offloading", "on_demand:miss=cpu,copy_stream=0", ON_HOST[1]]
)
def test_every_nanosecond_is_accounted_for(model_dir, store, policy) -> None:
    """Compute, planning and stalls fill the passes without a gap."""
    *_, ledger = generate(model_dir, store, policy, 3)
    for counts in ledger.phases:
        parts = counts.compute_ns + counts.latency_ns + counts.stall_miss_ns + counts.stall_late_ns
        assert parts == counts.elapsed_ns


def test_a_foreign_predictor_is_refused(model_dir, store) -> None:
    with pytest.raises(SpecError, match="predictor 'mine' does not run on the engine"):
        Engine(model_dir, bits=4, slots=2, options=options("speculative:predictor=mine"), machine=MACHINE, store=store)


def test_the_future_is_refused(model_dir, store) -> None:
    with pytest.raises(SpecError, match="belady needs the future"):
        Engine(model_dir, bits=4, slots=2, options=options("on_demand:cache=belady"), machine=MACHINE, store=store)


def test_recording_keeps_routing_weights_logits_and_guesses(model_dir) -> None:
    """A recorded trace says what the routers said, for prefill and decode."""
    trace = record(model_dir, list(BUILT_IN[:2]), 6, temperature=0.0)
    assert trace.num_decode_tokens == 12
    assert trace.domains == ("code", "proposal")
    assert trace.logits is not None
    best = trace.logits.astype("float32").argmax(-1)
    assert (best == trace.ids[..., 0]).mean() > 0.99  # float16 may tie two logits
    assert float(abs(trace.weights.astype("float32").sum(-1) - 1).max()) < 2e-3
    table = trace.guesses["router"]
    assert table.ids.shape == (trace.num_tokens, 5, 4, 4)
    assert (table.scores[:, 4] == 0).all()
    assert UNPACED.link.h2d_gb_s > 1
