"""Two processes with different string hashing write the same bytes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import random_trace

import traces

ROOT = Path(__file__).parent.parent
POLICIES = {
    "one": ["--policy", "speculative:lookahead=2,stale=keep,guard=0,trust=0,miss=load", "--bits", "3"],
    "all at once": [
        *("--policy", "speculative", "--policy", "mixtral_offloading", "--policy", "perfect:lookahead=2"),
        *(
            "--policy",
            "on_demand:cache=lfu",
            "--policy",
            "on_demand:cache=random",
            "--policy",
            "deadline",
            "--seed",
            "3",
        ),
    ],
}


@pytest.mark.parametrize("name", POLICIES)
def test_hash_seeds_change_nothing(name: str, tmp_path: Path) -> None:
    """`sim.run`: what it prints, its JSON line and the load log."""
    traces.save(random_trace(2, sequences=3, length=20, prefill=4), tmp_path / "t.safetensors")
    found = []
    for seed in ("1", "2"):
        log = tmp_path / f"log{seed}"
        command = [sys.executable, "-m", "sim.run", "--trace", str(tmp_path / "t.safetensors"), *POLICIES[name]]
        if name == "one":
            command += ["--load-log", str(log)]
        done = subprocess.run(
            command, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, check=False
        )
        assert done.returncode == 0, done.stderr.decode()
        found.append((done.stdout, log.read_bytes() if log.exists() else b""))
    assert found[0] == found[1]
    assert found[0][0].splitlines()[-1].startswith(b"{")
    if name == "one":
        assert found[0][1].count(b"\n") > 50
