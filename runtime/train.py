"""Train the demonstration model: a small Mixtral with its own tokenizer, on any text files.

    python -m runtime.train --corpus FILE [FILE ...] --out DIR

Resumable: run the same command again and it goes on from ``DIR/training/checkpoint.pt``. The learning rate is
constant after a warm-up and falls linearly to zero over the last quarter of ``--tokens``, so a run can be lengthened
or brought to its end early by naming another ``--tokens``.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, MixtralConfig, PreTrainedTokenizerFast

from runtime import corpus
from traces.cli import Parser

END_OF_TEXT = "<|endoftext|>"


def config(vocab_size: int, layers: int, hidden: int, ffn: int, experts: int, top_k: int) -> MixtralConfig:
    """A Mixtral shape whose dimensions are multiples of 64, so that quantization groups never straddle rows."""
    for name, value in (("--hidden", hidden), ("--ffn", ffn)):
        if value % 64:
            raise ValueError(f"{name} is {value}; it must be a multiple of 64 (quantization groups)")
    heads = hidden // 32
    return MixtralConfig(
        vocab_size=vocab_size,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=2 if heads % 2 == 0 else 1,
        head_dim=32,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        sliding_window=None,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    )


def train_tokenizer(domains: list[corpus.Domain], vocab_size: int, sample_bytes: int = 6_000_000) -> Tokenizer:
    """Byte-level BPE on an equal sample of every domain."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    texts = []
    for domain in domains:
        stride = max(1, sum(map(len, domain.train)) // sample_bytes)
        texts += [block.decode("utf-8", "replace") for block in domain.train[::stride]]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, blocks: tuple[bytes, ...]) -> np.ndarray:
    """Token ids of all blocks in a row, uint16 [tokens]."""
    encoded = tokenizer.encode_batch_fast([b.decode("utf-8", "replace") for b in blocks])
    return np.concatenate([np.asarray(e.ids, np.uint16) for e in encoded])


def learning_rate(step: int, steps: int, peak: float, warmup: int = 100) -> float:
    """Warm-up, then constant, then linear to zero over the last quarter."""
    if step < warmup:
        return peak * (step + 1) / warmup
    decay_start = int(steps * 0.75)
    if step < decay_start:
        return peak
    return peak * max(0.0, (steps - step) / max(1, steps - decay_start))


