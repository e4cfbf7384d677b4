"""DeepSeek V2 and V3: multi-head latent attention, whose cache keeps the latent."""

from typing import Any

from runtime.family import Family


class DeepSeek(Family):
    MODEL_TYPES = ("deepseek_v2", "deepseek_v3")

    def kv_values(self, config: Any) -> int:
        """The latent and the rotary part of the key, shared by all heads (DeepSeek-V2, section 2.1)."""
        return (config.kv_lora_rank + config.qk_rope_head_dim) * config.num_hidden_layers


FAMILY = DeepSeek()
