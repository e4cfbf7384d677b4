"""What the user says beyond the source, and how it joins what the source itself carries."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, NamedTuple

from traces.trace import TraceError
from traces.vocabulary import ModelSpec

_FLAGS: Final = {
    "name": "--name NAME",
    "num_layers": "--layers N",
    "num_experts": "--experts N",
    "top_k": "--top-k N",
    "hidden_size": "--hidden-size N",
    "expert_size": "--expert-size N",
}


class Shape(NamedTuple):
    """The model of a source; ``own_top_k`` is the model's own where the source routed with another, else None."""

    model: ModelSpec
    own_top_k: int | None = None


@dataclass(frozen=True, kw_only=True)
class Options:
    """Flags of ``traces.convert`` that importers read.

    Attributes:
        model: the model's shape from a file, or None.
        name, num_layers, num_experts, top_k, hidden_size, expert_size: single fields of it, or None.
        weights: ``renormalised`` or ``softmax``: how router logits become weights.
        prefill: tokens of every sequence that are prefill.
        sequences: sequences of equal length that follow each other in the source.
        forced: the recording program overrode the model's own choice.
    """

    model: ModelSpec | None = None
    name: str | None = None
    num_layers: int | None = None
    num_experts: int | None = None
    top_k: int | None = None
    hidden_size: int | None = None
    expert_size: int | None = None
    weights: str | None = None
    prefill: int | None = None
    sequences: int = 1
    forced: bool = False

    def shape(self, known: ModelSpec | None = None, **carried: str | int | None) -> Shape:
        """Join what the source carries, the flags, the model file and what the importer knows; the first has its say.

        Args:
            known: the importer's own knowledge of the model, used last.
            carried: fields of ``ModelSpec`` as the source carries them; None where it does not.

        Raises:
            TraceError: the source and a flag or the model file contradict each other, or a field stands nowhere. The
                name is free, and a different top_k is not a contradiction: the program that routed overrode it.
        """
        base = self.model or known
        values: dict[str, str | int] = {}
        for field in _FLAGS:
            found, flag = carried.get(field), getattr(self, field)
            if field == "name":
                found, flag = flag, self.model.name if self.model else found
            elif None not in (found, flag) and found != flag:
                raise TraceError(f"the file has {field} {found}, but {_FLAGS[field].split()[0]} says {flag}: omit it")
            value = flag if found is None else found
            if base:
                own = getattr(base, field)
                value = own if value is None else value
            if base and own != value and field not in ("name", "top_k"):
                raise TraceError(f"{field} is {value}, but model {base.name!r} has {own}; name the model that routed")
            if value is not None:
                values[field] = value
        if missing := [field for field in _FLAGS if field not in values]:
            flags = ", ".join(_FLAGS[field] for field in missing)
            raise TraceError(f"the file does not say {' and '.join(missing)}; give {flags}, or --model FILE.json")
        try:
            model = ModelSpec.from_json((base.to_json() if base else {}) | values)
        except ValueError as error:
            raise TraceError(str(error)) from None
        own_top_k = base.top_k if base and base.top_k != model.top_k else None
        return Shape(model, own_top_k)
