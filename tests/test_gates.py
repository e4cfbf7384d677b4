"""The ladder of lookahead gates: what each rung says, its file, and that it leaves the model alone."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="the engine needs the runtime extra")

from safetensors.torch import save_file  # noqa: E402 (after the check above)
from small_models import config, small_model  # noqa: E402

from runtime import corpus, gates, models, provenance, train  # noqa: E402 (after the check above)
from runtime.engine import Engine  # noqa: E402
from runtime.gates import GateError, GateFile  # noqa: E402
from runtime.lookahead import GATES_FILE, LADDER, RouterGates, gates_for, ranked  # noqa: E402
from runtime.prompts import BUILT_IN  # noqa: E402
from runtime.record import UNPACED, record  # noqa: E402
from runtime.store import HostStore  # noqa: E402
from sim.experiment import Setting, replay  # noqa: E402
from sim.ledger import LoadLog  # noqa: E402
from sim.spec import options  # noqa: E402

LAYERS, EXPERTS, HIDDEN = 4, 6, 64


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small random Mixtral whose norms differ from layer to layer."""
    out = tmp_path_factory.mktemp("gated")
    torch.manual_seed(5)
    torch.set_num_threads(1)
    text = ("def add(a, b):\n    return a + b\n\nThe quick brown fox. " * 400).encode()
    tokenizer = train.train_tokenizer([corpus.split("text", text)], 300)
    shape = train.config(tokenizer.get_vocab_size(), LAYERS, HIDDEN, ffn=64, experts=EXPERTS, top_k=2)
    shape.initializer_range = 0.2
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    for layer in model.model.layers:
        torch.nn.init.uniform_(layer.post_attention_layernorm.weight, 0.5, 1.5)
    train.save_model(model, tokenizer, out)
    return out


@pytest.fixture(scope="module")
def model(model_dir: Path):
    return models.load(model_dir)[0]


def gate_file(model, seed: int = 1, lookahead: int = 3) -> GateFile:
    """Heads of random numbers for every trained rung."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(LAYERS - 1):
        distances = min(lookahead, LAYERS - 1 - layer)
        shapes |= {
            f"router_mean.{layer}.bias": (distances, EXPERTS),
            f"aligned.{layer}.weight": (distances, EXPERTS, HIDDEN),
            f"aligned.{layer}.bias": (distances, EXPERTS),
            f"mlp.{layer}.down": (5, HIDDEN),
            f"mlp.{layer}.bias": (5,),
            f"mlp.{layer}.up": (distances * EXPERTS, 5),
            f"context.{layer}.weight": (distances, EXPERTS, HIDDEN),
            f"context.{layer}.before": (distances, EXPERTS, HIDDEN),
            f"context.{layer}.bias": (distances, EXPERTS),
            f"context.{layer}.up": (distances * EXPERTS, 5),
        }
    tensors = {n: 0.3 * torch.randn(s, generator=generator) for n, s in shapes.items()}
    tensors |= {f"spread.{layer}": 0.5 + torch.rand(HIDDEN, generator=generator) for layer in range(LAYERS)}
    tensors = gates.unpack(gates.pack(tensors))
    temperature = [[0.5 + d for d in range(min(lookahead, LAYERS - 1 - layer))] for layer in range(LAYERS - 1)]
    header = {
        "format": gates.FORMAT,
        "model": "tiny",
        "routers_sha256": gates.routers_sha256(gates.routers_of(model)),
        "lookahead": lookahead,
        "temperature": {"aligned": temperature},
    }
    return GateFile(tensors, header)


@pytest.mark.parametrize("rung", LADDER)
def test_scores_are_probabilities_of_every_later_layer(model, rung) -> None:
    """float16 [T, D, E] in 0..1 that sum to top_k, D cut at the last layer; far heads do not change near ones."""
    hidden = torch.randn(7, HIDDEN, generator=torch.Generator().manual_seed(0))
    made = gates.ladder(model, 2, 3, gate_file(model), [rung])[rung]
    near = gates.ladder(model, 2, 1, gate_file(model), [rung])[rung]
    for layer in range(LAYERS):
        scores = made.scores(layer, hidden)
        assert scores.dtype == np.float16
        assert scores.shape == (7, min(3, LAYERS - 1 - layer), EXPERTS)
        assert ((scores >= 0) & (scores <= 1)).all()
        assert np.abs(scores.astype(float).sum(-1) - 2).max(initial=0) < 0.01
        assert np.allclose(near.scores(layer, hidden), scores[:, :1], atol=2e-3)


def test_the_untrained_rungs_are_the_models_own_weights(model) -> None:
    """router_norm on layer l's input is the next router on the same direction under its own norm."""
    routers, norms = gates.routers_of(model), gates.norms_of(model)
    assert not torch.equal(norms[0], norms[1])
    direction = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(0))
    rungs = gates.ladder(model, 2, 2, None, ["router", "router_norm"])
    exact = RouterGates(routers, 2, 2).scores(1, direction * norms[3])[:, 1]
    found = rungs["router_norm"].scores(1, direction * norms[1])[:, 1]
    assert np.allclose(found, exact, atol=2e-3)
    assert np.array_equal(rungs["router"].scores(0, direction), RouterGates(routers, 2, 2).scores(0, direction))


