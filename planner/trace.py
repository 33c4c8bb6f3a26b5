"""A search's clock, its log, and what it tells of itself while it runs."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf
from typing import Literal

from ..ir.errors import StoppedError
from ..ir.units import format_seconds
from .solver.onehot import Stop

OFTEN = 0.2  # seconds between two words on where a search stands


@dataclass
class Trace:
    """One run of a search, which may take `time_limit` seconds from `started` on.

    `tell` hears one line per event, which `log` keeps; `now` hears where the search stands.
    """

    time_limit: float
    tell: Callable[[str], None] = lambda line: None
    now: Callable[[str], None] = lambda line: None
    started: float = field(default_factory=time.monotonic)
    log: list[str] = field(default_factory=lambda: [])
    stopped_by: Stop | Literal["estimate"] = "proof"
    _stood: float = 0.0  # when it was last said where the search stands

    @property
    def deadline(self) -> float:
        return self.started + self.time_limit

    @property
    def elapsed(self) -> float:
        """Seconds since the search began."""
        return time.monotonic() - self.started

    def past_deadline(self, share: float = 0.0) -> bool:
        """Whether time is up, but for a share of all that is kept for something."""
        return time.monotonic() > self.deadline - share * self.time_limit

    def note(self, line: str) -> None:
        self.log.append(line)
        self.tell(line)

    def report_progress(
        self, best: float, bound: float, looked: int, left: int, limit: float | None = None
    ) -> None:
        """Say where the search stands; `left` of what is looked at can still hold something better.

        `limit`: seconds that all may take, where this search is a part of another.
        """
        elapsed = self.elapsed
        if elapsed - self._stood < OFTEN:
            return
        self._stood = elapsed
        ends = min(left * elapsed / max(1, looked), (limit or self.time_limit) - elapsed)
        found = (
            f"best {format_seconds(best)}, gap {1 - bound / (best or 1.0):.1%}, "
            if best < inf
            else "nothing yet, "
        )
        self.now(
            f"{found}no plan under {format_seconds(bound)}; {left} left, about {max(0.0, ends):.0f} s"
        )

    def nothing_found(self) -> StoppedError:
        """The error of a search that was stopped before it found a plan."""
        return StoppedError(
            "no plan was found before the search was stopped.",
            where=f"stopped by {self.stopped_by} after {self.elapsed:.1f} s",
            fix="more time, fewer choices (pin the mesh or recompute), or more memory",
        )
