"""One expert as one contiguous buffer: packing with HQQ, views, and the product of an expert with its tokens.

Shape letters: H hidden_size, I expert_size, g group_size, G = H*I/g groups of one matrix, V code values in one word,
R = ceil(G/V) rows of words of one matrix, n tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from traces.vocabulary import GROUP_SIZE, ModelSpec

META_DTYPE = torch.float16
_SHIFTS = {
    8: (0,),
    4: (4, 0),
    3: tuple(range(27, -1, -3)),
    2: (6, 4, 2, 0),
}  # of a word's values, first row block first


@dataclass(frozen=True)
class ExpertLayout:
    """Where the pieces of one expert stand in its buffer.

    Quantized: the codes of gate, up and down (words [3, R, g]: uint8, or int32 at 3 bits), then their scales, then
    their zeros (float16 [3, G] each). At 16 bits: gate [I, H], up [I, H], down [H, I] in bfloat16. Words are HQQ's:
    groups run along a matrix's rows (axis 1), and word row r holds the groups r, r + R, r + 2R, ... from its high
    bits down.

    Raises:
        ValueError: a bit width or group size that ``ModelSpec.expert_bytes`` refuses, or groups that do not fill words.
    """

    hidden_size: int
    expert_size: int
    bits: int
    group_size: int = GROUP_SIZE

    def __post_init__(self) -> None:
        spec = ModelSpec("expert", 1, 1, 1, self.hidden_size, self.expert_size)
        spec.expert_bytes(self.bits, self.group_size)
        if self.bits in (4, 2) and self.groups % self.values:
            raise ValueError(
                f"one matrix has {self.groups} groups of {self.group_size}; {self.bits}-bit packing needs a multiple "
                f"of {self.values}: choose another group size"
            )

    @classmethod
    def of(cls, spec: ModelSpec, bits: int, group_size: int = GROUP_SIZE) -> ExpertLayout:
        """Layout of ``spec``'s routed experts.

        Raises:
            ValueError: as the class, or experts with biases.
        """
        if spec.expert_bias:
            raise ValueError(
                f"experts of {spec.name} have {spec.expert_bias} biases; only experts without can be packed"
            )
        return cls(spec.hidden_size, spec.expert_size, bits, group_size)

    @property
    def groups(self) -> int:
        return self.hidden_size * self.expert_size // self.group_size

    @property
    def values(self) -> int:
        return len(_SHIFTS[self.bits])

    @property
    def rows(self) -> int:
        return -(-self.groups // self.values)

    @property
    def word(self) -> torch.dtype:
        return torch.int32 if self.bits == 3 else torch.uint8

    @cached_property
    def scale_offset(self) -> int:
        """First byte of the scales (quantized layouts only); the codes begin at 0."""
        return 3 * self.rows * self.group_size * self.word.itemsize

    @cached_property
    def zero_offset(self) -> int:
        return self.scale_offset + 3 * self.groups * META_DTYPE.itemsize

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of the buffer; equals ``ModelSpec.expert_bytes``."""
        if self.bits == 16:
            return 3 * self.hidden_size * self.expert_size * torch.bfloat16.itemsize
        return self.zero_offset + 3 * self.groups * META_DTYPE.itemsize


class ExpertViews(NamedTuple):
    """Typed views into one expert's buffer; no bytes of their own.

    ``codes`` words [3, 1, R, g], ``scale`` and ``zero`` float16 [3, G, 1]. At 16 bits ``codes`` is the weights
    themselves, bfloat16 [3, H*I], and the other two are empty.
    """

    layout: ExpertLayout
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor


def views(buffer: torch.Tensor, layout: ExpertLayout) -> ExpertViews:
    """The pieces of ``buffer`` (uint8 [expert_bytes], 4-byte aligned), without copying.

    Raises:
        ValueError: a buffer of another type or size.
    """
    if buffer.dtype != torch.uint8 or buffer.shape != (layout.expert_bytes,):
        raise ValueError(
            f"buffer is {buffer.dtype} {list(buffer.shape)}; this layout needs torch.uint8 [{layout.expert_bytes}]"
        )
    if layout.bits == 16:
        weights = buffer.view(torch.bfloat16).view(3, -1)
        return ExpertViews(layout, weights, weights[:, :0], weights[:, :0])
    codes = buffer[: layout.scale_offset].view(layout.word).view(3, 1, layout.rows, layout.group_size)
    scale = buffer[layout.scale_offset : layout.zero_offset].view(META_DTYPE).view(3, layout.groups, 1)
    zero = buffer[layout.zero_offset :].view(META_DTYPE).view(3, layout.groups, 1)
    return ExpertViews(layout, codes, scale, zero)


