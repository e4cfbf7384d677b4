"""Runs mixture-of-experts models larger than the device: quantized experts in host memory, slots on the device.

    from runtime import offload

Importing this package loads neither torch nor transformers; the modules that need them import them.
"""

from typing import Any

__all__ = ["offload"]


def __getattr__(name: str) -> Any:
    if name == "offload":
        from runtime.offloading import offload

        return offload
    raise AttributeError(f"module 'runtime' has no attribute {name!r}")
