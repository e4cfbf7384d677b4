"""Fused kernels against float64 dequantize-and-multiply, by Triton's interpreter or on a GPU; the order of groups."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")

from kernel_errors import (  # noqa: E402 (before Triton is imported)
    GATES,
    SILU,
    TOLERANCE,
    error_in_a_slot,
    in_rows,
    layouts,
    on,
    random_expert,
    reference,
    relative_error,
)

from runtime import kernels, offload, offloading  # noqa: E402
from runtime.devices.cpu import CpuDevice  # noqa: E402
from runtime.family import ActGate  # noqa: E402
from runtime.quantize import ExpertLayout, dequantize, forward, pack, views  # noqa: E402
from runtime.repack import places  # noqa: E402

ROOT = Path(__file__).parents[1]
needs_triton = pytest.mark.skipif(not kernels.available(), reason="Triton is not installed: pip install triton")
GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")]
DEVICES = [
    pytest.param("cpu", marks=pytest.mark.skipif(torch.cuda.is_available(), reason="compiled for the GPU here")),
    pytest.param("cuda", marks=GPU),
]
# hidden, inner, group size; 2, 6, 1, 3, 5 groups a row: fewer and more than a word's ten, and with a rest
SHAPES = [(64, 192, 32), (64, 192, 64), (192, 320, 64), (64, 64, 16), (128, 256, 128)]
LAYOUTS = [ExpertLayout(hidden, inner, bits, group) for hidden, inner, group in SHAPES for bits in (8, 4, 3, 2)]


# What the interpreter, which is slow, computes of these: 3 bits always, one other width a shape. All of them with every
# shape, group, type and number of tokens: tests/kernel_errors.py.
COMPUTED = [layout for n, layout in enumerate(LAYOUTS) if layout.bits in (3, (8, 4, 2)[n // 4 % 3])]


def name(layout: ExpertLayout) -> str:
    return f"{layout.bits}b-g{layout.group_size}-{layout.hidden_size}x{layout.expert_size}"


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("layout", COMPUTED, ids=name)
def test_every_width_group_and_shape_in_both_orders(layout, device):
    """One token by sums, three by products, in HQQ's order and row by row, against float64.

    All four at 3 bits; one by sums and one by products at the others, whose code is the same.
    """
    expert = random_expert(layout)
    x = torch.randn(3, layout.hidden_size, generator=torch.Generator().manual_seed(1))
    expected = reference(expert, x, "silu")
    for order, there in (("hqq", expert), ("rows", in_rows(expert))):
        there = on(device, there)
        for n in (1, 3) if layout.bits == 3 else (1,) if order == "hqq" else (3,):
            got = kernels.forward(there, x[:n].to(device), SILU)
            assert got.shape == (n, layout.hidden_size)
            assert relative_error(got, expected[:n]) < 1e-5, (order, n)  # float32 throughout


@needs_triton
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("bits", "tokens"), [(8, 2), (8, 64), (4, 1), (4, 17), (3, 1), (3, 64), (2, 17)])
def test_half_precision_and_batches(bits, tokens, dtype, device):
    layout = ExpertLayout(64, 192, bits)
    expert = random_expert(layout, bits)
    x = torch.randn(tokens, 64, generator=torch.Generator().manual_seed(tokens)).to(dtype)
    there = on(device, in_rows(expert))
    out = torch.full((tokens, 64), torch.nan, dtype=dtype, device=device)
    got = kernels.forward(there, x.to(device), SILU, out)
    assert got is out
    assert relative_error(got, reference(expert, x, "silu")) < TOLERANCE


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # of the interpreter; 1 / inf is right
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("act", kernels.ACTIVATIONS)
@pytest.mark.parametrize("biases", [0, 3 * 64])
def test_activations_and_biases(act, biases, device):
    expert = random_expert(ExpertLayout(64, 64, 4, biases=biases))
    x = 3 * torch.randn(2, 64, generator=torch.Generator().manual_seed(2))
    form = kernels.activation(GATES[act])
    assert form.name == act
    for n in (1, 2):
        got = kernels.forward(on(device, in_rows(expert)), x[:n].to(device), form)
        assert relative_error(got, reference(expert, x[:n], act)) < 1e-5


@needs_triton
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch finds no CUDA device")
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
def test_a_mixtral_expert_on_a_gpu(bits):
    layout = ExpertLayout(4096, 14336, bits)
    expert = random_expert(layout)
    x = torch.randn(16, 4096, generator=torch.Generator().manual_seed(3)).bfloat16()
    expected = reference(expert, x, "silu")
    there = on("cuda", in_rows(expert))
    for n in (1, 16):
        assert relative_error(kernels.forward(there, x[:n].cuda(), SILU), expected[:n]) < TOLERANCE


@needs_triton
def test_an_expert_packed_by_hqq_gives_what_the_cpu_engine_computes():
    pytest.importorskip("hqq", reason="the runtime extra is not installed")
    generator = torch.Generator().manual_seed(4)
    for bits in (4, 3):
        layout = ExpertLayout(64, 128, bits, order="rows")
        gate, up, down = (torch.randn(s, generator=generator) / 8 for s in ((128, 64), (128, 64), (64, 128)))
        expert = views(pack(gate, up, down, layout, optimize=False), layout)
        x = torch.randn(2, 64, generator=generator)
        there = on("cuda" if torch.cuda.is_available() else "cpu", expert)
        got = kernels.forward(there, x.to(there.codes.device), SILU).cpu()
        assert torch.allclose(got, forward(expert, x, GATES["silu"]), rtol=1e-4, atol=1e-5)


@needs_triton
def test_what_the_kernels_cannot_do_is_refused():
    expert = random_expert(ExpertLayout(64, 64, 4))
    with pytest.raises(kernels.KernelError, match="activation 'mish' is unknown; choose one of silu"):
        kernels.forward(expert, torch.zeros(1, 64), kernels.Activation("mish"))
    with pytest.raises(kernels.KernelError, match="no activation Mish"):
        kernels.activation(ActGate(torch.nn.Mish()))
    with pytest.raises(kernels.KernelError, match="no activation function"):
        kernels.activation(lambda gate, up: gate * up)
    with pytest.raises(kernels.KernelError, match="groups of 8 weights"):
        kernels.forward(random_expert(ExpertLayout(64, 64, 4, 8)), torch.zeros(1, 64), SILU)
    layout = ExpertLayout(64, 64, 16)
    plain = views(torch.zeros(layout.expert_bytes, dtype=torch.uint8), layout)
    with pytest.raises(kernels.KernelError, match="bf16 need no kernel"):
        kernels.forward(plain, torch.zeros(1, 64), SILU)
    assert kernels.forward(expert, torch.zeros(0, 64), SILU).shape == (0, 64)


def test_nothing_but_the_kernels_own_file_imports_triton_when_it_is_imported():
    for path in (ROOT / "runtime").rglob("*.py"):
        lines = path.read_text().splitlines()
        assert path.name == "triton_kernels.py" or not any(line.startswith("import triton") for line in lines), path


COMPILE = """
import json, sys, torch, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from runtime import kernels, triton_kernels

