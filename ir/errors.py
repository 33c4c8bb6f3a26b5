"""Errors that users see: what failed, where they wrote it, where that came from, what to try.

The house form, as the CLI prints it:

    PlanError: 96 sequences cannot be divided over 5 data-parallel ranks.
      where  step argument `tokens`, dim 0 of (96, 2048); axis "data" = 5
      from   cluster spec lab.toml
      try    a size dividing 96 (2, 3, 4, 6, 8), or pad the batch to 100
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Self

LONGEST = 1200  # characters of one row of a message


class MeshwrightError(ValueError):
    """Base of all errors raised for user mistakes. `exit_code` is what the CLI ends with.

    `str(error)` leaves the class name out, since a traceback puts it in front;
    `report()` has it, for the CLI.
    """

    exit_code = 2
    several: tuple[MeshwrightError, ...] = ()  # told together in this one

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        origin: str | None = None,
        fix: str | None = None,
    ):
        super().__init__(what)  # the only argument, so that errors pickle
        self.what, self.where, self.origin, self.fix = what, where, origin, fix

    def __str__(self) -> str:
        rows = [("where", self.where), ("from", self.origin), ("try", self.fix)]
        what = _clipped(self.what).replace("\n", " ")  # of a value that has one
        return "\n".join([what, *(_row(label, _clipped(text)) for label, text in rows if text)])

    def report(self) -> str:
        """The message with the error's name in front, as the CLI prints it."""
        return f"{type(self).__name__}: {self}"

    @classmethod
    def at(cls, error: MeshwrightError, where: str | None, origin: str | None) -> Self:
        """The same complaint as this class, placed where the user wrote the value."""
        return cls(
            error.what, where=where or error.where, origin=origin or error.origin, fix=error.fix
        )


class UsageError(MeshwrightError):
    """An option or argument that does not exist or contradicts another."""


class ClusterError(MeshwrightError):
    """A cluster description that is wrong or incomplete."""


class CaptureError(MeshwrightError):
    """A step that cannot be traced into a graph."""


class GraphError(MeshwrightError):
    """A graph or its text that breaks an invariant."""


class PlanError(MeshwrightError):
    """A request that cannot be planned."""


class InfeasibleError(PlanError):
    """Nothing fits: the least any plan needs on one device, and what it may use."""

    exit_code = 3

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        origin: str | None = None,
        fix: str | None = None,
        needed_bytes: float | None = None,
        limit_bytes: float | None = None,
    ):
        super().__init__(what, where=where, origin=origin, fix=fix)
        self.needed_bytes, self.limit_bytes = needed_bytes, limit_bytes


class StoppedError(PlanError):
    """The search was stopped before it found any plan."""

    exit_code = 4


class LoweringError(MeshwrightError):
    """A plan that cannot run here."""

    exit_code = 5


class MismatchError(MeshwrightError):
    """A plan or file made for another graph, cluster or version."""

    exit_code = 5


class ProcessError(MeshwrightError):
    """Another process of the run ended, or was waited for too long."""

    exit_code = 7


class VerificationError(MeshwrightError):
    """The sharded step gave another result than the unsharded one."""

    exit_code = 1


class MissingDependencyError(MeshwrightError):
    """An optional package is not installed."""

    exit_code = 6

    @classmethod
    def of(cls, error: ImportError) -> Self | None:
        """That jax is not installed, if that is what could not be imported."""
        if (error.name or "").partition(".")[0] not in ("jax", "jaxlib"):
            return None
        return cls(
            "jax is not installed; steps written in it, those of the zoo too, are read and run with it.",
            fix="pip install 'meshwright[jax]'",
        )


def did_you_mean(word: str, known: Iterable[str], what: str = "one of") -> str:
    """What to try instead of an unknown word.

    did_you_mean("bandwith", ["bandwidth", "latency"])  ->  "`bandwidth`"
    did_you_mean("x", ["bandwidth", "latency"])         ->  "one of bandwidth, latency"
    """
    words = list(known)
    folded = {w.lower(): w for w in words}
    near = [folded[w] for w in get_close_matches(word.lower(), folded, n=3, cutoff=0.6)]
    return " or ".join(f"`{w}`" for w in near) if near else f"{what} {', '.join(words)}"


def _clipped(text: str) -> str:
    """Without the middle of a value that no one would read."""
    return text if len(text) <= LONGEST else f"{text[: LONGEST // 2]} ... {text[-LONGEST // 4 :]}"


def _row(label: str, text: str) -> str:
    return f"  {label:<5}  " + text.replace("\n", "\n" + " " * 9)
