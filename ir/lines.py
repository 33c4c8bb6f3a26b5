"""What readers of our texts share: lines one by one, patterns, Python literals."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass

from .attrs import Attr, read_all
from .errors import GraphError

TEXT = r"'(?:[^'\\]|\\.)*'|\"(?:[^\"\\]|\\.)*\""  # a string as Python writes it


@dataclass
class Lines:
    """A text read line by line; `line` is the one being read, empty before the first and behind the last."""

    text: str
    number: int = 0
    line: str = ""

    def __post_init__(self) -> None:
        self.lines = self.text.splitlines()

    def wrong(self) -> GraphError:
        """What is raised where a line is not understood."""
        raise NotImplementedError

    def next(self) -> str | None:
        """The next line that says something, None behind the last."""
        while self.number < len(self.lines):
            self.number += 1
            self.line = self.lines[self.number - 1].strip()
            if self.line and not self.line.startswith("#"):
                return self.line
        self.line = ""
        return None

    def match(self, pattern: re.Pattern[str], text: str) -> re.Match[str]:
        found = pattern.fullmatch(text)
        if found is None:
            raise self.wrong()
        return found

    def attrs(self, text: str) -> tuple[tuple[str, Attr], ...]:
        """Of `length=3, reverse=False`."""
        try:
            return read_all(text)
        except (SyntaxError, ValueError) as error:
            raise self.wrong() from error

    def literal(self, text: str) -> bool | int | float | str:
        """A constant's number."""
        if text in ("inf", "-inf", "nan"):
            return float(text)
        try:
            return ast.literal_eval(text)
        except (SyntaxError, ValueError) as error:
            raise self.wrong() from error
