"""A transformers model without weights: its MoE blocks, its parameters' names, and the shape they make."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from runtime import family
from runtime.family import ExpertWeights, Gated, ModelError
from traces.vocabulary import ModelSpec

EXPERTS = "experts"


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model.

    Attributes:
        block: the module with a router and ``experts``.
        router: its router; forward gives (logits [T, E], weights [T, K], ids [T, K]).
        name: where it stands in the model, as ``get_submodule`` takes it.
    """

    block: torch.nn.Module
    router: torch.nn.Module
    name: str

    @property
    def experts(self) -> torch.nn.Module:
        return self.block.experts

    @property
    def gated(self) -> Gated:
        """Its experts' gated activation; ask before the experts are replaced.

        Raises:
            ModelError: the family's is not known.
        """
        return family.of(self.experts.config.model_type).gated(self.experts)

    def expert(self, expert: int) -> ExpertWeights:
        """Views of one expert's loaded weights, in canonical orientation."""
        e = self.experts
        biases = [getattr(e, name)[expert] for name in ("gate_up_proj_bias", "down_proj_bias")] if e.has_bias else ()
        return family.split(e, e.gate_up_proj[expert], e.down_proj[expert], *biases)


def moe_blocks(model: torch.nn.Module) -> list[MoeBlock]:
    """All MoE blocks in layer order; dense layers are passed over.

    Raises:
        ModelError: there are none.
    """
    found = []
    for name, module in model.named_modules():
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(router, torch.nn.Module) and isinstance(getattr(module, EXPERTS, None), torch.nn.Module):
            found.append(MoeBlock(module, router, name))
    if not found:
        raise ModelError(f"{type(model).__name__} has no MoE block with a router and experts; name an MoE model")
    return found


class _NoMemory(TorchFunctionMode):
    """Uninitialised tensors have a shape only: a skeleton must not reserve the memory of the whole model."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = dict(kwargs or {})
        if function is torch.empty and kwargs.get("device") is None:
            kwargs["device"] = "meta"
        return function(*args, **kwargs)


def read_config(model_dir: Path) -> Any:
    """The directory's configuration; a quantization that its family reads is taken out.

    Raises:
        ModelError: not a model directory, or weights stored in a way that cannot be read.
    """
    from transformers import AutoConfig

    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} holds no config.json; name a Hugging Face model directory")
    try:
        config = AutoConfig.from_pretrained(model_dir, local_files_only=True)
    except (OSError, KeyError, ValueError, TypeError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ModelError(f"{model_dir} holds no usable config.json ({reason}); name a model directory") from None
    stored = getattr(config, "quantization_config", None)
    if stored:
        how = stored.get("quant_method") if isinstance(stored, dict) else getattr(stored, "quant_method", stored)
        how = getattr(how, "value", how)
        readable = family.of(config.model_type).STORED_AS
        if how not in readable:
            allowed = " or ".join(("unquantized", *readable))
            raise ModelError(f"weights of {model_dir.name} are stored as {how}; use a checkpoint that is {allowed}")
        del config.quantization_config
    return config


def skeleton(config: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """The model with parameters on the meta device; buffers that no checkpoint holds are real.

    Raises:
        ModelError: transformers has no language model of this type, or its experts are not kept as expected.
    """
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    try:
        with init_empty_weights(include_buffers=False), _NoMemory():
            model = AutoModelForCausalLM.from_config(copy.deepcopy(config), dtype=dtype)
    except (ValueError, ImportError) as error:
        reason = str(error).strip().split("\n")[0][:200]
        raise ModelError(f"no language model can be made of model type {config.model_type} ({reason})") from None
    model.tie_weights()  # moving parameters to the meta device parted them
    for found in moe_blocks(model):
        experts = found.experts
        if not getattr(experts, "has_gate", False) or getattr(experts, "has_post_expert_norm", False):
            raise ModelError(
                f"{type(experts).__name__} is not of gate, up and down projections as transformers 5 fuses them; "
                f"tested model types are {', '.join(family.model_types())}"
            )
    return model.eval()


def spec_of_skeleton(model: torch.nn.Module, name: str) -> ModelSpec:
    """Shape of a model whose experts are in place, dense weights counted in 16 bits.

    Of layers that differ (Jamba) ``attention_bytes`` and ``shared_bytes`` are means over the MoE layers, and
    ``kv_bytes`` is what one token adds over all layers, dense ones too, divided by the MoE layers; all rounded up.
    """
    config = model.config
    blocks = moe_blocks(model)
    experts = blocks[0].experts
    num_experts, *shape = experts.gate_up_proj.shape
    hidden, twice = shape if experts.is_transposed else reversed(shape)
    routed = sum(_numel([b.experts]) for b in blocks)
    shared = sum(_numel([b.block]) - _numel([b.experts, b.router]) for b in blocks)
    layers = _numel([model.get_submodule(b.name.rpartition(".")[0]) for b in blocks])
    count = len(blocks)
    head = model.get_output_embeddings()
    return ModelSpec(
        name=name,
        num_layers=count,
        num_experts=num_experts,
        top_k=getattr(blocks[0].router, "top_k", None) or config.num_experts_per_tok,
        hidden_size=hidden,
        expert_size=twice // 2,
        expert_bias=twice + hidden if experts.has_bias else 0,
        shared_bytes=_per_layer(shared, count),
        attention_bytes=_per_layer(layers - routed - shared, count),
        kv_bytes=_per_layer(family.of(config.model_type).kv_values(config), count),
        head_bytes=2 * head.weight.numel(),
        dense_bytes=2 * (_numel([model]) - routed),
    )


def _numel(modules: Sequence[torch.nn.Module]) -> int:
    """Weights in the modules, tied ones once."""
    return sum(p.numel() for p in {id(p): p for m in modules for p in m.parameters()}.values())


def _per_layer(values: int, layers: int) -> int:
    """Bytes of 16-bit ``values`` spread over ``layers``."""
    return -(-2 * values // layers)
