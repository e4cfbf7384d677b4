"""The families that need nothing said: SwiGLU experts without biases, grouped-query attention in every layer."""

from runtime.family import Family


class Usual(Family):
    MODEL_TYPES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe")


FAMILY = Usual()
