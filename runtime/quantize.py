"""One expert as one contiguous buffer: packing with HQQ, views, and the product of an expert with its tokens.

Shape letters: H hidden_size, I expert_size, g group_size, G = H*I/g groups of one matrix, V code values in one word,
R = ceil(G/V) rows of words of one matrix, n tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from runtime.family import ExpertWeights, Gated
from runtime.repack import ORDERS, Order, places, spread
from traces.vocabulary import GROUP_SIZE, ModelSpec

META_DTYPE = torch.float16
CHUNK = 1 << 18  # weights quantized at a time
GROUP_SIZES = (256, 128, 64, 32, 16, 8)  # what is offered where another size is refused
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
    bits down; in the order "rows" it holds neighbours (``runtime.repack``). With one value a word there is one order,
    "hqq".

    Raises:
        ValueError: a bit width or group size that ``ModelSpec.expert_bytes`` refuses, groups that do not fill words, or
            an unknown order.
    """

    hidden_size: int
    expert_size: int
    bits: int
    group_size: int = GROUP_SIZE
    biases: int = 0
    order: Order = "hqq"

    def __post_init__(self) -> None:
        if self.order not in ORDERS:
            raise ValueError(f"order of codes is {self.order!r}; it must be {' or '.join(ORDERS)}")
        if self.bits in (16, 8):
            object.__setattr__(self, "order", "hqq")
        widths = (self.hidden_size, self.expert_size)
        if self.biases not in (0, 2 * self.expert_size + self.hidden_size):
            raise ValueError(
                f"an expert of widths {self.hidden_size} and {self.expert_size} has {self.biases} biases; it has none, "
                "or one for each output of its three matrices"
            )
        if self.bits not in (16, *_SHIFTS):
            ModelSpec("expert", 1, 1, 1, *widths).expert_bytes(self.bits, 1)
        if self.bits == 16:
            return
        if any(width % self.group_size for width in widths):
            raise ValueError(
                f"group size {self.group_size} does not divide expert widths {widths[0]} and {widths[1]}; {self._fit()}"
            )
        if self.bits in (4, 2) and self.groups % self.values:
            raise ValueError(
                f"one matrix has {self.groups} groups of {self.group_size}; {self.bits}-bit packing needs a multiple "
                f"of {self.values}: {self._fit()}"
            )

    def _fit(self) -> str:
        """What to do about a group size that does not fit."""
        sizes = group_sizes(self.hidden_size, self.expert_size, self.bits)
        return f"use {' or '.join(map(str, sizes))}" if sizes else "keep these experts at 16 bits"

    @classmethod
    def of(cls, spec: ModelSpec, bits: int, group_size: int = GROUP_SIZE, order: Order = "hqq") -> ExpertLayout:
        """Layout of ``spec``'s routed experts.

        Raises:
            ValueError: as the class.
        """
        return cls(spec.hidden_size, spec.expert_size, bits, group_size, spec.expert_bias, order)

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
    def bias_offset(self) -> int:
        """First byte of the biases."""
        if self.bits == 16:
            return 3 * self.hidden_size * self.expert_size * torch.bfloat16.itemsize
        return self.zero_offset + 3 * self.groups * META_DTYPE.itemsize

    @cached_property
    def expert_bytes(self) -> int:
        """Bytes of the buffer; equals ``ModelSpec.expert_bytes``."""
        return self.bias_offset + self.biases * torch.bfloat16.itemsize


def group_sizes(hidden_size: int, expert_size: int, bits: int) -> list[int]:
    """The usual group sizes that experts of these widths can be packed with at ``bits``, largest first."""
    values = len(_SHIFTS[bits]) if bits in (4, 2) else 1
    return [
        size
        for size in GROUP_SIZES
        if hidden_size % size == expert_size % size == 0 and hidden_size * expert_size // size % values == 0
    ]


class ExpertViews(NamedTuple):
    """Typed views into one expert's buffer; no bytes of their own.

    ``codes`` words [3, 1, R, g], ``scale`` and ``zero`` float16 [3, G, 1]. At 16 bits ``codes`` is the weights
    themselves, bfloat16 [3, H*I], and the other two are empty. ``biases`` bfloat16 [2I + H], empty without.
    """

    layout: ExpertLayout
    codes: torch.Tensor
    scale: torch.Tensor
    zero: torch.Tensor
    biases: torch.Tensor