for name, bits, values, tokens in (("gate_up", 4, 2, 1), ("gate_up", 3, 10, 1), ("down", 3, 10, 64)):
    kernel = getattr(triton_kernels, name)
    fixed = {"N": 256, "K": 1280, "g": 64, "BITS": bits, "V": values, "ROWS": True}
    fixed |= {"ACT": "clamped", "ALPHA": 1.702, "LIMIT": 7.0, "BIASED": name == "down"}
    fixed |= kernels.tiles(tokens, torch.bfloat16, 64)
    options = {key: fixed.pop(key) for key in ("num_warps", "num_stages")}
    types = {"out": "*bf16", "codes": "*i32" if bits == 3 else "*u8", "scale": "*fp16", "zero": "*fp16", "x": "*bf16"}
    types |= {"biases": "*bf16", "M": "i32"} | dict.fromkeys(fixed, "constexpr")
    order = kernel.arg_names
    source = ASTSource(
        kernel,
        {arg: types[arg] for arg in order},
        {(order.index(key),): value for key, value in fixed.items() if key in order},
        {(order.index(key),): [["tt.divisibility", 16]] for key in types if types[key][0] == "*"},
    )
    made = triton.compile(source, target=GPUTarget("cuda", int(sys.argv[1]), 32), options=options)
    print(json.dumps([name, bits, tokens, made.metadata.shared, made.asm["ptx"].count("ld.global.b16")]))
