"""Copy streams without a GPU: one that copies at once, one that copies when it is told to."""

from __future__ import annotations

import threading

import torch


class Done:
    """The ticket of a copy that is done."""

    def done(self) -> bool:
        return True

    def wait(self) -> None:
        return

    def took_ns(self) -> int:
        return 1000


class MemoryStream:
    """Copies within ``submit``."""

    def submit(self, target: torch.Tensor, source: torch.Tensor, after: object) -> Done:
        assert after is None
        target.copy_(source)
        return Done()


class Held:
    """The ticket of a copy that waits for ``release``."""

    def __init__(self, target: torch.Tensor, source: torch.Tensor, after: threading.Event | None) -> None:
        self.target, self.source, self.after = target, source, after
        self.released = threading.Event()
        self.asked = 0

    def release(self) -> None:
        assert self.after is None or self.after.is_set(), "the copy did not wait for the slot's reader"
        self.target.copy_(self.source)
        self.released.set()

    def done(self) -> bool:
        self.asked += 1
        return self.released.is_set()

    def wait(self) -> None:
        assert self.released.wait(30), "nobody released the copy"

    def took_ns(self) -> int:
        return 1000


class HeldStream:
    """Copies in order, each when the test calls ``release``; ``after`` is a threading.Event."""

    def __init__(self) -> None:
        self.tickets: list[Held] = []
        self.grown = threading.Condition()

    def submit(self, target: torch.Tensor, source: torch.Tensor, after: threading.Event | None) -> Held:
        with self.grown:
            self.tickets.append(Held(target, source, after))
            self.grown.notify_all()
            return self.tickets[-1]

    def wait_for(self, count: int) -> list[Held]:
        """All tickets, once there are ``count``."""
        with self.grown:
            assert self.grown.wait_for(lambda: len(self.tickets) >= count, 30), f"{len(self.tickets)} copies submitted"
            return list(self.tickets)
