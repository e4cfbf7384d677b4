"""Draw results: pictures from result files alone, nothing is simulated.

python -m sim.plot stalls results.jsonl --out stalls.png
python -m sim.plot slots results.jsonl --where machine=rtx3090 --where bits=4 --out slots.svg
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import os
import pkgutil
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, cast

from sim import plots
from sim.plots._records import PictureError, Record, choose, comparable, read, usable
from sim.plots._style import RC, caption
from traces.cli import Parser

FORMATS = (".png", ".svg")
CHARACTERS_PER_INCH = 15.5  # of the caption's type


def pictures() -> dict[str, ModuleType]:
    """Pictures by name: the modules of ``sim.plots``."""
    names = sorted(info.name for info in pkgutil.iter_modules(plots.__path__) if not info.name.startswith("_"))
    return {name: importlib.import_module(f"{plots.__name__}.{name}") for name in names}


def parser() -> argparse.ArgumentParser:
    """Flags of ``sim.plot``; the kinds of picture are listed from the modules."""
    kinds = "\n".join(f"  {name}: {(module.__doc__ or '').splitlines()[0]}" for name, module in pictures().items())
    p = Parser(
        prog="python -m sim.plot",
        description="Draw results; nothing is simulated.",
        epilog=f"kinds:\n{kinds}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("kind", metavar="KIND", choices=tuple(pictures()), help="one of the kinds below")
    p.add_argument("results", metavar="RESULTS", nargs="+", help="JSON lines or documents of sim.run, sim.sweep, ...")
    p.add_argument("--out", action="append", required=True, metavar="FILE", help=f"{' or '.join(FORMATS)}; repeatable")
    p.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="only results with this value; repeat a key for alternatives",
    )
    p.add_argument(
        "--mark", action="append", default=[], type=float, metavar="VALUE", help="front: a line at this VRAM in GB"
    )
    return p


def check_targets(paths: list[str]) -> None:
    """Before anything is read: can every file be written, and in which format?

    Raises:
        PictureError: another ending, or a folder that does not exist.
    """
    for path in map(Path, paths):
        if path.suffix.lower() not in FORMATS:
            raise PictureError(f"--out {str(path)!r} ends in {path.suffix!r}; use one of {', '.join(FORMATS)}")
        if path.is_dir() or not path.absolute().parent.is_dir():
            raise PictureError(f"--out {str(path)!r} cannot be written; name a file in a folder that exists")


def select(picture: ModuleType, paths: list[str], where: list[str]) -> list[Record]:
    """The results a picture is drawn from.

    Raises:
        PictureError: a file, a key or a variation the picture needs is missing, or results that cannot be compared.
    """
    found = read(paths)
    results = found.cells if picture.READS == "cells" else found.runs
    if not results:
        made = "runtime.validate" if picture.READS == "cells" else "sim.run or sim.sweep"
        raise PictureError(f"{', '.join(paths)}: no {picture.READS} in there; this picture needs the output of {made}")
    results = usable(choose(results, where), picture.NEEDS)
    if picture.READS == "runs":
        comparable(results, picture.VARIES)
    return results


def cell_caption(cells: list[Record]) -> str:
    """As `caption`, for both halves of a validation."""
    text = caption([c["measured"] for c in cells])
    about = cells[0].get("validation", {})
    device = f", device {about['device']}" if about.get("device") else ""
    return text.removesuffix(".") + f"{device}; against SIMULATED on the profile of that machine."


def draw(kind: str, results: list[Record], marks: Sequence[float] = ()) -> tuple[dict[str, bytes], int, str]:
    """The picture in every format, how many points it shows, and its caption; the same results give the same bytes.

    Raises:
        PictureError: what the results lack, or no matplotlib.
    """
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise PictureError(f"a picture needs matplotlib ({error}); install the 'plots' extra") from None
    picture = pictures()[kind]
    with mpl.rc_context():
        mpl.rcdefaults()  # a person's own matplotlibrc changes no picture
        mpl.rcParams.update(cast(Any, RC))
        figure = Figure(figsize=picture.SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        drawn = picture.draw(figure, results)
        for value in marks:
            picture.mark(figure, value)
        text = " ".join([cell_caption(results) if picture.READS == "cells" else caption(results), *drawn.notes])
        lines = textwrap.fill(text, int(picture.SIZE[0] * CHARACTERS_PER_INCH))
        figure.supxlabel(lines, x=0.01, ha="left", fontsize=7.5, color="0.25")
        images = {}
        for ending, metadata in ((".png", {"Software": None}), (".svg", {"Date": None})):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=ending[1:], dpi=150, metadata=metadata)
            images[ending] = buffer.getvalue()
    return images, drawn.points, text


def write(path: str, content: bytes) -> None:
    """A file that appears under its name only when it is complete."""
    temporary = Path(f"{path}.tmp")
    try:
        temporary.write_bytes(content)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Draw and write; the returned document is the last line of output."""
    check_targets(args.out)
    if args.mark and not hasattr(pictures()[args.kind], "mark"):
        marked = ", ".join(name for name, module in pictures().items() if hasattr(module, "mark"))
        raise PictureError(f"--mark means nothing for {args.kind}; it is for {marked}")
    results = select(pictures()[args.kind], args.results, args.where)
    images, points, text = draw(args.kind, results, args.mark)
    for path in args.out:
        write(path, images[Path(path).suffix.lower()])
        print(f"{path}: {points} points from {len(results)} results")
    print(text)
    return {"kind": args.kind, "files": args.out, "points": points, "results": len(results), "caption": text}


def main() -> int:
    """Command line entry; 2 on bad input."""
    args = parser().parse_args()
    try:
        document = run(args)
    except (PictureError, OSError) as error:
        print(f"sim.plot: {error}", file=sys.stderr)
        return 2
    print(json.dumps(document))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
