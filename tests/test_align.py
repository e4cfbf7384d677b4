"""Gate alignment: fitted heads say what later routers said, and never less than what they started from."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="the engine needs the runtime extra")

from runtime import activations, align, corpus, fit, gates, gates_report, models, record, train  # noqa: E402 (after the check above)
from runtime.fit import LOSSES, Fitting, Sample, Scales  # noqa: E402
from runtime.lookahead import LADDER, UNTRAINED, Heads, Trunk  # noqa: E402

LAYERS, EXPERTS, HIDDEN = 3, 4, 64


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    lines = [f"def f{i % 97}(a, b{i % 7}):\n    return a * {i % 13} + b{i % 7}\n" for i in range(6000)]
    path = tmp_path_factory.mktemp("text") / "code.txt"
    path.write_text("".join(lines))
    return path


@pytest.fixture(scope="module")
def model_dir(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(3)
    torch.set_num_threads(1)
    tokenizer = train.train_tokenizer(corpus.load([text]), 300)
    shape = train.config(tokenizer.get_vocab_size(), LAYERS, HIDDEN, ffn=64, experts=EXPERTS, top_k=2)
    shape.initializer_range = 0.2
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    train.save_model(model, tokenizer, out)
    return out


def scales(*sizes: int) -> Scales:
    """Spreads of one for layers of these input sizes."""
    return Scales([torch.ones(size) for size in sizes])


def linear_task(tokens: int = 3000, noise: float = 0.0, seed: int = 0) -> tuple[Sample, Sample, Heads]:
    """Routers that are linear in the input, and another head to start from."""
    generator = torch.Generator().manual_seed(seed)
    true = torch.randn(2, 5, 8, generator=generator)
    hidden = torch.randn(tokens, 8, generator=generator)
    logits = torch.einsum("deh,nh->nde", true, hidden) + noise * torch.randn(tokens, 2, 5, generator=generator)
    both = Sample(hidden, logits, logits.topk(2, -1).indices)
    index = torch.arange(tokens)
    start = Heads(torch.randn(2, 5, 8, generator=generator))
    return both.rows(index[index % 8 > 0]), both.rows(index[index % 8 == 0]), start


@pytest.mark.parametrize(("loss", "least"), [("kl", 0.98), ("ranking", 0.95), ("top_k", 0.88)])
def test_a_linear_router_is_learned(loss, least) -> None:
    """From a wrong start, every loss finds a router that is linear in what the head sees; KL its softmax too, while
    cross-entropy on the routed experts, which asks for equal shares of these, draws the border elsewhere."""
    assert {"kl", "ranking", "top_k"} == set(LOSSES)
    ours, held, start = linear_task()
    heads, kept = fit.align(ours, held, [start], Fitting(loss, epochs=40, rate=0.2), 0, scales(8))
    assert kept == [-1, -1]
    assert float(fit.recall(start.logits(held.hidden), held.ids, 2).max()) < 0.8
    assert float(fit.recall(heads.logits(held.hidden), held.ids, 2).min()) > least


def test_a_head_that_does_not_beat_its_start_keeps_it() -> None:
    """Trained on noise, the start stays: at the distance where it is right, and not elsewhere."""
    ours, held, start = linear_task()
    right = Heads(torch.linalg.lstsq(ours.hidden, ours.logits.flatten(1)).solution.T.reshape(2, 5, 8))
    generator = torch.Generator().manual_seed(9)
    noise = torch.randn(ours.logits.shape, generator=generator)
    noisy = ours._replace(logits=noise, ids=noise.topk(2, -1).indices)
    heads, kept = fit.align(noisy, held, [right, start], Fitting(epochs=2, rate=0.5), 0, scales(8))
    assert kept == [0, 0]
    assert torch.equal(heads.weight, scales(8).saved("aligned.weight", 0, right.weight))


def test_a_trunk_learns_what_no_linear_head_can() -> None:
    """A router on the product of two inputs: linear heads cannot say, a trunk can; heads stay as they are."""
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(6000, 4, generator=generator)
    product = hidden[:, :1] * hidden[:, 1:2]
    logits = torch.cat([product, -product, torch.full_like(product, -9.0)], 1)[:, None] * 3
    both = Sample(hidden, logits, logits.topk(1, -1).indices)
    index = torch.arange(6000)
    ours, held = both.rows(index[index % 8 > 0]), both.rows(index[index % 8 == 0])
    heads = Heads(torch.zeros(1, 3, 4), torch.zeros(1, 3))
    trunk = fit.add_trunk(ours, held, heads, 32, Fitting(epochs=12, rate=4e-2), 0, scales(4))
    said = heads.logits(held.hidden) + trunk.logits(held.hidden).view(-1, 1, 3)
    assert float(fit.recall(heads.logits(held.hidden), held.ids, 1)) < 0.7
    assert float(fit.recall(said, held.ids, 1)) > 0.9


def test_context_learns_what_the_token_before_says() -> None:
    """A router that repeats what it was fed for the token before: heads on this token's input cannot say."""
    generator = torch.Generator().manual_seed(2)
    hidden, earlier = (torch.randn(4000, 6, generator=generator) for _ in range(2))
    true = torch.randn(5, 6, generator=generator)
    logits = (earlier @ true.T)[:, None]
    both = Sample(hidden, logits, logits.topk(2, -1).indices, earlier[None])
    index = torch.arange(4000)
    ours, held = both.rows(index[index % 8 > 0]), both.rows(index[index % 8 == 0])
    heads = Heads(torch.zeros(1, 5, 6), torch.zeros(1, 5))
    trunk = Trunk(torch.zeros(3, 6), torch.zeros(3), torch.zeros(5, 3))
    context = fit.add_context(ours, held, heads, trunk, Fitting(epochs=12, rate=5e-2), 0, scales(6, 6))
    assert held.before is not None
    assert float(fit.recall(context.logits(trunk, held.hidden, held.before), held.ids, 2)) > 0.9
    false = ours._replace(before=ours.before.roll(1, 1))  # another token's: nothing can be learned of it
    worse = held._replace(before=held.before.roll(1, 1))
    kept = fit.add_context(
        false, worse, Heads(true[None], torch.zeros(1, 5)), trunk, Fitting(epochs=2), 0, scales(6, 6)
    )
    said = kept.logits(trunk, held.hidden, held.before)
    assert (
        float(fit.recall(said, held.ids, 2)) >= float(fit.recall((held.hidden @ true.T)[:, None], held.ids, 2)) - 0.02
    )


