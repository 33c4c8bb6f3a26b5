"""Values of attributes: plain, hashable, JSON-able, equal where they mean the same; and how texts write them.

kept           written
2              2
0.5            0.5
"<float>2.0"   2.0      Python calls 2.0 == 2 == True equal; these must differ
"<float>nan"   nan      is not equal to itself, and no JSON
(0, "f32")     (0, 'f32')
"""

from __future__ import annotations

import ast
from math import isfinite

from .graph import Attr

_FLOAT = "<float>"


def real(value: float) -> Attr:
    """A real number as it is kept."""
    return value if isfinite(value) and value != int(value) else f"{_FLOAT}{value!r}"


def number(attr: Attr) -> float | None:
    """The number that an attribute is, if it is one."""
    if isinstance(attr, str) and attr.startswith(_FLOAT):
        try:
            return float(attr.removeprefix(_FLOAT))
        except ValueError:
            return None
    return float(attr) if isinstance(attr, int | float) and not isinstance(attr, bool) else None


def spelled(attr: Attr) -> str:
    """As texts write it."""
    if isinstance(attr, tuple):
        return f"({', '.join(map(spelled, attr))}{',' * (len(attr) == 1)})"
    return repr(attr) if not isinstance(attr, str) or number(attr) is None else repr(number(attr))


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
    raise ValueError(ast.dump(node))
