"""Experts on the host: what the kernels compute, one thread beside two others, and what it costs."""

from __future__ import annotations

import gc
import gzip
import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="the engine needs the runtime extra")

from tiny import tiny_mixtral  # noqa: E402

from runtime import executor as executing  # noqa: E402 (after the check above)
from runtime import models, offload  # noqa: E402
from runtime.calibration.host import HostFigures, host_figures, silu_product  # noqa: E402
from runtime.copier import CopierError  # noqa: E402
from runtime.devices import open_device  # noqa: E402
from runtime.engine import Engine  # noqa: E402
from runtime.generate import main  # noqa: E402
from runtime.host_experts import HostExperts, HostThread  # noqa: E402
from runtime.quantize import ExpertLayout, forward, pack, views  # noqa: E402
from runtime.repack import ORDERS, Order  # noqa: E402
from runtime.rows import ExpertRows  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from sim.machine import HardwareProfile, LinkProfile, Operators  # noqa: E402
from sim.spec import SpecError, options  # noqa: E402
from sim.timing import Timing  # noqa: E402
from traces import ModelSpec  # noqa: E402

MACHINE = HardwareProfile(
    "test", 1, 1, LinkProfile(0.05, 0.0, 0.05, 0.0, 0.05), memory_gb_s=8, tflops=0.05, host_memory_gb_s=0.1
)
PROMPT = [5, 17, 3, 99, 42, 7, 250, 11]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(model_dir: Path) -> Iterator[HostStore]:
    with HostStore.build(model_dir, models.spec_of(model_dir), 4, optimize=False, progress=False) as built:
        yield built


def engine(model_dir: Path, store: HostStore, policy: str, machine: HardwareProfile = MACHINE) -> Engine:
    return Engine(model_dir, bits=4, slots=2, options=options(policy), machine=machine, store=store)


