"""A step whose layers are scanned, captured as if they were written one after another.

    apart = capture_unstacked(train_step, state, batch)
    apart.captured.graph      w: f32[12, 64, 64] is now layers[0].w ... layers[11].w: f32[64, 64],
                              the scans over it 12 copies of their bodies, its update 12 updates
    apart.inputs, .outputs    which row of which of the user's leaves each of them is
    apart.apart(leaves)       the user's leaves to the graph's inputs
    apart.together(results)   the graph's outputs to the user's results

So stages are cut from scanned layers as from unrolled ones. The user's own state stays
stacked. Scans over anything else (microbatches, time) stay loops.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import jax
import jax.numpy as jnp

from ...ir.analysis.layer_axes import layer_axes, scans_left
from ...ir.graph import Batch, Graph
from ...ir.passes.dead import drop_dead_ops
from ...ir.passes.unroll import Place, unroll_layers
from .capture import Captured, convert
from .rebind import rebound
from .stacked import Row, StackedArray, join, stacked
from .trace import trace


@dataclass(frozen=True, slots=True)
class Piece:
    """One of the graph's inputs or outputs as part of the user's leaf number `leaf`.

    `rows` are (dim, row), to be taken one after another: the second counts the dims that the
    first left. None for a whole leaf, several for layers within layers.
    """

    leaf: int
    rows: Row = ()

    def of(self, array: Any) -> Any:
        """This part of the whole leaf."""
        if isinstance(array, StackedArray) and self.rows in array.pieces:
            return array.pieces[self.rows]
        for dim, row in self.rows:
            array = array[(slice(None),) * dim + (row,)]
        return array


@dataclass(frozen=True)
class Unstacked:
    """A captured step in pieces. `captured.binding` is of the pieces: there a leaf that came
    apart is a tuple. `stacked` is the same step as the user wrote it. `notes` name the ops
    that still need all layers at once."""

    captured: Captured
    stacked: Captured
    inputs: tuple[Piece, ...]
    outputs: tuple[Piece, ...]
    notes: tuple[str, ...] = ()

    def apart(self, leaves: Sequence[Any]) -> list[Any]:
        """The graph's inputs, from the leaves of the user's arguments."""
        return [piece.of(leaves[piece.leaf]) for piece in self.inputs]

    def whole(self, pieces: Sequence[Any]) -> list[Any]:
        """The leaves of the user's arguments, from the graph's inputs."""
        return [join(group, jnp.stack) for group in _by_leaf(self.inputs, pieces)]

    def split(self, results: Sequence[Any]) -> list[Any]:
        """The graph's outputs, from the leaves of the user's result."""
        return [piece.of(results[piece.leaf]) for piece in self.outputs]

    def in_pieces(self, step: Callable[..., Any]) -> Callable[..., list[Any]]:
        """The user's step on flat leaves as a step on the graph's inputs."""
        return jax.jit(lambda *pieces: self.split(jax.tree.leaves(step(*self.whole(pieces)))))

    def together(self, results: Sequence[Any]) -> list[Any]:
        """The leaves of the user's result, from the graph's outputs, which stay where they lie."""
        avals = self.stacked.binding.out_avals
        return [
            stacked(aval.shape, group) if group[0][0] else group[0][1]
            for aval, group in zip(avals, _by_leaf(self.outputs, results), strict=True)
        ]


def capture_unstacked(
    step: Callable[..., Any], *args: Any, options: Mapping[str, Any] | None = None, **kwargs: Any
) -> Unstacked:
    """Capture a step and take apart its scans over stacked, carried parameters.

    Args:
        step, args, kwargs: as for `capture`.
        options: `static_argnums`, `donate_argnums`, ... of `jax.jit`.

    Raises:
        CaptureError: as `capture` does.
    """
    return unstack(convert(trace(step, args, kwargs, options or {}), hold_in_loops=True))


def unstack(captured: Captured) -> Unstacked:
    """Take apart what a scan over layers runs over, the outer layers first, until nothing is left.

    A step whose recomputation is to be kept must have been converted with `hold_in_loops`.
    """
    graph, bound = captured.graph, dict(captured.binding.ops)
    inputs = tuple(Piece(leaf) for leaf in range(len(graph.inputs)))
    outputs = tuple(Piece(leaf) for leaf in range(len(graph.outputs)))
    notes: dict[str, None] = {}
    while (axes := layer_axes(graph)) or any(
        op.kind == "scan" and op.trips == 1 for op in graph.ops
    ):
        found = unroll_layers(graph, axes)
        graph, bound = drop_dead_ops(found.graph), rebound(found, bound)
        inputs, outputs = _refined(inputs, found.inputs), _refined(outputs, found.outputs)
        notes.update(dict.fromkeys(found.notes))
    for op in scans_left(graph):
        notes[
            f"scan at {op.where or 'no line'} stays a loop: no dim of the state alone is its {op.trips} rows"
        ] = None
    return Unstacked(
        _captured(captured, graph, bound, inputs, outputs), captured, inputs, outputs, tuple(notes)
    )


def _refined(before: tuple[Piece, ...], places: Sequence[Place]) -> tuple[Piece, ...]:
    return tuple(
        before[p] if dim is None else Piece(before[p].leaf, (*before[p].rows, (dim, row)))
        for p, dim, row in places
    )


def _captured(
    old: Captured,
    graph: Graph,
    bound: dict[Any, Any],
    inputs: tuple[Piece, ...],
    outputs: tuple[Piece, ...],
) -> Captured:
    """The graph with names, and the binding of its pieces."""
    binding = old.binding
    named = replace(
        graph,
        input_names=_names(binding.in_tree, old.graph.input_names, inputs, 2),
        output_names=_names(binding.out_tree, old.graph.output_names, outputs, 0),
        batch=_batch(old.graph.batch, inputs),
    )
    used = {(visit.op.kind, visit.op.attrs) for visit in named.visits}
    return Captured(
        named,
        replace(
            binding,
            ops={key: found for key, found in bound.items() if key in used},
            arrays={v: array for v, array in binding.arrays.items() if v in named.constant_ids},
            in_tree=_nested(binding.in_tree, inputs),
            out_tree=_nested(binding.out_tree, outputs),
            in_avals=tuple(_row_of(binding.in_avals[piece.leaf], piece) for piece in inputs),
            out_avals=tuple(_row_of(binding.out_avals[piece.leaf], piece) for piece in outputs),
        ),
    )


def _batch(told: Batch | None, inputs: Sequence[Piece]) -> Batch | None:
    """The told batch dims of the inputs that stayed whole."""
    if told is None:
        return None
    dims = dict(told.dims)
    whole = (
        (p, dims[piece.leaf])
        for p, piece in enumerate(inputs)
        if piece.leaf in dims and not piece.rows
    )
    return replace(told, dims=tuple(whole))


def _row_of(aval: Any, piece: Piece) -> Any:
    shape = list(aval.shape)
    for dim, _ in piece.rows:
        del shape[dim]
    return aval.update(shape=tuple(shape)) if piece.rows else aval


# ---------------------------------------------------------------- trees of pieces


def _by_leaf(pieces: Sequence[Piece], values: Sequence[Any]) -> list[list[tuple[Row, Any]]]:
    """One list per leaf; pieces of a leaf are neighbours, in order of their rows."""
    pairs = groupby(zip(pieces, values, strict=True), key=lambda pair: pair[0].leaf)
    return [[(piece.rows, value) for piece, value in group] for _, group in pairs]


def _nested(tree: Any, pieces: tuple[Piece, ...]) -> Any:
    """The tree in which a leaf that came apart is a tuple of its pieces."""
    groups = _by_leaf(pieces, [0] * len(pieces))
    leaves = [join(group, lambda values, axis: tuple(values)) for group in groups]
    return jax.tree.structure(jax.tree.unflatten(tree, leaves))


# ---------------------------------------------------------------- names


def _names(tree: Any, names: Sequence[str], pieces: Sequence[Piece], first: int) -> tuple[str, ...]:
    """`params['layers']['w']` -> `params['layers'][3]['w']`: rows stand behind the largest
    subtree that came apart as a whole, as if it were a list of layers.

    `first` is the number of path entries that a name spells its own way (arguments).
    """
    leaves = jax.tree.unflatten(tree, range(tree.num_leaves))
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(leaves)]
    counts: list[list[int]] = [[] for _ in paths]
    for piece in pieces:
        sizes = counts[piece.leaf]
        sizes[:] = [
            max(a, row + 1)
            for a, (_, row) in zip(sizes or [0] * len(piece.rows), piece.rows, strict=True)
        ]
    depths = _depths(paths, counts, first)
    return tuple(_name(names[p.leaf], paths[p.leaf], depths[p.leaf], p, first) for p in pieces)


def _depths(paths: Sequence[tuple], counts: Sequence[list[int]], first: int) -> list[list[int]]:
    """Per leaf and level of layers, how deep the subtree lies of which all leaves came apart alike."""
    inside: dict[tuple, list[list[int]]] = {}
    for path, sizes in zip(paths, counts, strict=True):
        for depth in range(first, len(path) + 1):
            inside.setdefault(path[:depth], []).append(sizes)
    found = []
    for path, sizes in zip(paths, counts, strict=True):
        depths, depth = [], first
        for level in range(1, len(sizes) + 1):
            while any(other[:level] != sizes[:level] for other in inside[path[:depth]]):
                depth += 1
            depths.append(depth)
        found.append(depths)
    return found


def _name(name: str, path: tuple, depths: Sequence[int], piece: Piece, first: int) -> str:
    spelt = jax.tree_util.keystr
    if not name.endswith(
        spelt(path[first:])
    ):  # a variable of an object, which has a path of its own
        return name + "".join(f"[{row}]" for _, row in piece.rows)
    made, before = name.removesuffix(spelt(path[first:])), first
    for depth, (_, row) in zip(depths, piece.rows, strict=True):
        made += f"{spelt(path[before:depth])}[{row}]"
        before = depth
    return made + spelt(path[before:])
