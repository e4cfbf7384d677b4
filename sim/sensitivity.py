"""How a result changes with the recall of the guesses, the link's speed and the size of a chunk, one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

from sim.experiment import Experiment, Setting
from sim.spec import Options

RECALLS = (0.5, 0.7, 0.8, 0.9, 1.0)
LINKS = (0.25, 0.5, 1.0, 2.0, 4.0)
CHUNKS = (1, 4, 16, 64)
DISTANCES = (1, 2, 3, 4)


class Row(NamedTuple):
    """One changed setting: what was changed, to what, and the TPOT in seconds."""

    field: str
    value: float
    tpot_s: float | None


def rows(setting: Setting, experiment: Experiment) -> Iterator[Row]:
    """The setting with one thing changed; recall and distance only for a policy that prefetches."""
    run = setting.options
    if run.prefetches:
        for recall in RECALLS:
            text = f"noisy_oracle:recall={recall},step=0.0"
            yield Row("recall of the guesses", recall, experiment.tpot_s(_with(setting, predictor=text)))
        for distance in DISTANCES:
            policy = replace(run.policy, params=run.policy.params._replace(lookahead=distance))
            perfect = _with(setting, policy=policy, predictor=f"oracle:reach={distance}")
            yield Row("lookahead, perfect guesses", distance, experiment.tpot_s(perfect))
    for factor in LINKS:
        link = setting.machine.link
        faster = {n: factor * getattr(link, n) for n in ("h2d_gb_s", "d2h_gb_s", "h2d_duplex_gb_s", "h2d_host_gb_s")}
        machine = replace(setting.machine, link=replace(link, **faster))
        yield Row("link GB/s", faster["h2d_gb_s"], experiment.tpot_s(replace(setting, machine=machine)))
    if run.copy_stream:
        for chunks in CHUNKS:
            size = -chunks if chunks > 1 else 0
            yield Row("chunks of an expert", chunks, experiment.tpot_s(_with(setting, chunk_bytes=size)))


def _with(setting: Setting, **changes: Any) -> Setting:
    run: Options = setting.options.replace(**changes)
    return replace(setting, options=run)


def table(found: list[Row]) -> str:
    """Lines to print: one for each field, its values and the TPOT in milliseconds."""
    lines = ["sensitivity of TPOT (ms), one change at a time:"]
    for field in dict.fromkeys(row.field for row in found):
        cells = [f"{row.value:g}: {(row.tpot_s or 0) * 1e3:.2f}" for row in found if row.field == field]
        lines.append(f"  {field:28} {'   '.join(cells)}")
    return "\n".join(lines)
