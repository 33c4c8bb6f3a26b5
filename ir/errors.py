"""Errors that users see: what failed, where they wrote it, where that came from, what to try.

    PlanError: 96 sequences cannot be divided over 5 data-parallel ranks.
      where  step argument `tokens`, dim 0 of (96, 2048); axis "data" = 5
      from   cluster spec lab.toml
      try    a size dividing 96 (2, 3, 4, 6, 8), or pad the batch to 100
"""

from __future__ import annotations


class MeshwrightError(ValueError):
    """Base of all errors raised for user mistakes. `exit_code` is what the CLI ends with."""

    exit_code = 2

    def __init__(self, what: str, *, where: str | None = None, origin: str | None = None, fix: str | None = None):
        self.what, self.where, self.origin, self.fix = what, where, origin, fix
        lines = [("where", where), ("from", origin), ("try", fix)]
        super().__init__("\n".join([what, *(f"  {label:<5}  {text}" for label, text in lines if text)]))

    def report(self) -> str:
        """The message with the error's name in front, as the CLI prints it."""
        return f"{type(self).__name__}: {self}"


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
    """Nothing fits; the message says what the least would be."""

    exit_code = 3


class LoweringError(MeshwrightError):
    """A plan that cannot run here."""

    exit_code = 5


class MismatchError(MeshwrightError):
    """A plan or file made for another graph, cluster or version."""

    exit_code = 5


class VerificationError(MeshwrightError):
    """The sharded step gave another result than the unsharded one."""

    exit_code = 1


class MissingDependencyError(MeshwrightError):
    """An optional package is not installed."""

    exit_code = 6
