"""The table of all results, which the page's script sorts and filters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from sim.report.markup import Markup, join, tag

Record = dict[str, Any]


class Column(NamedTuple):
    """A column: ``key`` is its name in filters, ``of`` its value, a number (shown with ``form``) or text."""

    key: str
    head: str
    of: Callable[[Record], Any]
    form: str = ""
    group: str = ""


def cell(column: Column, record: Record) -> Markup:
    """One value; a number also as an attribute, unrounded, for sorting and filtering."""
    value = column.of(record)
    if value is None:
        return tag("td", "-", data_v="")
    if isinstance(value, str):
        return tag("td", value, class_="text")
    return tag("td", format(value, column.form), data_v=float(value))


def table(
    name: str, columns: Sequence[Column], records: Sequence[Record], marked: dict[int, str], chosen: int | None
) -> Markup:
    """Controls and table.

    Args:
        name: unique on the page.
        marked: classes of rows by index, such as "front".
        chosen: index of the row that stands out.
    """
    groups: list[list[Any]] = []
    for column in columns:
        if groups and groups[-1][0] == column.group:
            groups[-1][1] += 1
        else:
            groups.append([column.group, 1])
    over = tag("tr", *(tag("th", text, colspan=span, scope="colgroup", class_="group") for text, span in groups))
    heads = (
        tag("th", tag("button", c.head, tag("span", class_="arrow", aria_hidden="true"), type="button"), scope="col",
            class_=None if c.form else "text", data_key=c.key, aria_sort="none")
        for c in columns
    )  # fmt: skip
    rows = []
    for number, record in enumerate(records):
        classes = " ".join(filter(None, [marked.get(number, ""), "chosen" if number == chosen else ""]))
        first, *rest = columns
        lead = tag("th", first.of(record), scope="row", class_="text")
        cells = (cell(c, record) for c in rest)
        rows.append(tag("tr", lead, *cells, id=f"{name}-{number}", class_=classes or None))
    keys = ", ".join(c.key for c in columns)
    hint = f"Words must all be found in a row; KEY=VALUE, KEY<VALUE and KEY>VALUE compare. Keys: {keys}."
    box = tag(
        "input", type="search", id=f"{name}-filter", class_="filter", autocomplete="off", spellcheck="false",
        placeholder="for example: speculative bits=4", aria_describedby=f"{name}-hint",
    )  # fmt: skip
    only = tag("label", tag("input", type="checkbox", class_="only"), " Pareto front only") if marked else None
    controls = tag(
        "div", tag("label", "Filter ", box, for_=f"{name}-filter"), only,
        tag("span", f"{len(records)} of {len(records)} shown", class_="count", role="status"), class_="controls",
    )  # fmt: skip
    note = tag("p", hint, class_="hint", id=f"{name}-hint")
    body = tag("table", tag("thead", over, tag("tr", *heads)), tag("tbody", *rows))
    scroll = tag("div", body, class_="scroll", tabindex=0, role="region", aria_label="table of results")
    return tag("div", join(controls, note, scroll), class_="grid")
