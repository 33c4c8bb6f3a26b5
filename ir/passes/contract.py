"""What every pass on local programs is, and how passes run: verified before and after, dumped by name.

MESHWRIGHT_DUMP=coalesce meshwright run ...    the program before and after that pass, on stderr
MESHWRIGHT_DUMP=all                            of every pass; several names with commas between
"""

from __future__ import annotations

import os
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import ClassVar

from ..errors import GraphError, UsageError
from ..local.checks import verify_local
from ..local.program import LocalProgram

DUMP, ALL = "MESHWRIGHT_DUMP", "all"  # the environment variable, and its word for every pass


class Pass(ABC):
    """Program in, program out: another way to run the same step. Values keep their numbers and shards; a pass never
    verifies, and may take for granted what `local/checks.py` holds."""

    name: ClassVar[str]

    @abstractmethod
    def run(self, program: LocalProgram) -> LocalProgram: ...


def run_passes(program: LocalProgram, passes: Sequence[Pass], whole: bool = True) -> LocalProgram:
    """The program after all passes, in order.

    Args:
        whole: False for the pass of a stage (see `verify_local`).

    Raises:
        UsageError: the environment asks for the dump of a pass that does not exist.
        GraphError: a law is broken, by the program as it came or by a pass, which is named.
    """
    dumped = dumped_passes(each.name for each in passes)
    verify_local(program, whole)
    for each in passes:
        after = each.run(program)
        if each.name in dumped:
            _dump("before", each, program)
            _dump("after", each, after)
        try:
            verify_local(after, whole)
        except GraphError as error:
            raise GraphError.at(error, None, f"pass `{each.name}`") from error
        program = after
    return program


def dumped_passes(known: Iterable[str]) -> frozenset[str]:
    """Names of the passes whose programs are to be printed.

    Raises:
        UsageError: the environment names a pass that does not exist.
    """
    names = tuple(known)
    asked = [word.strip() for word in os.environ.get(DUMP, "").split(",") if word.strip()]
    if unknown := [word for word in asked if word not in (*names, ALL)]:
        raise UsageError(
            f"`{unknown[0]}` is no pass.", where=DUMP, fix=f"one of {', '.join(names)}, or {ALL}"
        )
    return frozenset(names if ALL in asked else asked)


def _dump(when: str, each: Pass, program: LocalProgram) -> None:
    print(f"{when} pass {each.name}\n{program}", file=sys.stderr, end="", flush=True)
