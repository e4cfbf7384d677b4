"""Parts `calibrate`, `validate` and `record`: the demonstration model on the device, by those commands' functions.

All three take the device.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from runtime import models, prompts
from runtime.bench.book import Book, UnavailableError
from runtime.devices import Device

BITS = (4,)
POLICIES = ("on_demand", "mixtral_offloading", "speculative")


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

        amount: dict[str, Any] = {"tokens": 8, "rounds": 1, "context": 32} if smoke else {}
        made = calibrate.calibrate(models.DEMO, BITS, name=device.name, device=device.name, **amount)
        calibrate.save(made.profile, beside)
        return {
            "file": beside.name,
            "profile": made.profile.to_json(),
            "held_out_errors": made.errors,
            "spread": made.spread,
            "kept_share": made.kept_share,
        }

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
        rungs = record.rungs_asked(["all"], models.DEMO, None)
        tokens = 4 if smoke else 64
        trace = record.record(models.DEMO, asked, tokens, predictors=rungs, device=device.name)
        traces.save(trace, beside)
        return {"file": beside.name, "decode_tokens": trace.num_decode_tokens, "predictors": list(trace.guesses)}

    found = book.cell("record/demo", work)
    if found:
        book.say(f"record: {found['file']}, {found['decode_tokens']} decode tokens, {', '.join(found['predictors'])}")
