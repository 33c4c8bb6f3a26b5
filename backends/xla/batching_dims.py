"""Lookups that count along a dim, as lookups within a batch: `lp[jnp.arange(B), y]`.

    before   %i = iota [B];  %c = concatenate %i %y;  %p = gather %lp %c     each row is looked up
    after    %p = gather %lp %y, dim 0 of both being the same rows           rows can be cut

A column of the indices is dropped where it is proven to be the position along one of the indices' own
dims, as long as the dim that it looks up: then it names every row once, in order. The same for scatters.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np

from ...ir.attrs import Attr
from ...ir.graph import Graph, Op, Region, TensorType
from ...ir.passes.dead import drop_dead_ops
from ...ir.values import FreshIds
from .params import attrs_of

_Bound = dict[tuple[str, tuple[tuple[str, Attr], ...]], tuple[Any, dict[str, Any]]]
_LARGEST = 1 << 22  # elements of a constant that is looked at
_MOST = {
    "s8": 1 << 7,
    "u8": 1 << 8,
    "s16": 1 << 15,
    "u16": 1 << 16,
}  # what narrow integers count to


def with_batching_dims(graph: Graph, bound: _Bound, arrays: Mapping[int, Any]) -> Graph:
    """Rewrite a captured graph; `bound` learns the new ops, `arrays` are its constants."""
    if not any(visit.op.kind.startswith(("gather", "scatter")) for visit in graph.visits):
        return graph
    work = _Rewrite(graph, bound, arrays)
    ops = tuple(work.run(graph.ops))
    return drop_dead_ops(replace(graph, ops=ops, types=work.fresh.types)) if work.changed else graph


class _Rewrite:
    """`along`: value -> the dim along which it counts: 0, 1, 2, ... from one end to the other."""

    def __init__(self, graph: Graph, bound: _Bound, arrays: Mapping[int, Any]):
        self.bound, self.fresh, self.changed = bound, FreshIds(graph), False
        self.types = self.fresh.types
        self.numbers = {c.value: c.data for c in graph.constants if c.value not in arrays}
        found = ((value, _counting(array)) for value, array in arrays.items())
        self.along: dict[int, int] = {value: dim for value, dim in found if dim is not None}
        self.no = {value for value, array in arrays.items() if _is_false(array)}  # false everywhere
        self.columns: dict[int, Op] = {}  # indices -> the op that joins their columns
        self.joined: dict[tuple[int, ...], int] = {}

    def run(self, ops: Iterable[Op]) -> Iterator[Op]:
        for op in ops:
            yield from (
                self._rewritten(op)
                if op.kind.startswith(("gather", "scatter"))
                else [self._inside(op)]
            )
            self._learn(op)

    def _inside(self, op: Op) -> Op:
        regions = tuple(self._region(op, region) for region in op.regions)
        return replace(op, regions=regions) if regions else op

    def _region(self, op: Op, region: Region) -> Region:
        consts, _ = op.loop_inputs
        for outside, inside in zip(op.inputs[:consts], region.inputs, strict=False):
            self._same(outside, inside)
        known, self.joined = self.joined, {}
        ops = tuple(self.run(region.ops))
        self.joined = known
        return Region(region.inputs, ops, region.outputs)

    # ------------------------------------------------------------ what counts

    def _same(self, source: int, result: int, dim: int | None = None) -> None:
        if source in self.along:
            self.along[result] = self.along[source] if dim is None else dim
        if source in self.numbers:
            self.numbers[result] = self.numbers[source]

    def _learn(self, op: Op) -> None:
        if len(op.outputs) != 1:
            return
        first, result = (op.inputs or (-1,))[0], op.outputs[0]
        kind = self.types[result]
        if op.kind == "iota":
            self._learn_iota(op.integer("dimension"), result)
        elif op.kind in ("copy", "convert_element_type") and self._fits(first, kind):
            self._same(first, result)
        elif op.kind == "concatenate" and op.integer("dimension") == kind.rank - 1:
            self.columns[result] = op
        elif moved := self._moved(op):
            self._learn_moved(op, moved)
        else:
            self._learn_choice(op)

    def _learn_iota(self, dim: int, result: int) -> None:
        kind = self.types[result]
        if kind.shape[dim] <= _MOST.get(kind.dtype, 1 << 31):
            self.along[result] = dim

    def _fits(self, value: int, kind: TensorType) -> bool:
        """Whether a type holds all that a value counts to."""
        dim, counts = self.along.get(value), kind.dtype[0] in "su"
        return counts and (dim is None or kind.shape[dim] <= _MOST.get(kind.dtype, 1 << 31))

    def _moved(self, op: Op) -> Sequence[int] | None:
        """Where each dim of the operand is in the result, of ops that move dims only; -1: dropped."""
        if op.kind == "broadcast_in_dim":
            return op.integers("broadcast_dimensions")
        if op.kind == "transpose":
            order = op.integers("permutation")
            return [order.index(d) for d in range(len(order))]
        if op.kind not in ("reshape", "squeeze"):
            return None
        old, new = (self.types[v].shape for v in (op.inputs[0], op.outputs[0]))
        large = [d for d, size in enumerate(new) if size != 1]
        if [n for n in old if n != 1] != [n for n in new if n != 1]:
            return None
        places = iter(large)
        return [-1 if size == 1 else next(places) for size in old]

    def _learn_moved(self, op: Op, moved: Sequence[int]) -> None:
        (source, *_), result = op.inputs, op.outputs[0]
        dim = self.along.get(source)
        if dim is not None:
            place, size = moved[dim], self.types[source].shape[dim]
            if place >= 0 and self.types[result].shape[place] == size:
                self.along[result] = place
        elif source in self.numbers:
            self.numbers[result] = self.numbers[source]
        elif source in self.no:
            self.no.add(result)

    def _learn_choice(self, op: Op) -> None:
        """What keeps an index as it is: the choice of `i` or `i + B` by whether it is negative, and limits."""
        result = op.outputs[0]
        if op.kind == "lt" and op.inputs[0] in self.along and self.numbers.get(op.inputs[1]) == 0:
            self.no.add(result)
        elif op.kind == "select_n" and op.inputs[0] in self.no:
            self._same(op.inputs[1], result)
        elif op.kind in ("max", "min"):
            for value, limit in (op.inputs, op.inputs[::-1]):
                if value in self.along and self._within(op.kind, value, self.numbers.get(limit)):
                    self.along[result] = self.along[value]

    def _within(self, kind: str, value: int, limit: Any) -> bool:
        last = self.types[value].shape[self.along[value]] - 1
        return limit is not None and (limit <= 0 if kind == "max" else limit >= last)

    # ------------------------------------------------------------ lookups

    def _rewritten(self, op: Op) -> Iterator[Op]:
        primitive, params = self.bound[op.kind, op.attrs]
        batched = self._batched(op, params["dimension_numbers"])
        if not batched:
            yield op
            return
        self.changed = True
        indices = self.joined.get(key := (op.inputs[1], *sorted(batched)))
        if indices is None:
            made, indices = self._without(op.inputs[1], batched)
            self.joined[key] = indices
            yield from made
        numbers = _numbers(params["dimension_numbers"], batched)
        params = {**params, "dimension_numbers": numbers, "indices_are_sorted": False}
        attrs = attrs_of(op.kind, params)
        self.bound[op.kind, attrs] = primitive, params
        yield replace(op, inputs=(op.inputs[0], indices, *op.inputs[2:]), attrs=attrs)

    def _batched(self, op: Op, numbers: Any) -> dict[int, int]:
        """Column -> the indices' dim along which it counts; one column is left."""
        table, indices = (self.types[v].shape for v in op.inputs[:2])
        _, chosen, gone, _, taken = (getattr(numbers, name) for name in _names(numbers))
        found: dict[int, int] = {}
        for column, dim in self._counts(op.inputs[1]):
            looked_up = chosen[column]
            free = dim not in taken and dim not in found.values() and looked_up in gone
            if free and indices[dim] == table[looked_up] and len(found) < len(chosen) - 1:
                found[column] = dim
        return found

    def _counts(self, indices: int) -> Iterator[tuple[int, int]]:
        column, last = 0, self.types[indices].rank - 1
        for part in self.columns[indices].inputs if indices in self.columns else ():
            if self.types[part].shape[-1] == 1 and self.along.get(part, last) != last:
                yield column, self.along[part]
            column += self.types[part].shape[-1]

    def _without(self, indices: int, dropped: Mapping[int, int]) -> tuple[list[Op], int]:
        """The indices without some columns."""
        op, column, left = self.columns[indices], 0, []
        for part in op.inputs:
            left += [] if column in dropped else [part]
            column += self.types[part].shape[-1]
        if len(left) == 1:
            return [], left[0]
        kind = self.types[indices]
        shape = (*kind.shape[:-1], kind.shape[-1] - len(dropped))
        result = self.fresh.value(TensorType(kind.dtype, shape))
        return [replace(op, inputs=tuple(left), outputs=(result,))], result


