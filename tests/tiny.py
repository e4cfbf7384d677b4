"""A small random Mixtral with a tokenizer, as a checkpoint directory."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

from runtime import corpus, train


def tiny_mixtral(out: Path) -> Path:
    """Five layers of six experts, top-2, hidden 64, ffn 128; written into ``out``, which is returned."""
    torch.manual_seed(3)
    torch.set_num_threads(1)
    text = ("def add(a, b):\n    return a + b\n\nThe quick brown fox. " * 400).encode()
    tokenizer = train.train_tokenizer([corpus.split("text", text)], 300)
    shape = train.config(tokenizer.get_vocab_size(), layers=5, hidden=64, ffn=128, experts=6, top_k=2)
    shape.initializer_range = 0.2  # random routers that do not all agree
    model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    train.save_model(model, tokenizer, out)
    return out
