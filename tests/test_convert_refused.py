"""Importers: what is no routing in order, damaged, hostile or contradictory is refused in one sentence."""

from __future__ import annotations

import base64
import json
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from recordings import (
    NAMED,
    SHAPE,
    cache_lab,
    gpt_oss_document,
    refused,
    route,
    routed,
    run,
    sglang_file,
    sglang_record,
    vllm_ids,
    write_lines,
)

from traces import DECODE, PREFILL, TraceError
from traces.convert import convert as convert_file
from traces.convert import main
from traces.importers import Options, importers


@pytest.fixture
def ids() -> np.ndarray:
    return vllm_ids()


def test_counts_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    torch.save({"rank": 0, "logical_count": torch.ones(3, 2, 4)}, tmp_path / "stat.pt")
    torch.save({"records": [{"global_physical_count": torch.ones(2, 4)}]}, tmp_path / "pass.pt")
    (tmp_path / "stat.json").write_text(json.dumps({"logical_count": [[1, 2]]}))
    np.save(tmp_path / "eplb.npy", np.array([[90, 132], [20, 107]]))
    np.savez(tmp_path / "eplb.npz", expert_load_window=np.ones((3, 2, 4)))
    np.save(tmp_path / "infinity.npy", np.floor(np.random.default_rng(0).random((5, 2, 8)) * 9))
    safetensors.save_file({"50_3": np.arange(8), "51_3": np.arange(8)}, tmp_path / "rank0.safetensors")
    names = {
        "stat.pt": "SGLang expert distribution in stat mode",
        "pass.pt": "SGLang expert distribution in per_pass mode",
        "stat.json": "SGLang expert distribution in stat mode",
        "eplb.npy": "EPLB expert loads",
        "eplb.npz": "vLLM EPLB expert loads",
        "infinity.npy": "MoE-Infinity expert activation matrix",
        "rank0.safetensors": "TensorRT-LLM expert statistics",
    }
    for file, name in names.items():
        error = refused(capsys, tmp_path / file, tmp_path / "t")
        assert name in error and "not in which order" in error


def test_what_no_importer_knows_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cases = {
        "empty": b"", "text": b"hello\n", "zip": b"PK\x03\x04rubbish", "json": b'{"a": 1}', "npy": b"\x93NUMPY\x01\x00",
        "st": (99).to_bytes(8, "little") + b"{",
    }  # fmt: skip
    for name, data in cases.items():
        (tmp_path / name).write_bytes(data)
        error = refused(capsys, tmp_path / name, tmp_path / "t")
        assert "no importer recognises this file; say --format NAME, one of " in error
        for importer in importers():
            refused(capsys, tmp_path / name, tmp_path / "t", "--format", importer, *NAMED)
    assert "no such file" in refused(capsys, tmp_path / "absent", tmp_path / "t")
    assert "recording itself" in main_error(capsys, [str(tmp_path / "text"), "--out", str(tmp_path / "text")])


