"""Write text with an offloaded model, and say what it cost.

    python -m runtime.generate --model DIR --prompt "..." --bits 4 --vram 12GB --policy speculative

Text is streamed as it comes. Then one table of figures, MEASURED on this machine, beside the bound that the routing of
this very text and the link leave; the last line is one JSON document.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer
from transformers.utils import logging as transformers_logging

from runtime import devices, models, provenance
from runtime.copier import CopierError
from runtime.observe import EngineTimeline
from runtime.offloading import DTYPES, Offloaded, offload
from sim.choice import made_for_another, read_choice
from sim.experiment import regime
from sim.run import written
from sim.spec import SpecError
from traces.cli import Parser

PROMPT = "def moving_average(values, window):\n"


class TimedStreamer(TextStreamer):
    """Prints tokens as they come and keeps when each came (``time.monotonic`` seconds)."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        if not self.next_tokens_are_prompt:
            self.times.append(time.monotonic())
        super().put(value)


def prompt_ids(tokenizer: Any, prompt: str, chat: bool | None) -> torch.Tensor:
    """Token ids [1, n] of a prompt; as a user's message where the tokenizer has a chat template (``chat`` None).

    Raises:
        ValueError: a chat is asked for without a template, or the prompt has no tokens.
    """
    has_template = bool(getattr(tokenizer, "chat_template", None))
    if chat and not has_template:
        raise ValueError("--chat needs a tokenizer with a chat template; leave it out for plain continuation")
    if has_template if chat is None else chat:
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        return ids["input_ids"]
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    if ids.shape[1] == 0:
        raise ValueError("--prompt has no tokens; write at least one")
    return ids


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Generate and print; returns the JSON document.

    Raises:
        ValueError: what cannot be used. CopierError: the copier failed.
    """
    choice = read_choice(args.choice) if args.choice else {}
    for key in ("policy", "bits", "slots", "context"):
        if key in choice and getattr(args, key) is None:
            setattr(args, key, choice[key])
        elif key in choice:
            print(f"--{key} on the command line wins over the choice file's {choice[key]}", file=sys.stderr)
    policy = args.policy or "speculative"
    if "chunk_bytes" in choice and "chunk_bytes" not in policy:
        policy += ("," if ":" in policy else ":") + f"chunk_bytes={choice['chunk_bytes']}"
    provenance.check_folder("--timeline", args.timeline and Path(args.timeline))
    provenance.check_folder("--store", args.store)
    if args.tokens < 1:
        raise SpecError(f"--tokens is {args.tokens}; it must be at least 1")
    if other := made_for_another(choice, models.spec_of(args.model)):
        print(other, file=sys.stderr)
    start = time.monotonic()
    model = offload(
        args.model,
        bits=args.bits or 4,
        slots=args.slots,
        policy=policy,
        vram=args.vram,
        context=args.context or 4096,
        device=args.device,
        group_size=args.group_size,
        optimize=not args.fast,
        store=args.store,
        dtype=args.dtype,
        dense_bits=args.dense_bits,
        machine=args.machine,
        link_gb_s=args.link_gb_s,
        gates=args.gates,
        record=True,
    )
    handle: Offloaded = model.offloaded
    try:
        tokenizer = model.offload_tokenizer
        if tokenizer is None:
            raise ValueError(f"{args.model} holds no tokenizer; add its files")
        ids = prompt_ids(tokenizer, args.prompt, args.chat).to(handle.executor.device.torch_device)
        room = handle.budget.context
        if ids.shape[1] + args.tokens > room:
            raise SpecError(
                f"prompt ({ids.shape[1]} tokens) and --tokens {args.tokens} need more than --context {room}; raise it"
            )
        for line in (handle.executor.store.describe(), handle.budget.text()):
            print(line, file=sys.stderr)
        ready = time.monotonic()
        streamer = TimedStreamer(tokenizer)
        torch.manual_seed(args.seed)
        sampling = {"do_sample": False}
        if args.temperature > 0:
            sampling = {"do_sample": True, "temperature": args.temperature, "top_k": args.top_k, "top_p": args.top_p}
        print(args.prompt, end="", flush=True)
        with written(args.timeline) as file, torch.inference_mode():
            if file:
                handle.executor.timeline = EngineTimeline(file, f"measured: {policy}")
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=args.tokens,
                streamer=streamer,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id or 0,
                **sampling,
            )
            if file:
                handle.executor.finish()
                handle.executor.timeline.timeline.close()
        document = figures(handle, streamer.times, ready, args)
        document["text"] = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        document["load_s"] = ready - start
        return document
    finally:
        handle.close()


def figures(handle: Offloaded, times: list[float], start: float, args: argparse.Namespace) -> dict[str, Any]:
    """What was measured, printed and as JSON: TTFT and TPOT end to end, sampling included."""
    stats = handle.stats()
    gaps = len(times) - 1
    tpot_s = (times[-1] - times[0]) / gaps if gaps else None
    bounds = handle.bounds()
    counts = handle.executor.ledger.phases[1]
    stats |= {
        "model": handle.executor.spec.name,
        "device": handle.executor.device.name,
        "new_tokens": len(times),
        "ttft_s": times[0] - start if times else None,
        "tpot_s": tpot_s,
        "tokens_per_s": 1 / tpot_s if tpot_s else None,
        "regime": regime(counts) if counts.passes else None,
        "bounds": bounds,
        "budget": handle.budget.to_json(),
        "command": provenance.command(),
        "machine": provenance.machine(),
    }
    print(f"\n\n{stats['model']}, {stats['bits']} bits, {stats['policy']}, {stats['slots']} slots a layer; MEASURED")
    parts = [f"{len(times)} tokens", f"TTFT {stats['ttft_s'] * 1e3:.1f} ms"]
    if tpot_s:
        parts.append(f"TPOT {tpot_s * 1e3:.2f} ms ({1 / tpot_s:.2f} tokens/s)")
    if bounds:
        parts.append(f"bound {bounds['joint_floor_s'] * 1e3:.2f} ms")
    if counts.accesses:
        share = [100 * getattr(counts, key) / counts.accesses for key in ("hits", "late", "misses")]
        parts.append("hit/late/miss {:.1f}/{:.1f}/{:.1f} %".format(*share))
        if counts.host_computed:
            each_ms = counts.host_busy_ns / counts.host_computed / 1e6
            parts.append(
                f"{counts.host_computed} of {counts.accesses} experts computed on the host ({each_ms:.3f} ms each), "
                f"{counts.demand_loads} missing ones loaded"
            )
        parts.append(f"stall {stats['stall_s'] * 1e3:.2f} ms")
        parts.append(f"{stats['h2d_bytes'] / counts.passes / 1e6:.2f} MB/token over the link")
        parts.append(f"regime {stats['regime']}")
    if stats["prefetch_precision"] is not None:
        parts.append(f"prefetch precision {100 * stats['prefetch_precision']:.0f} %")
    print(", ".join(parts))
    return stats


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.generate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument(
        "--prompt", default=PROMPT, help="text to continue, or a user's message where there is a chat template"
    )
    p.add_argument("--tokens", type=int, default=64, metavar="N", help="new tokens, at most (default %(default)s)")
    p.add_argument("--device", choices=devices.names(), default="cpu", help="where it runs (default %(default)s)")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), help="of the experts (default 4)")
    p.add_argument("--group-size", type=int, default=64, metavar="N", help="weights to a scale (default %(default)s)")
    p.add_argument("--fast", action="store_true", help="round weights to codes without HQQ's solver")
    p.add_argument(
        "--dtype", choices=tuple(DTYPES), help="of the dense part (default: float32 on the CPU, else bfloat16)"
    )
    p.add_argument("--dense-bits", type=int, choices=(16, 4), default=16, help="of attention (default %(default)s)")
    p.add_argument(
        "--slots", type=int, metavar="N", help="experts of a layer on the device (default: what fits, or half)"
    )
    p.add_argument("--vram", metavar="SIZE", help="all of ours on the device must fit, such as 12GB")
    p.add_argument("--context", type=int, metavar="N", help="tokens the KV cache is counted for (default 4096)")
    p.add_argument("--policy", metavar="SPEC", help="default speculative")
    p.add_argument("--gates", type=Path, metavar="FILE", help="aligned lookahead gates, for predictor=aligned")
    p.add_argument("--store", type=Path, metavar="FILE", help="keep the quantized experts here, and map them next time")
    p.add_argument("--machine", metavar="NAME|FILE", help="profile of the planner's clock")
    p.add_argument("--link-gb-s", type=float, metavar="X", help="pace of the link (default: the GPU's own; cpu: 10)")
    p.add_argument("--temperature", type=float, default=0.0, metavar="X", help="0 is greedy (default %(default)s)")
    p.add_argument("--top-k", type=int, default=0, metavar="N", help="sample from the N likeliest; 0 is all (default)")
    p.add_argument("--top-p", type=float, default=1.0, metavar="X", help="sample from this share (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    p.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template (default: if there is one)"
    )
    p.add_argument("--choice", metavar="FILE", help="take policy, bits, slots, chunk_bytes, context from a choice file")
    p.add_argument("--timeline", metavar="FILE.json.gz", help="write a timeline for Perfetto")
    p.add_argument("--threads", type=int, default=1, metavar="N", help="of computing (default %(default)s)")
    return p


def main() -> int:
    args = parser().parse_args()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        for name, low, high in (("temperature", 0, 100), ("top_p", 1e-9, 1), ("top_k", 0, 1e9), ("threads", 1, 1024)):
            if not low <= getattr(args, name) <= high:
                flag = name.replace("_", "-")
                raise SpecError(f"--{flag} is {getattr(args, name)}; it must be {low:g} to {high:g}")
        torch.set_num_threads(args.threads)
        document = run(args)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.generate: {error}", file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        print(f"runtime.generate: {error}; give fewer --slots, or --vram", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nruntime.generate: stopped", file=sys.stderr)
        return 130
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
