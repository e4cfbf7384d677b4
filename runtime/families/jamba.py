"""Jamba: most layers are Mamba layers, whose state does not grow with the context."""

from typing import Any

from runtime.family import Family


class Jamba(Family):
    MODEL_TYPES = ("jamba",)
    DENSE_16_BIT = ("x_proj", "dt_proj")  # they make the state's step sizes; small

    def kv_values(self, config: Any) -> int:
        attention = config.layers_block_type.count("attention")
        return super().kv_values(config) // config.num_hidden_layers * attention


FAMILY = Jamba()
