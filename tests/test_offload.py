"""`offload`: transformers' own generate on an offloaded model gives what the resident model gives."""

from __future__ import annotations

import gc
import io
import json
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the engine needs the runtime extra")
transformers = pytest.importorskip("transformers", reason="the engine needs the runtime extra")

from tiny import tiny_mixtral  # noqa: E402

from runtime import models, offload  # noqa: E402 (after the check above)
from runtime.budget import dense_tensors, tensor_bytes, tensors_in  # noqa: E402
from runtime.copier import CopierError  # noqa: E402
from runtime.generate import main, prompt_ids  # noqa: E402
from runtime.quantize import dequantize, views  # noqa: E402
from runtime.verdict import replayed  # noqa: E402
from sim.ledger import LoadLog  # noqa: E402
from sim.spec import SpecError  # noqa: E402

IDS = torch.tensor([[5, 17, 3, 99, 42, 7, 250, 11]])
BATCH = torch.tensor([[5, 17, 3, 99], [8, 8, 1, 200], [0, 0, 31, 7], [0, 64, 65, 66]])
MASK = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [0, 0, 1, 1], [0, 1, 1, 1]])
WAYS = {
    "greedy": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "do_sample": False},
    "batch": {"input_ids": BATCH, "attention_mask": MASK, "do_sample": False},
    "beams": {"input_ids": IDS, "attention_mask": torch.ones_like(IDS), "num_beams": 3, "do_sample": False},
    "sampled": {"input_ids": BATCH, "attention_mask": MASK, "do_sample": True, "temperature": 0.9},
}


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_mixtral(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def store(model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store file that every test maps."""
    path = tmp_path_factory.mktemp("stores") / "tiny.experts"
    offload(model_dir, store=path, optimize=False).offload_close()
    return path


def offloaded(model_dir: Path, store: Path, **options):
    return offload(model_dir, store=store, **{"optimize": False, "link_gb_s": 0.2} | options)


def continued(model, way: str) -> torch.Tensor:
    torch.manual_seed(0)
    return model.generate(**WAYS[way], max_new_tokens=10, pad_token_id=0)


@pytest.fixture(scope="module")
def expected(model_dir: Path, store: Path) -> dict[str, torch.Tensor]:
    """What transformers' own experts write when they hold the same quantized weights."""
    reference, _ = models.load(model_dir)
    ours = offloaded(model_dir, store)
    rows = ours.offloaded.executor.store
    for layer, found in enumerate(models.moe_blocks(reference)):
        for expert in range(6):
            gate, up, down = dequantize(views(rows.row(layer * 6 + expert), rows.layouts[layer]))
            with torch.no_grad():
                found.block.experts.gate_up_proj[expert] = torch.cat([gate, up])
                found.block.experts.down_proj[expert] = down
    ours.offload_close()
    return {way: continued(reference, way) for way in WAYS}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("policy", "slots"), [("speculative", 2), ("on_demand", 6), ("speculative:guard=0,landing_slots=1", 3)]
)
def test_generate_is_unchanged(model_dir, store, expected, way, policy, slots) -> None:
    """Greedy, a padded batch, beam search and sampling write what the resident model writes."""
    model = offloaded(model_dir, store, policy=policy, slots=slots)
    assert torch.equal(continued(model, way), expected[way])
    stats = model.offload_stats()
    assert stats["hits"] + stats["late"] + stats["misses"] == stats["accesses"] > 0
    model.offload_close()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("policy", ["speculative", "on_demand", "mixtral_offloading"])
def test_on_cuda_outputs_do_not_depend_on_the_slots(model_dir, tmp_path, policy) -> None:
    """Batches, greedy."""
    texts = []
    for slots in (6, 2):
        model = offloaded(model_dir, tmp_path / "store", device="cuda", link_gb_s=None, policy=policy, slots=slots)
        inputs = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in WAYS["batch"].items()}
        texts.append(model.generate(**inputs, max_new_tokens=10, pad_token_id=0).cpu())
        model.offload_close()
    assert torch.equal(*texts)


def test_a_loaded_model_is_offloaded_in_place(model_dir) -> None:
    """Its experts leave the module tree; at 16 bits its logits stay."""
    model, _ = models.load(model_dir)
    with torch.inference_mode():
        before = model(input_ids=IDS).logits
        weights = sum(p.numel() for p in model.parameters())
        assert offload(model, bits=16, slots=2) is model
        after = model(input_ids=IDS).logits
    assert float((after - before).abs().max()) <= 1e-5 * float(before.abs().max())
    assert sum(p.numel() for p in model.parameters()) == weights - 5 * 6 * 3 * 64 * 128
    model.offload_close()


