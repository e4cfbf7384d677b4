"""Record the routing of a model, run on the engine with every expert resident.

python -m runtime.record --model DIR --corpus FILE [FILE ...] --predictor all --out trace.safetensors
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

import traces
from runtime import corpus, gates, models, prompts, provenance
from runtime.copier import CopierError
from runtime.devices import names
from runtime.engine import Engine
from runtime.lookahead import GATES_FILE, LADDER, UNTRAINED, Gates
from runtime.recorder import Recorder
from sim.machine import HardwareProfile, LinkProfile
from sim.spec import options
from traces import Trace
from traces.cli import Parser

UNPACED = HardwareProfile(
    "unpaced", 0, 0, LinkProfile(10.0, 0.0, 10.0, 0.0, 10.0), memory_gb_s=10.0, tflops=0.1, host_s=1e-4
)


def record(
    model_dir: Path,
    asked: list[prompts.Prompt],
    tokens: int,
    *,
    bits: int = 4,
    lookahead: int = 4,
    temperature: float = 0.8,
    seed: int = 0,
    logits: bool = True,
    predictors: Sequence[str] = ("router",),
    gates_file: Path | None = None,
    device: str = "cpu",
) -> Trace:
    """Generate ``tokens`` tokens after every prompt and keep all routing and guesses.

    Prompt i is sampled with seed + i. The first new token comes out of the prefill, so a prompt gives tokens - 1
    decode passes; one more token is generated than asked for. Distances that pass the last layer from every layer are
    not recorded. Guesses of all ``predictors`` are kept; trained ones come from ``gates_file``, or the model's own.

    Raises:
        GateError: a predictor that cannot be had.
        ValueError: an empty prompt.
        ModelError, StoreError: a model that cannot be used.
        DeviceError: no such device.
    """
    spec = models.spec_of(model_dir)
    run = options("on_demand")
    with Engine(
        model_dir,
        bits=bits,
        slots=spec.num_experts,
        options=run,
        machine=UNPACED,
        record=lookahead,
        record_logits=logits,
        device=device,
        paced=device == "cpu",
    ) as engine:
        assert engine.recorder is not None
        rungs: dict[str, Gates] = {}
        if reach := min(lookahead, spec.num_layers - 1):
            file = gates_file or model_dir / GATES_FILE
            beside = [p for p in predictors if p != "router"]
            rungs = gates.ladder(engine.model, spec.top_k, reach, file, beside)
            listen(engine.model, engine.recorder, rungs)
        bar = tqdm(total=len(asked) * (tokens + 1), unit="token", file=sys.stderr, delay=2)
        for number, prompt in enumerate(asked):
            ids = engine.tokenizer.encode(prompt.text)
            for rung in rungs.values():
                rung.start(1)
            stream = engine.generate(ids, tokens + 1, temperature=temperature, seed=seed + number, domain=prompt.domain)
            for _ in stream:
                bar.update()
        bar.close()
        made = {
            "model": model_dir.name,
            "weights_sha256": provenance.weights_sha256(model_dir),
            "bits": bits,
            "prompts": len(asked),
            "temperature": temperature,
            "seed": seed,
            "command": provenance.command(),
            "commit": provenance.commit(),
            "machine": provenance.machine(),
        }
        trace = engine.recorder.trace(made, "router")
    return replace(trace, guesses={name: trace.guesses[name] for name in predictors if name in trace.guesses})


def listen(model: torch.nn.Module, recorder: Recorder, rungs: dict[str, Gates]) -> None:
    """Have the recorder keep what ``rungs`` say at every visit: hooks on the routers, which change nothing."""

    def hook(layer: int) -> Callable[..., None]:
        def record(module: torch.nn.Module, inputs: tuple, output: tuple) -> None:
            hidden = inputs[0].flatten(0, -2)
            for name, rung in rungs.items():
                recorder.guess(name, rung.scores(layer, hidden, output[2]))
                rung.saw(layer, hidden)

        return record

    for layer, found in enumerate(models.moe_blocks(model)):
        found.router.register_forward_hook(hook(layer))


def rungs_asked(names: Sequence[str], model_dir: Path, gates_file: Path | None) -> list[str]:
    """The rungs that ``--predictor`` names; ``all`` is every one that the gates file (if there is one) allows.

    Raises:
        GateError: a gates file that cannot be read.
    """
    if "all" not in names:
        return list(dict.fromkeys(names))
    file = gates_file or model_dir / GATES_FILE
    return list(gates.load(file).rungs()) if gates_file or file.is_file() else list(UNTRAINED)


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.record", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--device", choices=names(), default="cpu", help="where experts are computed (default %(default)s)")
    p.add_argument("--prompts", type=Path, metavar="FILE", help="one prompt a line, or JSON lines (default: built in)")
    p.add_argument("--corpus", type=Path, nargs="+", metavar="FILE", help="cut prompts from the held-out part of these")
    p.add_argument(
        "--sequences", type=int, default=33, metavar="N", help="prompts cut from --corpus (default %(default)s)"
    )
    p.add_argument(
        "--prompt-bytes", type=int, default=96, metavar="N", help="length of these prompts (default %(default)s)"
    )
    p.add_argument(
        "--tokens", type=int, default=256, metavar="N", help="decode tokens after each prompt (default %(default)s)"
    )
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), default=4, help="of the experts (default %(default)s)")
    p.add_argument(
        "--lookahead", type=int, default=4, metavar="N", help="distances of the guesses (default %(default)s)"
    )
    p.add_argument(
        "--predictor",
        action="append",
        choices=("all", *LADDER),
        help="whose guesses; repeatable; all: the whole ladder (default router)",
    )
    p.add_argument("--gates", type=Path, metavar="FILE", help="trained heads (default: gates.safetensors of the model)")
    p.add_argument("--temperature", type=float, default=0.8, metavar="X", help="0 is greedy (default %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="default %(default)s")
    p.add_argument("--no-logits", action="store_true", help="leave the router logits out")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the trace")
    return p


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        provenance.check_folder("--out", args.out)
        for name, least in (("sequences", 1), ("prompt_bytes", 8), ("tokens", 1), ("lookahead", 0)):
            if getattr(args, name) < least:
                raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; it must be at least {least}")
        if not 0 <= args.temperature < float("inf"):
            raise ValueError(f"--temperature is {args.temperature}; it must be a number, 0 or larger")
        if args.corpus:
            asked = prompts.held_out(corpus.load(args.corpus), args.sequences, args.prompt_bytes)
        else:
            asked = prompts.read(args.prompts) if args.prompts else list(prompts.BUILT_IN)
        trace = record(
            args.model,
            asked,
            args.tokens,
            bits=args.bits,
            lookahead=args.lookahead,
            temperature=args.temperature,
            seed=args.seed,
            logits=not args.no_logits,
            predictors=rungs_asked(args.predictor or ["router"], args.model, args.gates),
            gates_file=args.gates,
            device=args.device,
        )
        traces.save(trace, args.out)
    except (ValueError, OSError, CopierError) as error:
        print(f"runtime.record: {error}", file=sys.stderr)
        return 2
    size = args.out.stat().st_size
    print(
        f"{args.out.name}: {trace.num_decode_tokens} decode and {trace.num_tokens - trace.num_decode_tokens} prefill "
        f"tokens in {len(asked)} sequences, {size / 1e6:.2f} MB"
    )
    print(
        json.dumps(
            {"out": str(args.out), "tokens": trace.num_tokens, "decode_tokens": trace.num_decode_tokens, "bytes": size}
        )
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
