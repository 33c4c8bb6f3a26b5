"""Dims that torch folds into one are kept apart, and moved no more than needed.

torch multiplies [B·T, D] and [B·H, T, d], so that sequence and heads would be minor parts of a dim, which no plan can
cut. Here each value is a view of one whose dims are apart (`views.py`), and ops are written on that:

    before  %2: f32[32, 64] = reshape %x             %x: f32[4, 8, 64]
            %3: f32[32, 16] = dot_general %2 %w (lhs_contracting=(1,), ...)
            %4: f32[4, 8, 16] = reshape %3
    after   %4: f32[4, 8, 16] = dot_general %x %w (lhs_contracting=(2,), ...)

Reshapes, transposes and dims of size 1 are views, written only where an op needs another order, or reads what is
folded as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

from ...ir.attrs import Attr
from ...ir.graph import Graph, Op, TensorType
from ...ir.ops import ELEMENTWISE, REDUCTIONS
from ...ir.passes.dead import drop_dead_ops
from .views import Apart, Layout, Product, Rewriting, Sizes, View, common

Rule = Callable[[Rewriting, Op], list[View]]


def unflatten(
    graph: Graph, whole: Iterable[int] = (), modules: Mapping[int, str] | None = None
) -> Graph:
    """The graph with dims apart; its inputs and outputs stay as they are.

    Args:
        whole: values whose readers get them as they were: gradients, that updates are made of.
        modules: of which module a value is; what moves a value is written once in each.
    """
    kept, modules = frozenset(whole), modules or {}
    work = Rewriting(graph)
    for op in graph.ops:
        work.where, work.module = op.where, modules.get(op.outputs[0], "")
        for value, view in zip(op.outputs, _views(work, op), strict=True):
            work.views[value] = view
            if value in kept:
                work.views[value] = work.same(work.as_it_was(value))
    outputs = tuple(work.as_it_was(value) for value in graph.outputs)
    return drop_dead_ops(replace(graph, types=work.types, ops=tuple(work.ops), outputs=outputs))


def _views(work: Rewriting, op: Op) -> list[View]:
    """What an op makes, by its rule where it has one; there is nothing to cut of what is empty."""
    empty = any(work.old[v].size == 0 for v in (*op.inputs, *op.outputs))
    if op.kind not in _RULES or empty:
        return _whole_op(work, op)
    try:
        return _RULES[op.kind](work, op)
    except Apart:
        return _whole_op(work, op)


def _whole_op(work: Rewriting, op: Op) -> list[View]:
    """On operands as they were."""
    inputs = tuple(work.as_it_was(value) for value in op.inputs)
    made = work.write(op, inputs, [work.old[v] for v in op.outputs], dict(op.attrs))
    if op.kind == "iota":
        work.counted[made[0]] = op.integer("dimension")
    return [work.same(value) for value in made]


# ---------------------------------------------------------------- what moves nothing


def _reshape(work: Rewriting, op: Op) -> list[View]:
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


def _transpose(work: Rewriting, op: Op) -> list[View]:
    view = work.views[op.inputs[0]]
    return [View(view.base, tuple(view.dims[d] for d in op.integers("permutation")))]


def _squeeze(work: Rewriting, op: Op) -> list[View]:
    view, gone = work.views[op.inputs[0]], op.integers("dimensions")
    return [View(view.base, tuple(dims for d, dims in enumerate(view.dims) if d not in gone))]


def _broadcast(work: Rewriting, op: Op) -> list[View]:
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


def _elementwise(work: Rewriting, op: Op) -> list[View]:
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


def _reduce(work: Rewriting, op: Op) -> list[View]:
    view = work.bare(work.views[op.inputs[0]])
    axes = op.integers("axes")
    gone = sorted(k for d in axes for k in view.dims[d])
    if op.kind in ("argmax", "argmin") and len(gone) != 1:
        raise Apart
    rest = [dims for d, dims in enumerate(view.dims) if d not in axes]
    if not gone:
        return [View(view.base, tuple(rest))]
    kept = [k for k in range(len(work.types[view.base].shape)) if k not in gone]
    made = _summed_product(work, op, view.base, gone) if op.kind == "reduce_sum" else None
    if made is None:
        shape = tuple(work.types[view.base].shape[k] for k in kept)
        kinds = [TensorType(work.old[op.outputs[0]].dtype, shape)]
        [made] = work.write(op, [view.base], kinds, {**dict(op.attrs), "axes": tuple(gone)})
    return [View(made, tuple(tuple(kept.index(k) for k in dims) for dims in rest))]


def _summed_product(work: Rewriting, op: Op, base: int, gone: Sequence[int]) -> int | None:
    """A product summed over batch dims, which nobody else reads: they are contracted in it, as of repeated keys."""
    if base not in work.products or not _is_read_once(work, op.inputs[0]):
        return None
    dot, product = work.products[base]
    if any(k >= len(product.batch) for k in gone):
        return None
    summed = tuple(product.batch[k] for k in gone)
    kept = tuple(pair for pair in product.batch if pair not in summed)
    return _multiplied(work, dot, Product(product.sides, (*product.summed, *summed), kept))[0]


def _is_read_once(work: Rewriting, value: int) -> bool:
    """Whether a product is read by one op alone, through what only moves it."""
    op = work.writer[value]
    if work.read[value] > 1 or op.kind == "dot_general":
        return work.read[value] == 1
    return op.kind in ("reshape", "transpose", "squeeze") and _is_read_once(work, op.inputs[0])


# ---------------------------------------------------------------- products

_PAIRED = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")


def _dot(work: Rewriting, op: Op) -> list[View]:
    """Paired dims get the same parts. A batch dim along which one side is repeated is the other's alone.

    weights [b, k·n, t, s] · values [b, k, repeated n, s, d]  ->  weights [b, k, n, t, s] · values [b, k, s, d]
    """
    left, right = (work.views[v] for v in op.inputs)
    left_sum, right_sum, left_batch, right_batch = map(op.integers, _PAIRED)
    pairs = [*zip(left_batch, right_batch, strict=True), *zip(left_sum, right_sum, strict=True)]
    for d, e in pairs:
        if left.dims[d]:
            sizes = common(work.sizes(left, d), work.sizes(right, e))
            left, right = work.refined(left, d, sizes), work.refined(right, e, sizes)
    left, right = work.bare(left), work.bare(right)
    summed = [
        pair for d, e in zip(left_sum, right_sum, strict=True)
        for pair in zip(left.dims[d], right.dims[e], strict=True)
    ]  # fmt: skip
    batch = [
        pair for d, e in zip(left_batch, right_batch, strict=True)
        for pair in zip(left.dims[d], right.dims[e], strict=True)
    ]  # fmt: skip
    product = Product((left.base, right.base), tuple(summed), tuple(batch))
    names: dict[tuple[int, int], tuple[int, int]] = {}  # (side, dim) as it was -> as it is
    product = _unrepeated(work, product, names)
    made, parts = _multiplied(work, op, product)
    dims = [(0, d) for d in left_batch]
    dims += [(0, d) for d in range(len(left.dims)) if d not in (*left_sum, *left_batch)]
    dims += [(1, d) for d in range(len(right.dims)) if d not in (*right_sum, *right_batch)]
    number = {part: i for i, part in enumerate(parts)}

    def place(side: int, view: View, d: int, n: int) -> int:
        part = names.get((side, view.dims[d][n]), (side, view.dims[d][n]))
        return number[part]

    views = (left, right)
    found = [
        tuple(place(side, views[side], d, n) for n in range(len(views[side].dims[d])))
        for side, d in dims
    ]
    return [View(made, tuple(found))]


def _unrepeated(
    work: Rewriting, product: Product, names: dict[tuple[int, int], tuple[int, int]]
) -> Product:
    """Without batch dims along which a side is repeated, if it is along no others; `names` learns what dims became."""
    for side in (0, 1):
        base = product.sides[side]
        if base not in work.spread:
            continue
        source, places = work.spread[base]
        repeated = {k for k in range(len(work.types[base].shape)) if k not in places}
        alone = [pair for pair in product.batch if pair[side] in repeated]
        if len(alone) != len(repeated) or not alone:
            continue

        def moved(
            pair: tuple[int, int], side: int = side, places: Sizes = places
        ) -> tuple[int, int]:
            there = places.index(pair[side])
            return (there, pair[1]) if side == 0 else (pair[0], there)

        other = 1 - side
        names |= {(side, k): (side, n) for n, k in enumerate(places)}
        names |= {(side, pair[side]): (other, pair[other]) for pair in alone}
        sides = (source, product.sides[1]) if side == 0 else (product.sides[0], source)
        kept = [pair for pair in product.batch if pair not in alone]
        return Product(sides, tuple(map(moved, product.summed)), tuple(map(moved, kept)))
    return product


def _multiplied(work: Rewriting, op: Op, product: Product) -> tuple[int, list[tuple[int, int]]]:
    """The product, and of which side and dim its dims are: of both first, then of the left, then of the right."""
    columns = (
        (*zip(*product.summed, strict=True), (), ())[:2],
        (*zip(*product.batch, strict=True), (), ())[:2],
    )
    (left_sum, right_sum), (left_batch, right_batch) = columns
    used = {
        *((0, k) for k in (*left_sum, *left_batch)),
        *((1, k) for k in (*right_sum, *right_batch)),
    }
    shapes = [work.types[base].shape for base in product.sides]
    parts = [(0, k) for k in left_batch]
    parts += [
        (s, k) for s, shape in enumerate(shapes) for k in range(len(shape)) if (s, k) not in used
    ]
    kind = TensorType(work.old[op.outputs[0]].dtype, tuple(shapes[s][k] for s, k in parts))
    attrs = {
        **dict(op.attrs),
        **dict(zip(_PAIRED, (left_sum, right_sum, left_batch, right_batch), strict=True)),
    }
    [made] = work.write(op, product.sides, [kind], attrs)
    work.products[made] = op, product
    return made, parts


# ---------------------------------------------------------------- along some dims


def _along(
    work: Rewriting, op: Op, touched: Iterable[int], attrs: Callable[[Layout], dict[str, Attr]],
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
    def rule(work: Rewriting, op: Op) -> list[View]:
        dim = op.integer(name)
        return _along(work, op, [dim], lambda layout: {name: layout.order.index((dim, 0))})

    return rule


def _rev(work: Rewriting, op: Op) -> list[View]:
    dims = op.integers("dimensions")
    return _along(
        work,
        op,
        dims,
        lambda at: {"dimensions": tuple(sorted(at.order.index((d, 0)) for d in dims))},
    )


def _slice(work: Rewriting, op: Op) -> list[View]:
    shape = work.old[op.inputs[0]].shape
    starts, limits = op.integers("start_indices"), op.integers("limit_indices")
    strides = op.integers("strides") if op.has("strides") else (1,) * len(shape)
    cuts = [*zip(starts, limits, strides, strict=True)]
    touched = [d for d, cut in enumerate(cuts) if cut != (0, shape[d], 1)]

    def attrs(layout: Layout) -> dict[str, Attr]:
        found = [cuts[d] if d in touched else (0, layout.sizes[d][n], 1) for d, n in layout.order]
        first, last, steps = (tuple(column) for column in zip(*found, strict=True))
        told = {"strides": steps} if op.has("strides") else {}
        return {"start_indices": first, "limit_indices": last, **told}

    return _along(work, op, touched, attrs)


def _pad(work: Rewriting, op: Op) -> list[View]:
    config = op.items("padding_config")
    touched = [d for d, one in enumerate(config) if one != (0, 0, 0)]

    def attrs(layout: Layout) -> dict[str, Attr]:
        return {
            "padding_config": tuple(
                config[d] if d in touched else (0, 0, 0) for d, _ in layout.order
            )
        }

    return _along(work, op, touched, attrs, numbers=1)


# ---------------------------------------------------------------- by index


def _gather(work: Rewriting, op: Op) -> list[View]:
    """Dims of the indices stay apart; of the operand those that it shares with them."""
    shared = op.integers("operand_batching_dims"), op.integers("start_indices_batching_dims")
    table, ids, sizes = _looked_up(work, op, shared)
    inside = op.integers("offset_dims")
    slices = op.integers("slice_sizes")
    attrs = _renumbered(op, table, ("collapsed_slice_dims", "start_index_map"))
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


def _scatter(work: Rewriting, op: Op) -> list[View]:
    shared = op.integers("operand_batching_dims"), op.integers("scatter_indices_batching_dims")
    table, ids, sizes = _looked_up(work, op, shared)
    inside = op.integers("update_window_dims")
    attrs = _renumbered(op, table, ("inserted_window_dims", "scatter_dims_to_operand_dims"))
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
    work: Rewriting, op: Op, shared: tuple[Sizes, Sizes]
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


def _folded(work: Rewriting, value: int, parts: Sequence[Sizes]) -> int:
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


def _renumbered(op: Op, table: Sequence[Sizes], names: Sequence[str]) -> dict[str, Attr]:
    return {**dict(op.attrs), **{name: _flat(table, op.integers(name)) for name in names}}


def _with_windows(
    work: Rewriting, value: int, inside: Sizes, sizes: Sequence[Sizes]
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