def views(buffer: torch.Tensor, layout: ExpertLayout) -> ExpertViews:
    """The pieces of ``buffer`` (uint8 [expert_bytes], 4-byte aligned), without copying.

    Raises:
        ValueError: a buffer of another type or size.
    """
    if buffer.dtype != torch.uint8 or buffer.shape != (layout.expert_bytes,):
        raise ValueError(
            f"buffer is {buffer.dtype} {list(buffer.shape)}; this layout needs torch.uint8 [{layout.expert_bytes}]"
        )
    biases = buffer[layout.bias_offset :].view(torch.bfloat16)
    if layout.bits == 16:
        weights = buffer[: layout.bias_offset].view(torch.bfloat16).view(3, -1)
        return ExpertViews(layout, weights, weights[:, :0], weights[:, :0], biases)
    codes = buffer[: layout.scale_offset].view(layout.word).view(3, 1, layout.rows, layout.group_size)
    scale = buffer[layout.scale_offset : layout.zero_offset].view(META_DTYPE).view(3, layout.groups, 1)
    zero = buffer[layout.zero_offset : layout.bias_offset].view(META_DTYPE).view(3, layout.groups, 1)
    return ExpertViews(layout, codes, scale, zero, biases)


def pack(
    gate: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    layout: ExpertLayout,
    optimize: bool = True,
    biases: torch.Tensor | None = None,
) -> torch.Tensor:
    """Quantize one expert into a new uint8 buffer [expert_bytes]; arguments and errors as `pack_into`."""
    buffer = torch.empty(layout.expert_bytes, dtype=torch.uint8)
    pack_into(buffer, ExpertWeights(gate, up, down, biases), layout, optimize)
    return buffer


@torch.no_grad()
def pack_into(buffer: torch.Tensor, weights: ExpertWeights, layout: ExpertLayout, optimize: bool = True) -> float:
    """Quantize one expert, matrix by matrix, into ``buffer`` (uint8 [expert_bytes]).

    A matrix is quantized ``CHUNK`` weights at a time, so that little memory is needed beside it; HQQ's solver decides
    for each chunk by itself when to stop.

    Args:
        weights: gate and up [I, H], down [H, I], of any float dtype; biases where the layout has them.
        optimize: run HQQ's solver for the zeros (Badri and Shaji 2023); False rounds to the nearest code.

    Returns:
        Relative Frobenius error of a matrix, the mean of the three.

    Raises:
        ValueError: a matrix or biases of another shape, or weights whose scale or zero does not fit into float16.
    """
    inner, hidden = layout.expert_size, layout.hidden_size
    shapes = {"gate": (inner, hidden), "up": (inner, hidden), "down": (hidden, inner)}
    pieces = views(buffer, layout)
    found = 0 if weights.biases is None else weights.biases.numel()
    if found != layout.biases:
        raise ValueError(f"{found or 'no'} bias values came with an expert; this layout needs {layout.biases}")
    if weights.biases is not None:
        pieces.biases.copy_(weights.biases)
    errors = []
    for i, ((name, shape), matrix) in enumerate(zip(shapes.items(), weights[:3], strict=True)):
        if matrix.shape != shape:
            raise ValueError(f"{name} has the shape {list(matrix.shape)}; this layout needs {list(shape)}")
        errors.append(_pack_matrix(matrix.to(buffer.device), pieces, i, optimize))
    return sum(errors) / len(errors)


