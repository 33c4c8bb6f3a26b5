"""Attributes: read by name and type; their values, plain, hashable, equal where they mean the same; and how texts and
JSON write these.

value           in texts       in JSON
2               2              2
real(2.0)       2.0            2.0                 is not 2
real(-0.0)      -0.0           -0.0                is not 0.0
real(nan)       nan            {"float": "nan"}    is itself
(0, "f32")      (0, 'f32')     [0, "f32"]
"""

from __future__ import annotations

import ast
from math import isfinite, isnan
from struct import pack
from typing import Any, NoReturn, TypeAlias, TypeVar

from .errors import GraphError
from .unchecked import is_dict, is_list

_T = TypeVar("_T")
_FLOAT = "float"  # of numbers that JSON does not have: {"float": "nan"}
Attr: TypeAlias = "bool | int | float | str | tuple[Attr, ...] | None"


class Real(float):
    """A real number that equals only floats of the same bits: Python calls 2.0 == 2 == True and 0.0 == -0.0, and no
    nan equal to itself."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, float) and pack("d", self) == pack("d", other)

    def __hash__(self) -> int:
        return 0 if isnan(self) else float.__hash__(self)


class Attributed:
    """What has attributes, read by name and type: `op.integers("permutation")` is `(1, 0)`.

    Raises:
        GraphError: there is no such attribute, or it is of another type.
    """

    __slots__ = ()
    kind: str
    where: str
    attrs: tuple[tuple[str, Attr], ...]

    def has(self, name: str) -> bool:
        """Whether it has an attribute that says something."""
        return dict(self.attrs).get(name) is not None

    def attr(self, name: str) -> Attr:
        found = dict(self.attrs)
        if name not in found:
            raise GraphError(f"`{self.kind}` has no attribute `{name}`.", where=self.where or None)
        return found[name]

    def flag(self, name: str) -> bool:
        """Of what is off where nothing is said."""
        return self.has(name) and self._of_type(name, bool, "truth value")

    def integer(self, name: str) -> int:
        return self._of_type(name, int, "whole number")

    def real(self, name: str) -> float:
        found = number(self.attr(name))
        return self._wrong(name, "number") if found is None else found

    def text(self, name: str) -> str:
        return self._of_type(name, str, "text")

    def items(self, name: str) -> tuple[Attr, ...]:
        found = self.attr(name)
        return found if isinstance(found, tuple) else self._wrong(name, "tuple")

    def integers(self, name: str) -> tuple[int, ...]:
        found = self.items(name)
        kept = tuple(each for each in found if isinstance(each, int))
        return kept if len(kept) == len(found) else self._wrong(name, "tuple of whole numbers")

    def integer_rows(self, name: str) -> tuple[tuple[int, ...], ...]:
        found = integer_rows(self.attr(name))
        return self._wrong(name, "tuple of tuples of whole numbers") if found is None else found

    def _of_type(self, name: str, type_: type[_T], words: str) -> _T:
        found = self.attr(name)
        return found if isinstance(found, type_) else self._wrong(name, words)

    def _wrong(self, name: str, words: str) -> NoReturn:
        what = f"attribute `{name}` of `{self.kind}` is {spelled(self.attr(name))}, no {words}."
        raise GraphError(what, where=self.where or None)


def integer_rows(attr: Attr) -> tuple[tuple[int, ...], ...] | None:
    """Tuples of whole numbers in a tuple, if it is that."""
    if not isinstance(attr, tuple):
        return None
    rows = [tuple(n for n in row if isinstance(n, int)) for row in attr if isinstance(row, tuple)]
    same = [len(row) for row in attr if isinstance(row, tuple)] == list(map(len, rows))
    return tuple(rows) if same and len(rows) == len(attr) else None


def real(value: float) -> Real:
    """A real number as attributes keep it; all nans as one."""
    return Real("nan" if isnan(value) else value)


def number(attr: Attr) -> float | None:
    """The number that an attribute is, if it is one."""
    return float(attr) if isinstance(attr, int | float) and not isinstance(attr, bool) else None


def spelled(attr: Attr) -> str:
    """As texts write it."""
    if isinstance(attr, tuple):
        return f"({', '.join(map(spelled, attr))}{',' * (len(attr) == 1)})"
    return repr(attr)


def spelled_all(attrs: tuple[tuple[str, Attr], ...]) -> str:
    """`length=3, reverse=False`."""
    return ", ".join(f"{name}={spelled(value)}" for name, value in attrs)


def read_all(text: str) -> tuple[tuple[str, Attr], ...]:
    """Of `length=3, reverse=False`.

    Raises:
        ValueError: it is something else.
    """
    call = ast.parse(f"_({text})", mode="eval").body
    if not isinstance(call, ast.Call) or call.args:
        raise ValueError(text)
    return tuple((word.arg or "", _read(word.value)) for word in call.keywords)


def _read(node: ast.expr) -> Attr:
    match node:
        case ast.Tuple():
            return tuple(map(_read, node.elts))
        case ast.Name("nan" | "inf"):
            return real(float(node.id))
        case ast.UnaryOp(ast.USub(), ast.Name("inf")):
            return real(float("-inf"))
        case ast.UnaryOp(ast.USub(), ast.Constant(int() | float() as positive)):
            return -positive if isinstance(positive, int) else real(-positive)
        case ast.Constant(float() as value):
            return real(value)
        case ast.Constant(None | int() | str() as value):  # `int` are truth values too
            return value
        case _:
            raise ValueError(ast.dump(node))


def to_json(attr: Attr) -> Any:
    """As JSON has it, which knows no nan and no infinity."""
    if isinstance(attr, tuple):
        return [*map(to_json, attr)]
    if isinstance(attr, float) and not isfinite(attr):
        return {_FLOAT: repr(attr)}
    return attr


def from_json(value: Any) -> Attr:
    """What `to_json` gave.

    Raises:
        ValueError: it is something else.
    """
    if is_list(value):
        return tuple(map(from_json, value))
    if is_dict(value):
        if value.keys() != {_FLOAT} or value[_FLOAT] not in ("nan", "inf", "-inf"):
            raise ValueError(f"{value} is no attribute")
        return real(float(value[_FLOAT]))
    if not isinstance(value, bool | int | float | str | None):
        raise ValueError(f"{value} is no attribute")
    return real(value) if isinstance(value, float) else value
