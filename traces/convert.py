"""Convert routing recorded by another program into a trace.

python -m traces.convert SOURCE --out FILE.safetensors
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Final

from traces.cli import Parser
from traces.format import save
from traces.importers import Options, importers
from traces.importers._files import read_json
from traces.trace import Trace, TraceError
from traces.vocabulary import ModelSpec

_PATHS: Final = ("source", "out", "model")
_RENAMED: Final = {"num_layers": "layers", "num_experts": "experts"}


def convert(source: Path, importer: str, options: Options) -> Trace:
    """Read ``source`` with the importer of that name; provenance says which file and importer it was.

    Raises:
        TraceError: a source that the importer refuses.
    """
    trace = importers()[importer].read(source, options)
    digest = hashlib.sha256()
    try:
        with source.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise TraceError(f"the file cannot be read ({error.strerror})") from None
    facts = {"source": source.name, "source_sha256": digest.hexdigest(), "importer": importer}
    return replace(trace, provenance=facts | trace.provenance)


def recognise(source: Path) -> str:
    """The name of the importer that knows the file.

    Raises:
        TraceError: none does, or several do.
    """
    known = importers()
    found = [name for name, importer in known.items() if importer.recognise(source)]
    if len(found) == 1:
        return found[0]
    names = ", ".join(found or known)
    problem = f"{names} all recognise this file" if found else "no importer recognises this file"
    raise TraceError(f"{problem}; say --format NAME{'' if found else f', one of {names}'}")


def read_model(path: Path) -> ModelSpec:
    """The model in a JSON file: its fields, or an object with them under ``model``."""
    values = read_json(path)
    if isinstance(values, dict) and isinstance(values.get("model"), dict):
        values = values["model"]
    if not isinstance(values, dict):
        raise TraceError(f"it holds a JSON {type(values).__name__}; it must be an object with the model's fields")
    try:
        return ModelSpec.from_json(values)
    except ValueError as error:
        raise TraceError(str(error)) from None


def parser() -> argparse.ArgumentParser:
    known = {name: (importer.__doc__ or "").strip().splitlines()[:1] for name, importer in importers().items()}
    listed = [f"  {name:<18}{line[0] if line else ''}" for name, line in known.items()]
    p = Parser(
        prog="python -m traces.convert",
        description=(__doc__ or "").splitlines()[0],
        epilog="\n".join(["formats:", *listed]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("source", metavar="SOURCE", type=Path, help="the recording")
    p.add_argument("--out", metavar="FILE", type=Path, required=True, help="trace file to write")
    p.add_argument(
        "--format", metavar="NAME", choices=list(known), help="one of the formats below (default: found out)"
    )
    p.add_argument("--model", metavar="FILE.json", type=Path, help="the model's shape, as in sim/models")
    p.add_argument("--name", metavar="NAME", help="the model's name")
    for flag, what in (
        ("layers", "MoE layers"),
        ("experts", "routed experts of a layer"),
        ("top-k", "experts of a token"),
        ("hidden-size", "width of the residual stream"),
        ("expert-size", "inner width of an expert"),
    ):
        p.add_argument(f"--{flag}", metavar="N", type=int, help=f"{what}, where the source does not say")
    p.add_argument("--weights", choices=("renormalised", "softmax"), help="how router logits become weights")
    p.add_argument("--prefill", metavar="N", type=int, help="tokens of every sequence that are prefill")
    p.add_argument(
        "--sequences", metavar="N", type=int, default=Options.sequences, help="equally long sequences (%(default)s)"
    )
    p.add_argument("--forced", action="store_true", help="the program overrode the model's own choice of experts")
    return p


def _options(args: argparse.Namespace) -> Options:
    values = {f.name: getattr(args, _RENAMED.get(f.name, f.name)) for f in fields(Options) if f.name != "model"}
    if args.model is None:
        return Options(**values)
    try:
        return Options(model=read_model(args.model), **values)
    except TraceError as error:
        raise TraceError(f"--model {args.model}: {error}") from None


def _command(arguments: Sequence[str], args: argparse.Namespace) -> str:
    """The command line with the names of files in place of their paths."""
    names = {str(path): path.name for key in _PATHS if (path := getattr(args, key)) is not None}
    words = []
    for word in arguments:
        flag, equals, value = word.partition("=")
        path = Path(value if equals else word)
        name = names.get(str(path), value if equals else word)
        words.append(f"{flag}={name}" if equals else name)
    return shlex.join(["python", "-m", "traces.convert", *words])


def report(trace: Trace, out: Path) -> dict[str, Any]:
    """What was written, for the last line."""
    decode = trace.num_decode_tokens
    return {
        "out": str(out),
        "model": trace.model.to_json(),
        "routing": trace.routing,
        "tokens": {"prefill": trace.num_tokens - decode, "decode": decode},
        "sequences": len(trace.sequence_lengths),
        "provenance": trace.provenance,
    }


def main(arguments: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if arguments is None else arguments)
    args = parser().parse_args(given)
    try:
        options = _options(args)
    except TraceError as error:
        print(f"traces.convert: {error}", file=sys.stderr)
        return 2
    try:
        if not args.source.is_file():
            raise TraceError("there is no such file; name an existing recording")
        if args.out.resolve() == args.source.resolve():
            raise TraceError("--out is the recording itself; name another file")
        trace = convert(args.source, args.format or recognise(args.source), options)
        trace = replace(trace, provenance=trace.provenance | {"command": _command(given, args)})
        save(trace, args.out)
    except TraceError as error:
        print(f"traces.convert: {args.source}: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"traces.convert: {args.out} cannot be written ({error.strerror}); name another --out", file=sys.stderr)
        return 2
    except MemoryError:
        print(f"traces.convert: {args.source}: not enough memory; convert a part of it", file=sys.stderr)
        return 2
    for note in trace.provenance.get("notes", []):
        print(f"traces.convert: {note}", file=sys.stderr)
    figures = report(trace, args.out)
    model, tokens = trace.model, figures["tokens"]
    print(f"model    {model.name}: {model.num_layers} MoE layers, {model.num_experts} experts, top-{model.top_k}")
    print(f"tokens   {tokens['prefill']} prefill, {tokens['decode']} decode, in {figures['sequences']} sequences")
    print(f"routing  {trace.routing}, read as {trace.provenance['importer']}")
    print(f"weights  {trace.provenance.get('weights', '-')}")
    print(f"written  {args.out}")
    print(json.dumps(figures))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
