"""What a program stores whose ops the host runs one by one: the result of each op, until its last reader is done.

    %2 = transpose %1        shows the memory of %1, which lives as long as %2 is read
    %3 = reshape %2          a copy: no strides show the dims of a transposed value as one
    %4 = add %3 %0           stored

Which results only show their operand's memory follows from strides, as torch has them ("Tensor views",
https://docs.pytorch.org/docs/stable/tensor_view.html): a value is its root, and for each dim how far apart its elements
lie there. Strides are those of whole values; a part of a dim lies likewise.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from ...ir.graph import Op, TensorType
from ...ir.program import Program

Sizes = tuple[int, ...]
# A result is its operand, whatever the strides.
_SAME = frozenset({"name", "stop_gradient", "optimization_barrier"})


@dataclass(frozen=True, slots=True)
class Shown:
    """Which value's memory another shows, and how."""

    root: int
    strides: Sizes


def shown_by(program: Program) -> Mapping[int, int]:
    """By value that is stored nowhere, the one whose memory it shows."""
    types = program.graph.types
    known: dict[int, Shown] = {}
    for visit in program.graph.visits:
        op = visit.op
        for value in op.inputs:
            known.setdefault(value, _plain(value, types))
        for value, found in zip(op.outputs, _views(op, types, known), strict=True):
            known[value] = found or _plain(value, types)
    return {value: found.root for value, found in known.items() if found.root != value}


def _plain(value: int, types: Mapping[int, TensorType]) -> Shown:
    """Stored by itself, row by row."""
    return Shown(value, row_by_row(types[value].shape))


def row_by_row(shape: Sizes) -> Sizes:
    """Strides of elements that lie one after another: (12, 4, 1) of shape (2, 3, 4)."""
    return tuple(prod(shape[d + 1 :]) for d in range(len(shape)))


def _views(
    op: Op, types: Mapping[int, TensorType], known: Mapping[int, Shown]
) -> Iterator[Shown | None]:
    """How each result shows an operand; None where it is stored."""
    if not op.inputs:
        yield from (None for _ in op.outputs)
        return
    source, kind = known[op.inputs[0]], types[op.inputs[0]]
    for number, value in enumerate(op.outputs):
        if op.kind in _SAME:
            yield known[op.inputs[number]]
            continue
        strides = _strides(op, source.strides, kind, types[value])
        yield None if strides is None else Shown(source.root, strides)


def _strides(op: Op, strides: Sizes, source: TensorType, made: TensorType) -> Sizes | None:
    """Of a result in the memory of its operand; None if it is not there."""
    match op.kind:
        case "transpose":
            return tuple(strides[d] for d in op.integers("permutation"))
        case "broadcast_in_dim":
            dims = op.integers("broadcast_dimensions")
            spread = {d: k for k, d in enumerate(dims) if source.shape[k] == made.shape[d]}
            return tuple(strides[spread[d]] if d in spread else 0 for d in range(len(made.shape)))
        case "reshape" if op.has("dimensions"):
            return None
        case "reshape" | "squeeze":
            return strides_as(source.shape, strides, made.shape)
        case "slice":
            steps = op.integers("strides") if op.has("strides") else (1,) * len(strides)
            return tuple(n * step for n, step in zip(strides, steps, strict=True))
        case "split":
            return strides
        case "unstack":
            axis = op.integer("axis")
            return (*strides[:axis], *strides[axis + 1 :])
        case "convert_element_type" if source.dtype == made.dtype:
            return strides
        case _:
            return None


def strides_as(shape: Sizes, strides: Sizes, made: Sizes) -> Sizes | None:
    """Strides that show the same elements in another shape; None if there are none.

    Dims that lie one within another are one run of elements, which new dims may divide; a new dim never takes a part of
    two runs.
    """
    if 0 in made:
        return row_by_row(made)
    runs: list[tuple[int, int]] = []  # elements, and how far apart
    for size, stride in zip(shape, strides, strict=True):
        if size == 1:
            continue
        if runs and runs[-1][1] == size * stride:
            runs[-1] = runs[-1][0] * size, stride
        else:
            runs.append((size, stride))
    found: list[int] = []
    left = iter(runs)
    many, apart = next(left, (1, 1))
    for size in made:
        if many == 1 and size > 1:
            many, apart = next(left, (1, 1))
        if many % size:
            return None
        many //= size
        found.append(many * apart)
    return tuple(found)
