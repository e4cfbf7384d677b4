"""Measure this machine for one model: link, dense part, lookahead gates, experts, head, host time, waits.

    python -m runtime.calibrate --out profile.json

Runs the engine itself on prompts of its own and fits laws fixed + slope x quantity to what each step took; prompts of
other lengths, which nothing is fitted to, tell the error. Nothing else may run beside it: that is checked first.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from runtime import models, provenance
from runtime.calibration.host import host_figures
from runtime.calibration.idle import BUSY_SHARE, OtherWork, check_idle
from runtime.calibration.link import link_laws, pageable_gb_s
from runtime.calibration.operators import Errors, operators, serial_s, spread, wake_s
from runtime.calibration.peaks import memory_gb_s, tflops
from runtime.calibration.runs import CONTEXT, DEFAULT_LINK_GB_S, POLICIES, TOKENS, Runs
from runtime.copier import CopierError
from runtime.devices import names, open_device
from runtime.host_experts import computes_on_host
from runtime.store import ExpertRows
from sim.machine import HardwareProfile, LinkProfile
from traces.cli import Parser

LARGE_EXPERT = 16 << 20  # bytes
MAPE = 0.05  # held-out error above which an operator is named


@dataclass(frozen=True)
class Result:
    """A profile, and how well its laws say what they were not fitted to.

    Attributes:
        errors: held-out error (MAPE) by operator; None where nothing was held out.
        spread: of a resident visit over the rounds.
        kept_share: of passes that nothing outside disturbed; the others count nowhere.
    """

    profile: HardwareProfile
    errors: Errors
    spread: float | None
    kept_share: float


def profile_of(work: Runs, others: OtherWork, name: str) -> Result:
    """The MEASURED profile of what engine runs have told so far; measures the link now."""
    laws, errors = operators(work)
    first = next(iter(work.stores.values()))
    device = open_device(work.device)
    stated = work.device == "cpu"
    if stated:
        link = link_laws(device, first, work.gb_s * 1e9)
    else:  # copies as large as real experts: of small ones the bytes take no time beside the fixed cost
        with ExpertRows(8, max(first.expert_bytes, LARGE_EXPERT)) as rows, device.hold(rows):
            link = link_laws(device, rows, float("inf"))
    memory, arithmetic = memory_gb_s(device), tflops(device)
    host_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    share = others.share()
    made = f"{provenance.machine()}, commit {provenance.commit()}"
    busy = "not known" if share is None else f"{share:.0%} of the cores"
    measured = f"measured: {made}; used by other processes meanwhile: {busy}"
    errors["link"] = link.error
    found = LinkProfile(work.gb_s, 0.0, work.gb_s, 0.0, work.gb_s)
    reached = (
        f"copies of five sizes reached {link.h2d[1]:.5g} GB/s to the device, {link.d2h[1]:.5g} back, "
        f"{link.h2d_duplex_gb_s:.5g} while both copy, {link.h2d_computing_gb_s:.5g} beside computing"
    )
    if not stated:
        reached += f", {pageable_gb_s(device, LARGE_EXPERT):.5g} from pageable memory"
    if not stated:
        found = LinkProfile(link.h2d[1], link.h2d[0], link.d2h[1], link.d2h[0], link.h2d_duplex_gb_s)
    sources = {
        "link.h2d_gb_s": f"stated: the copier's pace; {reached}" if stated else f"{measured}; {reached}",
        "link.h2d_fixed_s": "stated: paced copies have no fixed cost" if stated else measured,
        "link.d2h_gb_s": "stated: as h2d" if stated else measured,
        "link.d2h_fixed_s": "stated: as h2d" if stated else measured,
        "link.h2d_duplex_gb_s": "stated: as h2d" if stated else measured,
        "memory_gb_s": measured + "; a 64 MB copy, bytes read and written",
        "tflops": measured + "; a matrix product",
        "wake_s": measured + "; from the end of a load until the waiting engine knows of it, less what the host "
        "still plans after the copier has a plan, means",
        "serial_s": measured + "; by which serial copies in one direction take longer than the link, mean",
        "host_s": measured + "; planning and bookkeeping of one visit, on_demand",
        "operators": f"{measured}; engine runs of {work.tokens} tokens in {work.rounds} rounds, of these what nothing "
        "outside disturbed; means, least squares",
        "vram_gb": "the device is the host's memory",
        "host_gb": "the system's figure",
    }
    vram_bytes = host_bytes
    if not stated:
        sources |= dict.fromkeys(("wake_s", "serial_s"), "not measured on this device: 0")
        sources["vram_gb"] = "the driver's figure"
        vram_bytes = torch.cuda.get_device_properties(device.torch_device).total_memory
    idle = share is not None and share <= BUSY_SHARE and work.kept_share() >= 0.5
    profile = HardwareProfile(
        name=name,
        vram_gb=round(vram_bytes / 1e9, 1),
        host_gb=round(host_bytes / 1e9, 1),
        link=found,
        memory_gb_s=memory,
        tflops=arithmetic,
        host_s=laws.host_s["on_demand"],
        wake_s=wake_s(work),
        serial_s=serial_s(work),
        evidence="MEASURED" if idle else "MEASURED (busy machine)",
        operators={work.spec.name: laws},
        sources=sources,
    )
    if any(map(computes_on_host, work.policies.values())):
        profile = host_figures(work.stores, device, link=found).into(profile, work.spec)
    return Result(profile, errors, spread(work), work.kept_share())


def calibrate(
    model_dir: Path,
    bits: Sequence[int],
    *,
    gb_s: float = DEFAULT_LINK_GB_S,
    tokens: int = TOKENS,
    rounds: int = 2,
    policies: Sequence[str] = POLICIES,
    name: str = "cpu",
    device: str = "cpu",
    context: int = CONTEXT,
) -> Result:
    """A MEASURED profile of this machine for this model, its link paced to ``gb_s``.

    Raises:
        ModelError, StoreError, SpecError: inputs that cannot be used.
    """
    others = OtherWork()
    with Runs(model_dir, bits, tokens, policies=policies, gb_s=gb_s, device=device, context=context) as work:
        for _ in range(rounds):
            work.round()
        return profile_of(work, others, name)


def save(profile: HardwareProfile, path: Path) -> None:
    """Write a profile file, complete or not at all."""
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(json.dumps(profile.to_json(), indent=2) + "\n")
    os.replace(temporary, path)


def lines(result: Result) -> Iterator[str]:
    """What was found, for people."""
    profile = result.profile
    laws = next(iter(profile.operators.values()))
    yield f"{profile.name}, {profile.evidence}: {profile.sources['operators']}"
    yield f"dense part of a layer   {laws.dense[0] * 1e6:8.1f} us + {laws.dense[2] * 1e9:.1f} ns per token of context"
    for width, (fixed, slope) in laws.expert.items():
        one = (fixed + slope) * 1e6
        yield f"expert at {width:>2} bits       {one:8.1f} us for one token, {slope * 1e6:.2f} us each"
    yield f"head and embedding      {(laws.head[0] + laws.head[1]) * 1e6:8.1f} us"
    yield "lookahead gates         " + ", ".join(f"d={d} {s * 1e6:.1f} us" for d, s in enumerate(laws.gates, 1))
    longer = ", ".join(f"{k} {d * 1e6:.1f} + {e * 1e6:.1f} us" for k, (d, e) in laws.displaced.items())
    yield f"longer beside planning  {longer} (dense part of a visit + each expert)"
    yield "host, per visit         " + ", ".join(f"{k} {v * 1e6:.1f} us" for k, v in laws.host_s.items())
    yield f"arrival notice          {profile.wake_s * 1e6:8.1f} us, of serial copies {profile.serial_s * 1e6:.1f} us"
    yield f"link                    {profile.sources['link.h2d_gb_s']}"
    yield (
        "after a wait            "
        + ", ".join(
            f"{k} {share:.1%} of it longer, at most {most * 1e6:.0f} us" for k, (share, most) in laws.cooling.items()
        )
    )
    known = {k: e for k, e in result.errors.items() if e is not None}
    yield "error on what was held out: " + ", ".join(f"{k} {e:.1%}" for k, e in known.items())
    worse = [k for k, e in known.items() if e > MAPE]
    yield f"above {MAPE:.0%}: {', '.join(worse)}" if worse else f"none above {MAPE:.0%}"
    if result.spread is not None:
        yield f"rounds differ by {result.spread:.1%}"
    undisturbed_share = f"{result.kept_share:.0%} of the passes were undisturbed; only these count"
    yield f"control {laws.control_s * 1e6:.0f} us; {undisturbed_share}"
    yield f"simulates up to {' and '.join(f'{1.5 * v:.0f} tokens of {k}' for k, v in laws.reach.items())}".replace(
        "tokens of tokens", "tokens in a pass"
    ).replace("tokens of context", "of context")


def parser() -> argparse.ArgumentParser:
    p = Parser(prog="python -m runtime.calibrate", description=__doc__.splitlines()[0])
    p.add_argument("--model", type=Path, default=models.DEMO, metavar="DIR", help="default: the demonstration model")
    p.add_argument("--device", choices=names(), default="cpu", help="where experts are computed (default %(default)s)")
    p.add_argument("--bits", type=int, choices=(16, 8, 4, 3, 2), action="append", help="repeatable (default 4)")
    p.add_argument(
        "--policy",
        action="append",
        metavar="SPEC",
        help=f"whose planning is measured too, repeatable (always: {', '.join(POLICIES)})",
    )
    p.add_argument(
        "--link-gb-s", type=float, default=DEFAULT_LINK_GB_S, metavar="X", help="pace of the link (default %(default)s)"
    )
    p.add_argument(
        "--tokens", type=int, default=TOKENS, metavar="N", help="decode tokens of each run (default %(default)s)"
    )
    p.add_argument(
        "--rounds", type=int, default=2, metavar="N", help="everything is measured N times (default %(default)s)"
    )
    p.add_argument("--context", type=int, default=CONTEXT, metavar="N", help="longest prompt (default %(default)s)")
    p.add_argument("--allow-busy", action="store_true", help="measure although others use the processor, and say so")
    p.add_argument("--name", default="cpu", help="name of the profile (default %(default)s)")
    p.add_argument("--out", type=Path, required=True, metavar="FILE", help="the profile, a .json file")
    return p


def main() -> int:
    args = parser().parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    try:
        provenance.check_folder("--out", args.out)
        if not 1e-4 <= args.link_gb_s <= 100:
            raise ValueError(f"--link-gb-s is {args.link_gb_s}; it must be 0.0001 to 100")
        for flag, value, least in (
            ("tokens", args.tokens, 8),
            ("rounds", args.rounds, 1),
            ("context", args.context, 32),
        ):
            if value < least:
                raise ValueError(f"--{flag} is {value}; it must be at least {least}")
        check_idle(args.allow_busy)
        result = calibrate(
            args.model,
            args.bits or [4],
            gb_s=args.link_gb_s,
            tokens=args.tokens,
            rounds=args.rounds,
            policies=args.policy or (),
            name=args.name,
            device=args.device,
            context=args.context,
        )
        save(result.profile, args.out)
    except (ValueError, OSError, CopierError) as problem:
        print(f"runtime.calibrate: {problem}", file=sys.stderr)
        return 2
    print("\n".join(lines(result)))
    found = {
        "out": str(args.out),
        "held_out_errors": result.errors,
        "spread": result.spread,
        "kept_share": result.kept_share,
    }
    print(json.dumps(found | dataclasses.asdict(result.profile)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