def test_recall_and_calibration_error_by_hand() -> None:
    scores = torch.tensor([[[0.9, 0.8, 0.2, 0.1]], [[0.9, 0.1, 0.8, 0.2]]])
    ids = torch.tensor([[[0, 1]], [[0, 1]]])
    assert fit.recall(scores, ids, 1).tolist() == [0.5]
    assert fit.recall(scores, ids, 2).tolist() == [0.75]
    # bins of 1/15: 0.9 said twice, right twice; 0.8 once right in two; 0.2 never; 0.1 once in two
    wanted = (2 * 0.1 + abs(2 * 0.8 - 1) + 2 * 0.2 + abs(2 * 0.1 - 1)) / 8
    assert fit.calibration_error(scores, ids) == pytest.approx(wanted, abs=1e-6)
    best = (2 * 0.1 + abs(2 * 0.8 - 1)) / 4
    assert fit.calibration_error(scores, ids, 2) == pytest.approx(best, abs=1e-6)


def test_temperatures_make_sharp_logits_honest() -> None:
    """Logits three times too large for how often they are right get a temperature near three."""
    generator = torch.Generator().manual_seed(4)
    logits = torch.randn(20_000, 1, 6, generator=generator)
    drawn = torch.multinomial(logits[:, 0].softmax(-1), 1, generator=generator)[:, None]
    found = fit.temperatures(3 * logits, drawn)
    assert 2.5 < float(found) < 3.5


def test_windows_are_spread_and_alternate(model_dir, text) -> None:
    _, tokenizer = models.load(model_dir)
    domain = corpus.load([text])[0]
    found = activations.windows([domain.train, domain.held_out], tokenizer, 2048, 256)
    assert [w.domain for w in found] == [0, 1] * 4
    assert all(len(w.tokens) == 256 for w in found)
    assert len({tuple(w.tokens) for w in found}) == 8
    with pytest.raises(ValueError, match="give each of 2 texts a window of 256"):
        activations.windows([domain.train, domain.held_out], tokenizer, 300, 256)


def test_collecting_goes_on_where_it_stopped(model_dir, text, tmp_path, monkeypatch) -> None:
    """Killed after some windows, a second call reads the rest only; the tables are those of an undisturbed run."""
    _, tokenizer = models.load(model_dir)
    texts = activations.windows([corpus.load([text])[0].train], tokenizer, 2560, 32)
    whole = activations.collect(model_dir, texts, 4, tmp_path / "whole", progress=False)
    assert np.array_equal(whole.logits[0].argmax(-1), whole.ids[0][:, 0])
    assert whole.first.sum() == len(texts)
    read = activations._passes

    def killed(model, part, *rest):
        for number, seen in enumerate(read(model, part, *rest)):
            if number == 70:
                raise KeyboardInterrupt
            yield seen

    monkeypatch.setattr(activations, "_passes", killed)
    with pytest.raises(KeyboardInterrupt):
        activations.collect(model_dir, texts, 4, tmp_path / "cut", progress=False)
    asked = []

    def counted(model, part, *rest):
        asked.append(len(part))
        return read(model, part, *rest)

    monkeypatch.setattr(activations, "_passes", counted)
    again = activations.collect(model_dir, texts, 4, tmp_path / "cut", progress=False)
    assert asked == [len(texts) - 64]
    for name in ("inputs", "logits", "ids"):
        assert all(np.array_equal(getattr(again, name)[layer], getattr(whole, name)[layer]) for layer in range(LAYERS))


