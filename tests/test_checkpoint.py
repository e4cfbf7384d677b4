"""Stores: read from every layout of a checkpoint, kept in files, continued after a kill, refused when foreign."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from safetensors.torch import load_file, save_file  # noqa: E402
from small_models import CONFIGS, small_model  # noqa: E402

from runtime import models, store, store_file  # noqa: E402
from runtime.checkpoint import Checkpoint, identity  # noqa: E402
from runtime.quantize import dequantize, pack, views  # noqa: E402
from runtime.store import HostStore, StoreError, check_memory, layouts_of  # noqa: E402
from traces.vocabulary import ExpertId, ModelSpec  # noqa: E402

ROOT = Path(__file__).parents[1]
SPEC = ModelSpec("tiny", 3, 4, 2, 64, 128)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """One tiny Mixtral saved with an entry per expert, in several files, and with fused experts; and another model."""
    base = tmp_path_factory.mktemp("checkpoints")
    model = small_model("mixtral").to(torch.bfloat16)
    model.save_pretrained(base / "separate")
    model.save_pretrained(base / "sharded", max_shard_size="100KB")
    model.save_pretrained(base / "fused", save_original_format=False)
    small_model("mixtral", seed=8).to(torch.bfloat16).save_pretrained(base / "other")
    return base


def expert_of(weights: dict, layer: int, expert: int) -> list:
    prefix = f"model.layers.{layer}.block_sparse_moe.experts.{expert}."
    return [weights[f"{prefix}{name}.weight"] for name in ("w1", "w3", "w2")]


@pytest.mark.parametrize("form", ["separate", "sharded", "fused"])
def test_a_store_holds_every_expert_of_the_checkpoint_in_its_row(checkpoints, form):
    weights = load_file(checkpoints / "separate" / "model.safetensors")
    with HostStore.build(checkpoints / form, SPEC, 16, progress=False) as built:
        assert built.count == 12
        assert built.quantization_error == 0
        for layer in range(3):
            for expert in range(4):
                index = built.index(ExpertId(layer, expert))
                assert index == layer * 4 + expert
                assert built.row(index).data_ptr() % 64 == 0
                got = dequantize(views(built.row(index), built.layout), torch.bfloat16)
                assert all(map(torch.equal, got, expert_of(weights, layer, expert)))


def test_a_store_quantizes_as_pack_does_and_says_how_well(checkpoints):
    weights = load_file(checkpoints / "separate" / "model.safetensors")
    with HostStore.build(checkpoints / "separate", SPEC, 3, optimize=False, progress=False) as built:
        experts = [expert_of(weights, layer, e) for layer in range(3) for e in range(4)]
        assert torch.equal(built.row(6), pack(*experts[6], built.layout, optimize=False))
        errors = [
            float((got - given.float()).norm() / given.float().norm())
            for i, expert in enumerate(experts)
            for got, given in zip(dequantize(views(built.row(i), built.layout)), expert, strict=True)
        ]
        assert built.quantization_error == pytest.approx(sum(errors) / len(errors), rel=1e-4)
        assert "3 bits, groups of 64, rounded to nearest" in built.describe()


def test_large_matrices_are_quantized_in_pieces_hqq_unpacks(monkeypatch):
    """Without the solver a piece is quantized as in the whole matrix."""
    from runtime import quantize

    layout = quantize.ExpertLayout(128, 192, 3, 32)
    generator = torch.Generator().manual_seed(1)
    expert = [torch.randn(s, generator=generator) for s in ((192, 128), (192, 128), (128, 192))]
    whole = pack(*expert, layout, optimize=False)
    monkeypatch.setattr(quantize, "CHUNK", 1000)
    assert torch.equal(pack(*expert, layout, optimize=False), whole)


def test_checkpoints_that_do_not_fit_are_refused(checkpoints, tmp_path):
    with pytest.raises(ValueError, match=r"holds no config\.json"):
        HostStore.build(tmp_path, SPEC, 4)
    shutil.copy(checkpoints / "separate" / "config.json", tmp_path)
    with pytest.raises(StoreError, match=r"neither model\.safetensors nor"):
        HostStore.build(tmp_path, SPEC, 4)
    with pytest.raises(StoreError, match=r"has \(3, 4, 128, 64\) .* but model tiny has \(3, 8, 128, 64\)"):
        HostStore.build(checkpoints / "separate", ModelSpec("tiny", 3, 8, 2, 64, 128), 4)
    save_file({"x": torch.zeros(2)}, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match="no routed experts under a known name"):
        HostStore.build(tmp_path, SPEC, 4)
    (tmp_path / "model.safetensors").write_bytes(b"not this")
    with pytest.raises(StoreError, match="cannot be read as safetensors"):
        HostStore.build(tmp_path, SPEC, 4)
    weights = load_file(checkpoints / "separate" / "model.safetensors")
    del weights["model.layers.1.block_sparse_moe.experts.3.w2.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match="no down of expert 3 in MoE layer 1; the checkpoint is incomplete"):
        HostStore.build(tmp_path, SPEC, 4, progress=False)
    del weights["model.layers.2.self_attn.q_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(StoreError, match=r"no tensor for model\.layers\.2\.self_attn\.q_proj\.weight"):
        models.load_dense(tmp_path)


def test_identity_is_the_same_from_disk_and_loaded_and_other_in_other_models(checkpoints):
    found = {}
    for form in ("separate", "fused", "other"):
        with Checkpoint(checkpoints / form) as checkpoint:
            found[form] = checkpoint.identity()
    loaded = transformers.AutoModelForCausalLM.from_pretrained(checkpoints / "separate", dtype=torch.float32)
    assert found["separate"] == found["fused"] == identity(loaded)
    assert found["other"] != found["separate"]
    with torch.no_grad():
        models.moe_blocks(loaded)[1].experts.down_proj[2, 0, 0] += 0.5
    assert identity(loaded) != found["separate"]  # a fine-tune of one expert is another model


@pytest.mark.parametrize("name", CONFIGS)
def test_identity_of_every_family_is_the_same_from_disk_and_loaded(saved, name):
    with Checkpoint(saved(name)) as checkpoint:
        found = checkpoint.identity()
    assert found == identity(transformers.AutoModelForCausalLM.from_pretrained(saved(name), dtype=torch.float32))


# Files


def build(checkpoints, path: Path, form: str = "separate", bits=4, **how):
    return HostStore.build(checkpoints / form, SPEC, bits, optimize=False, progress=False, path=path, **how)


def test_a_kept_store_is_mapped_by_the_second_start(checkpoints, tmp_path, monkeypatch):
    path = tmp_path / "tiny.store"
    with build(checkpoints, path, bits=[4, 3, 8]) as first, build(checkpoints, tmp_path / "again", bits=[4, 3, 8]) as b:
        assert sorted(p.name for p in tmp_path.iterdir()) == ["again", "tiny.store"]
        assert (tmp_path / "again").read_bytes() == path.read_bytes()
        monkeypatch.setattr(store, "pack_into", None)  # nothing is packed again
        with build(checkpoints, path, "fused", bits=[4, 3, 8]) as second:
            assert torch.equal(first.block, second.block)
            assert torch.equal(b.block, second.block)
            assert second.layouts == first.layouts
            assert second.quantization_error == first.quantization_error > 0
            assert second.verified is True
            second.row(0).fill_(0)  # private: the file keeps its bytes
        with HostStore.open(path, SPEC, verify=False) as third:
            assert torch.equal(first.block, third.block)
            assert third.verified is False
            assert os.pread(third.fd, 100, 0) == bytes(third.row(0)[:100].numpy())  # what the copier process maps


def test_the_layout_of_a_file_is_the_one_described(checkpoints, tmp_path):
    path = tmp_path / "tiny.store"
    with build(checkpoints, path) as built:
        data = path.read_bytes()
        assert data[-8:] == b"EXPERTS1"
        length = int.from_bytes(data[-16:-8], "little")
        header = json.loads(data[-16 - length : -16])
        assert data[: -16 - length] == built.block.numpy().tobytes()
        assert header["bits"] == [4, 4, 4]
        assert header["group_size"] == 64
        assert header["optimize"] is False
        assert ModelSpec.from_json(header["spec"]) == SPEC


def test_other_truncated_and_damaged_stores_are_refused(checkpoints, tmp_path):
    path = tmp_path / "tiny.store"
    build(checkpoints, path).close()
    data = path.read_bytes()
    with pytest.raises(StoreError, match="is of another model; remove it"):
        build(checkpoints, path, "other")
    with pytest.raises(StoreError, match=r"has bits per layer \[4, 4, 4\], not \[3, 3, 3\]"):
        build(checkpoints, path, bits=3)
    with pytest.raises(StoreError, match="has group size 64, not 32"):
        build(checkpoints, path, group_size=32)
    with pytest.raises(StoreError, match="has model shape"):
        HostStore.open(path, ModelSpec("tiny", 3, 8, 2, 64, 128))
    for cut in (0, 10, len(data) // 2, len(data) - 1):
        path.write_bytes(data[:cut])
        with pytest.raises(StoreError, match="not a whole expert store"):
            build(checkpoints, path)
    path.write_bytes(data[1:])
    with pytest.raises(StoreError, match="but its header says"):
        build(checkpoints, path)
    path.write_bytes(bytes([data[0] ^ 1]) + data[1:])
    with pytest.raises(StoreError, match="is damaged"):
        build(checkpoints, path)
    build(checkpoints, path, verify=False).close()


def test_a_store_says_the_order_of_its_codes_and_another_is_refused(checkpoints, tmp_path):
    """Weights, sizes and scales are the same in both; with one value a word there is one order, whoever asks."""
    path = tmp_path / "tiny.store"
    with (
        build(checkpoints, path, bits=[4, 3, 8], order="rows") as rows,
        build(checkpoints, tmp_path / "other", bits=[4, 3, 8]) as hqq,
    ):
        assert store_file.read_header(path)["order"] == "rows"
        assert [layout.order for layout in rows.layouts] == ["rows", "rows", "hqq"]
        assert path.stat().st_size == (tmp_path / "other").stat().st_size + len("rows") - len("hqq")
        for index in range(rows.count):
            layer = index // SPEC.num_experts
            one, other = (views(s.row(index)[: s.layouts[layer].expert_bytes], s.layouts[layer]) for s in (rows, hqq))
            assert all(map(torch.equal, dequantize(one), dequantize(other)))
            assert torch.equal(one.codes, other.codes) == (layer == 2)
    with pytest.raises(StoreError, match=r"order of codes \(rows on a GPU .* else hqq\) 'rows', not 'hqq'; remove it"):
        build(checkpoints, path, bits=[4, 3, 8])
    with HostStore.open(path, SPEC) as found:  # whoever does not mind finds out
        assert found.layouts[0].order == "rows"
    eight = tmp_path / "eight.store"
    build(checkpoints, eight, bits=8).close()
    with build(checkpoints, eight, bits=8, order="rows") as found:
        assert found.layout.order == "hqq"


def test_a_store_of_the_first_version_is_refused(checkpoints, tmp_path):
    """It does not say the order of its codes."""
    path = tmp_path / "tiny.store"
    build(checkpoints, path).close()
    path.write_bytes(path.read_bytes().replace(b'"version": 2', b'"version": 1'))
    with pytest.raises(StoreError, match=r"has format version 1, not 2; remove it, or name another file"):
        build(checkpoints, path)


def test_a_killed_build_goes_on_where_it_stopped(checkpoints, tmp_path):
    """Killed while the sixth expert is packed: whole rows are not packed again, a damaged one is."""
    path = tmp_path / "tiny.store"
    script = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from runtime import store\n"
        "from traces import ModelSpec\n"
        "packed, real = [], store.pack_into\n"
        "def pack_into(*args):\n"
        "    packed.append(1)\n"
        "    if len(packed) == 6: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(*args)\n"
        "store.pack_into = pack_into\n"
        "store.HostStore.build(sys.argv[1], ModelSpec('tiny', 3, 4, 2, 64, 128), 4, optimize=False, progress=False,\n"
        "                      path=Path(sys.argv[2]))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, checkpoints / "separate", path], cwd=ROOT, timeout=120, capture_output=True
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert not path.exists()
    partial = tmp_path / "tiny.store.partial"
    with partial.open("r+b") as file:
        file.seek(2 * SPEC.expert_bytes(4) + 5)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
    packed = []
    real = store.pack_into
    with (
        pytest.MonkeyPatch.context() as patch,
        HostStore.build(checkpoints / "separate", SPEC, 4, optimize=False, progress=False) as expected,
    ):
        patch.setattr(store, "pack_into", lambda *args: packed.append(1) or real(*args))
        with build(checkpoints, path) as built:
            assert len(packed) == 12 - 5 + 1
            assert torch.equal(built.block, expected.block)
            assert built.quantization_error == expected.quantization_error
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.store"]


def test_a_build_of_something_else_does_not_go_on_from_anothers_rows(checkpoints, tmp_path):
    path = tmp_path / "tiny.store"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store, "_free", None)
        patch.setattr(HostStore, "_finish", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            build(checkpoints, path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["tiny.store.partial", "tiny.store.progress"]
    with (
        build(checkpoints, path, "other") as built,
        HostStore.build(checkpoints / "other", SPEC, 4, optimize=False, progress=False) as expected,
    ):
        assert torch.equal(built.block, expected.block)


# Memory


def test_too_little_memory_is_said_before_loading_with_the_width_that_would_fit():
    spec = ModelSpec("big", 32, 8, 2, 4096, 14336, dense_bytes=3_000_000_000)
    check_memory(spec, layouts_of(spec, 4), 30_000_000_000)
    with pytest.raises(
        StoreError, match=r"big at 4 bits .* need 29\.\d GB .* 25\.0 GB are available; 3 bits would fit"
    ):
        check_memory(spec, layouts_of(spec, 4), 25_000_000_000)
    with pytest.raises(StoreError, match="no width would fit: use a machine with more memory"):
        check_memory(spec, layouts_of(spec, 4), 8_000_000_000)


PEAK = """
import sys, threading, time
from pathlib import Path
import torch
torch.set_num_threads(1)
from runtime import models
from runtime.quantize import ExpertLayout, pack
from runtime.store import HostStore