def main_error(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> str:
    capsys.readouterr()
    assert main(arguments) == 2
    return capsys.readouterr().err


def test_pickles_are_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A pickle that would write a file is refused in every container, and does not write it."""
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    mark = tmp_path / "executed"

    class Harm:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (mark,))

    torch.save({"router_logits": Harm()}, tmp_path / "h.pt")
    torch.save({"topk_ids_of_layer": Harm()}, tmp_path / "g.pt")
    np.save(tmp_path / "h.npy", np.array([Harm()], object), allow_pickle=True)
    np.savez(tmp_path / "h.npz", router_logits=np.array([Harm()], object))
    for name in ("h.pt", "g.pt", "h.npy", "h.npz"):
        refused(capsys, tmp_path / name, tmp_path / "t", *NAMED)
    refused(capsys, tmp_path / "h.npy", tmp_path / "t", *NAMED, "--format", "vllm")
    assert not mark.exists()


def test_claims_of_size_are_not_believed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A .npy header that claims 2**50 elements, alone and in a .npz, and a .npz that unpacks a thousandfold."""
    header = b"{'descr': '<i2', 'fortran_order': False, 'shape': (1125899906842624, 3, 2), }".ljust(117) + b"\n"
    data = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(64)
    (tmp_path / "big.npy").write_bytes(data)
    refused(capsys, tmp_path / "big.npy", tmp_path / "t", *NAMED, "--format", "vllm", "--experts", "8")
    with zipfile.ZipFile(tmp_path / "big.npz", "w") as archive:
        archive.writestr("routed_experts.npy", data)
    assert "more than its" in refused(capsys, tmp_path / "big.npz", tmp_path / "t", *NAMED)
    encoded = base64.b64encode(data).decode()
    (tmp_path / "big.json").write_text(json.dumps({"choices": [{"routed_experts": encoded}]}))
    assert "more than its" in refused(capsys, tmp_path / "big.json", tmp_path / "t", *NAMED)
    with zipfile.ZipFile(tmp_path / "deep.json", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("routed_experts.npy", bytes(1 << 20))
    refused(capsys, tmp_path / "deep.json", tmp_path / "t", *NAMED)
    (tmp_path / "nested.json").write_text('{"routed_experts": ' + "[" * 100_000)
    refused(capsys, tmp_path / "nested.json", tmp_path / "t", *NAMED)
    (tmp_path / "wide.csv").write_text(route("0,1,0,0").replace("n_expert_used=2", "n_expert_used=900000"))
    refused(capsys, tmp_path / "wide.csv", tmp_path / "t", *SHAPE)
    (tmp_path / "slot.csv").write_text(route("0,1,0,0") + "0,1,0,1,900000000,1,0.5\n")
    assert "rows are missing" in refused(capsys, tmp_path / "slot.csv", tmp_path / "t", *SHAPE)


ROUTE_FAULTS = [
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,4,0.75", "names expert 4; the model's experts are 0 to 3"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,-3,0.75", "names expert -3"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,1,0.75", "twice"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,1,3,0.75", "rank 1 of layer 1 twice"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,3", "has 6 cells; the header names 7"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,x,0.75", "must be numbers"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,3,-0.75", "has the weight -0.75"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,3,1e9", "has the weight 1000000000.0"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,3,inf", "infinite weight"),
    ("0,1,0,1,0,3,0.75", "0,1,0,1,0,3,nan", "1 of 8 weights are nan"),
    ("0,1,0,1,0,3,0.75\n", "", "lacks experts of layer 1"),
    ("0,1,0,1,0,3,0.75", "0,1,0,9,0,3,0.75", "layers are 0 to 1"),
    ("0,1,0,1,0,3,0.75", "0,2,0,1,0,3,0.75", "a phase is 2"),
    ("\n0,1,1,", "\n0,1,2,", "goes from step 0 to 2"),
    ("\n0,1,1,", "\n0,1,-1,", "a step is negative"),
    ("n_expert_used=2", "n_expert_used=3", "n_expert_used is 3"),
    ("slot,expert", "slot,exp", "no column 'expert'"),
    ("# model=", "# nodel=", "is missing"),
]


@pytest.mark.parametrize(("old", "new", "message"), ROUTE_FAULTS)
def test_faults_in_a_route_csv(tmp_path: Path, old: str, new: str, message: str, capsys: Any) -> None:
    text = route("0,1,0,0", "0,1,0,1", "0,1,1,0", "0,1,1,1")
    assert old in text
    (tmp_path / "r.csv").write_text(text.replace(old, new))
    assert message in refused(capsys, tmp_path / "r.csv", tmp_path / "t", *SHAPE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selected_experts": [1, 6]}, "names expert 6"),
        ({"selected_experts": [1]}, "give one per expert"),
        ({"selected_experts": [1], "selected_probabilities": [0.5]}, "selects 1 experts, the lines before 2"),
        ({"selected_experts": [2, 2]}, "twice"),
        ({"selected_experts": [True, 2]}, "integers from 0"),
        ({"selected_probabilities": [0.5, float("nan")]}, "holds NaN"),
        ({"selected_probabilities": [0.5, 1e999]}, "holds Infinity"),
        ({"selected_probabilities": []}, "give all, or none"),
        ({"selected_probabilities": "ab"}, "give one per expert"),
        ({"layer": 7}, "has no record for layer"),
        ({"token_position": 9}, "has no record for layer"),
        ({"token_position": 0}, "prompt and generated"),
        ({"phase": "source"}, "it must be prompt or generated"),
        ({"record_type": "metadata"}, "it must be a routing_selection"),
    ],
)
def test_faults_in_a_moe_cache_lab_file(tmp_path: Path, change: dict[str, Any], message: str, capsys: Any) -> None:
    records = cache_lab(1)
    records[-1] |= change
    source = write_lines(tmp_path / "c.jsonl", records)
    assert message in refused(capsys, source, tmp_path / "t", *SHAPE)


def test_faults_of_moe_cache_lab_versions(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for index, change, message in (
        (0, {"format_version": 3}, "this program reads 1 and 2"),
        (0, {"routing_stages": []}, "describes no decoder"),
        (1, {"routing_stage": "encoder"}, "decoders only"),
        (1, {"assignment_state": "unassigned"}, "no expert took"),
    ):
        records = cache_lab(2)
        records[index] |= change
        source = write_lines(tmp_path / "c.jsonl", records)
        assert message in refused(capsys, source, tmp_path / "t", *SHAPE)


def test_faults_in_a_gpt_oss_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*NAMED, "--experts", "4"]
    source, out = tmp_path / "g.json", tmp_path / "t"
    source.write_text(json.dumps(gpt_oss_document()))
    trace = run(source, out, *flags)
    assert trace.phase.tolist() == [PREFILL, DECODE]
    out.unlink()
    faults = [
        (lambda d: d["router_data"][1]["token_6"].pop("layer_1"), "every token must have"),
        (lambda d: d["router_data"].append(d["router_data"][0]), "count up by one"),
        (lambda d: d["router_data"][1]["token_6"]["layer_0"].update(selected_experts=[1, 4]), "names expert 4"),
        (lambda d: d["router_data"][1]["token_6"]["layer_0"].update(selected_experts=[1]), "give as many"),
        (lambda d: d["router_data"][1]["token_6"]["layer_0"].update(selected_probs=None), "list of numbers"),
        (lambda d: d["router_data"][1]["token_6"].update(layer_x={}), "must be layer_<number>"),
        (lambda d: d.update(router_data=[]), "holds no routing"),
        (lambda d: d.update(router_data={}), "missing or no list"),
        (lambda d: d["router_data"].append(3), "must hold objects"),
    ]
    for fault, message in faults:
        document = gpt_oss_document()
        fault(document)
        source.write_text(json.dumps(document))
        assert message in refused(capsys, source, out, *flags), message
    source.write_text(json.dumps(gpt_oss_document())[:-20])
    assert "not valid JSON" in refused(capsys, source, out, *flags)


def test_faults_in_arrays(tmp_path: Path, ids: np.ndarray, capsys: pytest.CaptureFixture[str]) -> None:
    out, flags = tmp_path / "t", [*NAMED, "--experts", "8"]
    lens = np.array([7], np.int32)
    weights = np.full(ids.shape, 0.5, np.float32)
    bad = weights.copy()
    bad[3, 1, 0] = np.nan
    for arrays, message in (
        ({"experts": ids, "probs": weights[:5], "lens": lens}, "[tokens, layers, top_k]"),
        ({"experts": ids, "probs": bad, "lens": lens}, "token 3, layer 1 has the weight nan"),
        ({"experts": ids, "probs": weights, "lens": lens + 1}, "sum to the 7 tokens"),
        ({"experts": ids, "probs": weights, "lens": np.array([8, -1])}, "sequence has at least 1 token"),
        ({"experts": ids + 20, "probs": weights, "lens": lens}, "the model's experts are 0 to 7"),
    ):
        np.savez(tmp_path / "g.npz", **arrays)
        assert message in refused(capsys, tmp_path / "g.npz", out, *flags), message
    np.save(tmp_path / "v.npy", ids)
    assert "give --prefill N" in refused(capsys, tmp_path / "v.npy", out, *flags)
    assert "--prefill is 8" in refused(capsys, tmp_path / "v.npy", out, *flags, "--prefill", "8")
    assert "--sequences is 2" in refused(capsys, tmp_path / "v.npy", out, *flags, "--prefill", "0", "--sequences", "2")
    (tmp_path / "v.json").write_text(json.dumps({"choices": [{"routed_experts": [[[1, 2]], [[1]]]}]}))
    assert "routed_experts is damaged" in refused(capsys, tmp_path / "v.json", out, *flags)
    logits = np.random.default_rng(0).normal(size=(2, 3, 4))
    logits[1, 2, 3] = np.nan
    np.save(tmp_path / "l.npy", logits)
    model = [*NAMED, "--top-k", "2", "--weights", "softmax"]
    assert "token 2, layer 1, expert 3 is not a finite" in refused(capsys, tmp_path / "l.npy", out, *model)
    np.savez(tmp_path / "l.npz", layer_0=logits[0], layer_1=logits[1, :2])
    assert "shaped like the first" in refused(capsys, tmp_path / "l.npz", out, *model)


def test_faults_in_an_sglang_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    rng = np.random.default_rng(4)
    source, out = tmp_path / "s.pt", tmp_path / "t"
    good = [
        sglang_record(1, 1, routed(rng, 2), [0, 1], [2]),
        sglang_record(2, 2, routed(rng, 1), [2], None),
    ]
    ids = good[1]["topk_ids_of_layer"]
    outside, hole = ids.clone(), ids.clone()
    outside[1, 0, 0] = 6
    hole[1, 0, 0] = -1
    for change, message in (
        ({"topk_ids_of_layer": outside}, "a physical expert is 6"),
        ({"topk_ids_of_layer": hole}, "has no expert at rank 0"),
        ({"topk_ids_of_layer": ids[:2]}, "must be integers, [3 layers, 1 tokens, ranks]"),
        ({"topk_ids_of_layer": None}, "must be a tensor"),
        ({"positions": [9]}, "which no request got to"),
        ({"forward_pass_id": 1}, "passes must be in order"),
        ({"forward_mode": 3}, "mixes prefill and decode"),
        ({"forward_mode": "x"}, "must be an integer"),
        ({"rank": 1}, "2 ranks or gatherers"),
    ):
        sglang_file(source, [good[0], good[1] | change])
        assert message in refused(capsys, source, out, *NAMED), message
    torch.save({"records": good}, source)
    assert "last_physical_to_logical_map is a NoneType" in refused(capsys, source, out, *NAMED)


def test_mutated_files_end_in_a_sentence_or_a_trace(tmp_path: Path, ids: np.ndarray) -> None:
    """Changed and cut bytes of every container: recognise never raises, and read raises TraceError alone."""
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    safetensors = pytest.importorskip("safetensors.numpy")
    rng = np.random.default_rng(5)
    np.save(tmp_path / "vllm.npy", ids)
    np.savez_compressed(tmp_path / "vllm.npz", routed_experts=ids)
    (tmp_path / "vllm.json").write_text(json.dumps({"choices": [{"routed_experts": ids.tolist()}]}))
    (tmp_path / "route-csv.csv").write_text(route("0,1,0,0", "0,1,0,1"))
    write_lines(tmp_path / "moe-cache-lab.jsonl", cache_lab(1))
    torch.save((torch.randn(5, 4), torch.randn(5, 4)), tmp_path / "transformers.pt")
    sglang_file(tmp_path / "sglang.pt", [sglang_record(1, 1, routed(rng, 2), [0, 1], [2])])
    np.save(tmp_path / "transformers.npy", rng.normal(size=(2, 5, 4)))
    safetensors.save_file({"router_logits.0": rng.normal(size=(5, 4))}, tmp_path / "transformers.safetensors")
    (tmp_path / "gpt-oss.json").write_text(json.dumps(gpt_oss_document()))
    np.savez(tmp_path / "gpt-oss.npz", experts=ids, probs=np.ones(ids.shape, np.float16), lens=np.array([3, 4]))
    shape = Options(name="m", hidden_size=64, expert_size=32, prefill=0, weights="softmax")
    needs = {"transformers": {"top_k": 2}, "vllm": {"num_experts": 8}, "gpt-oss": {"num_experts": 8}}
    known = importers()
    outcomes = {"read": 0, "refused": 0}
    for source in sorted(path for path in tmp_path.iterdir() if path.is_file()):
        data = source.read_bytes()
        for _ in range(60):
            changed = bytearray(data)
            for at in rng.integers(len(data), size=rng.integers(1, 4)):
                changed[at] = rng.integers(256)
            if rng.random() < 0.3:
                del changed[rng.integers(len(changed)) :]
            (tmp_path / "m").write_bytes(changed)
            for importer in known.values():
                importer.recognise(tmp_path / "m")
            try:
                convert_file(tmp_path / "m", source.stem, replace(shape, **needs.get(source.stem, {})))
                outcomes["read"] += 1
            except TraceError as error:
                assert "\n" not in str(error)
                outcomes["refused"] += 1
    assert min(outcomes.values()) > 30
