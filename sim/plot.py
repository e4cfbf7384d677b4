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
from typing import Any, NamedTuple, cast

from sim import plots
from sim.plots._records import PictureError, Record, choose, comparable, read, usable
from sim.plots._style import RC, caption, recall_caption, trace_caption
from traces.cli import Parser

FORMATS = (".png", ".svg")
CHARACTERS_PER_INCH = 15.5  # of the caption's type
LETTERS_PER_INCH = 10.0  # of the headline's
PLACES = 4  # of a figure's width and height
LINE, SMALL_LINE, MARGIN = 0.19, 0.135, 0.12  # inches: a line of headline and caption, and what stays free around them
MADE_BY = {
    "runs": "sim.run or sim.sweep",
    "cells": "runtime.validate",
    "traces": "traces.inspect",
    "recalls": "runtime.gates_report",
}


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
    results: list[Record] = getattr(read(paths), picture.READS)
    if not results:
        made = MADE_BY[picture.READS]
        raise PictureError(f"{', '.join(paths)}: no {picture.READS} in there; this picture needs the output of {made}")
    return suited(picture, results, where)


def suited(picture: ModuleType, results: list[Record], where: Sequence[str] = ()) -> list[Record]:
    """Those a picture can be drawn from.

    Raises:
        PictureError: a key or a variation the picture needs is missing, or results that cannot be compared.
    """
    results = usable(choose(results, where), picture.NEEDS)
    if picture.READS == "runs":
        comparable(results, picture.VARIES)
    return results


class Picture(NamedTuple):
    """A picture in memory; a notebook shows it by itself."""

    images: dict[str, bytes]
    points: int
    caption: str

    def _repr_png_(self) -> bytes:
        return self.images[".png"]

    def __repr__(self) -> str:
        return f"{self.points} points. {self.caption}"


def picture(
    kind: str,
    source: str | os.PathLike[str] | list[Record],
    where: Sequence[str] = (),
    marks: Sequence[float] = (),
) -> Picture:
    """A picture of a result file, or of results as `sim.explore`, `traces.inspect` and others return them.

    ``where`` and ``marks`` as the flags ``--where`` and ``--mark``.

    Raises:
        PictureError: as `select` and `draw`.
    """
    if isinstance(source, list):
        if not source:
            raise PictureError(f"there are no results to draw; {kind} needs at least one")
        return Picture(*draw(kind, suited(pictures()[kind], source, where), marks))
    return Picture(*draw(kind, select(pictures()[kind], [os.fspath(source)], list(where)), marks))


def validations(folder: str | os.PathLike[str]) -> list[Path]:
    """The files of a folder that ``runtime.validate`` wrote, by name.

    Raises:
        PictureError: there is none.
    """
    found = []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            document = json.loads(path.read_text())
        except ValueError:
            continue
        if isinstance(document, dict) and document.get("cells"):
            found.append(path)
    if not found:
        raise PictureError(f"{os.fspath(folder)}: no validation in there; name the folder of runtime.validate --out")
    return found


def cell_caption(cells: list[Record]) -> str:
    """As `caption`, for both halves of a validation."""
    text = caption([c["measured"] for c in cells])
    about = cells[0].get("validation", {})
    device = f", device {about['device']}" if about.get("device") else ""
    return text.removesuffix(".") + f"{device}; against SIMULATED on the profile of that machine."


CAPTIONS = {"runs": caption, "cells": cell_caption, "traces": trace_caption, "recalls": recall_caption}


def settle(figure: Any) -> None:
    """Lay the figure out once and round where parts and axes stand: the solver's last digits differ from run to run."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for part in figure.subfigs:
        corners = part.bbox_relative.get_points().round(PLACES)
        part.bbox_relative.p0, part.bbox_relative.p1 = corners
        for axes in part.axes:
            axes.set_position([round(value, PLACES) for value in axes.get_position(original=True).bounds])


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
    width, height = picture.SIZE
    if hasattr(picture, "height"):
        height = picture.height(results)
    with mpl.rc_context():
        mpl.rcdefaults()  # a person's own matplotlibrc changes no picture
        mpl.rcParams.update(cast(Any, RC))
        drawn = picture.draw(Figure(figsize=(width, height)), results)  # for its words: how much room they need
        text = " ".join([CAPTIONS[picture.READS](results), *(note for note in drawn.notes if note)])
        above = textwrap.wrap(drawn.headline, int(width * LETTERS_PER_INCH))
        below = textwrap.wrap(text, int(width * CHARACTERS_PER_INCH))
        rows = [LINE * len(above) + MARGIN, height, SMALL_LINE * len(below) + MARGIN]
        figure = Figure(figsize=(width, sum(rows)), layout="constrained")
        FigureCanvasAgg(figure)
        parts: Any = figure.subfigures(3, 1, height_ratios=rows, hspace=0)
        head, body, foot = parts
        picture.draw(body, results)
        for value in marks:
            picture.mark(body, value)
        edge = 0.1 / width
        head.text(edge, 1 - MARGIN / 2 / rows[0], "\n".join(above), va="top", fontsize=11, fontweight="bold")
        foot.text(edge, 1 - MARGIN / 2 / rows[2], "\n".join(below), va="top", fontsize=7.5, color="0.25")
        settle(figure)
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
