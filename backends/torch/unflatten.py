"""Dims that torch folds into one are kept apart, and moved no more than needed.

torch multiplies [B·T, D] and [B·H, T, d], so that sequence and heads would be minor parts of a dim, which no plan can
cut. Here each value is a view of one whose dims are apart, and ops are written on that:

    before  %2: f32[32, 64] = reshape %x             %x: f32[4, 8, 64]
            %3: f32[32, 16] = dot_general %2 %w (lhs_contracting=(1,), ...)
            %4: f32[4, 8, 16] = reshape %3
    after   %4: f32[4, 8, 16] = dot_general %x %w (lhs_contracting=(2,), ...)

Reshapes, transposes and dims of size 1 are views, written only where an op needs another order, or reads what is
folded as it is. Values of `whole` (gradients, results) are written as they were.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from ...ir.attrs import Attr
from ...ir.graph import Graph, Op, TensorType
from ...ir.ops import ELEMENTWISE, REDUCTIONS
from ...ir.passes.dead import drop_dead_ops
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


def unflatten(
    graph: Graph, whole: Iterable[int] = (), modules: Mapping[int, str] | None = None
) -> Graph:
    """The graph with dims apart; its inputs, outputs and the values of `whole` stay as they are.

    `modules` tells of which module a value is: what moves it is written once in each.
    """
    work = _Unflatten(graph, frozenset((*whole, *graph.outputs)), modules or {})
    for op in graph.ops:
        work.op(op)
    outputs = tuple(work.as_it_was(value) for value in graph.outputs)
    return drop_dead_ops(replace(graph, types=work.types, ops=tuple(work.ops), outputs=outputs))


class _Unflatten:
    def __init__(self, graph: Graph, whole: frozenset[int], modules: Mapping[int, str]):
        self.old, self.whole, self.modules = graph.types, whole, modules
        self.types = {v: graph.types[v] for v in (*graph.inputs, *graph.constant_ids)}
        self.next = max(graph.types, default=0) + 1
        self.ops: list[Op] = []
        self.views: dict[int, View] = {v: self.same(v) for v in self.types}
        self.spread: dict[int, tuple[int, Sizes]] = {}  # repeated: of what, and where its dims are
        self.reshapes: dict[int, int] = {}  # reshaped: of what
        self.counted: dict[int, int] = {}  # iotas, and along which dim
        self.free = set(graph.constant_ids)  # made of constants alone
        self.known: dict[tuple[object, ...], int] = {}  # what was written of values before
        self.where = self.module = ""

    # ------------------------------------------------------------ one op

    def op(self, op: Op) -> None:
        self.where, self.module = op.where, self.modules.get(op.outputs[0], "")
        try:
            empty = any(self.old[v].size == 0 for v in (*op.inputs, *op.outputs))
            views = _RULES.get(op.kind, _whole_op)(self, op) if not empty else _whole_op(self, op)
        except Apart:
            views = _whole_op(self, op)
        for value, view in zip(op.outputs, views, strict=True):
            self.views[value] = view
            if value in self.whole:
                self.views[value] = self.same(self.as_it_was(value))

    def write(
        self, op: Op, inputs: Sequence[int], kinds: Sequence[TensorType], attrs: dict[str, Attr]
    ) -> list[int]:
        made = [self.new(kind) for kind in kinds]
        given = tuple(sorted(attrs.items()))
        self.ops.append(replace(op, inputs=tuple(inputs), outputs=tuple(made), attrs=given))
        if self.free.issuperset(inputs):
            self.free.update(made)
        return made

    def new(self, kind: TensorType) -> int:
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
        return View(
            value, tuple((d,) if n != 1 else () for d, n in enumerate(self.types[value].shape))
        )

    def shape(self, view: View) -> Sizes:
        return tuple(prod(self.sizes(view, d)) for d in range(len(view.dims)))

    def sizes(self, view: View, dim: int) -> Sizes:
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

    def transposed(self, value: int, order: Sizes) -> int:
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

    def together(self, views: Sequence[View], apart: frozenset[int] = frozenset()) -> _Layout:
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
        return _Layout(order, tuple(sizes))

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


@dataclass(frozen=True, slots=True)
class _Layout:
    """An order of parts of dims, and the sizes of the parts of each dim."""

    order: tuple[Place, ...]
    sizes: tuple[Sizes, ...]


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


# ---------------------------------------------------------------- what moves nothing

Rule = Callable[[_Unflatten, Op], list[View]]


def _whole_op(work: _Unflatten, op: Op) -> list[View]:
    """On operands as they were."""
    inputs = tuple(work.as_it_was(value) for value in op.inputs)
    made = work.write(op, inputs, [work.old[v] for v in op.outputs], dict(op.attrs))
    if op.kind == "iota":
        work.counted[made[0]] = op.integer("dimension")
    return [work.same(value) for value in made]


def _reshape(work: _Unflatten, op: Op) -> list[View]:
    """Parts are taken in order; a part that a new dim takes only some of is divided."""
    view = work.views[op.inputs[0]]
    groups = list[tuple[int, ...]]()
    waiting = [k for dims in view.dims for k in dims]
    for size in work.old[op.outputs[0]].shape:
        group = list[int]()
        while size > 1:
            k = waiting.pop(0)
            n = work.types[view.base].shape[k]
            if size % n == 0:
                size //= n
                group.append(k)
                continue
            if n % size:
                raise Apart
            view = work.split(view, k, (size, n // size))
            waiting = [k + 1, *(j + (j > k) for j in waiting)]
            groups = [tuple(j + (j > k) for j in found) for found in groups]
            group = [*(j + (j > k) for j in group), k]
            size = 1
        groups.append(tuple(group))
    return [View(view.base, tuple(groups))]


def _transpose(work: _Unflatten, op: Op) -> list[View]:
    view = work.views[op.inputs[0]]
    return [View(view.base, tuple(view.dims[d] for d in op.integers("permutation")))]


def _squeeze(work: _Unflatten, op: Op) -> list[View]:
    view, gone = work.views[op.inputs[0]], op.integers("dimensions")
    return [View(view.base, tuple(dims for d, dims in enumerate(view.dims) if d not in gone))]


def _broadcast(work: _Unflatten, op: Op) -> list[View]:
    """Dims of size 1 are none; those that are repeated stand where the result has them, if nothing was moved."""
    view, places = work.bare(work.views[op.inputs[0]]), op.integers("broadcast_dimensions")
    shape = work.old[op.outputs[0]].shape
    held = {place: view.dims[d] for d, place in enumerate(places)}
    new = [d for d, n in enumerate(shape) if n > 1 and not held.get(d)]
    if not new:
        return [View(view.base, tuple(held.get(d, ()) for d in range(len(shape))))]
    order = [k for d in range(len(shape)) for k in held.get(d, ())]
    if order == sorted(order):
        parts = [
            (d, k) for d in range(len(shape)) for k in (held.get(d) or ((-1,) if d in new else ()))
        ]
    else:
        parts = [(d, -1) for d in new]
        whose = {k: d for d, dims in held.items() for k in dims}
        parts += [(whose[k], k) for k in sorted(whose)]
    sizes = work.types[view.base].shape
    made = tuple(shape[d] if k < 0 else sizes[k] for d, k in parts)
    base = work.repeated(view.base, made, tuple(i for i, (_, k) in enumerate(parts) if k >= 0))
    dims: list[list[tuple[int, int]]] = [[] for _ in shape]
    for i, (d, k) in enumerate(parts):
        dims[d].append((held[d].index(k) if k >= 0 else 0, i))
    return [View(base, tuple(tuple(i for _, i in sorted(found)) for found in dims))]


# ---------------------------------------------------------------- element by element, reductions


def _elementwise(work: _Unflatten, op: Op) -> list[View]:
    """Operands of rank 0 stay as they are."""
    rank = work.old[op.outputs[0]].rank
    views = [work.views[v] for v in op.inputs if work.old[v].rank]
    if not views:
        return _whole_op(work, op)
    layout = work.together(views)
    inputs = [
        work.laid(work.views[v], layout.order, layout.sizes)
        if work.old[v].rank
        else work.as_it_was(v)
        for v in op.inputs
    ]
    shape = tuple(layout.sizes[d][n] for d, n in layout.order)
    kinds = [TensorType(work.old[v].dtype, shape) for v in op.outputs]
    made = work.write(op, inputs, kinds, dict(op.attrs))
    return [work.made_of(value, layout.order, rank) for value in made]


def _reduce(work: _Unflatten, op: Op) -> list[View]:
    view = work.bare(work.views[op.inputs[0]])
    axes = op.integers("axes")
    gone = sorted(k for d in axes for k in view.dims[d])
    if op.kind in ("argmax", "argmin") and len(gone) != 1:
        raise Apart
    rest = [dims for d, dims in enumerate(view.dims) if d not in axes]
    if not gone:
        return [View(view.base, tuple(rest))]
    kept = [k for k in range(len(work.types[view.base].shape)) if k not in gone]
    shape = tuple(work.types[view.base].shape[k] for k in kept)
    kinds = [TensorType(work.old[op.outputs[0]].dtype, shape)]
    [made] = work.write(op, [view.base], kinds, {**dict(op.attrs), "axes": tuple(gone)})
    return [View(made, tuple(tuple(kept.index(k) for k in dims) for dims in rest))]


# ---------------------------------------------------------------- products


def _dot(work: _Unflatten, op: Op) -> list[View]:
    left, right = (work.views[v] for v in op.inputs)
    names = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")
    left_sum, right_sum, left_batch, right_batch = map(op.integers, names)
    pairs = [*zip(left_batch, right_batch, strict=True), *zip(left_sum, right_sum, strict=True)]
    for d, e in pairs:
        if not left.dims[d]:
            continue
        sizes = common(work.sizes(left, d), work.sizes(right, e))
        left, right = work.refined(left, d, sizes), work.refined(right, e, sizes)
    left, right = work.bare(left), work.bare(right)
    attrs = dict(op.attrs)
    chosen = (left, left_sum), (right, right_sum), (left, left_batch), (right, right_batch)
    for name, (view, dims) in zip(names, chosen, strict=True):
        attrs[name] = tuple(k for d in dims for k in view.dims[d])
    batch = [view_dims for d in left_batch for view_dims in left.dims[d]]
    parts = [(0, k) for k in batch]
    for side, view, used in (
        (0, left, (*left_sum, *left_batch)),
        (1, right, (*right_sum, *right_batch)),
    ):
        gone = {k for d in used for k in view.dims[d]}
        parts += [(side, k) for k in range(len(work.types[view.base].shape)) if k not in gone]
    shape = tuple(work.types[(left, right)[side].base].shape[k] for side, k in parts)
    [made] = work.write(
        op, [left.base, right.base], [TensorType(work.old[op.outputs[0]].dtype, shape)], attrs
    )
    dims = [(0, d) for d in left_batch]
    dims += [(0, d) for d in range(len(left.dims)) if d not in (*left_sum, *left_batch)]
    dims += [(1, d) for d in range(len(right.dims)) if d not in (*right_sum, *right_batch)]
    number = {part: i for i, part in enumerate(parts)}
    return [
        View(made, tuple(tuple(number[s, k] for k in (left, right)[s].dims[d]) for s, d in dims))
    ]


# ---------------------------------------------------------------- along some dims


def _along(
    work: _Unflatten, op: Op, touched: Iterable[int], attrs: Callable[[_Layout], dict[str, Attr]],
    numbers: int = 0,
) -> list[View]:  # fmt: skip
    """An op that some dims matter to, by attributes of a layout; the last `numbers` operands are of rank 0."""
    apart = frozenset(touched)
    given = op.inputs[: len(op.inputs) - numbers]
    views = [work.views[v] for v in given]
    layout = work.together(views, apart)
    rank = work.old[op.outputs[0]].rank

    def parts(value: int) -> list[Sizes]:
        shape = work.old[value].shape
        return [(shape[d],) if d in apart else layout.sizes[d] for d in range(rank)]

    inputs = [work.laid(view, layout.order, parts(v)) for v, view in zip(given, views, strict=True)]
    inputs += [work.as_it_was(v) for v in op.inputs[len(given) :]]
    kinds = [
        TensorType(work.old[v].dtype, tuple(parts(v)[d][n] for d, n in layout.order))
        for v in op.outputs
    ]
    made = work.write(op, inputs, kinds, {**dict(op.attrs), **attrs(layout)})
    return [work.made_of(value, layout.order, rank) for value in made]


def _one_dim(name: str) -> Rule:
    def rule(work: _Unflatten, op: Op) -> list[View]:
        dim = op.integer(name)
        return _along(work, op, [dim], lambda layout: {name: layout.order.index((dim, 0))})

    return rule


def _rev(work: _Unflatten, op: Op) -> list[View]:
    dims = op.integers("dimensions")
    return _along(
        work,
        op,
        dims,
        lambda at: {"dimensions": tuple(sorted(at.order.index((d, 0)) for d in dims))},
    )


def _slice(work: _Unflatten, op: Op) -> list[View]:
    shape = work.old[op.inputs[0]].shape
    starts, limits = op.integers("start_indices"), op.integers("limit_indices")
    strides = op.integers("strides") if op.has("strides") else (1,) * len(shape)
    cuts = [*zip(starts, limits, strides, strict=True)]
    touched = [d for d, cut in enumerate(cuts) if cut != (0, shape[d], 1)]

    def attrs(layout: _Layout) -> dict[str, Attr]:
        found = [cuts[d] if d in touched else (0, layout.sizes[d][n], 1) for d, n in layout.order]
        first, last, steps = (tuple(column) for column in zip(*found, strict=True))
        return {
            "start_indices": first, "limit_indices": last, "strides": steps if op.has("strides") else None,
        }  # fmt: skip

    return _along(work, op, touched, attrs)


def _pad(work: _Unflatten, op: Op) -> list[View]:
    config = op.items("padding_config")
    touched = [d for d, one in enumerate(config) if one != (0, 0, 0)]

    def attrs(layout: _Layout) -> dict[str, Attr]:
        return {
            "padding_config": tuple(
                config[d] if d in touched else (0, 0, 0) for d, _ in layout.order
            )
        }

    return _along(work, op, touched, attrs, numbers=1)


# ---------------------------------------------------------------- by index


def _gather(work: _Unflatten, op: Op) -> list[View]:
    """Dims of the indices stay apart; of the operand those that it shares with them."""
    shared = op.integers("operand_batching_dims"), op.integers("start_indices_batching_dims")
    table, ids, sizes = _looked_up(work, op, shared)
    inside = op.integers("offset_dims")
    slices = op.integers("slice_sizes")
    attrs = _renumbered(op, table, shared, sizes, ("collapsed_slice_dims", "start_index_map"))
    attrs["slice_sizes"] = tuple(
        n
        for d, size in enumerate(slices)
        for n in ((1,) * len(table[d]) if d in shared[0] else (size,))
    )
    attrs |= {
        "operand_batching_dims": _flat(table, shared[0]),
        "start_indices_batching_dims": _flat(sizes, shared[1]),
    }
    shape, dims = _with_windows(work, op.outputs[0], inside, sizes)
    attrs["offset_dims"] = tuple(dims[d][0] for d in inside)
    source = _folded(work, op.inputs[0], table)
    [made] = work.write(
        op, [source, ids], [TensorType(work.old[op.outputs[0]].dtype, shape)], attrs
    )
    return [View(made, tuple(tuple(k for k in found if shape[k] > 1) for found in dims))]


def _scatter(work: _Unflatten, op: Op) -> list[View]:
    shared = op.integers("operand_batching_dims"), op.integers("scatter_indices_batching_dims")
    table, ids, sizes = _looked_up(work, op, shared)
    inside = op.integers("update_window_dims")
    attrs = _renumbered(
        op, table, shared, sizes, ("inserted_window_dims", "scatter_dims_to_operand_dims")
    )
    attrs |= {
        "operand_batching_dims": _flat(table, shared[0]), "scatter_indices_batching_dims": _flat(sizes, shared[1]),
    }  # fmt: skip
    shape, dims = _with_windows(work, op.inputs[2], inside, sizes)
    attrs["update_window_dims"] = tuple(dims[d][0] for d in inside)
    parts = [tuple(shape[k] for k in found) for found in dims]
    order = [(d, n) for d, found in enumerate(parts) for n in range(len(found))]
    updates = work.laid(work.views[op.inputs[2]], order, parts)
    target = _folded(work, op.inputs[0], table)
    [made] = work.write(op, [target, ids, updates], [work.types[target]], attrs)
    numbers = [*range(len(work.types[made].shape))]
    found = list[tuple[int, ...]]()
    for part in table:
        here, numbers = numbers[: len(part)], numbers[len(part) :]
        found.append(tuple(k for k in here if work.types[made].shape[k] > 1))
    return [View(made, tuple(found))]


def _looked_up(
    work: _Unflatten, op: Op, shared: tuple[Sizes, Sizes]
) -> tuple[list[Sizes], int, list[Sizes]]:
    """Sizes of the parts of the operand's dims, the indices, and sizes of the parts of theirs."""
    view, ids = work.views[op.inputs[0]], work.views[op.inputs[1]]
    kind = work.old[op.inputs[1]]
    sizes = [work.sizes(ids, d) or (1,) for d in range(kind.rank - 1)]
    table: list[Sizes] = [(n,) for n in work.old[op.inputs[0]].shape]
    for d, e in zip(*shared, strict=True):
        both = common(work.sizes(view, d), work.sizes(ids, e)) if view.dims[d] else (1,)
        table[d], sizes[e] = both, both
    parts = [*sizes, (kind.shape[-1],)]
    order = [(d, n) for d, found in enumerate(parts) for n in range(len(found))]
    return table, work.laid(ids, order, parts), sizes


