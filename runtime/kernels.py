"""An expert's feed-forward straight from its codes, with no dequantized matrix written: two Triton kernels.

The first reads gate and up and applies the activation, the second reads down. Both read a slot's buffer as
``runtime.quantize.ExpertLayout`` lays it out, in HQQ's order of groups or in that of ``runtime.repack`` ("rows"),
which is meant for the GPU: every word is read once, and at 3 bits nothing else comes near. The same kernels run under
Triton's interpreter (TRITON_INTERPRET=1, set before Triton is imported), which is how they are tested without a GPU.

Which experts go through them is decided by `activation_for` alone; all others are dequantized and multiplied.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Any, NamedTuple

import torch

from runtime.family import ActGate, ClampedGate, Gated
from runtime.quantize import ExpertLayout, ExpertViews

CLAMPED = "clamped"
ACTIVATIONS = ("silu", "gelu", "gelu_tanh", "relu", CLAMPED)
_NAMES = {  # of activation modules, in torch and transformers
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUActivation": "gelu",
    "PytorchGELUTanh": "gelu_tanh",
    "GELUTanh": "gelu_tanh",
    "ReLU": "relu",
}
_MIN_GROUP = 16  # the least width of a tensor-core product


class KernelError(ValueError):
    """What the kernels cannot do; one sentence."""


class Activation(NamedTuple):
    """A gated activation as the kernels know it: one of ``ACTIVATIONS``, and the two constants of "clamped"."""

    name: str
    alpha: float = 0.0
    limit: float = 0.0


def activation(gated: Gated) -> Activation:
    """The kernels' own form of a gated activation.

    Raises:
        KernelError: one they have not.
    """
    if isinstance(gated, ClampedGate):
        return Activation(CLAMPED, float(gated.alpha), float(gated.limit))
    act = gated.act if isinstance(gated, ActGate) else None
    if isinstance(act, torch.nn.GELU):
        return Activation({"none": "gelu", "tanh": "gelu_tanh"}[act.approximate])
    name = type(act or gated).__name__
    if act is None or name not in _NAMES:
        raise KernelError(
            f"the kernels have no activation {name}; they have {', '.join(ACTIVATIONS)}: dequantize and multiply"
        )
    return Activation(_NAMES[name])


def activation_for(layout: ExpertLayout, gated: Gated) -> Activation | None:
    """How the kernels compute experts of this layout and activation; None: they cannot, dequantize and multiply.

    They can if the experts have codes (8, 4, 3 or 2 bits) in groups of 16 weights or more, a power of two, and the
    activation is among theirs; biases may be there or not.
    """
    try:
        _check(layout)
        return activation(gated)
    except KernelError:
        return None


def _check(layout: ExpertLayout) -> None:
    if layout.bits == 16:
        raise KernelError("experts in bf16 need no kernel; multiply them with torch")
    if layout.group_size < _MIN_GROUP or layout.group_size & (layout.group_size - 1):
        raise KernelError(
            f"groups of {layout.group_size} weights do not fit the kernels; choose 16, 32, 64, 128 or 256"
        )


def available() -> bool:
    """Whether Triton is installed."""
    return importlib.util.find_spec("triton") is not None


def forward(expert: ExpertViews, x: torch.Tensor, act: Activation, out: torch.Tensor | None = None) -> torch.Tensor:
    """down(gated(gate x, up x)) for x [n, H] -> [n, H], biases added, on x's device.

    Products of one token are summed in float32 throughout. Of more, they are made in x's dtype (float32 under the
    interpreter) from exact codes, and summed in float32; the intermediate of gate and up is kept in float32.

    Args:
        out: contiguous [n, H] of any float dtype, overwritten and returned; a new one in float32 when None.

    Raises:
        KernelError: no Triton, bf16 experts, groups narrower than 16 or no power of two, or an unknown activation.
    """
    layout = expert.layout
    _check(layout)
    if act.name not in ACTIVATIONS:
        raise KernelError(f"activation {act.name!r} is unknown; choose one of {', '.join(ACTIVATIONS)}")
    kernels = _kernels()
    tokens, hidden, inner = len(x), layout.hidden_size, layout.expert_size
    x = x.contiguous()
    out = torch.empty_like(x, dtype=torch.float32) if out is None else out
    if not tokens:
        return out
    middle = torch.empty(tokens, inner, dtype=torch.float32, device=x.device)
    codes, scale, zero, biases = expert[1:]
    common = {"g": layout.group_size, "BITS": layout.bits, "V": layout.values, "ROWS": layout.order == "rows"}
    common |= tiles(tokens, x.dtype, layout.group_size) | {"BIASED": layout.biases > 0}
    gate = {"ACT": act.name, "ALPHA": act.alpha, "LIMIT": act.limit}
    grid = (-(-inner // common["BN"]), -(-tokens // common["BM"]))
    kernels.gate_up[grid](middle, codes, scale, zero, biases, x, tokens, N=inner, K=hidden, **gate, **common)
    grid = (-(-hidden // common["BN"]), grid[1])
    biases = biases[2 * inner :]
    kernels.down[grid](out, codes[2], scale[2], zero[2], biases, middle, tokens, N=hidden, K=inner, **common)
    return out


def compile_for(expert: ExpertViews, act: Activation, dtype: torch.dtype) -> None:
    """Compile what `forward` may need of these experts' kernels, so that no token waits for the compiler."""
    for tokens in (1, 16, 32, 64):
        forward(expert, torch.zeros(tokens, expert.layout.hidden_size, dtype=dtype, device=expert.codes.device), act)


def tiles(tokens: int, dtype: torch.dtype, group_size: int) -> dict[str, Any]:
    """Sizes of one program's tile, the dtype of its products and its warps; Triton's own tuner needs a driver.

    One token: few rows a program, so that a matrix of 4096 rows still fills a large GPU, and four weights a thread:
    then codes, activations and sums share one layout, else codes pass through shared memory and scales are loaded
    eight times. More tokens: no pipelining, whose buffers at 3 bits pass what a multiprocessor has. Chosen by looking
    at what the compiler makes of it; to be tuned on a GPU.
    """
    import triton.language as tl

    if interpreted():  # a program costs the same whatever its size
        return {"BM": 1 if tokens == 1 else max(16, _power(tokens)), "BN": 128, "DOT": tl.float32}
    if tokens == 1:
        warps = min(8, max(1, 8 * group_size // 128))
        return {"BM": 1, "BN": 8, "DOT": tl.float32, "num_warps": warps, "num_stages": 1}
    dot = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}.get(dtype, tl.float32)
    return {"BM": min(64, max(16, _power(tokens))), "BN": 32, "DOT": dot, "num_warps": 4, "num_stages": 1}


def _power(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (number - 1).bit_length()


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def _kernels() -> Any:
    if not available():
        raise KernelError("the kernels need Triton, which is not installed; pip install triton")
    return importlib.import_module("runtime.triton_kernels")