@pytest.fixture(scope="module")
def machine_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A profile by which a split divides misses, however fast this machine is."""
    path = tmp_path_factory.mktemp("machine") / "test.json"
    path.write_text(json.dumps(MACHINE.to_json()))
    return path


def packed(
    hidden: int, inner: int, bits: int, group: int, biases: bool, order: Order
) -> tuple[ExpertLayout, torch.Tensor]:
    generator = torch.Generator().manual_seed(bits)
    count = 2 * inner + hidden if biases else 0
    layout = ExpertLayout(hidden, inner, bits, group, count, order)
    shapes = ((inner, hidden), (inner, hidden), (hidden, inner))
    gate, up, down = (torch.randn(shape, generator=generator) * 0.1 for shape in shapes)
    row = torch.randn(count, generator=generator) if biases else None
    return layout, pack(gate, up, down, layout, optimize=False, biases=row)


@pytest.mark.parametrize(
    ("bits", "order"), [(16, "hqq"), (8, "hqq"), *((bits, order) for bits in (4, 3, 2) for order in ORDERS)]
)
@pytest.mark.parametrize(
    ("hidden", "inner", "group", "biases"),
    [(64, 128, 64, False), (96, 160, 32, True), (256, 128, 128, False), (352, 416, 32, False)],
)
@pytest.mark.parametrize("threads", [1, 3])
def test_weights_are_multiplied_as_they_stand(bits, hidden, inner, group, biases, order, threads) -> None:
    """Every width in both orders of codes, words whose values end in the middle of an output row, biases, rows shared
    by threads. Row by row: fewer groups a row than values a word, as many, and more with a rest.
    """
    pytest.importorskip("numba", reason="compiled products need the fast extra")
    layout, buffer = packed(hidden, inner, bits, group, biases, order)
    torch.set_num_threads(threads)
    with ExpertRows(2, layout.expert_bytes) as rows:
        rows.row(1).copy_(buffer)
        with closing(HostExperts(rows, 2, [layout], silu_product, torch.float32, exact=False)) as experts:
            for tokens in (1, 2, 9):
                x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(tokens))
                ours = experts.compute(0, 1, x).float()
                expected = forward(views(buffer, layout), x, silu_product)
                error = float((ours - expected).norm() / expected.norm())
                assert error < (0.02 if bits == 16 else 1e-5)  # experts of 16 bits are multiplied in bfloat16


def test_float16_is_read_bit_by_bit() -> None:
    """Every finite float16, subnormal ones included."""
    pytest.importorskip("numba", reason="compiled products need the fast extra")
    from runtime.host_kernels import _float

    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.float16)
    halves = halves[halves.isfinite()][::7]
    bits = halves.view(torch.int16).numpy().view("uint16")
    assert [float(_float(b)) for b in bits] == halves.double().tolist()


def test_outputs_on_another_path_differ_by_rounding_only(model_dir, store, monkeypatch) -> None:
    """The engine with the products a GPU's host uses: same text's worth of logits within float32 rounding."""
    logits = []
    for exact in (True, False):
        monkeypatch.setattr(executing, "HostExperts", lambda *args, exact=exact: HostExperts(*args[:-1], exact))
        with engine(model_dir, store, "on_demand:miss=cpu") as one:
            seen: list[torch.Tensor] = []
            one.model.register_forward_hook(lambda module, inputs, out, seen=seen: seen.append(out.logits[0]))
            for _ in one.generate([t % 250 for t in PROMPT], 6):
                pass
            assert one.ledger.phases[1].host_computed > 0
        logits.append(torch.cat(seen))
    assert float((logits[0] - logits[1]).abs().max()) <= 1e-4 * float(logits[0].abs().max())


def test_a_split_loads_some_and_computes_some(model_dir, store) -> None:
    """Both happen in one run, and together they are the misses."""
    with engine(model_dir, store, "on_demand:miss=split") as one:
        for _ in one.generate([t % 250 for t in PROMPT], 24):
            pass
        decode = one.finish().phases[1]
    assert decode.host_computed and decode.demand_loads
    assert decode.host_computed + decode.demand_loads == decode.misses
    assert decode.host_busy_ns > 0


class Slow:
    """Experts that take their time, and some that fail."""

    def __init__(self, failing: int = -1) -> None:
        self.failing = failing
        self.computed: list[int] = []
        self.go = threading.Event()

    def compute(self, layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
        self.go.wait(30)
        if expert == self.failing:
            raise RuntimeError("no such thing")
        self.computed.append(expert)
        return x * expert

    def close(self) -> None:
        self.go.set()


def test_the_thread_computes_in_order_and_tells_which_tokens() -> None:
    slow = Slow()
    with closing(HostThread(slow)) as thread:
        hidden = torch.arange(6.0).view(3, 2)
        thread.begin(0, [2, 1], hidden, [[1, 2], [2, 0], [0, 1]])
        hidden.zero_()  # inputs were taken before
        assert not thread.done()
        slow.go.set()
        (first, outputs), (second, _) = thread.take(30), thread.take(30)
        assert thread.done() and slow.computed == [2, 1]
        assert (first.expert, first.rows.tolist(), first.ranks.tolist()) == (2, [0, 1], [1, 0])
        assert (second.expert, second.rows.tolist(), second.ranks.tolist()) == (1, [0, 2], [0, 1])
        assert outputs.outputs.tolist() == [[0, 2], [4, 6]]
        assert outputs.begin_ns <= outputs.end_ns <= time.monotonic_ns()


def test_what_has_not_begun_is_dropped() -> None:
    slow = Slow()
    with closing(HostThread(slow)) as thread:
        thread.begin(0, [0, 1, 2], torch.ones(1, 2), [[0, 1, 2]])
        threading.Timer(0.05, slow.go.set).start()
        thread.drop()
        assert thread.done() and slow.computed in ([0], [])
        thread.begin(0, [3], torch.ones(1, 2), [[3]])
        assert thread.take(30)[0].expert == 3


def test_a_host_that_hangs_ends_the_wait() -> None:
    with closing(HostThread(Slow())) as thread:
        thread.begin(0, [5], torch.ones(1, 2), [[5]])
        with pytest.raises(CopierError, match=r"the host did not compute expert 5 within 0\.01 s"):
            thread.take(0.01)
        thread.experts.close()


@pytest.mark.parametrize(
    "policy", ["on_demand:miss=cpu", "speculative:miss=split,guard=0", "on_demand:miss=cpu,copy_stream=0"]
)
def test_an_error_on_the_host_is_one_error_and_the_engine_goes_on(model_dir, store, policy) -> None:
    """It surfaces where the expert's outputs are waited for; the next pass starts with empty slots, and is right."""
    prompt = [t % 250 for t in PROMPT]
    with engine(model_dir, store, policy) as one:
        expected = list(one.generate(prompt, 8))
    with engine(model_dir, store, policy) as one:
        assert one.host is not None
        compute, calls = one.host.experts.compute, []

        def fails(layer: int, expert: int, x: torch.Tensor) -> torch.Tensor:
            calls.append(expert)
            if len(calls) == 4:
                raise RuntimeError("no such thing")
            return compute(layer, expert, x)

        one.host.experts.compute = fails
        with pytest.raises(RuntimeError, match="no such thing") as raised:
            list(one.generate(prompt, 8))
        assert raised.value.__notes__ == [f"while the host computed expert {calls[3]}"]
        assert list(one.generate(prompt, 8)) == expected


