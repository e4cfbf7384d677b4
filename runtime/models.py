"""What the engine needs to know of a transformers model: its MoE blocks, routers and shape."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from traces import ModelSpec

DEMO = Path(__file__).parent / "demo"


class ModelError(ValueError):
    """A model directory or family that cannot be used; one sentence."""


@dataclass(frozen=True)
class MoeBlock:
    """One MoE block of a loaded model.

    Attributes:
        block: the module with a router and ``experts``.
        router: its router; forward gives (logits [T, E], weights [T, K], ids [T, K]).
    """

    block: torch.nn.Module
    router: torch.nn.Module


def moe_blocks(model: torch.nn.Module) -> list[MoeBlock]:
    """All MoE blocks in layer order; dense layers are passed over.

    Raises:
        ModelError: there are none.
    """
    found = []
    for module in model.modules():
        router = getattr(module, "gate", None) or getattr(module, "router", None)
        if isinstance(router, torch.nn.Module) and isinstance(getattr(module, "experts", None), torch.nn.Module):
            found.append(MoeBlock(module, router))
    if not found:
        raise ModelError(f"{type(model).__name__} has no MoE block with a router and experts; name an MoE model")
    return found


def load(model_dir: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model and tokenizer from a local directory.

    Raises:
        ModelError: not a model directory.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} holds no config.json; name a Hugging Face model directory")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    model.eval()
    return model, AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


def spec_of(model_dir: Path) -> ModelSpec:
    """Shape of a Mixtral checkpoint directory, dense weights counted in 16 bits; named after the directory.

    Raises:
        ModelError: another family, or a config without the fields.
    """
    try:
        config = json.loads((model_dir / "config.json").read_text())
        kind = config["model_type"]
        if kind != "mixtral":
            raise ModelError(f"{model_dir.name} is a {kind} model; this version runs mixtral models")
        hidden, layers, vocab = config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]
        heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
        head_dim = config.get("head_dim") or hidden // heads
        attention = 2 * hidden * head_dim * (heads + kv_heads) + hidden * (config["num_local_experts"] + 2)
        embeddings = vocab * hidden * (1 if config.get("tie_word_embeddings") else 2)
        return ModelSpec(
            name=model_dir.resolve().name,
            num_layers=layers,
            num_experts=config["num_local_experts"],
            top_k=config["num_experts_per_tok"],
            hidden_size=hidden,
            expert_size=config["intermediate_size"],
            attention_bytes=2 * attention,
            kv_bytes=2 * 2 * kv_heads * head_dim,
            head_bytes=2 * vocab * hidden,
            dense_bytes=2 * (embeddings + layers * attention + hidden),
        )
    except (OSError, KeyError, ValueError) as error:
        if isinstance(error, ModelError):
            raise
        raise ModelError(f"{model_dir} holds no usable config.json ({error}); name a model directory") from None