def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(s.split()[1]) * 1024 for s in lines if s.startswith(("RssAnon", "RssShmem")))

spec = models.spec_of(Path(sys.argv[1]))
pack(*(torch.randn(64, 64) for _ in range(3)), ExpertLayout(64, 64, 4))  # imports what packing needs
start = peak = held()
stop = threading.Event()

def watch():
    global peak
    while not stop.is_set():
        peak = max(peak, held())
        time.sleep(0.0005)

thread = threading.Thread(target=watch)
thread.start()
store = HostStore.build(sys.argv[1], spec, int(sys.argv[2]), optimize=False, progress=False)
stop.set()
thread.join()
print(peak - start, store.count * store.row_bytes, 2 * spec.expert_bytes(16))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("bits", [4, 3])
def test_a_build_needs_the_store_and_two_experts(tmp_path, bits):
    """Private and shared memory of the process, sampled; pages of the checkpoint's file can be dropped: not counted."""
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=1024,
        intermediate_size=2048,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
    )
    torch.manual_seed(0)
    transformers.MixtralForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    run = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path, str(bits)],
        cwd=ROOT,
        env=os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"},  # freed memory goes back to the system at once
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    peak, rows, two_experts = map(int, run.stdout.split())
    assert rows < peak <= rows + two_experts