def test_align_then_record(model_dir, text, tmp_path, capsys) -> None:
    """The command: no trained head recalls less than the router on its own tokens; the same seed gives the same file;
    model files are untouched; `runtime.record` takes its gates."""
    files = {p.name: p.read_bytes() for p in model_dir.iterdir()}
    flags = ["--model", str(model_dir), "--corpus", str(text), "--tokens", "6000", "--held-out-tokens", "1024"]
    flags += ["--lookahead", "2", "--width", "4", "--epochs", "3", "--out"]
    outs = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for out in outs:
        assert align.main([*flags, str(out)]) == 0
    header = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert {p.name: p.read_bytes() for p in model_dir.iterdir()} == files
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.safetensors", "b.safetensors"]
    first, second = map(gates.load, outs)
    assert all(torch.equal(t, second.tensors[n]) for n, t in first.tensors.items())
    assert header["lookahead"] == 2
    assert [len(row) for row in header["recall"]["aligned"]] == [2, 1]
    assert np.mean(header["recall"]["aligned"][0]) > np.mean(header["recall"]["router"][0]) - 0.02
    asked = record.rungs_asked(["all"], model_dir, outs[0])
    trace = record.record(model_dir, [record.prompts.Prompt("def f1(a", "code")], 4, lookahead=2,
                          predictors=asked, gates_file=outs[0])  # fmt: skip
    assert tuple(trace.guesses) == tuple(LADDER)


def test_the_readmes_three_commands(model_dir, text, tmp_path, monkeypatch, capsys) -> None:
    """Align, record with every rung, simulate with each: as the README shows them, at tiny size."""
    readme = (Path(__file__).parent.parent / "README.md").read_text()
    block = next(b for b in re.findall(r"```bash\n(.*?)```", readme, re.DOTALL) if "runtime.align" in b)
    lines = [shlex.split(line) for line in block.replace("\\\n", " ").splitlines()]
    assert [words[2] for words in lines] == ["runtime.align", "runtime.record", "sim.run"]
    tiny = {
        "runtime.align": "--tokens 2560 --held-out-tokens 512 --width 4 --epochs 1",
        "runtime.record": "--sequences 1 --tokens 4 --prompt-bytes 16",
        "sim.run": "--slots 2",
    }
    monkeypatch.chdir(tmp_path)
    for words in lines:
        given = [str(text) if word == "FILES" else word for word in words[3:]]
        model = [] if words[2] == "sim.run" else ["--model", str(model_dir)]
        monkeypatch.setattr(sys, "argv", [words[2], *given, *model, *tiny[words[2]].split()])
        assert importlib.import_module(words[2]).main() == 0
    runs = json.loads(capsys.readouterr().out.splitlines()[-1])["runs"]
    trained = [r for r in LADDER if r not in UNTRAINED and r != "router_mean"]
    assert [r["predictor"] for r in runs if r["predictor"]] == ["router", *trained]


def test_bad_input_is_one_sentence(model_dir, text, tmp_path, capsys) -> None:
    flags = ["--model", str(model_dir), "--corpus", str(text)]
    for more, message in (
        (["--out", str(tmp_path / "none" / "g")], "its folder does not exist"),
        (["--out", str(tmp_path / "g"), "--lookahead", "0"], "--lookahead is 0"),
        (["--out", str(tmp_path / "g"), "--tokens", "300"], "windows; 8 are needed"),
    ):
        assert align.main([*flags, *more]) == 2
        found = capsys.readouterr().err
        assert message in found and found.startswith("runtime.align: ")
    assert not (tmp_path / "g").exists()


def test_report_of_the_ladder(model_dir, text, tmp_path, capsys) -> None:
    """Every rung and every id-only predictor by domain, layer and distance; the drawn file is there."""
    out = tmp_path / "a.safetensors"
    flags = ["--model", str(model_dir), "--corpus", str(text)]
    small = ["--tokens", "2560", "--held-out-tokens", "512", "--lookahead", "2", "--width", "0", "--epochs", "1"]
    assert align.main([*flags, *small, "--out", str(out)]) == 0
    more = ["--gates", str(out), "--tokens", "512", "--bits", "2", "--out", str(tmp_path / "r.json")]
    assert gates_report.main([*flags, *more, "--picture", str(tmp_path / "r.svg")]) == 0
    found = json.loads((tmp_path / "r.json").read_text())["reports"][0]
    assert set(found["recall"]) == {"router", "router_norm", "router_mean", "aligned", *gates_report.ID_ONLY}
    assert set(found["recall"]["aligned"]) == {"all", "code"}
    assert found["recall"]["aligned"]["all"] == found["recall"]["aligned"]["code"]
    table = found["recall"]["aligned"]["all"]
    assert [[len(row) for row in layers] for layers in table] == [[4] * LAYERS] * 2
    assert table[1][1] == [None] * 4  # two layers ahead of the last but one there is none
    assert table[0][0][3] == 1.0  # all four experts are guessed
    assert {p.name for p in tmp_path.iterdir()} == {"a.safetensors", "r.json", "r.svg"}
    assert "recall@2" in capsys.readouterr().out
