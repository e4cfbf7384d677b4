"""Linear layers outside the experts at 4 bits."""

from __future__ import annotations

import torch

from traces.vocabulary import GROUP_SIZE

BITS = 4


def fits(weight: torch.Tensor) -> bool:
    """Whether a weight [O, I] divides into groups that fill bytes."""
    return weight.shape[1] % GROUP_SIZE == 0 and weight.numel() // GROUP_SIZE % 2 == 0


class QuantizedLinear(torch.nn.Module):
    """A linear layer whose weight [O, I] is kept in HQQ's 4-bit codes and dequantized by every call.

    Args:
        weight: what to quantize; its dtype is the dtype computed in.
        bias: [O], kept as it is; it may be loaded later.
        optimize: run HQQ's solver; False rounds to the nearest code.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.nn.Parameter | None, optimize: bool = True) -> None:
        super().__init__()
        from hqq.core.quantize import Quantizer

        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        codes, meta = Quantizer.quantize(
            weight, nbits=BITS, group_size=GROUP_SIZE, optimize=optimize, axis=1, device=str(weight.device)
        )
        self.register_buffer("codes", codes, persistent=False)
        self.register_buffer("scale", meta["scale"].to(torch.float16), persistent=False)
        self.register_buffer("zero", meta["zero"].to(torch.float16), persistent=False)
        self.register_parameter("bias", bias)

    @property
    def weight(self) -> torch.Tensor:
        """The dequantized weight [O, I], a new tensor."""
        codes = torch.cat([self.codes >> 4, self.codes & 15])
        values = (codes.to(self.dtype) - self.zero.to(self.dtype)) * self.scale.to(self.dtype)
        return values.view(self.out_features, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight, self.bias)
