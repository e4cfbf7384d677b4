"""Packed experts and the memory they stand in."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from runtime.quantize import ExpertLayout, Workspace, dequantize, forward, pack, views  # noqa: E402
from runtime.store import ExpertRows, SlotPool, StoreError  # noqa: E402
from traces.vocabulary import ModelSpec  # noqa: E402

ROOT = Path(__file__).parents[1]
BITS = (16, 8, 4, 3, 2)


def spec(hidden: int = 128, expert: int = 64, layers: int = 2, experts: int = 4) -> ModelSpec:
    return ModelSpec("tiny", layers, experts, 2, hidden, expert)


def matrices(hidden: int, expert: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(s, generator=generator) / 20 for s in ((expert, hidden), (expert, hidden), (hidden, expert))]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("hidden", "expert", "group"), [(192, 256, 64), (64, 64, 64), (128, 384, 32), (4096, 14336, 64)]
)
def test_a_buffer_has_the_bytes_the_vocabulary_says(bits, hidden, expert, group):
    assert ExpertLayout(hidden, expert, bits, group).expert_bytes == spec(hidden, expert).expert_bytes(bits, group)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize(("hidden", "expert", "group"), [(192, 256, 64), (64, 64, 64), (96, 32, 32)])
def test_dequantized_weights_are_hqqs_bit_for_bit(bits, hidden, expert, group, dtype):
    """HQQ unpacks the words of the buffer itself, so this holds the packing, the order and the rounding."""
    from hqq.core.quantize import Quantizer

    layout = ExpertLayout(hidden, expert, bits, group)
    pieces = views(pack(*matrices(hidden, expert), layout), layout)
    shapes = [(expert, hidden), (expert, hidden), (hidden, expert)]
    for i, (ours, shape) in enumerate(zip(dequantize(pieces, dtype), shapes, strict=True)):
        meta = {
            "nbits": bits,
            "group_size": group,
            "shape": torch.Size(shape),
            "scale": pieces.scale[i].to(dtype),
            "zero": pieces.zero[i].to(dtype),
            "axis": 1,
            "packing": Quantizer.bit_to_packing[bits],
            "view_as_float": False,
            "compute_dtype": dtype,
        }
        assert torch.equal(ours, Quantizer.dequantize(pieces.codes[i, 0], meta))


@pytest.mark.parametrize(("bits", "error"), [(16, 0.002), (8, 0.008), (4, 0.09), (3, 0.19), (2, 0.45)])
def test_packing_loses_no_more_than_its_bits(bits, error):
    layout = ExpertLayout(192, 256, bits)
    originals = matrices(192, 256)
    for original, got in zip(originals, dequantize(views(pack(*originals, layout), layout)), strict=True):
        assert (got - original).norm() / original.norm() < error


@pytest.mark.parametrize("bits", BITS)
def test_forward_is_the_swiglu_of_the_dequantized_matrices(bits):
    layout = ExpertLayout(128, 64, bits)
    pieces = views(pack(*matrices(128, 64), layout, optimize=False), layout)
    gate, up, down = dequantize(pieces)

    def swiglu(gate, up):
        return torch.nn.functional.silu(gate) * up

    workspace = Workspace(layout)
    for n in (1, 5):
        x = torch.randn(n, 128, generator=torch.Generator().manual_seed(n))
        expected = swiglu(x @ gate.T, x @ up.T) @ down.T
        torch.testing.assert_close(forward(pieces, x, swiglu, workspace), expected, rtol=1e-4, atol=1e-6)
        assert torch.equal(forward(pieces, x, swiglu), forward(pieces, x, swiglu, workspace))


def test_views_follow_the_buffer():
    """A slot's views are made once; whatever is copied into the slot later is what they show."""
    layout = ExpertLayout(128, 64, 4)
    first, second = (pack(*matrices(128, 64, seed), layout, optimize=False) for seed in (1, 2))
    with SlotPool(1, layout.expert_bytes) as slots:
        pieces = views(slots.row(0), layout)
        for packed in (first, second):
            slots.row(0).copy_(packed)
            assert torch.equal(dequantize(pieces)[2], dequantize(views(packed, layout))[2])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (lambda: ExpertLayout(128, 64, 5), "bits is 5"),
        (lambda: ExpertLayout(128, 96, 4), "group size 64 does not divide"),
        (lambda: ExpertLayout(9, 9, 4, 9), "needs a multiple of 2"),
        (lambda: ExpertLayout(2880, 96, 4), "group size 64 does not divide expert widths 2880 and 96; use 32 or 16"),
        (lambda: ExpertLayout(10, 10, 4, 64), "keep these experts at 16 bits"),
        (lambda: ExpertLayout.of(ModelSpec("b", 1, 2, 1, 64, 64, expert_bias=8), 4), "8 biases"),
    ],
)
def test_a_layout_that_cannot_be_is_refused(layout, message):
    with pytest.raises(ValueError, match=message):
        layout()


def test_wrong_tensors_are_refused():
    layout = ExpertLayout(128, 64, 4)
    gate, up, down = matrices(128, 64)
    with pytest.raises(ValueError, match=r"down has the shape \[64, 128\]; this layout needs \[128, 64\]"):
        pack(gate, up, gate, layout)
    with pytest.raises(ValueError, match="not a finite float16"):
        pack(gate * torch.inf, up, down, layout)
    with pytest.raises(ValueError, match=r"this layout needs torch.uint8"):
        views(torch.zeros(10, dtype=torch.uint8), layout)


# The memory they stand in


def test_buffers_are_separate_and_end_with_close():
    rows = ExpertRows(3, 100)
    assert rows.row_bytes == 128
    rows.row(1).fill_(7)
    assert [int(rows.row(i).sum()) for i in range(3)] == [0, 700, 0]
    with pytest.raises(IndexError, match="0 to 2"):
        rows.row(3)
    kept = rows.row(1)
    rows.close()
    rows.close()
    assert int(kept.sum()) == 700
    with pytest.raises(StoreError, match=r"after close\(\)"):
        rows.row(0)
    with pytest.raises(ValueError, match="both must be at least 1"):
        SlotPool(0, 100)


ENDINGS = {
    "return": "",
    "exception": "raise RuntimeError('on purpose')",
    "ctrl-c": "import os, signal; os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(30)",
    "killed": "import os, signal; os.kill(os.getpid(), signal.SIGKILL)",
}


@pytest.mark.parametrize("ending", ENDINGS)
def test_nothing_is_left_behind_however_the_process_ends(ending):
    """The blocks have no path while they live, so none outlives them; the copier process ends with its engine."""
    script = (
        "import json, os\n"
        "from runtime.store import ExpertRows, SlotPool\n"
        "from runtime.copier import Copier, Request\n"
        "store, slots = ExpertRows(4, 1 << 20), SlotPool(2, 1 << 20)\n"
        "copier = Copier(store, slots, bytes_per_s=1e6, fixed_s=0, chunk_bytes=4096)\n"
        "copier.apply(demand=[Request(0, 0, 0)])\n"
        "links = [os.fstat(fd).st_nlink for fd in (store.fd, slots.fd)]\n"
        "print(json.dumps([copier.pid, *links]), flush=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script + ENDINGS[ending]], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert (done.returncode == 0) == (ending == "return"), done.stderr
    child, *links = json.loads(done.stdout)
    assert links == [0, 0]
    deadline = time.monotonic() + 20
    while _runs(child) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")
