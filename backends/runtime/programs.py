"""A pipeline's programs as the driver runs them: what each takes and gives, and how values lie on a stage.

Layouts are those of `ir`. A value whose sum is still owed over some mesh axes crosses from program to program
as a stack: a dim in front of its own, cut over those axes, with a slice for each device that owes a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...ir.pipeline.borders import ProgramBorder
from ...ir.sharding import Sharding

Transfer = Callable[[Sequence[Any] | None], tuple[Sequence[Any] | None, Any]]
"""`transfer(arrays) -> (arrays there, token)`; every process with a device of either end calls it.

A process without a device of the sender gives None, one without a device of the receiver gets None. The token is
ready when this process has done its part.
"""


@dataclass(frozen=True)
class Route:
    """One array: its shape as a whole, how it lies on the sender, and how it shall lie on the receiver."""

    shape: tuple[int, ...]
    dtype: str  # of our element types
    leaves: Sharding
    arrives: Sharding


@dataclass(frozen=True)
class StageProgram(ProgramBorder):
    """A fragment as a program of the framework.

    `call(moment, given_up, kept) -> (token, totals, gives, sent, results)`: `moment` is the number of the
    microbatch, `given_up` are the totals so far and donated inputs, `kept` the other values it takes, `sent` an
    array per message. The token is ready when everything is.
    """

    call: Callable[..., Any]


@dataclass(frozen=True)
class StageDevices:
    """Where a stage runs, and what its programs find there."""

    mesh: Any
    inputs: Mapping[int, Sharding]  # how each input of the step lies that the stage reads or keeps
    same: Mapping[int, int]  # prepared value -> the value it equals
    totals: tuple[int, ...]  # values that are joined over the microbatches
    zeros: Callable[[], Sequence[Any]]  # makes the totals before the first microbatch
