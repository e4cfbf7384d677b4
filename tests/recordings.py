"""Recordings to convert, and what running the command on them gives.

Where no real recording is at hand, the file is made by the format's own writer (tiny models of transformers) or laid
out as its documentation says: vLLM's documents on routed experts, SGLang's expert_distribution.py, TRACE_FORMAT.md of
moe-cache-lab, the route-trace section of BigMoeOnEdge's documents.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from traces import Trace, load
from traces.convert import main

ROOT = Path(__file__).parent.parent
SHARED = ROOT.parent / "shared/data/traces"
SHAPE = ["--hidden-size", "64", "--expert-size", "32"]
NAMED = ["--name", "made-up", *SHAPE]


def need(path: Path) -> Path:
    if not path.exists():
        pytest.skip(f"../shared/data, with {path.name}, is not next to the project")
    return path


def run(source: Path, out: Path, *flags: str) -> Trace:
    """The trace that the command writes."""
    assert main([str(source), "--out", str(out), *flags]) == 0
    return load(out)


def refused(capsys: pytest.CaptureFixture[str], source: Path, out: Path, *flags: str) -> str:
    """The one sentence with which the command refuses a source."""
    capsys.readouterr()
    assert main([str(source), "--out", str(out), *flags]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1 and captured.err.startswith("traces.convert: ")
    assert not out.exists()
    return captured.err


ROUTE = """# route_trace v1
# model=/x/tiny.gguf arch=tiny n_layer=2 n_expert=4 n_expert_used=2
# layer=0 expert_bytes=10 dense_bytes=5
# layer=1 expert_bytes=10 dense_bytes=5
turn,phase,step,layer,slot,expert,weight
"""


def route(*cells: str) -> str:
    """Two ranks of each (turn,phase,step,layer)."""
    return ROUTE + "".join(f"{cell},0,3,0.75\n{cell},1,1,0.25\n" for cell in cells)


def sglang_record(number: int, mode: int, ids: np.ndarray, positions: list[int], lengths: list[int] | None) -> dict:
    """One forward pass: layer 0 is dense, and the model's top_k of 3 leaves five of eight ranks at -1."""
    torch = pytest.importorskip("torch", reason="needs the runtime extra")
    padded = torch.full((ids.shape[1] + 1, len(ids), 8), -1, dtype=torch.int32)
    padded[1:, :, :3] = torch.from_numpy(ids.transpose(1, 0, 2).astype(np.int32))
    return {
        "forward_pass_id": number, "rank": 0, "gatherer_key": "primary", "input_ids": [7] * len(ids),
        "positions": positions, "extend_seq_lens": lengths, "forward_mode": mode, "topk_ids_of_layer": padded,
        "misc_objects": [],
    }  # fmt: skip


def sglang_file(path: Path, records: list[dict]) -> np.ndarray:
    """Write records with two layers of 6 physical experts for 5 logical ones; returns the map of those layers."""
    import torch

    maps = torch.tensor([[0, 1, 2, 3, 4, 0], [4, 3, 2, 1, 0, 2], [1, 2, 3, 4, 0, 4]])
    torch.save({"records": records, "last_physical_to_logical_map": maps}, path)
    return maps[1:].numpy()


def routed(rng: np.random.Generator, tokens: int) -> np.ndarray:
    """Physical ids [tokens, 2, 3] of which no two are one logical expert (5 is left out)."""
    return np.argsort(rng.random((tokens, 2, 5)))[..., :3]


def cache_lab(version: int, with_probabilities: bool = True) -> list[dict[str, Any]]:
    """Two prompt and two generated tokens in layers 1 and 3; prompt layer by layer, the rest token by token."""
    first: dict[str, Any] = {
        "record_type": "metadata", "format": "moe-cache-lab.routing-jsonl", "format_version": version, "model_id": "a/b"
    }  # fmt: skip
    phases = ("prompt", "generated") if version == 1 else ("decoder_prompt", "decoder_generated")
    if version == 1:
        first |= {"num_experts": 6, "experts_per_token": 2, "source_text": "text"}
    else:
        profile = {"routing_stage": "decoder", "num_experts": 6, "assigned_experts_per_token": 2}
        first["routing_stages"] = [profile | {"allows_unassigned": True}]
    records = [first]
    for phase, token, layer in [(0, 0, 1), (0, 1, 1), (0, 0, 3), (0, 1, 3), (1, 2, 1), (1, 2, 3), (1, 3, 1), (1, 3, 3)]:
        event = {
            "record_type": "routing_selection", "phase": phases[phase], "token_position": token, "layer": layer,
            "selected_experts": [(token + layer) % 6, token % 2],
            "selected_probabilities": [0.1 + token / 7, 0.05] if with_probabilities else [],
        }  # fmt: skip
        records.append(event | ({} if version == 1 else {"routing_stage": "decoder", "assignment_state": "assigned"}))
    return records


def write_lines(path: Path, records: list[Any]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def gpt_oss_document() -> dict[str, Any]:
    cell = {"selected_experts": [3, 1], "selected_probs": [0.75, 0.25]}
    data = [{f"token_{t}": {f"layer_{i}": dict(cell) for i in range(2)}} for t in (5, 6)]
    return {"full_text": ["a"] * 7, "generated_only": ["a"], "router_data": data}


def vllm_ids() -> np.ndarray:
    """int16 [7 tokens, 3 layers, 2], not in the order of the ids."""
    return np.argsort(np.random.default_rng(1).random((7, 3, 8)))[..., :2].astype(np.int16)