@pytest.mark.parametrize("way", ["greedy", "batch"])
def test_the_simulator_replays_a_recorded_run_load_for_load(model_dir, store, way) -> None:
    """Batches too: guesses of several tokens are merged as the simulator merges them."""
    log = io.StringIO()
    model = offloaded(model_dir, store, policy="speculative:guard=0,trust=0", slots=3, record=True)
    executor = model.offloaded.executor
    executor.ledger.log = LoadLog(log)
    continued(model, way)
    continued(model, way)
    trace = executor.recorder.trace({}, "router")
    simulated = io.StringIO()
    replayed(trace, executor.timing.machine, 4, 3, executor.options, simulated)
    assert log.getvalue().splitlines() == simulated.getvalue().splitlines()
    assert '"prefetch"' in log.getvalue()
    model.offload_close()


def test_a_pass_that_breaks_off_leaves_the_model_usable(model_dir, store, expected) -> None:
    """An exception between two layers (Ctrl-C, say) costs the slots' content and nothing else."""
    model = offloaded(model_dir, store, slots=2, record=True)
    block = models.moe_blocks(model)[3].block

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    hook = block.register_forward_pre_hook(fail)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            continued(model, "greedy")
    hook.remove()
    assert torch.equal(continued(model, "greedy"), expected["greedy"])
    trace = model.offloaded.executor.recorder.trace({}, "router")
    assert len(trace.sequence_lengths) == 1
    model.offload_close()


def test_closing_leaves_nothing_behind(model_dir, store) -> None:
    """Closed by hand or forgotten, the copier's process ends, and a closed model says so."""
    model = offloaded(model_dir, store)
    pid = model.offloaded.executor.copier.pid
    model.offload_close()
    model.offload_close()
    with pytest.raises(CopierError, match="closed"):
        continued(model, "greedy")
    forgotten = offloaded(model_dir, store)
    other = forgotten.offloaded.executor.copier.pid
    del forgotten
    gc.collect()
    for gone in (pid, other):
        assert not Path(f"/proc/{gone}").exists()
    assert threading.active_count() == 1 or all(t.daemon for t in threading.enumerate()[1:])


@pytest.mark.parametrize("context", [64, 1000])
@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (4, "bfloat16"), ([8, 4, 3, 3, 2], "float32")])
def test_the_budget_holds(model_dir, context, bits, dtype) -> None:
    """What is stated is what is there, within 2 % and never above: dense weights, slots, buffers, KV cache."""
    limit = 1_000_000 + 2 * 5 * 2 * 4 * 64 * context
    model = offload(
        model_dir,
        bits=bits,
        dtype=dtype,
        vram=limit,
        context=context,
        optimize=False,
        progress=False,
        policy="on_demand",
    )
    handle = model.offloaded
    assert handle.budget.total_bytes <= limit
    assert handle.budget.total_bytes + 5 * handle.budget.slot_bytes > limit or handle.budget.slots == 6
    with torch.inference_mode():
        ids = torch.arange(context)[None] % 250
        cache = model(input_ids=ids, use_cache=True).past_key_values
    executor = handle.executor
    own = tensor_bytes(dense_tensors(model))
    own += tensor_bytes(tensors_in(cache))
    own += executor.pool.count * executor.pool.row_bytes
    own += tensor_bytes(tensors_in([executor.experts.workspaces, executor.gates]))
    assert 0.98 * handle.budget.total_bytes <= own <= handle.budget.total_bytes
    model.offload_close()


def test_bfloat16_is_the_same_offloaded_and_resident(model_dir, store) -> None:
    """Experts and dense part computed in bfloat16, prefill and decode."""
    texts = []
    for slots in (6, 2):
        model = offloaded(model_dir, store, dtype="bfloat16", slots=slots)
        texts.append(continued(model, "batch"))
        model.offload_close()
    assert torch.equal(*texts)


def test_a_refused_call_leaves_a_loaded_model_whole(model_dir) -> None:
    """Everything is checked before the first expert is taken."""
    model, _ = models.load(model_dir)
    for wrong in (
        {"slots": 1},
        {"vram": 1000},
        {"machine": "nothing"},
        {"policy": "on_demand:cache=belady"},
        {"bits": 5},
    ):
        with pytest.raises(ValueError):  # noqa: PT011 (each its own sentence)
            offload(model, **wrong)
    with torch.inference_mode():
        assert model(input_ids=IDS).logits.isfinite().all()
    offload(model, optimize=False, progress=False)
    with pytest.raises(ValueError, match="offloaded already"):
        offload(model)
    cache = model(input_ids=IDS).past_key_values  # without inference_mode: nothing is trained here
    model(input_ids=IDS[:, :1], past_key_values=cache)
    figures = model.offload_stats()
    model.offload_close()
    assert model.offload_stats() == figures


