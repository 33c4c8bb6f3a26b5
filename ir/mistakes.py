"""Mistakes told together: those of one request that have nothing to do with each other, and what a file lacks.

wrong = Mistakes()
parallelism = wrong.of(lambda: Parallelism(pp=7, vpp=-1))     None, and its error kept
setting = wrong.of(lambda: Setting(recompute="most"))
wrong.tell()                                                  one error that names all of them
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from pydantic import ValidationError

from .errors import MeshwrightError

T = TypeVar("T")
NAMED = 4  # fields that a message lists; a wrong file lacks dozens


@dataclass
class Mistakes:
    """Errors found so far, in the order in which they were found."""

    found: list[MeshwrightError] = field(default_factory=lambda: [])

    def of(self, make: Callable[[], T]) -> T | None:
        """What it makes; None where that is a mistake of the user's."""
        try:
            return make()
        except MeshwrightError as error:
            self.add(error)
            return None

    def add(self, error: MeshwrightError) -> None:
        self.found += error.several or [error]

    def tell(self) -> None:
        """Raise what was found: one error as it is, several as one of the first's class."""
        if not self.found:
            return
        first, *others = self.found
        if not others:
            raise first

        def joined(texts: Iterator[str | None], between: str) -> str | None:
            return between.join(dict.fromkeys(filter(None, texts))) or None

        told = type(first)(
            f"{joined((error.what.removesuffix('.') for error in self.found), '; ')}.",
            where=joined((error.where for error in self.found), ", "),
            origin=joined((error.origin for error in self.found), ", "),
            fix=joined((_advice(error) for error in self.found), "; "),
        )
        told.several = tuple(self.found)
        raise told


def _advice(error: MeshwrightError) -> str | None:
    """What to try, and for what: several stand in one row."""
    return error.fix and (f"{error.where}: {error.fix}" if error.where else error.fix)


def in_words(error: ValidationError) -> tuple[str, str | None]:
    """What is wrong with a file's content, and where in it: the fields that it lacks, or its first wrong one."""
    found = error.errors()
    lacking = [each["loc"] for each in found if each["type"] == "missing"]
    if not lacking:
        return found[0]["msg"], ".".join(map(str, found[0]["loc"])) or "the whole file"
    place = lacking[0][:-1]
    names = [f"`{loc[-1]}`" for loc in lacking if loc[:-1] == place]
    more = f" and {len(names) - NAMED} more fields" if len(names) > NAMED + 1 else ""
    named = ", ".join(names[:NAMED] if more else names)
    return f"it has no {named}{more}", ".".join(map(str, place)) or None
