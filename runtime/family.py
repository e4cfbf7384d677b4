"""What differs between model families; the usual answer to each question, overridden in `runtime.families`.

A family is one file there with ``FAMILY``, found by existing. Sizes, numbers and names come from the model class and
the conversion table of transformers themselves, so a family says only what those do not.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any, NamedTuple

import torch

Gated = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""The product of one expert's gate and up projections. The two below are known to ``runtime.kernels``."""


class ActGate(NamedTuple):
    """act(gate) * up."""

    act: torch.nn.Module

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return self.act(gate) * up


class ClampedGate(NamedTuple):
    """(up + 1) * gate * sigmoid(alpha * gate), gate clamped from above and up from both sides."""

    alpha: float
    limit: float

    def __call__(self, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        gate = gate.clamp(max=self.limit)
        return (up.clamp(-self.limit, self.limit) + 1) * (gate * torch.sigmoid(gate * self.alpha))


class ModelError(ValueError):
    """A model directory or family that cannot be used; one sentence."""


class ExpertWeights(NamedTuple):
    """One expert: gate and up [I, H], down [H, I], and gate's, up's and down's biases in a row [2I + H], if any."""

    gate: torch.Tensor
    up: torch.Tensor
    down: torch.Tensor
    biases: torch.Tensor | None = None


class Family:
    """The usual family.

    Attributes:
        MODEL_TYPES: ``model_type`` values of ``config.json`` this family answers for.
        STORED_AS: quantization methods of checkpoints it can read, beside unquantized ones.
        DENSE_16_BIT: names of linear layers that are never quantized.
    """

    MODEL_TYPES: tuple[str, ...] = ()
    STORED_AS: tuple[str, ...] = ()
    DENSE_16_BIT: tuple[str, ...] = ("shared_expert_gate",)

    def kv_values(self, config: Any) -> int:
        """Values one token adds to the KV cache, all layers together, sliding windows not yet full."""
        heads = config.num_attention_heads
        kv_heads = getattr(config, "num_key_value_heads", None) or heads
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        return 2 * kv_heads * head_dim * config.num_hidden_layers

    def gated(self, experts: torch.nn.Module) -> Gated:
        """The product of one expert's gate and up projections, from the module that holds its experts.

        Raises:
            ModelError: the module does more than act(gate) * up, and this family does not say what.
        """
        apply = type(experts)._apply_gate
        if apply.__module__ != "transformers.integrations.moe":
            raise ModelError(f"{type(experts).__name__} gates in its own way; add a file for it to runtime/families")
        return ActGate(experts.act_fn)

    def preference(self, router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
        """What this family's routers rank experts by, on the scale of logits, from router logits [..., E]."""
        return logits

    def allowed(self, router: torch.nn.Module, preference: torch.Tensor) -> torch.Tensor:
        """``preference`` [..., E], minus infinity for experts that the router does not choose from."""
        return preference

    def fused(self, parts: Mapping[str, Any], name: str, expert: int) -> torch.Tensor:
        """One expert's slice of the fused tensor ``name``; ``parts`` are sliceable tensors of its layer by name.

        Raises:
            KeyError: the checkpoint lacks it.
        """
        return parts[name][expert]


@cache
def _families() -> tuple[dict[str, Family], Family]:
    package = importlib.import_module("runtime.families")
    found: dict[str, Family] = {}
    for info in sorted(pkgutil.iter_modules(package.__path__), key=lambda i: i.name):
        family = importlib.import_module(f"{package.__name__}.{info.name}").FAMILY
        found |= dict.fromkeys(family.MODEL_TYPES, family)
    return found, Family()


def model_types() -> tuple[str, ...]:
    """Model types the contract tests hold, in alphabetical order."""
    return tuple(sorted(_families()[0]))


def of(model_type: str) -> Family:
    """The family of a model type; the usual one for a type no file names."""
    found, usual = _families()
    return found.get(model_type, usual)


def split(
    experts: torch.nn.Module,
    gate_up: torch.Tensor,
    down: torch.Tensor,
    gate_up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> ExpertWeights:
    """One expert's slices of the fused tensors in canonical orientation, by the flags of its ``experts`` module.

    Args:
        gate_up: [2I, H], or [H, 2I] where ``is_transposed``; gate above up, or in turn unless ``is_concatenated``.
        down: [H, I], or [I, H].
        gate_up_bias, down_bias: [2I] and [H], where ``has_bias``.
    """
    if experts.is_transposed:
        gate_up, down = gate_up.T, down.T
    gate, up = gate_up.chunk(2) if experts.is_concatenated else (gate_up[::2], gate_up[1::2])
    if gate_up_bias is None or down_bias is None:
        return ExpertWeights(gate, up, down)
    gates, ups = gate_up_bias.chunk(2) if experts.is_concatenated else (gate_up_bias[::2], gate_up_bias[1::2])
    return ExpertWeights(gate, up, down, torch.cat([gates, ups, down_bias]))