class BalanceLoss:
    """Per-layer Switch loss E * sum_i(P_i * f_i), read by hooks on the routers (Fedus et al. 2021, equation 4).

    The library's own loss pools all layers before balancing, which lets single layers collapse.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self._per_layer: list[torch.Tensor] = []
        for layer in model.model.layers:
            layer.mlp.gate.register_forward_hook(self._hook)

    def _hook(self, module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
        logits, _, ids = output
        probabilities = logits.float().softmax(-1)
        experts = probabilities.shape[-1]
        load = torch.nn.functional.one_hot(ids, experts).float().mean((0, 1))
        self._per_layer.append(experts * (probabilities.mean(0) * load).sum())

    def take(self) -> torch.Tensor:
        """Mean over the layers of the last forward pass; 1 is perfect balance."""
        loss = torch.stack(self._per_layer).mean()
        self._per_layer.clear()
        return loss


class MasterAdamW:
    """AdamW on float32 copies of bfloat16 weights; matrices decay, vectors do not."""

    def __init__(self, model: torch.nn.Module, weight_decay: float = 0.1) -> None:
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.master = [p.detach().float().clone().requires_grad_() for p in self.weights]
        matrices = [m for m in self.master if m.dim() > 1]
        vectors = [m for m in self.master if m.dim() <= 1]
        groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), lr=0.0, fused=True)

    def step(self, lr: float, clip: float = 1.0) -> None:
        for weight, master in zip(self.weights, self.master, strict=True):
            master.grad = None if weight.grad is None else weight.grad.float()
            weight.grad = None
        torch.nn.utils.clip_grad_norm_(self.master, clip)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        with torch.no_grad():
            for weight, master in zip(self.weights, self.master, strict=True):
                weight.copy_(master)

    def state(self) -> dict:
        return {"master": [m.detach() for m in self.master], "optimizer": self.optimizer.state_dict()}

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for weight, master, saved in zip(self.weights, self.master, state["master"], strict=True):
                master.copy_(saved)
                weight.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])


def batch(data: list[np.ndarray], size: int, length: int, step: int, seed: int) -> torch.Tensor:
    """Token ids [size, length + 1] of batch number ``step``; every domain equally likely, whatever its length."""
    rng = np.random.default_rng([seed, step])
    rows = []
    for domain in rng.integers(len(data), size=size):
        start = rng.integers(len(data[domain]) - length - 1)
        rows.append(data[domain][start : start + length + 1].astype(np.int64))
    return torch.from_numpy(np.stack(rows))


@torch.no_grad()
def held_out_loss(model: torch.nn.Module, balance: BalanceLoss, data: list[np.ndarray], length: int) -> list[float]:
    """Mean next-token loss in nats per token, one figure per domain, on up to 32 windows of each."""
    model.eval()
    losses = []
    for tokens in data:
        count = max(1, min(32, len(tokens) // (length + 1)))
        windows = np.stack([tokens[i * (length + 1) : (i + 1) * (length + 1)] for i in range(count)]).astype(np.int64)
        ids = torch.from_numpy(windows)
        losses.append(float(next_token_loss(model, ids)))
        balance.take()
    model.train()
    return losses


def next_token_loss(model: torch.nn.Module, ids: torch.Tensor) -> torch.Tensor:
    logits = model(input_ids=ids[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, 1:].flatten())


def save_checkpoint(path: Path, optimizer: MasterAdamW, step: int) -> None:
    temporary = path.with_suffix(".tmp")
    torch.save({"step": step, **optimizer.state()}, temporary)
    os.replace(temporary, path)


def save_model(model: torch.nn.Module, tokenizer: Tokenizer, out: Path) -> None:
    model.save_pretrained(out, safe_serialization=True)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END_OF_TEXT, bos_token=END_OF_TEXT)
    fast.save_pretrained(out)


def train(args: argparse.Namespace) -> dict:
    work = args.out / "training"
    domains = corpus.load(args.corpus)
    work.mkdir(parents=True, exist_ok=True)
    tokenizer_file = work / "tokenizer.json"
    if not tokenizer_file.exists():
        train_tokenizer(domains, args.vocab).save(str(tokenizer_file), pretty=False)
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    train_data = [encode(tokenizer, d.train) for d in domains]
    held_data = [encode(tokenizer, d.held_out) for d in domains]
    shape = config(tokenizer.get_vocab_size(), args.layers, args.hidden, args.ffn, args.experts, args.top_k)
    torch.manual_seed(args.seed)
    model = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16)
    model.set_experts_implementation("grouped_mm")
    model.config.use_cache = False
    model.train()
    balance = BalanceLoss(model)
    optimizer = MasterAdamW(model)
    checkpoint = work / "checkpoint.pt"
    first = 0
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        optimizer.restore(state)
        first = state["step"]
    steps = math.ceil(args.tokens / (args.batch * args.length))
    log = (work / "log.jsonl").open("a")
    progress = tqdm(range(first, steps), initial=first, total=steps, unit="step", file=sys.stderr, mininterval=5)
    saved = time.monotonic()
    for step in progress:
        ids = batch(train_data, args.batch, args.length, step, args.seed)
        loss = next_token_loss(model, ids)
        balanced = balance.take()
        (loss + args.balance * balanced).backward()
        optimizer.step(learning_rate(step, steps, args.lr))
        progress.set_postfix(loss=f"{loss.item():.3f}", balance=f"{balanced.item():.3f}", refresh=False)
        last = step == steps - 1
        if step % args.evaluate_every == args.evaluate_every - 1 or last:
            held = held_out_loss(model, balance, held_data, args.length)
            record = {"step": step + 1, "train": loss.item(), "balance": balanced.item()}
            record |= {f"held_out_{d.name}": x for d, x in zip(domains, held, strict=True)}
            print(json.dumps(record), file=log, flush=True)
        if last or time.monotonic() - saved > 300:
            save_checkpoint(checkpoint, optimizer, step + 1)
            saved = time.monotonic()
    model.config.use_cache = True
    save_model(model, tokenizer, args.out)
    AutoConfig.from_pretrained(args.out)
    held = held_out_loss(model, balance, held_data, args.length)
    return {
        "out": str(args.out),
        "tokens": steps * args.batch * args.length,
        "held_out_nats_per_token": {d.name: round(x, 4) for d, x in zip(domains, held, strict=True)},
    }


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.train", description=__doc__.splitlines()[0])
    p.add_argument(
        "--corpus",
        type=Path,
        nargs="*",
        default=[],
        metavar="FILE",
        help="text files (default: Python's standard library)",
    )
    p.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="model directory; its training/ holds the checkpoint"
    )
    p.add_argument(
        "--tokens", type=float, default=16e6, metavar="N", help="training tokens in total (default %(default).0f)"
    )
    p.add_argument("--layers", type=int, default=12, metavar="N", help="default %(default)s")
    p.add_argument("--hidden", type=int, default=192, metavar="N", help="hidden size (default %(default)s)")
    p.add_argument("--ffn", type=int, default=256, metavar="N", help="inner size of an expert (default %(default)s)")
    p.add_argument("--experts", type=int, default=8, metavar="N", help="per layer (default %(default)s)")
    p.add_argument("--top-k", type=int, default=2, metavar="N", help="experts per token (default %(default)s)")
    p.add_argument("--vocab", type=int, default=2048, metavar="N", help="tokenizer entries (default %(default)s)")
    p.add_argument("--batch", type=int, default=16, metavar="N", help="windows per step (default %(default)s)")
    p.add_argument("--length", type=int, default=256, metavar="N", help="tokens in one window (default %(default)s)")
    p.add_argument("--lr", type=float, default=2e-3, metavar="X", help="peak learning rate (default %(default)s)")
    p.add_argument(
        "--balance", type=float, default=0.02, metavar="X", help="weight of the balance loss (default %(default)s)"
    )
    p.add_argument("--evaluate-every", type=int, default=250, metavar="N", help="steps (default %(default)s)")
    p.add_argument("--threads", type=int, default=os.cpu_count(), metavar="N", help="default %(default)s")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    return p


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    try:
        result = train(args)
    except (ValueError, OSError) as error:
        print(f"runtime.train: {error}", file=sys.stderr)
        return 2
    print(json.dumps(result))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