def _pack_matrix(matrix: torch.Tensor, pieces: ExpertViews, i: int, optimize: bool) -> float:
    """Fill the ``i``-th matrix of ``pieces``; returns its relative error."""
    layout = pieces.layout
    squares = torch.zeros(2, dtype=torch.float64)  # of the error, of the weights
    if layout.bits == 16:
        for given, kept in zip(matrix.reshape(-1).split(CHUNK), pieces.codes[i].split(CHUNK), strict=True):
            kept.copy_(given)
            _add_squares(squares, given.float(), kept.float())
        return _relative(squares)
    from hqq.core.quantize import Quantizer  # takes over a second to import; only packing needs it

    codes = torch.empty(layout.groups, layout.group_size, dtype=torch.uint8)
    step = max(1, CHUNK // layout.group_size)
    parts = (t.split(step) for t in (matrix.reshape(layout.groups, -1), codes, pieces.scale[i], pieces.zero[i]))
    for given, code, scale, zero in zip(*parts, strict=True):
        given = given.float()
        found, meta = Quantizer.quantize(
            given,
            nbits=layout.bits,
            group_size=layout.group_size,
            optimize=optimize,
            axis=1,
            device="cpu",
            bitpack=False,
        )
        code.copy_(found)
        scale.copy_(meta["scale"])
        zero.copy_(meta["zero"])
        if not (scale.isfinite().all() and zero.isfinite().all()):
            raise ValueError(
                "a group's scale or zero is not a finite float16; the weights hold NaN, infinity or outliers"
            )
        _add_squares(squares, given, (found - zero.float()).mul_(scale.float()))
    words = pieces.codes[i, 0]
    words.zero_()
    if layout.order != "hqq":
        placed = torch.zeros(layout.values * layout.rows, layout.group_size, dtype=torch.uint8)
        placed[places(layout, i)] = codes
        codes = placed
    for part, shift in zip(codes.split(layout.rows), _SHIFTS[layout.bits], strict=False):
        words[: len(part)] |= part.to(layout.word) << shift
    return _relative(squares)


def _add_squares(squares: torch.Tensor, given: torch.Tensor, kept: torch.Tensor) -> None:
    squares[0] += kept.sub_(given).square_().sum(dtype=torch.float64)
    squares[1] += given.square().sum(dtype=torch.float64)


def _relative(squares: torch.Tensor) -> float:
    error, norm = squares.tolist()
    return (error / norm) ** 0.5 if norm else 0.0


class Workspace:
    """Scratch for the dequantized weights of one expert at a time; one per computing thread.

    Args:
        layout: of the experts it takes.
        dtype, device: of the dequantized weights.
        share: another workspace of the same widths whose weights this one overwrites (layers of other bit widths).

    Attributes:
        gate_up: ``dtype`` [2I, H], gate above up.
        down: ``dtype`` [H, I].
    """

    def __init__(
        self,
        layout: ExpertLayout,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        share: Workspace | None = None,
    ) -> None:
        self.layout = layout
        size = layout.hidden_size * layout.expert_size
        weights = torch.empty(3, size, dtype=dtype, device=device) if share is None else share._weights
        self.gate_up = weights[:2].view(2 * layout.expert_size, layout.hidden_size)
        self.down = weights[2].view(layout.hidden_size, layout.expert_size)
        self._weights = weights
        if layout.bits == 16:
            return
        self._grouped = weights.view(3, layout.groups, layout.group_size)
        if layout.bits == 8:
            return
        self._unpacked = torch.empty(3, layout.values, layout.rows, layout.group_size, dtype=layout.word, device=device)
        self._codes = self._unpacked.view(3, layout.values * layout.rows, layout.group_size)[:, : layout.groups]
        shifts = torch.tensor(_SHIFTS[layout.bits], dtype=layout.word, device=device)
        self._shifts = shifts.view(1, layout.values, 1, 1)

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
            if self.layout.order == "hqq":
                self._grouped.copy_(self._codes)
            else:
                spread(self.layout, self._unpacked, self._grouped)
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
    gated: Gated,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """down(gated(gate x, up x)) for x [n, H] -> [n, H], biases added, in the workspace's dtype (float32 without one).

    Call it without autograd: ``workspace`` is overwritten by every call.
    """
    work = Workspace(expert.layout, device=x.device) if workspace is None else workspace
    work.fill(expert)
    x = x.to(work.down.dtype)
    if not expert.layout.biases:
        gate, up = torch.nn.functional.linear(x, work.gate_up).chunk(2, dim=-1)
        return torch.nn.functional.linear(gated(gate, up), work.down)
    inner = 2 * expert.layout.expert_size
    biases = expert.biases.to(work.down.dtype)
    gate, up = torch.nn.functional.linear(x, work.gate_up, biases[:inner]).chunk(2, dim=-1)
    return torch.nn.functional.linear(gated(gate, up), work.down, biases[inner:])
