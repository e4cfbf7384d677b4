"""What made a file: command, commit, machine, model; no path of the machine it was made on."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from runtime.lookahead import GATES_FILE


def commit() -> str:
    """Commit of the project's checkout, with ``+changes`` when files differ from it; empty outside a checkout."""
    root = Path(__file__).parent.parent
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True, check=True)
        status = subprocess.run(
            ["git", "status", "--porcelain"], cwd=root, capture_output=True, text=True, check=True
        ).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+changes" if status.strip() else "")


def command() -> str:
    """The command line, files by name only."""
    words = [re.sub(rf"[^=]*{re.escape(os.sep)}", "", word.rstrip(os.sep)) for word in sys.argv[1:]]
    path = Path(sys.argv[0])
    module = path.parent.name if path.stem == "__main__" else path.stem
    return " ".join(["python -m", f"runtime.{module}", *words])


def check_folder(flag: str, path: Path | None) -> None:
    """Before anything long begins: is there a folder to write ``path`` into?

    Raises:
        ValueError: there is none.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ValueError(f"{flag} {path}: its folder does not exist; make it first")


def weights_sha256(model_dir: Path) -> str:
    """sha256 over the model directory's safetensors files, in name order; lookahead gates are no weights of it."""
    digest = hashlib.sha256()
    for file in sorted(p for p in model_dir.glob("*.safetensors") if p.name != GATES_FILE):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def machine() -> dict[str, Any]:
    """Processor, cores and versions the numbers depend on."""
    import torch

    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    except OSError:
        model = platform.processor()
    return {
        "processor": model,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
