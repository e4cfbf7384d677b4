"""Every family: its shape, its experts and its dense weights, read from disk, give the model's own logits."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch", reason="the runtime extra is not installed")
transformers = pytest.importorskip("transformers", reason="the runtime extra is not installed")
pytest.importorskip("hqq", reason="the runtime extra is not installed")

from small_models import CONFIGS, config  # noqa: E402

from runtime import family, models  # noqa: E402
from runtime.dense import QuantizedLinear  # noqa: E402
from runtime.experts import SlotExperts  # noqa: E402
from runtime.quantize import dequantize, views  # noqa: E402
from runtime.store import HostStore, SlotPool  # noqa: E402
from traces import ExpertId, ModelSpec  # noqa: E402

FAMILIES = list(CONFIGS)


class Resident(torch.nn.Module):
    """The experts of one layer, all in slots; outputs are summed in rank order."""

    def __init__(self, experts: SlotExperts, layer: int, num_experts: int) -> None:
        super().__init__()
        self._experts, self._layer, self._num = experts, layer, num_experts

    def forward(self, hidden, ids, weights):
        out = torch.empty(*ids.shape, hidden.shape[-1])
        rows = ids.tolist()
        for expert in sorted({e for row in rows for e in row}):
            self._experts.compute(self._layer, expert, self._layer * self._num + expert, hidden, ids, rows, out)
        return (out * weights.unsqueeze(-1)).sum(1).to(hidden.dtype)


def with_resident_experts(model, store: HostStore):
    """``model`` with the experts of ``store``, each in a slot of its own."""
    blocks = models.moe_blocks(model)
    pool = SlotPool(store.count, store.expert_bytes)
    for i in range(store.count):
        pool.row(i).copy_(store.row(i))
    experts = SlotExperts(pool, store.layouts, blocks[0].gated)
    for layer, found in enumerate(blocks):
        found.block.experts = Resident(experts, layer, store.spec.num_experts)
    return model


@torch.inference_mode()
def logits(model, batch: int, prompt: int = 7, decode: int = 3):
    """Logits of prefill and of decode through the cache, [B, prompt + decode, V]."""
    ids = torch.randint(3, 96, (batch, prompt + decode), generator=torch.Generator().manual_seed(5))
    out = model(input_ids=ids[:, :prompt], use_cache=True)
    seen = [out.logits]
    for i in range(prompt, prompt + decode):
        out = model(input_ids=ids[:, i : i + 1], past_key_values=out.past_key_values, use_cache=True)
        seen.append(out.logits)
    return torch.cat(seen, 1)


def with_weights_of(model, store: HostStore):
    """``model`` whose own experts module holds what ``store`` says its experts are."""
    for layer, found in enumerate(models.moe_blocks(model)):
        for expert in range(store.spec.num_experts):
            layout = store.layouts[layer]
            held = views(store.row(store.index(ExpertId(layer, expert)))[: layout.expert_bytes], layout)
            with torch.no_grad():
                for mine, theirs in zip(dequantize(held), found.expert(expert)[:3], strict=True):
                    theirs.copy_(mine)
    return model


def test_the_ten_families_are_there():
    assert set(family.model_types()) == set(FAMILIES)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("bits", [16, 4])
def test_store_and_dense_weights_from_disk_give_the_models_own_logits(saved, name, bits):
    """16 bits hold the weights exactly, so the reference is the model as saved; at 4 bits it is given the store's."""
    model_dir = saved(name)
    spec = models.spec_of(model_dir)
    whole = _whole(model_dir)
    with HostStore.build(model_dir, spec, bits, optimize=False, progress=False) as store:
        if bits == 4:
            whole = with_weights_of(whole, store)
        dense, tokenizer = models.load_dense(model_dir)
        assert tokenizer is None
        mine = with_resident_experts(dense, store)
    for batch in (1, 4):
        expected = logits(whole, batch)
        assert float(expected.std()) > 0.05
        assert float((logits(mine, batch) - expected).abs().max()) <= 1e-5 * max(1.0, float(expected.abs().max()))