def test_an_interrupted_pass_leaves_nothing_on_the_host(model_dir, store) -> None:
    """Ctrl-C between plan and outputs: jobs are dropped, the next text is right, and closing does not hang."""
    prompt = [t % 250 for t in PROMPT]
    with engine(model_dir, store, "on_demand:miss=cpu") as one:
        expected = list(one.generate(prompt, 8))

        def interrupted(*_: object) -> None:
            raise KeyboardInterrupt

        usual = one.experts.compute
        one.experts.compute = interrupted
        for _ in range(2):
            with pytest.raises(KeyboardInterrupt):
                list(one.generate(prompt, 8))
        one.experts.compute = usual
        assert list(one.generate(prompt, 8)) == expected
    assert not any(thread.name.startswith("host") for thread in threading.enumerate())


def test_batches_on_the_host(model_dir, machine_file) -> None:
    """Several sequences with a KV cache, prefill and decode, padded: as with every expert resident."""
    ids = torch.tensor([[5, 17, 3, 99], [8, 8, 1, 200], [0, 0, 31, 7]])
    texts = []
    for policy, slots in (("on_demand", 6), ("on_demand:miss=cpu", 2), ("speculative:miss=split", 2)):
        model = offload(
            model_dir, policy=policy, slots=slots, optimize=False, progress=False, link_gb_s=0.05,
            machine=str(machine_file),
        )  # fmt: skip
        mask = (ids != 0).long()
        texts.append(model.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0))
        counts = model.offload_stats()
        assert (counts["host_computed"] + counts["prefill"]["host_computed"] > 0) == ("miss" in policy)
        model.offload_close()
    assert torch.equal(texts[0], texts[1]) and torch.equal(texts[0], texts[2])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["on_demand:miss=cpu", "speculative:miss=split"])
def test_on_cuda_the_host_computes_the_same_within_rounding(model_dir, policy) -> None:
    """Logits of a prefill and of a decode step beside those with every expert resident."""
    ids, logits = torch.tensor([PROMPT]).cuda() % 250, []
    for run, slots in (("on_demand", 6), (policy, 2)):
        model = offload(model_dir, policy=run, slots=slots, device="cuda", optimize=False, progress=False)
        with torch.inference_mode():
            first = model(ids, use_cache=True)
            then = model(ids[:, :1], past_key_values=first.past_key_values, use_cache=True)
        logits.append(torch.cat([first.logits, then.logits], 1).float())
        model.offload_close()
    assert float((logits[0] - logits[1]).norm()) <= 0.03 * float(logits[0].norm())


def test_a_profile_without_the_host_is_refused_in_a_sentence(model_dir, store) -> None:
    bare = replace(MACHINE, host_memory_gb_s=0.0)
    with pytest.raises(SpecError, match=r"miss=cpu computes experts on the host, but .* calibrate this machine"):
        engine(model_dir, store, "on_demand:miss=cpu", machine=bare)


def test_figures_go_into_a_profile_and_come_out_again(store) -> None:
    """The law is exact for one token; the slowdown beside the link comes out of the profile's bandwidths."""
    figures = HostFigures({4: {1: 2e-4, 2: 2.2e-4, 4: 2.6e-4}, 2: {1: 1e-4}}, 5e-5, 1.25, 0.05, 0.04, 1)
    laws = figures.laws()
    assert laws["4"] == pytest.approx((1.8e-4, 2e-5)) and laws["2"] == (1e-4, 0.0)
    bare = replace(MACHINE, host_memory_gb_s=0.0)
    known = replace(
        bare, operators={store.spec.name: Operators((1e-4, 0, 0), {"4": (1e-4, 0), "2": (1e-4, 0)}, (1e-4, 0))}
    )
    for profile in (bare, known):
        timing = Timing(figures.into(profile, store.spec), store.spec, 4, options("on_demand:miss=split"))
        alone, shared = timing.host_expert_ns(1), timing.host_expert_ns(1, shared=True)
        assert alone == pytest.approx(200_000 if profile is known else 250_000, rel=1e-3)
        assert shared - alone == pytest.approx(0.25 * 200_000, rel=1e-3)
        assert timing.chunks.full_host_ns == pytest.approx(timing.chunks.full_ns / 0.8, rel=1e-3)