def test_trained_rungs_by_hand(model) -> None:
    """aligned is (W x + b) / temperature, mlp adds up @ silu(down @ x + bias), router_mean a bias."""
    file = gate_file(model)
    tensors = {n: t.float() for n, t in file.tensors.items()}
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(2))
    rungs = gates.ladder(model, 2, 3, file, LADDER)
    linear = torch.einsum("deh,th->tde", tensors["aligned.0.weight"], x) + tensors["aligned.0.bias"]
    inner = torch.nn.functional.silu(x @ tensors["mlp.0.down"].T + tensors["mlp.0.bias"])
    more = (inner @ tensors["mlp.0.up"].T).view(1, 3, EXPERTS)
    assert torch.allclose(rungs["aligned"].logits(0, x), linear / torch.tensor([0.5, 1.5, 2.5])[:, None], atol=1e-4)
    assert torch.allclose(rungs["mlp"].logits(0, x), linear + more, atol=1e-4)
    moved = rungs["router_norm"].logits(0, x) + tensors["router_mean.0.bias"]
    assert torch.allclose(rungs["router_mean"].logits(0, x), moved, atol=1e-4)


def test_a_file_comes_back_as_it_was(model, tmp_path) -> None:
    file = gate_file(model)
    gates.save(file, tmp_path / "g.safetensors")
    found = gates.load(tmp_path / "g.safetensors")
    assert found.header == json.loads(json.dumps(file.header))
    assert found.rungs() == tuple(LADDER)
    assert all(torch.equal(found.tensors[n], t) for n, t in file.tensors.items())
    assert [p.name for p in tmp_path.iterdir()] == ["g.safetensors"]


def other_model(file: GateFile) -> GateFile:
    return dataclasses.replace(file, header=file.header | {"routers_sha256": "0" * 64})