def _whole(model_dir: Path):
    return transformers.AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_disk_fused_layout_and_loaded_model_give_the_same_store(saved, name, tmp_path):
    model_dir = saved(name)
    spec = models.spec_of(model_dir)
    whole = _whole(model_dir)
    whole.to(torch.bfloat16).save_pretrained(tmp_path / "fused", save_original_format=False)
    with (
        HostStore.build(model_dir, spec, 4, optimize=False, progress=False) as first,
        HostStore.build(tmp_path / "fused", spec, 4, optimize=False, progress=False) as second,
        HostStore.from_model(whole, spec, 4, optimize=False, progress=False) as third,
    ):
        assert torch.equal(first.block, second.block)
        assert torch.equal(first.block, third.block)
        assert all(p.is_meta for b in models.moe_blocks(whole) for p in b.experts.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_spec_counts_what_is_there(saved, name):
    """Bytes of dense weights, head and KV cache, against the loaded model and a cache it filled."""
    model_dir = saved(name)
    spec = models.spec_of(model_dir)
    whole = _whole(model_dir)
    blocks = models.moe_blocks(whole)
    routed = sum(p.numel() for b in blocks for p in b.experts.parameters())
    assert spec.dense_bytes == 2 * (sum(p.numel() for p in whole.parameters()) - routed)
    assert spec.num_layers == len(blocks)
    assert spec.num_layers * spec.num_experts * spec.expert_bytes(16) == 2 * routed
    layers = [whole.get_submodule(b.name.rpartition(".")[0]) for b in blocks]
    in_layers = sum(p.numel() for layer in layers for p in layer.parameters()) - routed
    assert 0 <= spec.num_layers * (spec.attention_bytes + spec.shared_bytes) - 2 * in_layers < 4 * spec.num_layers
    with torch.inference_mode():
        cache = whole(input_ids=torch.tensor([[3, 4, 5, 6]]), use_cache=True).past_key_values
    held = sum(
        tensor.numel()
        for layer in cache.layers
        for tensor in (getattr(layer, "keys", None), getattr(layer, "values", None))
        if tensor is not None
    )
    assert 0 <= 4 * spec.num_layers * spec.kv_bytes - 2 * held < 8 * spec.num_layers


@pytest.mark.parametrize("name", ["qwen2_moe", "jamba", "gpt_oss"])
def test_dense_weights_at_4_bits_leave_router_head_and_embeddings(saved, name):
    """Logits equal those of the whole model given the dequantized dense weights."""
    model_dir = saved(name)
    spec = models.spec_of(model_dir)
    dense, _ = models.load_dense(model_dir, dense_bits=4)
    whole = _whole(model_dir)
    quantized = {n: m for n, m in dense.named_modules() if isinstance(m, QuantizedLinear)}
    kept = [b.router for b in models.moe_blocks(dense)] + [dense.get_output_embeddings()]
    assert any(n.endswith("o_proj") for n in quantized)
    assert not any(isinstance(m, QuantizedLinear) for module in kept for m in module.modules())
    for path, module in quantized.items():
        target = whole.get_submodule(path).weight
        assert 0 < float((module.weight - target).norm() / target.norm()) < 0.15
        with torch.no_grad():
            target.copy_(module.weight)
    with HostStore.build(model_dir, spec, 16, progress=False) as store:
        mine = with_resident_experts(dense, store)
    assert float((logits(mine, 2) - logits(whole, 2)).abs().max()) < 1e-4


def test_layers_may_have_different_widths(saved):
    model_dir = saved("mixtral")
    spec = models.spec_of(model_dir)
    with HostStore.build(model_dir, spec, [8, 3, 16], optimize=False, progress=False) as store:
        assert [layout.bits for layout in store.layouts] == [8, 3, 16]
        assert store.expert_bytes == spec.expert_bytes(16)
        whole = _whole(model_dir)
        expected = logits(with_weights_of(whole, store), 2)
        mine = logits(with_resident_experts(models.load_dense(model_dir)[0], store), 2)
    assert float((mine - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    with pytest.raises(ValueError, match="2 bit widths given for 3 MoE layers"):
        HostStore.build(model_dir, spec, [4, 4], progress=False)


def test_gpt_oss_experts_stored_as_mxfp4_are_read(saved, tmp_path):
    """Blocks of 32 four-bit floats with an exponent each: read against the same values written out."""
    from safetensors.torch import load_file, save_file
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    model_dir = saved("gpt_oss")
    weights = load_file(model_dir / "model.safetensors")
    generator = torch.Generator().manual_seed(4)
    packed, plain = dict(weights), dict(weights)
    for name in [n for n in weights if n.endswith(("experts.gate_up_proj", "experts.down_proj"))]:
        experts, inner, outer = weights[name].shape
        blocks = torch.randint(0, 256, (experts, outer, inner // 32, 16), dtype=torch.uint8, generator=generator)
        scales = torch.randint(120, 126, (experts, outer, inner // 32), dtype=torch.uint8, generator=generator)
        del packed[name]
        packed |= {f"{name}_blocks": blocks, f"{name}_scales": scales}
        plain[name] = convert_moe_packed_tensors(blocks, scales).contiguous()
    for form, tensors in (("packed", packed), ("plain", plain)):
        (tmp_path / form).mkdir()
        made = config("gpt_oss")
        if form == "packed":
            made.quantization_config = {"quant_method": "mxfp4"}
        made.save_pretrained(tmp_path / form)
        save_file(tensors, tmp_path / form / "model.safetensors", metadata={"format": "pt"})
    spec = models.spec_of(tmp_path / "packed")
    with (
        HostStore.build(tmp_path / "packed", spec, 16, progress=False) as first,
        HostStore.build(tmp_path / "plain", spec, 16, progress=False) as second,
    ):
        assert torch.equal(first.block, second.block)


@pytest.mark.parametrize("name", ["mixtral-8x7b", "gpt-oss-120b", "qwen1.5-moe-a2.7b"])
def test_published_shapes_are_found_from_a_configuration(name):
    """The model classes' default configurations are these models; the simulator's files were written by hand."""
    made = {
        "mixtral-8x7b": ("mixtral", {"num_key_value_heads": 8}),
        "gpt-oss-120b": ("gpt_oss", {}),
        "qwen1.5-moe-a2.7b": ("qwen2_moe", {}),
    }[name]
    document = json.loads((Path(__file__).parents[1] / "sim" / "models" / f"{name}.json").read_text())
    expected = ModelSpec.from_json(document["model"])
    assert models.spec_of_config(transformers.AutoConfig.for_model(made[0], **made[1]), name) == expected


def test_what_cannot_be_used_is_refused(tmp_path):
    with pytest.raises(models.ModelError, match=r"holds no config\.json"):
        models.spec_of(tmp_path)
    transformers.LlamaConfig(num_hidden_layers=1).save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match="LlamaForCausalLM has no MoE block"):
        models.spec_of(tmp_path)
    made = config("deepseek_v3")
    made.quantization_config = {"quant_method": "fp8"}
    made.save_pretrained(tmp_path)
    with pytest.raises(models.ModelError, match="stored as fp8; use a checkpoint that is unquantized"):
        models.spec_of(tmp_path)
    with pytest.raises(models.ModelError, match="dense_bits is 8"):
        models.load_dense(tmp_path, dense_bits=8)