@torch.no_grad()
def pack(
    gate: torch.Tensor, up: torch.Tensor, down: torch.Tensor, layout: ExpertLayout, optimize: bool = True
) -> torch.Tensor:
    """Quantize one expert, matrix by matrix, into a new uint8 buffer [expert_bytes].

    Args:
        gate, up: float [I, H].
        down: float [H, I].
        optimize: run HQQ's solver for the zeros (Badri and Shaji 2023); False rounds to the nearest code.

    Raises:
        ValueError: a matrix of another shape, or weights whose scale or zero does not fit into float16.
    """
    inner, hidden = layout.expert_size, layout.hidden_size
    matrices = {"gate": (gate, (inner, hidden)), "up": (up, (inner, hidden)), "down": (down, (hidden, inner))}
    buffer = torch.empty(layout.expert_bytes, dtype=torch.uint8)
    pieces = views(buffer, layout)
    for i, (name, (matrix, shape)) in enumerate(matrices.items()):
        if matrix.shape != shape:
            raise ValueError(f"{name} has the shape {list(matrix.shape)}; this layout needs {list(shape)}")
        if layout.bits == 16:
            pieces.codes[i].copy_(matrix.reshape(-1))
            continue
        from hqq.core.quantize import Quantizer  # takes over a second to import; only packing needs it

        codes, meta = Quantizer.quantize(
            matrix, nbits=layout.bits, group_size=layout.group_size, optimize=optimize, axis=1, device="cpu"
        )
        pieces.codes[i, 0].copy_(codes)
        pieces.scale[i].copy_(meta["scale"])
        pieces.zero[i].copy_(meta["zero"])
    if not (pieces.scale.isfinite().all() and pieces.zero.isfinite().all()):
        raise ValueError("a group's scale or zero is not a finite float16; the weights hold NaN, infinity or outliers")
    return buffer


class Workspace:
    """Scratch for the dequantized weights of one expert at a time; one per computing thread.

    Attributes:
        gate_up: ``dtype`` [2I, H], gate above up.
        down: ``dtype`` [H, I].
    """

    def __init__(self, layout: ExpertLayout, dtype: torch.dtype = torch.float32) -> None:
        self.layout = layout
        weights = torch.empty(3, layout.hidden_size * layout.expert_size, dtype=dtype)
        self.gate_up = weights[:2].view(2 * layout.expert_size, layout.hidden_size)
        self.down = weights[2].view(layout.hidden_size, layout.expert_size)
        self._weights = weights
        if layout.bits == 16:
            return
        self._grouped = weights.view(3, layout.groups, layout.group_size)
        self._unpacked = torch.empty(3, layout.values, layout.rows, layout.group_size, dtype=layout.word)
        self._codes = self._unpacked.view(3, layout.values * layout.rows, layout.group_size)[:, : layout.groups]
        self._shifts = torch.tensor(_SHIFTS[layout.bits], dtype=layout.word).view(1, layout.values, 1, 1)

    def fill(self, expert: ExpertViews) -> None:
        """Dequantize: (code - zero) * scale, each step in ``dtype`` as HQQ does, all three matrices at once."""
        bits = self.layout.bits
        if bits == 16:
            self._weights.copy_(expert.codes)
            return
        if bits == 8:
            self._grouped.copy_(expert.codes[:, 0])
        else:
            torch.bitwise_right_shift(expert.codes, self._shifts, out=self._unpacked)
            self._unpacked.bitwise_and_((1 << bits) - 1)
            self._grouped.copy_(self._codes)
        dtype = self._grouped.dtype
        self._grouped.sub_(expert.zero.to(dtype)).mul_(expert.scale.to(dtype))


def dequantize(
    expert: ExpertViews, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """gate [I, H], up [I, H], down [H, I] as new tensors of ``dtype``, bit for bit what HQQ's own gives."""
    work = Workspace(expert.layout, dtype)
    work.fill(expert)
    gate, up = work.gate_up.chunk(2)
    return gate, up, work.down


def forward(
    expert: ExpertViews,
    x: torch.Tensor,
    act: Callable[[torch.Tensor], torch.Tensor],
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """down(act(gate x) * up x) for x [n, H] -> [n, H], in the workspace's dtype (float32 when none is given).

    Call it without autograd: ``workspace`` is overwritten by every call.
    """
    work = Workspace(expert.layout) if workspace is None else workspace
    work.fill(expert)
    gate, up = torch.nn.functional.linear(x.to(work.down.dtype), work.gate_up).chunk(2, dim=-1)
    return torch.nn.functional.linear(act(gate) * up, work.down)
