"""Progress on stderr: one changing line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Self

from rich.console import Console
from rich.status import Status

SELDOM = 5.0  # seconds between lines that only say where a search stands


class Progress:
    """`with Progress() as p: p.say("tracing")` while something runs."""

    def __init__(self) -> None:
        self.said = time.monotonic()
        self.console = Console(stderr=True, highlight=False)
        self.status: Status | None = None

    def __enter__(self) -> Self:
        if sys.stderr.isatty():
            self.status = self.console.status("")
            self.status.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.status is not None:
            self.status.stop()

    def say(self, text: str) -> None:
        """What is going on now."""
        if self.status is not None:
            self.status.update(text)
        else:
            print(text, file=sys.stderr, flush=True)

    def now(self, text: str) -> None:
        """Where a search stands, said again and again; where lines cannot change, one every few seconds."""
        if self.status is not None:
            self.status.update(text)
        elif time.monotonic() - self.said > SELDOM:
            self.said = time.monotonic()
            print(f"  {text}", file=sys.stderr, flush=True)

    def line(self, text: str) -> None:
        """Something found, worth keeping on the screen."""
        if self.status is not None:
            self.console.print(f"  {text}", markup=False)
        else:
            print(f"  {text}", file=sys.stderr, flush=True)
