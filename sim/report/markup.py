"""HTML from elements: whatever is not markup already is escaped, so no result can become part of the page's code."""

from __future__ import annotations

import html

VOID = frozenset({"meta", "input", "br", "rect", "line", "path", "circle"})  # written without an end tag


class Markup(str):
    """Text that is markup already: what `tag` and `join` make, and the page's own style and script."""

    __slots__ = ()


Child = str | int | None


def escaped(child: Child) -> str:
    """Text as it may stand between tags or in quotes; None is nothing."""
    if isinstance(child, Markup):
        return child
    return "" if child is None else html.escape(str(child))


def tag(name: str, /, *children: Child, **attributes: str | float | bool | None) -> Markup:
    """An element. Of an attribute's name a trailing underscore is dropped, others become hyphens; True stands alone,
    None and False are left out."""
    words = [name]
    for key, value in attributes.items():
        written = key.rstrip("_").replace("_", "-")
        if value is True:
            words.append(written)
        elif value is not None and value is not False:
            text = f"{value:.10g}" if isinstance(value, float) else str(value)
            words.append(f'{written}="{html.escape(text)}"')
    inside = "".join(map(escaped, children))
    if name in VOID and not inside:
        return Markup(f"<{' '.join(words)}/>")
    return Markup(f"<{' '.join(words)}>{inside}</{name}>")


def join(*children: Child) -> Markup:
    """Elements and texts one after the other."""
    return Markup("".join(map(escaped, children)))


def badge(evidence: str) -> Markup:
    """What a figure rests on, as a label."""
    kind = evidence.split()[0].lower() if evidence.split() else ""
    known = kind if kind in ("measured", "simulated", "estimated", "mixed") else "unknown"
    return tag("span", evidence, class_=f"badge {known}")


def figure(title: str, evidence: str, body: Markup, caption: str, name: str) -> Markup:
    """A figure with its title, its evidence label, and the sentence that says what it shows."""
    heading = tag("h3", title, " ", badge(evidence), id=name)
    return tag("figure", heading, body, tag("figcaption", caption), aria_labelledby=name)


def pairs(rows: list[tuple[str, Child]]) -> Markup:
    """Names and values, as a description list."""
    return tag("dl", *(join(tag("dt", name), tag("dd", value)) for name, value in rows))


def plain_table(head: list[str], rows: list[list[Child]]) -> Markup:
    """A small table whose first column names the row."""
    body = (
        tag(
            "tr",
            tag("th", row[0], scope="row"),
            *(tag("td", cell, class_="text" if isinstance(cell, Markup) else None) for cell in row[1:]),
        )
        for row in rows
        if row
    )
    top = tag("thead", tag("tr", *(tag("th", name, scope="col") for name in head)))
    return tag("div", tag("table", top, tag("tbody", *body)), class_="scroll", tabindex=0)
