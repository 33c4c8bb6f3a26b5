"""Values of a graph as views of others whose dims are apart: what ops are rewritten with (`unflatten.py`).

    %2: f32[32, 64] = reshape %0        dims ((0, 1), (2,)) of %0: f32[4, 8, 64]
    %3: f32[64, 32] = transpose %2      dims ((2,), (0, 1)) of it

A part of a dim is a dim of the base. What is repeated, counted or reshaped is made again with other dims, rather than
moved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import prod

from ...ir.attrs import Attr
from ...ir.graph import Graph, Op, TensorType
from .map.builder import DEFAULTS

Sizes = tuple[int, ...]
Place = tuple[int, int]  # a dim as the old graph has it, and which of its parts


@dataclass(frozen=True, slots=True)
class View:
    """A value of the old graph: dim d is made of the dims `dims[d]` of `base`, major to minor.

    Dims of size 1 are made of none, and dims of size 1 of the base are in none.
    """

    base: int
    dims: tuple[tuple[int, ...], ...]


class Apart(Exception):
    """Dims that cannot be brought together: the op is written on what is folded."""


@dataclass(frozen=True, slots=True)
class Layout:
    """An order of parts of dims, and the sizes of the parts of each dim."""

    order: tuple[Place, ...]
    sizes: tuple[Sizes, ...]


@dataclass(frozen=True, slots=True)
class Product:
    """A product of two values: pairs of dims that are summed, and that both have. The latter come first in it."""

    sides: tuple[int, int]
    summed: tuple[tuple[int, int], ...]
    batch: tuple[tuple[int, int], ...]


class Rewriting:
    """A graph in the making, with a view for each value of the old one. `where` and `module` are of the op at hand."""

    def __init__(self, graph: Graph):
        self.old = graph.types
        self.writer = {v: op for op in graph.ops for v in op.outputs}
        self.read = Counter([*graph.outputs, *(v for op in graph.ops for v in op.inputs)])
        self.types = {v: graph.types[v] for v in (*graph.inputs, *graph.constant_ids)}
        self.next = max(graph.types, default=0) + 1
        self.ops: list[Op] = []
        self.views: dict[int, View] = {v: self.same(v) for v in self.types}
        self.spread: dict[int, tuple[int, Sizes]] = {}  # repeated: of what, and where its dims are
        self.products: dict[int, tuple[Op, Product]] = {}
        self.reshapes: dict[int, int] = {}  # reshaped: of what
        self.counted: dict[int, int] = {}  # iotas, and along which dim
        self.free = set(graph.constant_ids)  # made of constants alone
        self.known: dict[tuple[object, ...], int] = {}  # what was written of values before
        self.where = self.module = ""

    # ------------------------------------------------------------ ops

    def write(
        self, op: Op, inputs: Sequence[int], kinds: Sequence[TensorType], attrs: dict[str, Attr]
    ) -> list[int]:
        """Append an op with other operands, results and attributes; its results."""
        made = [self.new(kind) for kind in kinds]
        given = tuple(sorted(attrs.items()))
        self.ops.append(replace(op, inputs=tuple(inputs), outputs=tuple(made), attrs=given))
        if self.free.issuperset(inputs):
            self.free.update(made)
        return made

    def new(self, kind: TensorType) -> int:
        """A value of the new graph."""
        self.types[self.next] = kind
        self.next += 1
        return self.next - 1

    def plain(self, kind: str, source: Sequence[int], made: TensorType, **attrs: Attr) -> int:
        """An op that only moves: once in a module, but for what is made of constants, where it is read."""
        key = (self.module, kind, *source, made, *sorted(attrs.items()))
        if key not in self.known or self.free.issuperset(source):
            given = {**DEFAULTS.get(kind, {}), **attrs}
            op = Op(kind, tuple(source), (), tuple(sorted(given.items())), where=self.where)
            [self.known[key]] = self.write(op, op.inputs, [made], given)
        return self.known[key]

    # ------------------------------------------------------------ views

    def same(self, value: int) -> View:
        """The view of a value as it is."""
        return View(
            value, tuple((d,) if n != 1 else () for d, n in enumerate(self.types[value].shape))
        )

    def sizes(self, view: View, dim: int) -> Sizes:
        """Of the parts of a dim."""
        return tuple(self.types[view.base].shape[k] for k in view.dims[dim])

    def order(self, view: View) -> list[Place]:
        """Parts of dims, as the base has them."""
        places = {k: (d, n) for d, dims in enumerate(view.dims) for n, k in enumerate(dims)}
        return [places[k] for k in sorted(places)]

    def as_it_was(self, value: int) -> int:
        """A value of the old graph, with its dims folded."""
        view = self.bare(self.views[value])
        order = tuple(k for dims in view.dims for k in dims)
        return self.resized(self.transposed(view.base, order), self.old[value].shape)

    def bare(self, view: View) -> View:
        """Of a base without dims of size 1."""
        shape = self.types[view.base].shape
        kept = [k for k, n in enumerate(shape) if n != 1]
        if len(kept) == len(shape):
            return view
        number = {k: i for i, k in enumerate(kept)}
        base = self.resized(view.base, tuple(shape[k] for k in kept))
        return View(base, tuple(tuple(number[k] for k in dims) for dims in view.dims))

    # ------------------------------------------------------------ what only moves

    def transposed(self, value: int, order: Sizes) -> int:
        """With its dims in another order; what is repeated is repeated there."""
        kind = self.types[value]
        if order == tuple(range(len(order))):
            return value
        made = TensorType(kind.dtype, tuple(kind.shape[d] for d in order))
        if value in self.spread:
            source, places = self.spread[value]
            there = [order.index(p) for p in places]
            turned = sorted(range(len(there)), key=there.__getitem__)
            return self.repeated(
                self.transposed(source, tuple(turned)), made.shape, tuple(sorted(there))
            )
        return self.plain("transpose", [value], made, permutation=order)

    def repeated(self, source: int, shape: Sizes, places: Sizes) -> int:
        """Its dims at `places` of a larger shape."""
        kind = self.types[source]
        made = self.plain(
            "broadcast_in_dim",
            [source],
            TensorType(kind.dtype, shape),
            broadcast_dimensions=places,
            shape=shape,
        )
        self.spread[made] = source, places
        return made

    def resized(self, value: int, shape: Sizes) -> int:
        """Dims joined, or dims of size 1 put in or taken out."""
        kind = self.types[value]
        if kind.shape == shape:
            return value
        made = TensorType(kind.dtype, shape)
        kept = [d for d, n in enumerate(shape) if n != 1]
        if kind.shape == tuple(shape[d] for d in kept):
            return self.plain(
                "broadcast_in_dim", [value], made, broadcast_dimensions=tuple(kept), shape=shape
            )
        if shape == tuple(n for n in kind.shape if n != 1):
            gone = tuple(d for d, n in enumerate(kind.shape) if n == 1)
            return self.plain("squeeze", [value], made, dimensions=gone)
        return self.reshaped(value, made)

    def reshaped(self, value: int, made: TensorType) -> int:
        """In one step, of what a value was reshaped from."""
        source = self.reshapes.get(value, value)
        if self.types[source] == made:
            return source
        found = self.plain("reshape", [source], made, new_sizes=made.shape)
        self.reshapes[found] = source
        return found

    def split(self, view: View, at: int, sizes: Sizes) -> View:
        """With one dim of the base as several."""
        more = len(sizes) - 1
        base = self.split_value(view.base, at, sizes)

        def moved(k: int) -> tuple[int, ...]:
            return tuple(range(k, k + more + 1)) if k == at else (k + more * (k > at),)

        dims = tuple(tuple(j for k in dims for j in moved(k)) for dims in view.dims)
        return View(base, dims)

    def split_value(self, value: int, at: int, sizes: Sizes) -> int:
        """With one dim as several; what is repeated or counted is made so."""
        kind = self.types[value]
        shape = (*kind.shape[:at], *sizes, *kind.shape[at + 1 :])
        more = len(sizes) - 1
        if value in self.spread:
            source, places = self.spread[value]
            there = [p + more * (p > at) for p in places]
            if at in places:
                source = self.split_value(source, places.index(at), sizes)
                k = places.index(at)
                there[k : k + 1] = range(at, at + more + 1)
            return self.repeated(source, shape, tuple(there))
        if self.counted.get(value, at) != at:
            dim = self.counted[value] + more * (self.counted[value] > at)
            made = self.plain(
                "iota",
                [],
                TensorType(kind.dtype, shape),
                dimension=dim,
                dtype=kind.dtype,
                shape=shape,
            )
            self.counted[made] = dim
            return made
        return self.reshaped(value, TensorType(kind.dtype, shape))

    def refined(self, view: View, dim: int, sizes: Sizes) -> View:
        """With one dim made of parts of these sizes, at least as fine as those that it has."""
        done = 0
        for n in self.sizes(view, dim):
            parts, many = list[int](), 1
            while many < n:
                parts.append(sizes[done + len(parts)])
                many *= parts[-1]
            if many != n:
                raise Apart
            if len(parts) > 1:
                view = self.split(view, view.dims[dim][done], tuple(parts))
            done += len(parts)
        return view

    def laid(self, view: View, order: Sequence[Place], sizes: Sequence[Sizes]) -> int:
        """The base in an order of parts; parts that it has not are 1 in size."""
        for d, wanted in enumerate(sizes):
            if view.dims[d]:
                view = self.refined(view, d, wanted)
        view = self.bare(view)
        held = [view.dims[d][n] for d, n in order if view.dims[d]]
        base = self.transposed(view.base, tuple(held))
        return self.resized(base, tuple(self._size(view, place, sizes) for place in order))

    def _size(self, view: View, place: Place, sizes: Sequence[Sizes]) -> int:
        dim, part = place
        return sizes[dim][part] if view.dims[dim] else 1

    # ------------------------------------------------------------ one layout for several

    def together(self, views: Sequence[View], apart: frozenset[int] = frozenset()) -> Layout:
        """A layout in which all can be read; dims of `apart` are not divided, and have their own size in each."""
        rank = len(views[0].dims)
        sizes: list[Sizes] = []
        for d in range(rank):
            found: Sizes = ()
            for view in views:
                if d in apart:
                    if len(view.dims[d]) > 1:
                        raise Apart
                    continue
                if view.dims[d]:
                    found = common(found, self.sizes(view, d)) if found else self.sizes(view, d)
            sizes.append(found)
        full = [
            v
            for v in views
            if all(bool(v.dims[d]) == bool(sizes[d]) for d in range(rank) if d not in apart)
        ]
        order = self._order(full or list(views), sizes, apart)
        return Layout(order, tuple(sizes))

    def _order(
        self, views: Sequence[View], sizes: Sequence[Sizes], apart: frozenset[int]
    ) -> tuple[Place, ...]:
        """That of the view with which most others agree; in doubt, of one that is in order."""
        orders = [self._fine_order(view, sizes, apart) for view in views]
        free = [view.base in self.spread for view in views]
        counted = [o for o, ok in zip(orders, free, strict=True) if not ok] or orders
        return max(counted, key=lambda order: (counted.count(order), list(order) == sorted(order)))

    def _fine_order(
        self, view: View, sizes: Sequence[Sizes], apart: frozenset[int]
    ) -> tuple[Place, ...]:
        """Parts as fine as `sizes`, as a view's base has them; dims that it has not stand where their number says."""
        found = list[Place]()
        for d, n in self.order(view):
            first = _number_of(sizes[d], prod(self.sizes(view, d)[:n])) if d not in apart else 0
            last = _number_of(sizes[d], prod(self.sizes(view, d)[: n + 1])) if d not in apart else 1
            found += [(d, part) for part in range(first, last)]
        for d in range(len(view.dims)):
            if not view.dims[d]:
                at = next((i for i, (other, _) in enumerate(found) if other > d), len(found))
                found[at:at] = [(d, part) for part in range(1 if d in apart else len(sizes[d]))]
        return tuple(found)

    def made_of(self, base: int, order: Sequence[Place], rank: int) -> View:
        """The view of a result whose base has parts in an order."""
        shape = self.types[base].shape
        dims: list[list[tuple[int, int]]] = [[] for _ in range(rank)]
        for k, (d, n) in enumerate(order):
            if shape[k] > 1:
                dims[d].append((n, k))
        return View(base, tuple(tuple(k for _, k in sorted(found)) for found in dims))


def common(one: Sizes, other: Sizes) -> Sizes:
    """The coarsest parts of which both are made: (6, 4) and (2, 12) -> (2, 3, 4)."""
    left, right, found = list(one), list(other), list[int]()
    while left and right:
        here = min(left[0], right[0])
        if max(left[0], right[0]) % here or here == 1:
            raise Apart
        found.append(here)
        for side in (left, right):
            side[0] //= here
            if side[0] == 1:
                side.pop(0)
    return tuple(found)


def _number_of(sizes: Sizes, many: int) -> int:
    """How many of the first parts make up `many` elements."""
    return next(n for n in range(len(sizes) + 1) if prod(sizes[:n]) == many)