def _names(numbers: Any) -> tuple[str, str, str, str, str]:
    """Fields of a gather's or a scatter's numbers: window, chosen dims, those gone, batching dims of both."""
    if hasattr(numbers, "start_index_map"):
        return (
            "offset_dims", "start_index_map", "collapsed_slice_dims", "operand_batching_dims",
            "start_indices_batching_dims",
        )  # fmt: skip
    return (
        "update_window_dims", "scatter_dims_to_operand_dims", "inserted_window_dims", "operand_batching_dims",
        "scatter_indices_batching_dims",
    )  # fmt: skip


def _numbers(numbers: Any, batched: Mapping[int, int]) -> Any:
    """The dimension numbers with columns turned into batching dims."""
    _, chosen, gone, batching, taken = _names(numbers)
    dims = getattr(numbers, chosen)
    pairs = [*zip(getattr(numbers, batching), getattr(numbers, taken), strict=True)]
    pairs = sorted([*pairs, *((dims[column], dim) for column, dim in batched.items())])
    moved = {dims[column] for column in batched}
    changed = {
        chosen: tuple(d for column, d in enumerate(dims) if column not in batched),
        gone: tuple(d for d in getattr(numbers, gone) if d not in moved),
        batching: tuple(d for d, _ in pairs),
        taken: tuple(d for _, d in pairs),
    }
    return numbers._replace(**changed)


def _is_false(array: Any) -> bool:
    return array.dtype == np.bool_ and array.size <= _LARGEST and not np.asarray(array).any()


def _counting(array: Any) -> int | None:
    """The dim along which a constant counts."""
    if not (jnp.issubdtype(array.dtype, np.integer) and 0 < array.size <= _LARGEST):
        return None
    whole = np.asarray(array)
    for dim, size in enumerate(whole.shape):
        line = np.arange(size).reshape([size if d == dim else 1 for d in range(whole.ndim)])
        if size > 1 and bool((whole == line).all()):
            return dim
    return None