def test_too_little_memory_is_said_with_what_would_do(model_dir, store) -> None:
    with pytest.raises(SpecError, match=r"0\.10 MB are too few: tiny\d+ needs .* on the device: .*\(2 a layer\)"):
        offloaded(model_dir, store, vram=100_000)


@pytest.mark.parametrize("policy", ["speculative", "on_demand", "mixtral_offloading", "confidence:cache=heat"])
def test_the_command_writes_the_same_text_with_two_slots_as_with_all(model_dir, store, capsys, monkeypatch, policy):
    """Text, then figures, then one JSON document."""
    texts = []
    for slots in ("6", "2"):
        words = ["--model", str(model_dir), "--store", str(store), "--fast", "--tokens", "12", "--slots", slots]
        words += ["--policy", policy, "--prompt", "def add(", "--link-gb-s", "0.5"]
        monkeypatch.setattr(sys, "argv", ["runtime.generate", *words])
        assert main() == 0
        out = capsys.readouterr().out
        document = json.loads(out.splitlines()[-1])
        assert out.startswith("def add(" + document["text"].split("\n")[0])
        assert "MEASURED" in out and "bound" in out
        assert document["tpot_s"] >= document["bounds"]["link_floor_s"]
        texts.append(document["text"])
    assert texts[0] == texts[1]


def test_a_chat_template_is_used_where_there_is_one(model_dir) -> None:
    """The prompt becomes a user's message; --no-chat continues it as it stands."""
    _, tokenizer = models.load(model_dir)
    plain = tokenizer("def add(", return_tensors="pt").input_ids
    assert torch.equal(prompt_ids(tokenizer, "def add(", None), plain)
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
    chat = prompt_ids(tokenizer, "def add(", None)
    assert tokenizer.decode(chat[0]) == "user: def add("
    assert torch.equal(prompt_ids(tokenizer, "def add(", False), plain)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "0"], "--tokens is 0; it must be at least 1"),
        (["--vram", "many"], "--vram is 'many'"),
        (["--policy", "nothing"], "policy 'nothing' is unknown"),
        (["--chat"], "--chat needs a tokenizer with a chat template"),
        (["--context", "10"], "need more than --context 10"),
        (["--slots", "1"], "slots"),
        (["--temperature", "-1"], "--temperature is -1.0"),
    ],
)
def test_bad_input_is_one_sentence(model_dir, store, capsys, monkeypatch, words, sentence) -> None:
    base = [
        "runtime.generate",
        "--model",
        str(model_dir),
        "--store",
        str(store),
        "--fast",
        "--prompt",
        "def add(a, b):",
    ]
    monkeypatch.setattr(sys, "argv", [*base, *words])
    assert main() == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("runtime.generate")]
    assert len(lines) == 1 and sentence in lines[0]


def test_ctrl_c_ends_the_command_and_its_copier(model_dir, store) -> None:
    """Interrupted while text is written: exit code 130, no traceback, and the copier's process is gone."""
    command = [sys.executable, "-m", "runtime.generate", "--model", str(model_dir), "--store", str(store), "--fast"]
    slow = ["--tokens", "4000", "--link-gb-s", "0.002", "--prompt", "def add(", "--policy", "on_demand", "--slots", "2"]
    with subprocess.Popen([*command, *slow], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        process.stdout.read(9)  # text has begun
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in errors and b"stopped" in errors
    assert children
    assert not any(Path(f"/proc/{child}").exists() for child in children)


def test_widths_may_differ_by_layer(model_dir) -> None:
    """Slots are as large as the widest expert; outputs do not depend on how many there are."""
    texts = []
    for slots in (6, 2):
        model = offload(model_dir, bits=[8, 4, 4, 3, 2], slots=slots, optimize=False, progress=False)
        texts.append(continued(model, "greedy"))
        assert model.offloaded.executor.store.expert_bytes == model.offloaded.executor.spec.expert_bytes(8)
        model.offload_close()
    assert torch.equal(*texts)


def test_importing_the_package_is_light() -> None:
    code = "import sys, runtime; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
