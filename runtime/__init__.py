"""Runs mixture-of-experts models larger than the device: quantized experts in host memory, slots on the device.

Importing this package loads neither torch nor transformers; the modules that need them import them.
"""