def _folded(work: _Unflatten, value: int, parts: Sequence[Sizes]) -> int:
    """A value in order, its dims in these parts."""
    view = work.views[value]
    if any(len(part) == 1 < len(view.dims[d]) for d, part in enumerate(parts)):
        view = work.same(work.as_it_was(value))
    order = [(d, n) for d, found in enumerate(parts) for n in range(len(found))]
    return work.laid(view, order, parts)


def _flat(parts: Sequence[Sizes], dims: Sizes) -> Sizes:
    """Numbers of the parts of dims."""
    starts = [sum(map(len, parts[:d])) for d in range(len(parts))]
    return tuple(starts[d] + n for d in dims for n in range(len(parts[d])))


def _renumbered(
    op: Op,
    table: Sequence[Sizes],
    shared: tuple[Sizes, Sizes],
    sizes: Sequence[Sizes],
    names: Sequence[str],
) -> dict[str, Attr]:
    return {**dict(op.attrs), **{name: _flat(table, op.integers(name)) for name in names}}


def _with_windows(
    work: _Unflatten, value: int, inside: Sizes, sizes: Sequence[Sizes]
) -> tuple[Sizes, list[tuple[int, ...]]]:
    """The shape of what indices and windows make up, and which of its dims each old dim is."""
    shape, dims, rest = list[int](), list[tuple[int, ...]](), iter(sizes)
    for d, size in enumerate(work.old[value].shape):
        parts = (size,) if d in inside else next(rest)
        dims.append(tuple(range(len(shape), len(shape) + len(parts))))
        shape += parts
    return tuple(shape), dims


_RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _elementwise),
    **dict.fromkeys(REDUCTIONS, _reduce),
    "reshape": _reshape,
    "transpose": _transpose,
    "squeeze": _squeeze,
    "broadcast_in_dim": _broadcast,
    "dot_general": _dot,
    "concatenate": _one_dim("dimension"),
    "split": _one_dim("axis"),
    "cumsum": _one_dim("axis"),
    "cumprod": _one_dim("axis"),
    "sort": _one_dim("dimension"),
    "top_k": _one_dim("axis"),
    "rev": _rev,
    "slice": _slice,
    "pad": _pad,
    "gather": _gather,
    "scatter": _scatter,
    "scatter-add": _scatter,
}  # fmt: skip
