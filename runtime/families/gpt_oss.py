"""gpt-oss: clamped gating, biases, and checkpoints whose experts are stored as MXFP4."""

from collections.abc import Mapping
from typing import Any

import torch

from runtime.family import ClampedGate, Family, Gated


class GptOss(Family):
    MODEL_TYPES = ("gpt_oss",)
    STORED_AS = ("mxfp4",)

    def gated(self, experts: torch.nn.Module) -> Gated:
        return ClampedGate(experts.alpha, experts.limit)

    def fused(self, parts: Mapping[str, Any], name: str, expert: int) -> torch.Tensor:
        """As stored, or decoded from blocks of 32 four-bit floats [rows, H/32, 16] with an exponent each."""
        if f"{name}_blocks" not in parts:
            return super().fused(parts, name, expert)
        from transformers.integrations.mxfp4 import convert_moe_packed_tensors

        here = slice(expert, expert + 1)
        return convert_moe_packed_tensors(parts[f"{name}_blocks"][here], parts[f"{name}_scales"][here])[0]


FAMILY = GptOss()
