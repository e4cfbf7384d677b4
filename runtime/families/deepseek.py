"""DeepSeek V2 and V3: multi-head latent attention, whose cache keeps the latent; routers that choose within groups."""

from typing import Any

import torch

from runtime.family import Family


class DeepSeek(Family):
    MODEL_TYPES = ("deepseek_v2", "deepseek_v3")

    def kv_values(self, config: Any) -> int:
        """The latent and the rotary part of the key, shared by all heads (DeepSeek-V2, section 2.1)."""
        return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers

    def preference(self, router: torch.nn.Module, logits: torch.Tensor) -> torch.Tensor:
        """V3 ranks by the sigmoid plus a bias that balances the load; four times that is as steep as a logit near 0."""
        bias = getattr(router, "e_score_correction_bias", None)
        return logits if bias is None else 4 * (logits.sigmoid() + bias)

    def allowed(self, router: torch.nn.Module, preference: torch.Tensor) -> torch.Tensor:
        """Experts of the ``topk_group`` best groups: by the best expert in V2, by the sum of the best two in V3."""
        corrected = getattr(router, "e_score_correction_bias", None) is not None
        if not corrected and router.topk_method == "greedy":
            return preference
        groups = preference.unflatten(-1, (router.num_group, -1))
        best = groups.topk(2 if corrected else 1, -1).values.sum(-1)
        chosen = torch.zeros_like(best, dtype=torch.bool).scatter_(-1, best.topk(router.topk_group, -1).indices, True)
        return groups.masked_fill(~chosen[..., None], -torch.inf).flatten(-2)


FAMILY = DeepSeek()
