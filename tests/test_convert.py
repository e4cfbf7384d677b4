"""Importers: what they read is what stands in the source, in its order, rounded to float16 and nothing else."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import (
    NAMED,
    ROOT,
    SHAPE,
    SHARED,
    cache_lab,
    need,
    refused,
    route,
    routed,
    run,
    sglang_file,
    sglang_record,
    vllm_ids,
    write_lines,
)

import traces.importers
from traces import DECODE, PREFILL, Trace, TraceError, stats
from traces.convert import convert as convert_file
from traces.convert import main, read_model, recognise
from traces.importers import Options, importers


@pytest.fixture
def ids() -> np.ndarray:
    return vllm_ids()


# gpt-oss: real files


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Trace:
    source = need(SHARED / "gpt-oss-20b/gptoss20b_decode_sample64.npz")
    return run(source, tmp_path_factory.mktemp("npz") / "sample.safetensors")


def test_gpt_oss_npz_is_the_file(sample: Trace) -> None:
    source = SHARED / "gpt-oss-20b/gptoss20b_decode_sample64.npz"
    with np.load(source) as arrays:
        assert np.array_equal(sample.ids, arrays["experts"])
        assert sample.weights.tobytes() == arrays["probs"].tobytes()
        assert np.array_equal(sample.sequence_lengths, arrays["lens"])
        assert sample.provenance["sequence_index"] == arrays["seq_index"].tolist()
    assert (sample.phase == DECODE).all()
    assert sample.routing == "RECORDED"
    assert sample.provenance["source"] == source.name
    assert sample.provenance["source_sha256"] == hashlib.sha256(source.read_bytes()).hexdigest()
    assert sample.provenance["importer"] == "gpt-oss"
    assert sample.provenance["command"] == f"python -m traces.convert {source.name} --out sample.safetensors"


@pytest.mark.parametrize(("cold", "hits"), [(True, (1_921_810, 2_651_137)), (False, (1_925_105, 2_662_873))])
def test_gpt_oss_npz_gives_the_reference_counts(sample: Trace, cold: bool, hits: tuple[int, int]) -> None:
    by_slots = stats.lru_hits(sample, cold_sequences=cold).sum(axis=0)
    assert (by_slots[8 - 4], by_slots[16 - 4]) == hits


def test_gpt_oss_json_is_the_file(tmp_path: Path) -> None:
    source = need(SHARED / "gpt-oss-20b/raw_example.json")
    trace = run(source, tmp_path / "t")
    document = json.loads(source.read_text())
    for row, entry in enumerate(document["router_data"]):
        (key,) = entry
        assert key == f"token_{trace.provenance['first_position'] + row}"
        for layer in range(24):
            cell = entry[key][f"layer_{layer}"]
            assert trace.ids[row, layer].tolist() == cell["selected_experts"]
            assert trace.weights[row, layer].tolist() == np.float16(cell["selected_probs"]).tolist()
    assert trace.num_tokens == len(document["router_data"]) == trace.num_decode_tokens
    assert trace.domains == (document["category"],)


# route-csv: real files


def csv_rows(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(line for line in path.read_text().splitlines() if not line.startswith("#")))


@pytest.mark.parametrize(
    ("name", "prefill", "left_out", "own"), [("qwen", 0, 28, 8), ("gptoss", 0, 85, 4), ("gemma", 29, 0, 8)]
)
def test_route_csv_is_the_file(tmp_path: Path, name: str, prefill: int, left_out: int, own: int, capsys: Any) -> None:
    """Every decode row, and the prefill where the last layer routed all of it; the engine forced all three."""
    source = need(SHARED / f"route-csv/{name}.route.csv")
    trace = run(source, tmp_path / "t", *SHAPE)
    first = trace.provenance["first_position"][0]
    rows = [row for row in csv_rows(source) if row["phase"] == "1" or prefill]
    assert len(rows) == trace.ids.size
    for row in rows:
        cell = int(row["step"]) - first, int(row["layer"]), int(row["slot"])
        assert trace.ids[cell] == int(row["expert"])
        assert trace.weights[cell] == np.float16(float(row["weight"]))
        assert trace.phase[cell[0]] == int(row["phase"])
    assert int((trace.phase == PREFILL).sum()) == prefill
    assert trace.provenance["prefill_tokens_left_out"] == left_out
    assert trace.routing == "FORCED"
    said = capsys.readouterr().err
    assert f"the model's own is {own}: routing is FORCED" in said
    assert (f"prefill of {left_out} tokens left out" in said) == bool(left_out)
    assert "/data/local" not in json.dumps(trace.provenance)


def test_route_csv_by_turns_and_column_names(tmp_path: Path) -> None:
    """A turn is a sequence; columns may move; only a prefill that its last layer did not route is left out."""
    text = route("0,0,0,0", "0,0,0,1", "0,1,1,0", "0,1,1,1", "1,0,4,0", "1,0,5,0", "1,0,5,1", "1,1,6,0", "1,1,6,1")
    (tmp_path / "r.csv").write_text(text)
    trace = run(tmp_path / "r.csv", tmp_path / "t", *SHAPE)
    assert trace.sequence_lengths.tolist() == [2, 1]
    assert trace.phase.tolist() == [PREFILL, DECODE, DECODE]
    assert trace.provenance["first_position"] == [0, 6]
    assert trace.ids.tolist() == [[[3, 1]] * 2] * 3
    assert trace.model.name == "tiny"
    assert trace.routing == "RECORDED"
    moved = text.replace("slot,expert,weight", "slot,expert,weight,residency,dropped").replace("5\n", "5,1,0\n")
    (tmp_path / "d.csv").write_text(
        moved.replace("dense_bytes=5,1,0", "dense_bytes=5").replace("0.25,1,0", "nan,1,1", 1)
    )
    with pytest.raises(TraceError, match="1 of 18 weights are nan"):
        convert_file(tmp_path / "d.csv", "route-csv", Options(hidden_size=64, expert_size=32))
    (tmp_path / "n.csv").write_text(text.replace("0.75", "nan").replace("0.25", "nan"))
    unknown = run(tmp_path / "n.csv", tmp_path / "n", *SHAPE, "--forced")
    assert not unknown.weights.any() and unknown.provenance["weights"].startswith("not recorded")
    assert unknown.routing == "FORCED"


# transformers: its own models write the file


FAMILIES = [
    ("Mixtral", "renormalised", {"num_local_experts": 8, "num_experts_per_tok": 3}, "mlp.gate"),
    ("Qwen3Moe", "renormalised", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True}, "mlp.gate"),
    ("Olmoe", "softmax", {"num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False}, "mlp.gate"),
    ("GptOss", "renormalised", {"num_local_experts": 8, "num_experts_per_tok": 3}, "mlp.router"),
]


@pytest.mark.parametrize(("family", "way", "sizes", "router"), FAMILIES)
def test_transformers_logits_give_the_models_own_choice(
    tmp_path: Path, family: str, way: str, sizes: dict[str, Any], router: str
) -> None:
    """Ids, order and weights are those that the router computed, prefill and decode, in each container."""
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    transformers = pytest.importorskip("transformers", reason="needs the runtime extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        vocab_size=50, hidden_size=32, intermediate_size=16, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=2, head_dim=16, output_router_logits=True, **sizes,
    )  # fmt: skip
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    chosen: list[tuple[Any, Any]] = []
    for layer in model.model.layers:
        layer.get_submodule(router).register_forward_hook(lambda _m, _i, out: chosen.append(out[1:]))
    tokens = torch.arange(8)[None]
    passes: list[tuple[Any, ...]] = []
    with torch.no_grad():
        cache = None
        for part in (tokens[:, :5], tokens[:, 5:6], tokens[:, 6:7]):
            out = model(part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            passes.append(out.router_logits)
    weights = np.concatenate([np.stack([w for w, _ in chosen[i : i + 3]], 1) for i in range(0, 9, 3)])
    ids = np.concatenate([np.stack([e for _, e in chosen[i : i + 3]], 1) for i in range(0, 9, 3)])
    numbered = {f"pass{p}.router_logits.{i}": t.numpy() for p, one in enumerate(passes) for i, t in enumerate(one)}
    torch.save(passes, tmp_path / "bare.pt")
    torch.save({"router_logits": passes}, tmp_path / "named.pt")
    np.savez_compressed(tmp_path / "l.npz", **numbered)
    safetensors.save_file(numbered, tmp_path / "l.safetensors")
    flags = [*NAMED, "--top-k", "3", "--weights", way]
    for name in ("bare.pt", "named.pt", "l.npz", "l.safetensors"):
        assert recognise(tmp_path / name) == "transformers"
        trace = run(tmp_path / name, tmp_path / "t", *flags)
        assert np.array_equal(trace.ids, ids)
        assert np.allclose(trace.weights.astype(np.float32), weights, atol=0, rtol=2**-10)
        assert trace.phase.tolist() == [PREFILL] * 5 + [DECODE] * 2
        logits = np.concatenate([np.stack([t.numpy() for t in one], 1) for one in passes])
        assert trace.logits is not None and np.array_equal(trace.logits, logits.astype(np.float16))
        assert trace.provenance["weights_from_logits"] == way
    np.save(tmp_path / "one.npy", np.stack([t.numpy() for t in passes[0]]))
    single = run(tmp_path / "one.npy", tmp_path / "t", *flags, "--prefill", "2")
    assert np.array_equal(single.ids, ids[:5])
    assert single.phase.tolist() == [PREFILL] * 2 + [DECODE] * 3


def test_transformers_batches_ties_and_probabilities(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal(size=(2, 3, 4, 6)).astype(np.float32), rng.normal(size=(2, 3, 1, 6)).astype(np.float32)
    arrays = {f"router_logits_{p}_{i}": one[i] for p, one in enumerate((first, second)) for i in range(2)}
    np.savez(tmp_path / "b.npz", **arrays)
    flags = [*NAMED, "--top-k", "2", "--weights", "softmax"]
    trace = run(tmp_path / "b.npz", tmp_path / "t", *flags)
    assert trace.sequence_lengths.tolist() == [5, 5, 5]
    assert trace.pass_lengths is not None and trace.pass_lengths.tolist() == [12, 3]
    rows = trace.rows_of(1)
    expected = np.concatenate([first[:, 1], second[:, 1]], axis=1).transpose(1, 0, 2)
    assert np.array_equal(trace.ids[rows], np.argsort(-expected, axis=-1)[..., :2])
    assert trace.phase[rows].tolist() == [PREFILL] * 4 + [DECODE]

    np.save(tmp_path / "tie.npy", np.array([[[0.5, 2.5, 2.5, 1.0]]], np.float32))
    tied = run(tmp_path / "tie.npy", tmp_path / "t", *flags)
    assert tied.ids.tolist() == [[[1, 2]]] and tied.provenance["equal_logits"] == {"rankings": 1, "last_chosen": 0}
    assert "1 of 1 rankings had equal logits, 0 of them at the last expert chosen" in capsys.readouterr().err

    shares = np.array([[[0.1, 0.6, 0.0, 0.3]]], np.float32)
    np.save(tmp_path / "p.npy", shares)
    soft = run(tmp_path / "p.npy", tmp_path / "t", *flags)
    assert soft.logits is None and soft.ids.tolist() == [[[1, 3]]]
    assert np.allclose(soft.weights.astype(float), [[[0.6, 0.3]]], atol=3e-4)


def test_transformers_weights_are_said_or_known_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "l.npy", np.random.default_rng(0).normal(size=(2, 3, 4)))
    flags = [*SHAPE, "--top-k", "2", "--name"]
    assert run(tmp_path / "l.npy", tmp_path / "t", *flags, "olmoe-1b-7b").provenance["weights_from_logits"] == "softmax"
    mixtral = run(tmp_path / "l.npy", tmp_path / "t", *flags, "mixtral-8x7b")
    assert np.allclose(mixtral.weights.astype(float).sum(axis=-1), 1, atol=1e-3)
    (tmp_path / "t").unlink()
    assert "--weights renormalised" in refused(capsys, tmp_path / "l.npy", tmp_path / "t", *flags, "deepseek-v3")


# vLLM: laid out as its documents say


def test_vllm_arrays_and_responses_are_the_ids(tmp_path: Path, ids: np.ndarray) -> None:
    buffer = io.BytesIO()
    np.save(buffer, ids.astype(np.uint8))
    later = {"routed_experts": base64.b64encode(buffer.getvalue()).decode()}
    usage = {"prompt_tokens": 4, "completion_tokens": 4}
    responses = {
        "nested.json": {
            "model": "m",
            "prompt_routed_experts": ids[:4].tolist(),
            "choices": [{"index": 0, "routed_experts": ids[4:].tolist()}],
        },
        "base64.json": {"model": "m", "choices": [later], "usage": usage},
        "list.json": [{"model": "m", "choices": [later], "usage": usage}],
    }
    for name, response in responses.items():
        (tmp_path / name).write_text(json.dumps(response))
    np.save(tmp_path / "all.npy", ids)
    np.savez(tmp_path / "parts.npz", routed_experts=ids[4:], prompt_routed_experts=ids[:4])
    for name in (*responses, "all.npy", "parts.npz"):
        flags = [*SHAPE, "--experts", "8", "--name", "m", *(["--prefill", "4"] if name == "all.npy" else [])]
        assert recognise(tmp_path / name) == "vllm"
        trace = run(tmp_path / name, tmp_path / "t", *flags)
        assert np.array_equal(trace.ids, ids), name
        assert trace.phase.tolist() == [PREFILL] * 4 + [DECODE] * 3, name
        assert trace.sequence_lengths.tolist() == [7]
        assert not trace.weights.any() and trace.provenance["weights"] == "not recorded; every weight is 0"
        assert trace.model.name == "m"


def test_vllm_dense_layers_prefix_cache_and_choices(tmp_path: Path, ids: np.ndarray) -> None:
    slots = np.insert(ids, 0, 0, axis=1)
    slots[:2] = -1
    np.save(tmp_path / "v.npy", slots)
    trace = run(tmp_path / "v.npy", tmp_path / "t", *NAMED, "--experts", "8", "--prefill", "4")
    assert np.array_equal(trace.ids, ids[2:])
    assert trace.provenance["moe_layers"] == [1, 2, 3] and trace.provenance["first_position"] == [2]
    assert trace.phase.tolist() == [PREFILL] * 2 + [DECODE] * 3
    response = {
        "prompt_routed_experts": ids[:4].tolist(),
        "choices": [{"routed_experts": ids[4:6].tolist()}, {"routed_experts": ids[6:].tolist()}],
    }
    (tmp_path / "v.json").write_text(json.dumps(response))
    choices = run(tmp_path / "v.json", tmp_path / "t", *NAMED, "--experts", "8")
    assert np.array_equal(choices.ids, ids) and choices.sequence_lengths.tolist() == [6, 1]


# SGLang: laid out as its expert_distribution.py writes it


def test_sglang_ids_are_mapped_back(tmp_path: Path) -> None:
    rng = np.random.default_rng(2)
    parts = [routed(rng, n) for n in (3, 2, 1, 1, 4, 1)]
    records = [
        sglang_record(1, 1, parts[0], [0, 1, 2], [3]),
        sglang_record(2, 1, parts[1], [3, 4], [2]),  # a chunk of the same prompt
        sglang_record(3, 2, parts[2], [5], None),
        sglang_record(5, 2, parts[3], [6], None),
        sglang_record(8, 1, parts[4], [0, 1, 2, 3], [4]),
        sglang_record(9, 2, parts[5], [4], None),
    ]
    logical = sglang_file(tmp_path / "s.pt", records)
    assert recognise(tmp_path / "s.pt") == "sglang"
    trace = run(tmp_path / "s.pt", tmp_path / "t", *NAMED)
    assert trace.model.num_experts == 5 and trace.model.top_k == 3 and trace.provenance["moe_layers"] == [1, 2]
    assert trace.sequence_lengths.tolist() == [7, 5]
    assert np.array_equal(trace.ids, logical[np.arange(2)[None, :, None], np.concatenate(parts)])
    assert trace.phase.tolist() == [PREFILL] * 5 + [DECODE] * 2 + [PREFILL] * 4 + [DECODE]
    assert trace.pass_lengths is not None and trace.pass_lengths.tolist() == [3, 2, 1, 1, 4, 1]


def test_sglang_batches_are_told_apart_by_position_or_refused(tmp_path: Path, capsys: Any) -> None:
    rng = np.random.default_rng(3)
    records = [
        sglang_record(1, 1, routed(rng, 5), [0, 1, 0, 1, 2], [2, 3]),
        sglang_record(2, 2, routed(rng, 2), [2, 3], None),
        sglang_record(3, 1, routed(rng, 1), [0], [1]),
        sglang_record(4, 2, routed(rng, 3), [3, 4, 1], None),
        sglang_record(5, 2, routed(rng, 2), [5, 2], None),  # the first request has ended
    ]
    sglang_file(tmp_path / "s.pt", records)
    trace = run(tmp_path / "s.pt", tmp_path / "t", *NAMED)
    assert trace.token_sequence is not None
    assert trace.token_sequence.tolist() == [0, 0, 1, 1, 1, 0, 1, 2, 0, 1, 2, 1, 2]
    assert trace.pass_lengths is not None and trace.pass_lengths.tolist() == [5, 2, 1, 3, 2]
    (tmp_path / "t").unlink()
    alike = [
        sglang_record(1, 1, routed(rng, 4), [0, 1, 0, 1], [2, 2]),
        sglang_record(2, 2, routed(rng, 1), [2], None),
    ]
    sglang_file(tmp_path / "a.pt", alike)
    assert "cannot be told" in refused(capsys, tmp_path / "a.pt", tmp_path / "t", *NAMED)


# moe-cache-lab: laid out as TRACE_FORMAT.md says


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("with_probabilities", [True, False])
def test_moe_cache_lab_is_the_file(tmp_path: Path, version: int, with_probabilities: bool) -> None:
    records = cache_lab(version, with_probabilities)
    source = write_lines(tmp_path / "c.jsonl", records)
    assert recognise(source) == "moe-cache-lab"
    trace = run(source, tmp_path / "t", *SHAPE)
    assert trace.ids.shape == (4, 2, 2) and trace.model.num_experts == 6 and trace.model.name == "a/b"
    for event in records[1:]:
        cell = event["token_position"], {1: 0, 3: 1}[event["layer"]]
        assert trace.ids[cell].tolist() == event["selected_experts"]
        assert trace.weights[cell].tolist() == np.float16(event["selected_probabilities"] or [0, 0]).tolist()
    assert trace.phase.tolist() == [PREFILL, PREFILL, DECODE, DECODE]
    assert trace.provenance["moe_layers"] == [1, 3]


# the command


def test_shapes_come_from_the_file_then_flags_then_the_model(tmp_path: Path, ids: np.ndarray, capsys: Any) -> None:
    np.save(tmp_path / "v.npy", ids)
    model = {"name": "big", "num_layers": 3, "num_experts": 8, "top_k": 4, "hidden_size": 64, "expert_size": 32}
    (tmp_path / "model.json").write_text(json.dumps({"model": model | {"expert_bias": 7}, "source": "x"}))
    common = ["--prefill", "0", "--model", str(tmp_path / "model.json")]
    trace = run(tmp_path / "v.npy", tmp_path / "t", *common)
    assert trace.model.expert_bias == 7 and trace.model.name == "big"
    assert trace.model.top_k == 2 and trace.routing == "FORCED"
    assert "top_k was 2, the model's own is 4" in capsys.readouterr().err
    assert str(tmp_path) not in trace.provenance["command"] and "--model model.json" in trace.provenance["command"]
    assert run(tmp_path / "v.npy", tmp_path / "t", *common, "--name", "n").model.name == "n"
    (tmp_path / "t").unlink()
    assert "--layers says 4" in refused(capsys, tmp_path / "v.npy", tmp_path / "t", *common, "--layers", "4")
    assert "model 'big' has 8" in refused(capsys, tmp_path / "v.npy", tmp_path / "t", *common, "--experts", "16")
    error = refused(capsys, tmp_path / "v.npy", tmp_path / "t", "--prefill", "0")
    assert "the file does not say name and num_experts and hidden_size and expert_size; give --name NAME" in error
    (tmp_path / "model.json").write_text("[]")
    assert "must be an object" in refused(capsys, tmp_path / "v.npy", tmp_path / "t", *common)


def test_models_of_the_project_are_read() -> None:
    for path in sorted((ROOT / "sim/models").glob("*.json")):
        assert read_model(path).num_experts > 1


def test_the_last_line_is_json_and_the_same_source_gives_the_same_bytes(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "c.jsonl", cache_lab(1))
    command = [sys.executable, "-m", "traces.convert", str(source), "--out", str(tmp_path / "t"), *SHAPE]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60)
    figures = json.loads(result.stdout.splitlines()[-1])
    assert figures["tokens"] == {"prefill": 2, "decode": 2} and figures["routing"] == "RECORDED"
    assert "token ids are left out" in result.stderr
    first = (tmp_path / "t").read_bytes()
    subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=60)
    assert (tmp_path / "t").read_bytes() == first
    inspected = [sys.executable, "-m", "traces.inspect", str(tmp_path / "t")]
    subprocess.run(inspected, cwd=ROOT, capture_output=True, check=True, timeout=60)


def test_an_importer_is_added_by_adding_a_file(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    (tmp_path / "my_format.py").write_text(
        '"""Recordings of nobody."""\n\n\ndef recognise(path):\n    return path.suffix == ".nobody"\n\n\n'
        "def read(path, options):\n    raise NotImplementedError\n"
    )
    monkeypatch.setattr(traces.importers, "__path__", [*traces.importers.__path__, str(tmp_path)])
    with pytest.raises(SystemExit, match="0"):
        main(["--help"])
    assert "  my-format         Recordings of nobody.\n" in capsys.readouterr().out
    (tmp_path / "x.nobody").write_text("x")
    assert recognise(tmp_path / "x.nobody") == "my-format"
    sys.modules.pop("traces.importers.my_format")


def test_every_importer_keeps_its_contract() -> None:
    assert set(importers()) == {"counts", "gpt-oss", "moe-cache-lab", "route-csv", "sglang", "transformers", "vllm"}
    for name, importer in importers().items():
        assert importer.__doc__ and len(importer.__doc__.splitlines()[0]) <= 110, name
        assert importer.recognise(Path("/does/not/exist")) is False, name


def test_every_recording_at_hand_is_converted_and_described(tmp_path: Path) -> None:
    """Through the commands, as a user would."""
    sources = [p for p in sorted(need(SHARED).rglob("*")) if p.is_file() and p.name != "LICENSE"]
    assert len(sources) == 5
    for source in sources:
        shape = SHAPE if source.suffix == ".csv" else []
        command = [sys.executable, "-m", "traces.convert", str(source), "--out", str(tmp_path / "t"), *shape]
        subprocess.run(command, cwd=ROOT, capture_output=True, check=True, timeout=120)
        command = [sys.executable, "-m", "traces.inspect", str(tmp_path / "t")]
        result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=120)
        assert json.loads(result.stdout.splitlines()[-1])["provenance"]["source"] == source.name
