"""A small random model of every family, for contract tests; weights are exact in bfloat16."""

from __future__ import annotations

from typing import Any

import torch
import transformers

SHARED = {
    "vocab_size": 96,
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
LATENT = {
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 64,
    "intermediate_size": 128,
    "first_k_dense_replace": 1,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "mixtral": {"intermediate_size": 128, "num_local_experts": 4},
    "qwen2_moe": {
        "moe_intermediate_size": 64,
        "shared_expert_intermediate_size": 128,
        "num_experts": 6,
        "intermediate_size": 128,
        "mlp_only_layers": [1],
    },
    "qwen3_moe": {"moe_intermediate_size": 64, "num_experts": 6, "head_dim": 32, "norm_topk_prob": True},
    "olmoe": {"intermediate_size": 64, "num_experts": 8},
    "deepseek_v2": LATENT | {"n_routed_experts": 6, "n_shared_experts": 1, "n_group": 1, "topk_group": 1},
    "deepseek_v3": LATENT | {"n_routed_experts": 8, "n_shared_experts": 1, "n_group": 2, "topk_group": 1},
    "gpt_oss": {"intermediate_size": 64, "num_local_experts": 4, "head_dim": 16, "sliding_window": 8},
    "phimoe": {"intermediate_size": 128, "num_local_experts": 4, "lm_head_bias": True},
    "granitemoe": {"intermediate_size": 64, "num_local_experts": 4, "tie_word_embeddings": True},
    "jamba": {
        "intermediate_size": 128,
        "num_experts": 4,
        "num_hidden_layers": 4,
        "attn_layer_period": 2,
        "attn_layer_offset": 1,
        "mamba_d_state": 8,
        "mamba_dt_rank": 8,
    },
}


def config(family: str) -> Any:
    return transformers.AutoConfig.for_model(family, **(SHARED | CONFIGS[family]))


def small_model(family: str, seed: int = 0) -> Any:
    """A model of ``family`` in float32 whose weights bfloat16 holds exactly, experts apart from one another."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(config(family), dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed + 1)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("e_score_correction_bias") or (tensor.dim() == 1 and "bias" in name):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
            elif tensor.dim() > 1 and not name.endswith("A_log"):
                tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.15)
        for tensor in model.parameters():
            tensor.copy_(tensor.to(torch.bfloat16))
    return model
