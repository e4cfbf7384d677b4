"""Transformers models as the engine takes them: their shape, whole, or with dense weights only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from runtime import family
from runtime.checkpoint import Checkpoint, StoreError
from runtime.dense import QuantizedLinear, fits
from runtime.family import ModelError
from runtime.skeleton import MoeBlock, moe_blocks, read_config, skeleton, spec_of_skeleton
from traces import ModelSpec

__all__ = ["DEMO", "ModelError", "MoeBlock", "load", "load_dense", "moe_blocks", "spec_of", "spec_of_config"]

DEMO = Path(__file__).parent / "demo"
DENSE_BITS = (16, 4)


def spec_of(model_dir: Path) -> ModelSpec:
    """Shape of a checkpoint directory's model, named after the directory; its weights are not read.

    Raises:
        ModelError: not a model directory, or a model without routed experts of a known form.
    """
    return spec_of_config(read_config(model_dir), model_dir.resolve().name)


def spec_of_config(config: Any, name: str) -> ModelSpec:
    """Shape of the model a transformers configuration describes (see `spec_of_skeleton`).

    Raises:
        ModelError: as `spec_of`.
    """
    return spec_of_skeleton(skeleton(config), name)


def load(model_dir: Path, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, PreTrainedTokenizerBase]:
    """Model, experts and all, and tokenizer from a local directory.

    Raises:
        ModelError: not a model directory.
    """
    if not (model_dir / "config.json").is_file():
        raise ModelError(f"{model_dir} holds no config.json; name a Hugging Face model directory")
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype, local_files_only=True)
    model.eval()
    return model, AutoTokenizer.from_pretrained(model_dir, local_files_only=True)


@torch.no_grad()
def load_dense(
    model_dir: Path, dtype: torch.dtype = torch.float32, dense_bits: int = 16, optimize: bool = True
) -> tuple[torch.nn.Module, PreTrainedTokenizerBase | None]:
    """Model with every weight but the routed experts', read tensor by tensor; and the tokenizer, if there is one.

    The experts' parameters stay on the meta device: replace ``block.experts`` before running the model.

    Args:
        dtype: of the dense weights; what transformers always keeps in float32 stays so.
        dense_bits: 16 leaves ``dtype``; 4 quantizes linear layers outside routers, head and embeddings.
        optimize: as in `runtime.quantize.pack`.

    Raises:
        ModelError: no model directory, another width, or an incomplete checkpoint.
        StoreError: weights that cannot be read.
    """
    if dense_bits not in DENSE_BITS:
        raise ModelError(f"dense_bits is {dense_bits}; dense weights are kept at 16 or 4 bits")
    config = read_config(model_dir)
    model = skeleton(config, dtype)
    keep = tuple(model._get_dtype_plan(dtype))
    routers = {id(m) for b in moe_blocks(model) for m in b.router.modules()}
    kept_16 = {id(model.get_output_embeddings()), *routers}
    kept_names = family.of(config.model_type).DENSE_16_BIT
    with Checkpoint(model_dir, model) as checkpoint:
        for name, stored in checkpoint.dense():
            path, _, leaf = name.rpartition(".")
            module = model.get_submodule(path)
            wide = any(f".{part}." in f".{name}." for part in keep)
            tensor = stored.to(torch.float32 if wide else dtype)
            quantized = isinstance(module, torch.nn.Linear) and leaf == "weight" and id(module) not in kept_16
            quantized = quantized and path.rpartition(".")[2] not in kept_names and fits(tensor)
            if dense_bits == 4 and quantized:
                model.set_submodule(path, QuantizedLinear(tensor, module.bias, optimize))
                continue
            if leaf in module._buffers:
                module._buffers[leaf] = tensor
            else:
                module._parameters[leaf] = torch.nn.Parameter(tensor, requires_grad=False)
    model.tie_weights()
    _check_complete(model, model_dir)
    if (model_dir / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(model_dir, local_files_only=True)
    return model.eval(), tokenizer_of(model_dir)


def _check_complete(model: torch.nn.Module, model_dir: Path) -> None:
    experts = {id(p) for b in moe_blocks(model) for p in b.experts.parameters()}
    tensors = [*model.named_parameters(), *model.named_buffers()]
    missing = [name for name, tensor in tensors if tensor.is_meta and id(tensor) not in experts]
    if missing:
        more = f" and {len(missing) - 1} others" if len(missing) > 1 else ""
        raise StoreError(f"{model_dir} holds no tensor for {missing[0]}{more}; the checkpoint is incomplete")


def tokenizer_of(model_dir: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer of a model directory; None where there is none."""
    if any((model_dir / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "tokenizer.model")):
        return AutoTokenizer.from_pretrained(model_dir, local_files_only=True)
    return None
