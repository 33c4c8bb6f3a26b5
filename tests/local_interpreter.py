"""Local programs run in numpy, all ranks side by side: the oracle of localization, with no devices and no compiler.

    interpret(program, [np.ones((8, 4)), ...])    whole inputs -> whole outputs

A value is a list with one array per rank of the mesh. Collectives exchange between the lists' entries; everything else
runs rank by rank. Knows the ops that `random_graphs` makes; another one is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any

import numpy as np

from meshwright.ir.graph import Graph, Op, TensorType
from meshwright.ir.local.program import BARRIER, MICROBATCHES, ON_SHARDS, LocalOp, LocalProgram
from meshwright.ir.mesh import Mesh
from meshwright.ir.sharding import Sharding

Ranks = list[np.ndarray]

JOINS: dict[str, Callable[[Any, Any], Any]] = {
    "sum": np.add, "max": np.maximum, "min": np.minimum, "and": np.logical_and, "or": np.logical_or,
}  # fmt: skip
ELEMENTWISE: dict[str, Callable[..., Any]] = {
    "add": np.add, "add_any": np.add, "sub": np.subtract, "mul": np.multiply, "neg": np.negative, "tanh": np.tanh,
    "max": np.maximum, "sin": np.sin, "copy": lambda x: x, "ge": np.greater_equal,
    "select_n": lambda which, no, yes: np.where(which, yes, no),
}  # fmt: skip


def interpret(program: LocalProgram, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Whole results of a local program on whole inputs."""
    return _Running(program).run(inputs)