"""


@needs_triton
@pytest.mark.parametrize("architecture", [80])
def test_the_compiler_makes_of_them_what_their_tiles_are_chosen_for(architecture, tmp_path):
    """Compiled for a GPU without one. One token: nothing but the sums of warps passes through shared memory, and each
    thread loads one scale and one zero a group. 64 tokens: shared memory that every GPU since 2020 has.
    """
    environment = os.environ | {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(tmp_path), "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COMPILE, str(architecture)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for line in done.stdout.splitlines():
        name, bits, tokens, shared, loads = json.loads(line)
        assert shared <= (512 if tokens == 1 else 48 << 10), line
        if tokens == 1:
            groups = {3: 10, 4: 4}[bits]  # a loop's, unrolled: of two matrices, a scale and a zero each
            assert name == "gate_up" and loads <= groups * 6, line  # 4 by triton 3.6, 6 by 3.9
    assert len(done.stdout.splitlines()) == 3


# In the engine


SOME = [layout for n, layout in enumerate(layouts()) if n % 13 == 0]


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")  # as above
@pytest.mark.skipif(torch.cuda.is_available(), reason="slots of the CPU: compiled for the GPU here")
@pytest.mark.parametrize("layout", SOME, ids=name)
def test_an_expert_in_a_slot_is_multiplied_as_it_stands(layout):
    """A sample of what ``tests/kernel_errors.py`` measures; no dequantized matrix is held."""
    number = SOME.index(layout)
    for tokens in (1, (2, 17, 64)[number % 3]):
        dtype = (torch.float32, torch.bfloat16)[number % 2]
        act = "clamped" if layout.biases else "silu"
        assert error_in_a_slot(layout, tokens, dtype, act) < (TOLERANCE if number % 2 else 1e-5)


class FusedCpu(CpuDevice):
    """A device of the CPU that computes as CUDA does with Triton; the interpreter runs it."""

    fused = True


def passes(model, batch: int) -> list[torch.Tensor]:
    """Logits of a prefill and of two decode passes."""
    ids = torch.randint(3, 90, (batch, 4), generator=torch.Generator().manual_seed(batch))
    with torch.inference_mode():
        out = model(input_ids=ids[:, :2], use_cache=True)
        found = [out.logits]
        for i in (2, 3):
            out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
            found.append(out.logits)
    return found


@needs_triton
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
@pytest.mark.skipif(torch.cuda.is_available(), reason="slots of the CPU: compiled for the GPU here")
@pytest.mark.parametrize(("family", "bits", "batches"), [("mixtral", 3, (1, 3)), ("gpt_oss", 4, (3,))])
def test_offloading_never_changes_a_bit_with_kernels_either(saved, monkeypatch, tmp_path, family, bits, batches):
    """Bit-equal with two slots and with all; beside dequantizing, float32 rounding only. gpt-oss: biases, clamped."""
    options = {"bits": bits, "optimize": False, "progress": False, "store": tmp_path / "rows"}
    plain = offload(saved(family), **options | {"store": None})
    expected = {batch: passes(plain, batch) for batch in batches}
    plain.offload_close()
    monkeypatch.setattr(offloading, "open_device", lambda name: FusedCpu())
    found = {}
    for slots in (4, 2):
        model = offload(saved(family), slots=slots, policy="speculative:guard=0,trust=0", **options)
        executor = model.offloaded.executor
        assert executor.store.layout.order == "rows" and not executor.experts.workspaces
        assert model.offloaded.budget.buffer_bytes < 64 * 64 * 3 * 4  # no dequantized expert
        found[slots] = {batch: passes(model, batch) for batch in batches}
        assert slots == 4 or model.offload_stats()["misses"] > 0
        model.offload_close()
    for batch, logits in expected.items():
        for one, other, near in zip(found[4][batch], found[2][batch], logits, strict=True):
            assert torch.equal(one, other)
            assert relative_error(one, near.double()) < 1e-4


# The order of groups


@pytest.mark.parametrize("layout", LAYOUTS, ids=name)
def test_the_order_of_codes_changes_no_weight(layout):
    """Nor a scale, a zero or the number of bytes: packed in both orders, dequantized bit for bit the same."""
    pytest.importorskip("hqq", reason="the runtime extra is not installed")
    generator = torch.Generator().manual_seed(5)
    hidden, inner = layout.hidden_size, layout.expert_size
    matrices = [torch.randn(s, generator=generator) / 8 for s in ((inner, hidden), (inner, hidden), (hidden, inner))]
    rows = dataclasses.replace(layout, order="rows")
    first, second = (views(pack(*matrices, kind, optimize=False), kind) for kind in (layout, rows))
    assert torch.equal(first.scale, second.scale) and torch.equal(first.zero, second.zero)
    assert torch.equal(first.codes, second.codes) == (layout.values == 1)
    for one, other, moved in zip(*map(dequantize, (first, second, in_rows(first))), strict=True):
        assert torch.equal(one, other) and torch.equal(one, moved)


@pytest.mark.parametrize("layout", [*LAYOUTS, ExpertLayout(4096, 14336, 3)], ids=name)
def test_every_group_has_its_own_place_among_the_words_there_are(layout):
    layout = dataclasses.replace(layout, order="rows")
    for matrix in range(3):
        spots = places(layout, matrix)
        assert len(spots.unique()) == layout.groups
        assert spots.min() >= 0
        assert spots.max() < layout.values * layout.rows


def test_neighbouring_groups_of_a_row_share_a_word_by_literal_codes():
    """4 bits, 32 rows of 2 groups of 32: HQQ has rows 0 to 15 in the high halves; row by row has group 0 there."""
    layout = ExpertLayout(64, 32, 4, 32)
    expert = views(torch.zeros(layout.expert_bytes, dtype=torch.uint8), layout)
    for row in range(32):  # groups 2n and 2n + 1 of row n hold the codes n % 8 and n % 8 + 8
        for half in range(2):
            group = 2 * row + half
            word, high = group % 32, group < 32
            expert.codes[0, 0, word] |= (row % 8 + 8 * half) << (4 if high else 0)
    moved = in_rows(expert).codes[0, 0, :, 0].tolist()
    assert moved == [(n % 8) * 16 + n % 8 + 8 for n in range(32)]


def test_with_one_value_a_word_there_is_one_order():
    for bits in (16, 8):
        assert ExpertLayout(64, 64, bits, order="rows") == ExpertLayout(64, 64, bits)
    with pytest.raises(ValueError, match="order of codes is 'columns'; it must be hqq or rows"):
        ExpertLayout(64, 64, 4, order="columns")