def test_the_figures_are_measured(store) -> None:
    """Every width and number of tokens, and the link beside it; no claim about how fast."""
    figures = host_figures({4: store}, open_device("cpu"), link=LinkProfile(0.05, 0, 0.05, 0, 0.05), seconds=0.05)
    assert list(figures.seconds) == [4] and list(figures.seconds[4]) == [1, 2, 4, 16]
    assert all(s > 0 for s in figures.seconds[4].values())
    assert figures.slowdown >= 1 and figures.handover_s > 0
    assert figures.link_gb_s > 0 and figures.link_beside_gb_s > 0
    profile = figures.into(MACHINE, store.spec)
    assert Timing(profile, store.spec, 4, options("on_demand:miss=split")).has_host
    assert all(profile.sources[key] for key in ("host_memory_gb_s", "host_tflops", "link.h2d_host_gb_s"))


def test_the_command_says_what_was_computed_where(model_dir, machine_file, capsys, monkeypatch, tmp_path) -> None:
    """With the default machine the host is measured first; the timeline has its track."""
    words = ["--model", str(model_dir), "--fast", "--tokens", "12", "--slots", "2", "--prompt", "def add("]
    texts = []
    stated = ["--machine", str(machine_file)]
    for policy, machine in (("on_demand", []), ("speculative:miss=split", stated), ("on_demand:miss=cpu", [])):
        timeline = tmp_path / f"{len(texts)}.json.gz"
        more = ["--policy", policy, "--link-gb-s", "0.05", "--timeline", str(timeline), *machine]
        monkeypatch.setattr(sys, "argv", ["runtime.generate", *words, *more])
        assert main() == 0
        found = capsys.readouterr()
        document = json.loads(found.out.splitlines()[-1])
        texts.append(document["text"])
        hosted = document["host_computed"]
        said = f"{hosted} of {document['accesses']} experts computed on the host"
        assert (said in found.out) == ("miss" in policy) and bool(hosted) == ("miss" in policy)
        assert ("on this host an expert takes" in found.err) == ("miss" in policy and not machine)
        assert document["tpot_s"] >= document["bounds"]["joint_floor_s"]
        with gzip.open(timeline, "rt") as file:
            tracks = {e["args"]["name"] for e in json.load(file)["traceEvents"] if e.get("name") == "thread_name"}
        assert ("host" in tracks) == ("miss" in policy)
    assert texts[0] == texts[1] == texts[2]


def test_a_forgotten_model_leaves_no_thread(model_dir) -> None:
    """As with the copier's process: nobody has to close."""
    model = offload(model_dir, policy="on_demand:miss=cpu", slots=2, optimize=False, progress=False)
    model.generate(torch.tensor([[5, 6]]), max_new_tokens=4, do_sample=False, pad_token_id=0)
    assert any(thread.name.startswith("host") for thread in threading.enumerate())
    del model
    gc.collect()
    assert not any(thread.name.startswith("host") for thread in threading.enumerate())


def test_a_model_shape_gives_the_law_of_its_own_experts(store) -> None:
    """The rate at which an expert was read times other widths too."""
    figures = HostFigures({4: {1: 2e-4}}, 0.0, 1.0, 0.0, 0.0, 1)
    profile = figures.into(replace(MACHINE, host_memory_gb_s=0.0), store.spec)
    other: ModelSpec = store.spec
    times = [Timing(profile, other, b, options("on_demand:miss=cpu")).host_expert_ns(1) for b in (4, 8)]
    assert times[0] == pytest.approx(200_000, rel=1e-6)
    assert times[1] / times[0] == pytest.approx(other.expert_bytes(8) / other.expert_bytes(4), rel=1e-4)