def evaluate(graph: Graph, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Results of a graph, as one device gives them."""
    values = dict(zip(graph.inputs, inputs, strict=True))
    values |= {c.value: np.array(c.data) for c in graph.constants}
    for op in graph.ops:
        kinds = [graph.types[v] for v in op.outputs]
        found = _computed(op, [values[v] for v in op.inputs], kinds, {})
        values.update(zip(op.outputs, found, strict=True))
    return [values[v] for v in graph.outputs]


def places(mesh: Mesh) -> list[dict[str, int]]:
    """Of each rank, where it lies along the axes."""
    return [
        dict(zip(mesh.names, map(int, where), strict=True)) for where in np.ndindex(*mesh.shape)
    ]


def part_of(axes: Sequence[str], place: dict[str, int], mesh: Mesh) -> int:
    """Which part of a dim cut over these axes a rank has."""
    return reduce(lambda found, axis: found * mesh.sizes[axis] + place[axis], axes, 0)


class _Running:
    def __init__(self, program: LocalProgram):
        self.program, self.mesh = program, program.mesh
        self.places = places(program.mesh)
        self.moment: int | None = None

    def run(self, inputs: Sequence[np.ndarray]) -> list[np.ndarray]:
        program, values = self.program, dict[int, Ranks]()
        for value, array in zip(program.inputs, inputs, strict=True):
            values[value] = self.cut(array, program.shards[value].sharding)
        for constant in program.constants:
            values[constant.value] = [np.array(constant.data)] * len(self.places)
        self.ops(program.ops, values)
        return [self.whole(values[v], program.shards[v].sharding) for v in program.outputs]

    def cut(self, array: np.ndarray, layout: Sharding) -> Ranks:
        found = []
        for place in self.places:
            part = array
            for d, axes in enumerate(layout.dims):
                ways = self.mesh.ways(axes)
                part = (
                    np.split(part, ways, d)[part_of(axes, place, self.mesh)] if ways > 1 else part
                )
            found.append(part)
        return found

    def whole(self, ranks: Ranks, layout: Sharding) -> np.ndarray:
        """What the ranks hold together. Those that hold the same part must agree to the last bit."""
        assert not layout.partial
        shape = tuple(
            n * self.mesh.ways(a) for n, a in zip(ranks[0].shape, layout.dims, strict=True)
        )
        found, seen = np.zeros(shape, ranks[0].dtype), np.zeros(shape, bool)
        for place, part in zip(self.places, ranks, strict=True):
            numbers = [part_of(axes, place, self.mesh) for axes in layout.dims]
            where = tuple(
                slice(i * n, (i + 1) * n) for i, n in zip(numbers, part.shape, strict=True)
            )
            assert not seen[where].any() or np.array_equal(found[where], part), "copies differ"
            found[where], seen[where] = part, True
        assert seen.all()
        return found

    # ------------------------------------------------------------ ops

    def ops(self, ops: Sequence[LocalOp], values: dict[int, Ranks]) -> None:
        for op in ops:
            operands = [values[v] for v in op.inputs]
            if op.kind == MICROBATCHES:
                found = self.microbatches(op, values)
            elif op.kind == BARRIER:
                found = operands
            elif op.kind in ON_SHARDS:
                found = [self.moved(op, each) for each in operands]
            else:
                found = self.computed(op, operands)
            for value, ranks in zip(op.outputs, found, strict=True):
                assert all(r.shape == self.program.local(value).shape for r in ranks), (op, value)
            values.update(zip(op.outputs, found, strict=True))

    def microbatches(self, op: LocalOp, values: dict[int, Ranks]) -> list[Ranks]:
        [region], joins = op.regions, op.attr("joins")
        assert isinstance(joins, tuple)
        runs = []
        for moment in range(self.program.microbatches):
            self.moment, inner = moment, dict(values)
            self.ops(region.ops, inner)
            runs.append([inner[v] for v in region.outputs])
        self.moment = None
        found = []
        for k in range(len(region.outputs)):
            each = [[run[k][rank] for run in runs] for rank in range(len(self.places))]
            found.append(
                [reduce(JOINS[str(joins[k])], parts) for parts in each]
                if k < len(joins)
                else [np.stack(parts) for parts in each]
            )
        return found

    def computed(self, op: LocalOp, operands: list[Ranks]) -> list[Ranks]:
        kinds = [self.program.local(v) for v in op.outputs]
        rule = self.program.rule(op)
        found = []
        for rank, place in enumerate(self.places):
            starts = dict[int, Any]()
            for each in op.cuts:
                index, ways = part_of(each.axes, place, self.mesh), self.mesh.ways(each.axes)
                starts[each.factor] = index * (rule.factors[each.factor].size // ways)
                assert not each.time or op.kind != "iota", "iota over the batch is not known here"
            given = [ranks[rank] for ranks in operands]
            dims = {d: f for d, dim in enumerate(rule.results[0]) for f in dim if f in starts}
            offsets = {d: starts[f] for d, f in dims.items()}
            found.append(_computed(op.whole, given, kinds, offsets))
        return [list(each) for each in zip(*found, strict=True)]

    # ------------------------------------------------------------ between ranks

    def moved(self, op: LocalOp, ranks: Ranks) -> Ranks:
        return [self._moved(op, ranks, rank) for rank in range(len(ranks))]

    def group(self, axes: Sequence[str], rank: int) -> list[int]:
        """The ranks that differ from one along these axes alone, in order."""
        others = [a for a in self.mesh.names if a not in axes]
        mine = self.places[rank]
        same = [r for r, p in enumerate(self.places) if all(p[a] == mine[a] for a in others)]
        return sorted(same, key=lambda r: part_of(axes, self.places[r], self.mesh))

    def _moved(self, op: LocalOp, ranks: Ranks, rank: int) -> np.ndarray:
        here, many = ranks[rank], self.program.microbatches
        if op.kind == "take_microbatch":
            dim, groups = op.integer("dim"), op.integer("groups")
            runs = np.split(here, groups * many, dim)
            return np.concatenate(runs[self.moment :: many], dim)
        if op.kind == "join_microbatches":
            dim, groups = op.integer("dim"), op.integer("groups")
            each = [np.split(part, groups, dim) for part in here]
            return np.concatenate([each[m][g] for g in range(groups) for m in range(many)], dim)
        group = self.group(op.axes, rank)
        mine = group.index(rank)
        if op.kind == "keep_first":
            return here if mine == 0 else np.zeros_like(here)
        if op.kind == "local_slice":
            return np.split(here, len(group), op.integer("dim"))[mine]
        if op.kind == "all_gather":
            return np.concatenate([ranks[r] for r in group], op.integer("dim"))
        if op.kind == "all_to_all":
            parts = [np.split(ranks[r], len(group), op.integer("to"))[mine] for r in group]
            return np.concatenate(parts, op.integer("dim"))
        join = JOINS[str(dict(op.attrs).get("reduction", "sum"))]
        total = reduce(join, [ranks[r] for r in group])
        scatter = op.kind == "reduce_scatter"
        return np.split(total, len(group), op.integer("dim"))[mine] if scatter else total


def _computed(
    op: Op, given: list[np.ndarray], kinds: list[TensorType], offsets: dict[int, Any]
) -> list[np.ndarray]:
    attrs, shape = dict(op.attrs), kinds[0].shape
    if op.kind in ELEMENTWISE:
        return [np.asarray(ELEMENTWISE[op.kind](*given))]
    match op.kind:
        case "dot_general":
            return [_product(op, *given)]
        case "transpose":
            return [np.transpose(given[0], attrs["permutation"])]
        case "reshape":
            return [given[0].reshape(shape)]
        case "broadcast_in_dim":
            dims = attrs["broadcast_dimensions"]
            inner = [1] * len(shape)
            for d, size in zip(dims, given[0].shape, strict=True):
                inner[d] = size
            return [np.broadcast_to(given[0].reshape(inner), shape)]
        case "reduce_sum" | "reduce_max" | "reduce_min":
            join = JOINS[op.kind.removeprefix("reduce_")]
            return [join.reduce(given[0], axis=tuple(attrs["axes"]))]  # type: ignore[attr-defined]
        case "iota":
            dim = attrs["dimension"]
            line = np.arange(shape[dim]) + offsets.get(dim, 0)
            inner = [1] * len(shape)
            inner[dim] = shape[dim]
            return [np.broadcast_to(line.reshape(inner), shape).astype(float)]
    raise NotImplementedError(op.kind)


def _product(op: Op, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    names = ("lhs_contracting", "rhs_contracting", "lhs_batch", "rhs_batch")
    ca, cb, ba, bb = map(op.integers, names)
    left, right = list(range(a.ndim)), [-1] * b.ndim
    for x, y in (*zip(ca, cb, strict=True), *zip(ba, bb, strict=True)):
        right[y] = left[x]
    fresh = a.ndim
    for y, name in enumerate(right):
        if name < 0:
            right[y], fresh = fresh, fresh + 1
    free_a = [left[x] for x in range(a.ndim) if x not in (*ca, *ba)]
    free_b = [right[y] for y in range(b.ndim) if y not in (*cb, *bb)]
    return np.einsum(a, left, b, right, [*(left[x] for x in ba), *free_a, *free_b])
