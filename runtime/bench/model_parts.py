"""Parts `calibrate`, `validate` and `record`: the demonstration model on the device, by those commands' functions.

One thin adapter: they are given what they take; where one does not know the device, the cell is refused and says so.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from runtime import models, prompts
from runtime.bench.book import Book, UnavailableError
from runtime.devices import Device

BITS = (4,)
POLICIES = ("on_demand", "mixtral_offloading", "speculative")


def taken(function: Callable[..., Any], device: str, **wanted: Any) -> Any:
    """``function`` called with what it takes of ``wanted``, and the device.

    Raises:
        UnavailableError: a device other than cpu, and the function takes none.
    """
    known = inspect.signature(function).parameters
    if "device" in known:
        wanted["device"] = device
    elif device != "cpu":
        raise UnavailableError(f"{function.__module__}.{function.__name__} takes no device, so it knows cpu alone")
    return function(**{name: value for name, value in wanted.items() if name in known})


def parsed(module: Any, words: list[str]) -> Any:
    """The arguments of a command.

    Raises:
        UnavailableError: it refuses them.
    """
    try:
        return module.parser().parse_args(words)
    except SystemExit:
        raise UnavailableError(f"{module.__name__} does not take {' '.join(words)}") from None


def run_calibrate(book: Book, device: Device, smoke: bool) -> None:
    """A profile of the device for the demonstration model, kept in the result and beside it."""
    beside = profile_file(book)

    def work() -> dict[str, Any]:
        from runtime import calibrate

        wanted = {"model_dir": models.DEMO, "bits": BITS, "tokens": 8 if smoke else 48, "name": device.name}
        profile = taken(calibrate.calibrate, device.name, **wanted)
        calibrate.save(profile, beside)
        return {"file": beside.name, "profile": profile.to_json()}

    found = book.cell("calibrate/demo", work)
    if found:
        book.say(f"calibrate: {found['file']}, {found['profile']['evidence']}")


def profile_file(book: Book) -> Path:
    """Where the profile stands."""
    return book.path.with_name(book.path.stem + ".profile.json")


def run_validate(book: Book, device: Device, smoke: bool) -> None:
    """Engine against simulator on the demonstration model, with the profile of part `calibrate`."""
    profile = profile_file(book)
    paces = ("0.05",) if device.name == "cpu" else ("12.4", "25.5")

    def work() -> dict[str, Any]:
        from runtime import validate

        if book.result("calibrate/demo") is None or not profile.is_file():
            raise UnavailableError("there is no profile of this device; part calibrate makes it")
        words = ["--device", device.name, "--profile", str(profile)]
        words += ["--tokens", "4" if smoke else "32", "--repeats", "1" if smoke else "2"]
        for policy in POLICIES[:1] if smoke else POLICIES:
            words += ["--policy", policy]
        for pace in paces:
            words += ["--link-gb-s", pace]
        return {"document": validate.validate(parsed(validate, words))}

    found = book.cell("validate/demo", work)
    if found:
        document = found["document"]
        equal = sum(bool(cell["load_log_equal"]) for cell in document["cells"])
        book.say(
            f"validate: TPOT error median {document['median_abs_tpot_error']:.1%}, worst "
            f"{document['max_abs_tpot_error']:.1%}, load logs equal in {equal} of {len(document['cells'])} cells"
        )


def run_record(book: Book, device: Device, smoke: bool) -> None:
    """Traces of the demonstration model with its trained gates attached, kept beside the result."""
    beside = book.path.with_name(book.path.stem + ".demo.safetensors")

    def work() -> dict[str, Any]:
        import traces
        from runtime import record

        asked = list(prompts.BUILT_IN)[: 1 if smoke else None]
        wanted = {
            "model_dir": models.DEMO,
            "asked": asked,
            "tokens": 4 if smoke else 64,
            "predictors": record.rungs_asked(["all"], models.DEMO, None),
        }
        trace = taken(record.record, device.name, **wanted)
        traces.save(trace, beside)
        return {"file": beside.name, "decode_tokens": trace.num_decode_tokens, "predictors": list(trace.guesses)}

    found = book.cell("record/demo", work)
    if found:
        book.say(f"record: {found['file']}, {found['decode_tokens']} decode tokens, {', '.join(found['predictors'])}")
