"""The words every package shares: experts, model shapes, visits."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from math import ceil
from typing import Any, NamedTuple

PREFILL = 0
DECODE = 1
GROUP_SIZE = 64  # default number of weights that share one scale and one zero
_PER_WORD = {8: (1, 1), 4: (2, 1), 3: (10, 4), 2: (4, 1)}  # bits -> (values in one word, bytes of the word)


class ExpertId(NamedTuple):
    """One routed feed-forward block of one MoE layer."""

    layer: int
    expert: int


@dataclass(frozen=True)
class ModelSpec:
    """Shape of a mixture-of-experts model: all that deciding and timing need to know.

    Attributes:
        name: short name, as given to ``--model``.
        num_layers: MoE layers (dense-only layers count into ``dense_bytes``).
        num_experts: routed experts of one layer.
        top_k: routed experts of one token in one layer.
        hidden_size: width of the residual stream.
        expert_size: inner width of one routed expert (three matrices of hidden_size x expert_size).
        expert_bias: bias values of one expert, kept in 16 bits.
        shared_bytes: bytes per layer of shared experts, always on the device.
        attention_bytes: bytes per layer read by attention, norms and router for one token (weights only).
        kv_bytes: bytes per layer and token of the KV cache.
        head_bytes: bytes read by the output head for one token.
        dense_bytes: all weights outside the routed experts, as kept on the device.
        full_layers: MoE layers of the whole model, when this spec is its first ``num_layers`` only; 0 when it is whole.
    """

    name: str
    num_layers: int
    num_experts: int
    top_k: int
    hidden_size: int
    expert_size: int
    expert_bias: int = 0
    shared_bytes: int = 0
    attention_bytes: int = 0
    kv_bytes: int = 0
    head_bytes: int = 0
    dense_bytes: int = 0
    full_layers: int = 0

    @property
    def expert_weights(self) -> int:
        """Weights of one expert: gate, up and down projection."""
        return 3 * self.hidden_size * self.expert_size

    def expert_bytes(self, bits: int, group_size: int = GROUP_SIZE) -> int:
        """Bytes of one expert's buffer at ``bits`` (16, 8, 4, 3, 2).

        Quantized: HQQ's packing along the grouped rows (axis 1) plus 16-bit scale and zero per group of
        ``group_size`` weights; 3-bit packs ten values into an int32.

        Raises:
            ValueError: a bit width HQQ does not pack, or a group size that straddles a row.
        """
        bias = 2 * self.expert_bias
        if bits == 16:
            return 2 * self.expert_weights + bias
        if bits not in _PER_WORD:
            raise ValueError(f"bits is {bits}; experts are kept at 16, 8, 4, 3 or 2 bits")
        if self.hidden_size % group_size or self.expert_size % group_size:
            raise ValueError(
                f"group size {group_size} does not divide {self.name}'s widths {self.hidden_size} and "
                f"{self.expert_size}; choose one that does"
            )
        values, word = _PER_WORD[bits]
        groups = self.hidden_size * self.expert_size // group_size
        matrix = ceil(groups / values) * group_size * word + groups * 4
        return 3 * matrix + bias

    def at_depth(self, num_layers: int) -> ModelSpec:
        """The same model with its first ``num_layers`` MoE layers only, remembering the whole depth."""
        if num_layers == self.num_layers:
            return self
        if num_layers > self.num_layers:
            raise ValueError(f"{self.name} has {self.num_layers} MoE layers; the trace has {num_layers}")
        per_layer = self.attention_bytes + self.shared_bytes
        values = asdict(self) | {
            "num_layers": num_layers,
            "full_layers": self.full_layers or self.num_layers,
            "dense_bytes": self.dense_bytes - (self.num_layers - num_layers) * per_layer,
        }
        return ModelSpec(**values)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> ModelSpec:
        """Build from a JSON object.

        Raises:
            ValueError: an unknown, missing or non-integer field, or a size that is not positive; the field is named.
        """
        known = {f.name: f for f in fields(cls)}
        for key in values:
            if key not in known:
                raise ValueError(f"model field {key!r} is unknown; known are {', '.join(known)}")
        for name in ("name", "num_layers", "num_experts", "top_k", "hidden_size", "expert_size"):
            if name not in values:
                raise ValueError(f"model field {name!r} is missing")
        for key, value in values.items():
            if key == "name":
                if not isinstance(value, str):
                    raise ValueError(f"model field 'name' is {value!r}; it must be a string")
            elif not isinstance(value, int) or isinstance(value, bool) or value < 0:
                raise ValueError(f"model field {key!r} is {value!r}; it must be an integer, 0 or larger")
        spec = cls(**values)
        for name in ("num_layers", "num_experts", "top_k", "hidden_size", "expert_size"):
            if getattr(spec, name) < 1:
                raise ValueError(f"model field {name!r} is {getattr(spec, name)}; it must be at least 1")
        if spec.top_k > spec.num_experts:
            raise ValueError(f"model field 'top_k' is {spec.top_k}; it cannot exceed num_experts {spec.num_experts}")
        return spec


class Guesses(NamedTuple):
    """Predicted experts of one later layer, best first.

    ``scores[i]`` is the probability that ``experts[i]`` is among the routed top_k of the target visit, already
    rounded to float16 and held as a Python float, so that every driver's planner sees the same number.
    """

    experts: list[int]
    scores: list[float]


@dataclass(slots=True)
class Visit:
    """One MoE layer in one forward pass.

    Attributes:
        index: running number of the visit in its run, from 0.
        layer: MoE layer.
        phase: ``PREFILL`` or ``DECODE``.
        tokens: tokens in the pass (in decode one of each sequence in it).
        context: tokens in the KV caches before this pass, summed over its sequences.
        experts: distinct routed experts in router order (tokens in order, then rank; first appearance).
        counts: tokens routed to each of ``experts``.
        guesses: predictions for layer + 1, layer + 2, ...: entry d - 1 is distance d; empty when there are none.
        starts_sequence: first visit of a pass in which a sequence starts.
    """

    index: int
    layer: int
    phase: int
    tokens: int
    context: int
    experts: list[int]
    counts: list[int]
    guesses: list[Guesses] = field(default_factory=list)
    starts_sequence: bool = False


def router_order(ids: list[list[int]]) -> tuple[list[int], list[int]]:
    """Distinct experts and how many tokens go to each, from per-token ids [tokens][top_k], in router order."""
    counts: dict[int, int] = {}
    for token in ids:
        for expert in token:
            counts[expert] = counts.get(expert, 0) + 1
    return list(counts), list(counts.values())