@pytest.mark.parametrize(
    ("change", "lookahead", "message"),
    [
        (other_model, 2, "trained for the routers of 'tiny'"),
        (lambda f: dataclasses.replace(f, header=f.header | {"format": 3}), 2, "format 3; this version reads format 2"),
        (lambda f: dataclasses.replace(f, header={}), 2, "no gates in its header"),
        (lambda f: dataclasses.replace(f, header=f.header | {"lookahead": 1}), 2, "look 1 layers ahead, 2 are asked"),
        (lambda f: dataclasses.replace(f, tensors={"mlp.0.up": f.tensors["mlp.0.up"]}), 2, "not 'aligned'"),
        (lambda f: dataclasses.replace(f, tensors={n: t for n, t in f.tensors.items() if n != "aligned.1.bias"}), 2,
         "lack the tensor 'aligned.1.bias'"),
        (lambda f: dataclasses.replace(f, tensors=f.tensors | {"aligned.0.bias": torch.full((3, 6), torch.inf)}), 2,
         "finite float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused_in_one_sentence(model, tmp_path, change, lookahead, message) -> None:
    path = tmp_path / "g.safetensors"
    gates.save(change(gate_file(model)), path)
    with pytest.raises(GateError, match=message) as raised:
        gates_for("aligned", model, 2, lookahead, path)
    assert "\n" not in str(raised.value)


def test_packing_rounds_once(model, tmp_path) -> None:
    """What was read packs to the same bytes; int8 rows are within half a step of what was meant, weighed by the spread
    of the inputs they multiply; a file without a spread is refused."""
    generator = torch.Generator().manual_seed(7)
    meant = {"spread.0": 0.01 + torch.rand(HIDDEN, generator=generator), "spread.1": torch.ones(HIDDEN)}
    meant["aligned.0.weight"] = torch.randn(1, EXPERTS, HIDDEN, generator=generator) / meant["spread.0"].half()
    once = gates.pack(meant)
    assert once["aligned.0.weight"].dtype == torch.int8
    read = gates.unpack(once)
    twice = gates.pack(read)
    assert all(torch.equal(t, twice[n]) for n, t in once.items())
    error = ((read["aligned.0.weight"] - meant["aligned.0.weight"]) * read["spread.0"]).abs().amax(-1)
    assert bool((error <= 0.51 * once["aligned.0.weight.scale"].float()).all())
    path = tmp_path / "g.safetensors"
    header = json.dumps(gate_file(model).header)
    save_file({n: t for n, t in once.items() if n != "spread.0"}, path, {"gates": header})
    with pytest.raises(GateError, match=r"lacks the tensor 'spread\.0'"):
        gates.load(path)


def test_context_remembers_the_token_before(model) -> None:
    """In decode `context` adds what later routers were fed for the token before, of every sequence of a batch by
    itself; in prefill, and where nothing is known yet, it says what `mlp` says; a new start forgets."""
    generator = torch.Generator().manual_seed(8)
    file = gate_file(model)
    rungs = gates.ladder(model, 2, 3, file, ["mlp", "context"])
    mlp, context = rungs["mlp"], rungs["context"]
    prompts = torch.randn(LAYERS, 2 * 3, HIDDEN, generator=generator)
    token = torch.randn(LAYERS, 2, HIDDEN, generator=generator)
    for _ in range(2):
        context.start(2)
        for layer in range(LAYERS):
            assert np.array_equal(context.scores(layer, prompts[layer]), mlp.scores(layer, prompts[layer]))
            context.saw(layer, prompts[layer])
        for layer in range(LAYERS - 1):
            said = context.logits(layer, token[layer])
            t = {n.split(".")[-1]: part for n, part in file.tensors.items() if n.startswith(f"context.{layer}.")}
            inner = token[layer] @ file.tensors[f"mlp.{layer}.down"].T + file.tensors[f"mlp.{layer}.bias"]
            wanted = torch.einsum("deh,th->tde", t["weight"], token[layer]) + t["bias"]
            wanted += (torch.nn.functional.silu(inner) @ t["up"].T).view_as(wanted)
            last = prompts[layer + 1 : layer + 1 + said.shape[1], [2, 5]]  # the third token of each
            wanted += torch.einsum("deh,dth->tde", t["before"], last)
            assert torch.allclose(said, wanted, atol=1e-4)
            context.saw(layer, token[layer])


def test_no_file_and_no_such_rung(model, tmp_path) -> None:
    with pytest.raises(GateError, match="not found; train one"):
        gates_for("aligned", model, 2, 1, tmp_path / "none.safetensors")
    with pytest.raises(GateError, match="needs trained gates"):
        gates_for("mlp", model, 2, 1)
    with pytest.raises(GateError, match="none of the engine's"):
        gates_for("tarot", model, 2, 1)
    (tmp_path / "text.safetensors").write_text("not a safetensors file")
    with pytest.raises(GateError, match="cannot be read"):
        gates_for("aligned", model, 2, 1, tmp_path / "text.safetensors")
    assert gates_for("recorded", model, 2, 0) is None


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v2", "deepseek_v3", "grouped", "phimoe", "qwen3_moe"])
def test_untrained_rungs_rank_as_the_familys_own_router(family) -> None:
    """With a bias (gpt-oss), a correction of the choice (deepseek_v3) or groups (deepseek): the first guesses for the
    next layer, of an input that its router is then fed itself, are what it routes to; and they differ without."""
    grouped, family = family == "grouped", "deepseek_v2" if family == "grouped" else family
    model = small_model(family)
    blocks = models.moe_blocks(model)
    if grouped:
        blocks[1].router.topk_method, blocks[1].router.num_group = "group_limited_greedy", 3
    top_k = models.spec_of_config(config(family), family).top_k
    x = torch.randn(400, 64, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        rungs = gates.ladder(model, top_k, 1, None, ["router", "router_norm"])
        routed = blocks[1].router(x)[2].sort(-1).values
        said = rungs["router"].logits(0, x)[:, 0].topk(top_k, -1).indices.sort(-1).values
        bare = RouterGates(gates.routers_of(model), top_k, 1).logits(0, x)[:, 0].topk(top_k, -1).indices.sort(-1).values
    assert torch.equal(said, routed)
    assert torch.equal(bare, routed) == (family not in ("gpt_oss", "deepseek_v3") and not grouped)
    scores = rungs["router"].scores(0, x).astype(float)
    assert np.abs(scores.sum(-1) - top_k).max() < 0.01


def test_ties_go_to_the_lower_id() -> None:
    scores = np.array([[0.5, 0.25, 0.5, 0.75, 0.25, 0.25]], np.float16)
    assert ranked(scores)[0][0] == [3, 0, 2, 1]


@pytest.fixture(scope="module")
def gated(model_dir: Path, model) -> Path:
    """The model directory with gates beside the weights."""
    gates.save(gate_file(model), model_dir / GATES_FILE)
    return model_dir


def test_gates_are_no_weights_of_the_model(model, gated) -> None:
    """They change neither its hash nor what is loaded."""
    before = provenance.weights_sha256(gated)
    (gated / GATES_FILE).unlink()
    assert provenance.weights_sha256(gated) == before
    gates.save(gate_file(model), gated / GATES_FILE)
    again = models.load(gated)[0]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def store(model_dir: Path):
    with HostStore.build(model_dir, models.spec_of(model_dir), 4, progress=False) as built:
        yield built


def run_engine(model_dir: Path, store: HostStore, policy: str, record: int | None):
    """Logits of every pass, load log, and the engine's recorder, of a greedy run."""
    logits, log = [], io.StringIO()
    with Engine(
        model_dir, bits=4, slots=3, options=options(policy), machine=UNPACED, store=store, record=record
    ) as engine:
        engine.ledger.log = LoadLog(log)
        engine.model.register_forward_hook(lambda module, inputs, out: logits.append(out.logits[0].clone()))
        list(engine.generate([5, 17, 3, 99], 10))
        engine.finish()
        return logits, log.getvalue(), engine.recorder


@pytest.fixture(scope="module")
def plain(gated: Path, store: HostStore):
    return run_engine(gated, store, "on_demand", None)[0]


@pytest.mark.parametrize("rung", LADDER)
def test_plug_and_play(gated, store, plain, rung) -> None:
    """With any rung attached, logits are bit-equal to those without, and the load log is the simulator's."""
    policy = f"all_positive:lookahead=3,predictor={rung}"
    logits, log, recorder = run_engine(gated, store, policy, 3)
    assert all(torch.equal(a, b) for a, b in zip(logits, plain, strict=True))
    trace = recorder.trace({}, rung)
    simulated = io.StringIO()
    replay(Setting(trace, UNPACED, trace.model, 4, 3, options(policy)), simulated)
    assert log == simulated.getvalue()
    assert "prefetch" in log


def test_the_whole_ladder_is_recorded_at_once(gated) -> None:
    """Every rung's guesses under its name; routing and the router's guesses as when it is recorded alone."""
    alone = record(gated, list(BUILT_IN[:2]), 5, lookahead=3, temperature=0.0)
    both = record(gated, list(BUILT_IN[:2]), 5, lookahead=3, temperature=0.0, predictors=list(LADDER))
    assert tuple(both.guesses) == tuple(LADDER)
    assert np.array_equal(alone.ids, both.ids)
    assert np.array_equal(alone.guesses["router"].ids, both.guesses["router"].ids)
    assert np.array_equal(alone.guesses["router"].scores, both.guesses["router"].scores)
    assert not np.array_equal(both.guesses["aligned"].ids, both.guesses["mlp"].ids)
    for table in both.guesses.values():
        assert table.ids.shape == (both.num_tokens, LAYERS, 3, 4)
        assert (table.scores[:, -1] == 0).all()
    only = record(gated, list(BUILT_IN[:1]), 3, lookahead=2, predictors=["mlp"], logits=False)
    assert tuple(only.guesses) == ("mlp",)
