"""Figures of a tiny random model against direct computation, and its model card."""

from __future__ import annotations

import argparse
import gzip
import json
import math
from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
pytest.importorskip("transformers", reason="the runtime extra is not installed")

from conftest import trace_of  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

from runtime import corpus, evaluate, models, train  # noqa: E402
from traces.trace import check  # noqa: E402

FLAGS = "--layers 3 --hidden 64 --ffn 64 --experts 4 --vocab 300 --tokens 4096 --batch 2 --length 64"
LINE = "def area(width: int, größe: int) -> int:  # {}\n    return width * {}\n"


@pytest.fixture(scope="module")
def text_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One training block and a held-out one of about 1,000 bytes."""
    path = tmp_path_factory.mktemp("corpus") / "thealgorithms_python.txt"
    lines = [LINE.format(i, i * i) for i in range(2000)]
    data = "".join(lines).encode()[: corpus.BLOCK_BYTES + 1000]
    path.write_bytes(data[: data.rindex(b"\n") + 1])
    return path


@pytest.fixture(scope="module")
def domain(text_file: Path) -> corpus.Domain:
    (only,) = corpus.load([text_file])
    assert len(only.train) == 1
    assert 500 < len(only.held_out[0]) < 1500
    return only


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, domain: corpus.Domain) -> Path:
    """A saved model with random weights, large enough that its predictions are far from even."""
    out = tmp_path_factory.mktemp("model") / "tiny"
    tokenizer = train.train_tokenizer([domain], 300)
    shape = train.config(tokenizer.get_vocab_size(), layers=3, hidden=64, ffn=64, experts=4, top_k=2)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight.mul_(8)
    train.save_model(model, tokenizer, out)
    return out


@pytest.fixture
def model_dir(template: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "tiny"
    copy.mkdir()
    for file in template.iterdir():
        (copy / file.name).write_bytes(file.read_bytes())
    return copy


def tokenizer_of(model_dir: Path) -> Tokenizer:
    return Tokenizer.from_file(str(model_dir / "tokenizer.json"))


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = evaluate.main([str(a) for a in ("--threads", 1, *argv)])
    out, err = capsys.readouterr()
    return code, out, err


def test_loss_equals_that_of_each_token_predicted_by_itself(template: Path, domain: corpus.Domain) -> None:
    """Windows of 8: token i sees exactly the tokens of its window before it."""
    model, tokenizer = evaluate.load(template)
    text = evaluate.held_out(domain, tokenizer, 16, 8)
    (piece,) = text.pieces
    assert text.tokens == 16
    assert tokenizer.decode(piece[1:].tolist()).encode() == text.text
    asked: list[int] = []
    found = evaluate.nats(model, piece, 8, asked.append)
    by_hand = []
    for i in range(1, 17):
        start = (i - 1) // 8 * 8
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(piece[start:i].astype(np.int64))[None]).logits[0, -1]
        by_hand.append(-float(logits.double().log_softmax(-1)[int(piece[i])]))
    assert asked == [8, 8]
    np.testing.assert_allclose(found, by_hand, rtol=1e-4)
    assert max(by_hand) - min(by_hand) > 0.5


def test_unigram_bits_by_hand() -> None:
    """Counts 3, 0, 1 become 4/7, 1/7, 2/7."""
    fitted, found = np.array([3, 0, 1]), np.array([2, 1, 0])
    assert evaluate.unigram_bits(fitted, found) == pytest.approx(2 * math.log2(7 / 4) + math.log2(7))


def test_gzip_is_level_nine(domain: corpus.Domain) -> None:
    """On a text long enough that the levels differ; the header is counted."""
    text = evaluate.HeldOut((np.array([0, 1], np.uint16),), domain.train[0])
    bits = evaluate.domain_bits(domain, text, np.ones(2, np.int64), 1.0)
    assert bits["gzip"] == 8 * len(gzip.compress(domain.train[0], 9))
    assert bits["gzip"] < 8 * len(gzip.compress(domain.train[0], 1))
    assert bits["model"] == pytest.approx(1 / math.log(2))


def test_figures_by_hand() -> None:
    """20 bits over 5 bytes are 4 bits a byte, and 10 bits a token are 10 ln 2 nats."""
    shown = evaluate.figures(2, 5, dict.fromkeys(evaluate.MEASURES, 20.0))
    assert shown["bits_per_byte"]["gzip"] == 4
    assert shown["nats_per_token"] == pytest.approx(10 * math.log(2), abs=1e-5)


def test_held_out_is_spread_over_the_blocks_and_capped() -> None:
    """Four blocks and room for three windows: every second block, one window of each."""
    tokenizer = train.train_tokenizer([corpus.Domain("d", (b"abc " * 50,), ())], 260)
    blocks = tuple(bytes([letter]) * 40 for letter in b"wxyz")
    text = evaluate.held_out(corpus.Domain("d", (), blocks), tokenizer, 24, 8)
    assert text.text == b"w" * 8 + b"y" * 8
    with pytest.raises(ValueError, match="--max-tokens is 7; evaluate at least one window of 8"):
        evaluate.held_out(corpus.Domain("d", (), blocks), tokenizer, 7, 8)


def test_trace_is_what_the_routers_did(template: Path, domain: corpus.Domain) -> None:
    """Ids from the model's own router logits; recall from each router applied to an earlier router's input."""
    model, tokenizer = evaluate.load(template)
    (piece,) = evaluate.held_out(domain, tokenizer, 32, 16).pieces
    recording = evaluate.Recording(model, models.spec_of(template))
    evaluate.nats(model, piece, 16, lambda n: recording.window("python", n))
    trace = recording.trace()
    check(trace)
    assert trace.routing == "FORCED"
    assert trace.sequence_lengths.tolist() == [16, 16]
    assert trace.num_decode_tokens == 32

    blocks = models.moe_blocks(model)
    inputs: list[torch.Tensor] = []
    handles = [b.router.register_forward_hook(lambda m, i, o: inputs.append(i[0].flatten(0, -2))) for b in blocks]
    with torch.no_grad():
        out = model(input_ids=torch.from_numpy(piece[None, :16].astype(np.int64)), output_router_logits=True)
    for handle in handles:
        handle.remove()
    routed = torch.stack([logits.topk(2).indices for logits in out.router_logits], 1)
    assert trace.ids[:16].tolist() == routed.tolist()

    head = trace.head(16)
    shown = evaluate.routing(head)
    for distance, layer in ((1, 0), (1, 1), (2, 0)):
        guessed = (inputs[layer] @ blocks[layer + distance].router.weight.T).topk(2).indices
        hits = (guessed[:, :, None] == routed[:, layer + distance, None, :]).any(1).double().mean()
        assert shown["recall"][distance - 1][layer] == pytest.approx(float(hits), abs=1e-5)
    assert shown["recall"][1][1] is None
    shares = np.bincount(routed[:, 0].flatten(), minlength=4) / 32
    assert shown["layers"]["busiest_share"][0] == pytest.approx(shares.max(), abs=1e-5)
    assert shown["layers"]["least_share"][0] == pytest.approx(shares.min(), abs=1e-5)


def test_a_dead_expert_is_named() -> None:
    """Expert 3 of layer 1 is never routed; with it routed once in four, there is no dead expert."""
    alive = [[0, 1], [2, 3]]
    full = trace_of([[a, b] for a in alive for b in alive])
    poor = trace_of([[a, b] for a in alive for b in ([0, 1], [2, 1])])
    assert evaluate.dead_experts({"routing": evaluate.routing(full)}).startswith("No dead expert: the least used one")
    found = {"routing": evaluate.routing(poor)}
    assert found["routing"]["dead"] == [[1, 3]]
    assert evaluate.dead_experts(found) == "Below 0.5 % of their layer's accesses: expert 3 of layer 1."


def test_card_and_last_line(
    model_dir: Path, text_file: Path, domain: corpus.Domain, capsys: pytest.CaptureFixture[str]
) -> None:
    """The whole command: its JSON line agrees with the card, the sizes, gzip and the log; no path gets in."""
    log = model_dir / "training" / "log.jsonl"
    log.parent.mkdir()
    log.write_text('{"step": 1, "train": 9.0}\n{"step": 32, "train": 5.25, "balance": 1.01}\n')
    code, out, err = run(capsys, "--model", model_dir, "--corpus", text_file, "--card", "--training", FLAGS)
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    card = (model_dir / "README.md").read_text()

    shown = result["domains"]["thealgorithms_python"]
    text = evaluate.held_out(domain, tokenizer_of(model_dir), 60_000).text
    assert shown["bytes"] == len(text)
    assert len(domain.held_out[0]) - 10 < len(text) < len(domain.held_out[0])
    assert shown["bits_per_byte"]["gzip"] == pytest.approx(8 * len(gzip.compress(text, 9)) / len(text), abs=1e-5)
    assert shown["nats_per_token"] * shown["tokens"] / math.log(2) / len(text) == pytest.approx(
        shown["bits_per_byte"]["model"], abs=1e-4
    )
    counts = {byte: domain.train[0].count(byte) + 1 for byte in range(256)}
    total = len(domain.train[0]) + 256
    direct = -sum(math.log2(counts[byte] / total) for byte in text) / len(text)
    assert shown["bits_per_byte"]["byte_unigram"] == pytest.approx(direct, abs=1e-5)
    assert result["overall"]["bits_per_byte"] == shown["bits_per_byte"]
    assert result["training"]["tokens"] == 4096

    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| TheAlgorithms/Python | MIT |" in card
    assert f"{FLAGS}\n" not in card  # what is a default of runtime.train is left out, the order is its own
    command = result["training"]["command"]
    assert command in card
    assert command.startswith("python -m runtime.train --corpus thealgorithms_python.txt --out tiny --tokens 4096 ")
    again = train.parser().parse_args(command.split()[3:])
    assert (again.layers, again.hidden, again.batch, again.length, again.vocab) == (3, 64, 2, 64, 300)
    assert "- balance: 1.0100" in card
    assert evaluate.quality_table(result) in card
    assert result["samples"][0]["text"] in card
    for path in (model_dir, text_file):
        assert str(path.parent) not in card
        assert str(path.parent) not in out
    shipped = [p for p in model_dir.iterdir() if p.is_file()]
    assert result["bytes"] == sum(p.stat().st_size for p in shipped)


def test_card_too_large_is_not_written(
    model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways over the limit: the model alone, and the model with its card."""
    alone = evaluate.shipped_bytes(model_dir)
    for limit in (alone - 1, alone + 10):
        monkeypatch.setattr(evaluate, "MAX_BYTES", limit)
        code, _, err = run(capsys, "--model", model_dir, "--corpus", text_file, "--card", "--training", FLAGS)
        assert code == 2
        assert f"{limit:,} are allowed: no card written" in err
        assert not (model_dir / "README.md").exists()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--corpus", "nowhere.txt"], "corpus file nowhere.txt not found"),
        (["--max-tokens", "100"], "--max-tokens is 100; evaluate at least one window of 512"),
        (["--card"], "state how the model was trained with --training"),
        (["--card", "--training", FLAGS.replace("--hidden 64", "--hidden 128")], "--training has hidden 128"),
        (["--card", "--training", FLAGS + " --colour red"], "unrecognized arguments: --colour red"),
    ],
)
def test_bad_input_is_one_sentence(
    argv: list[str], sentence: str, template: Path, text_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2, nothing on standard output, no card."""
    files = [] if "--corpus" in argv else ["--corpus", text_file]
    code, out, err = run(capsys, "--model", template, *files, *argv)
    assert (code, out) == (2, "")
    assert sentence in err.splitlines()[-1]
    assert not (template / "README.md").exists()


def test_a_log_that_ends_elsewhere_is_refused(model_dir: Path) -> None:
    """32 steps by the flags, 20 in the log: the flags are not those of the finished run."""
    (model_dir / "training").mkdir()
    (model_dir / "training" / "log.jsonl").write_text('{"step": 20, "train": 5.0}\n')
    args = argparse.Namespace(model=model_dir, corpus=[], training=FLAGS)
    with pytest.raises(ValueError, match="ends at step 20, but the flags make 32 steps of 128 tokens"):
        evaluate.training_facts(args, models.spec_of(model_dir))


def test_what_is_no_model_is_refused(model_dir: Path, text_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No directory, no tokenizer, weights cut off: exit code 2 and one sentence each."""
    code, _, err = run(capsys, "--model", model_dir / "absent", "--corpus", text_file)
    assert (code, len(err.splitlines())) == (2, 1)
    weights = (model_dir / "model.safetensors").read_bytes()
    (model_dir / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    code, _, err = run(capsys, "--model", model_dir, "--corpus", text_file)
    assert code == 2
    assert "cannot be loaded" in err.splitlines()[-1]
    (model_dir / "tokenizer.json").unlink()
    code, _, err = run(capsys, "--model", model_dir, "--corpus", text_file)
    assert code == 2
    assert "holds no tokenizer.json" in err
