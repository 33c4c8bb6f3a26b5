"""All ranks of a local program in one process, a thread each, that meet in memory."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import reduce
from threading import Barrier
from typing import Any

import torch

from meshwright.backends.torch.collectives import part, part_of, places_of
from meshwright.backends.torch.local_step import LocalStep
from meshwright.ir.local.program import COLLECTIVES, MICROBATCHES, LocalOp, LocalProgram
from meshwright.ir.mesh import Mesh
from meshwright.ir.sharding import Sharding

JOIN: dict[str, Callable[[Any, Any], Any]] = {
    "sum": torch.add,
    "max": torch.maximum,
    "min": torch.minimum,
}


class InMemory:
    """What ranks give to a meeting lies in a list that all of them read."""

    def __init__(self, mesh: Mesh, rank: int, board: list[Any], barrier: Barrier):
        self.mesh, self.rank, self.board, self.barrier = mesh, rank, board, barrier
        self.places = places_of(mesh)

    def _meet(self, given: Any, axes: Sequence[str]) -> list[Any]:
        """What all ranks gave that differ along the axes alone, in the order of parts."""
        self.board[self.rank] = given
        self.barrier.wait(60)
        mine = self.places[self.rank]
        others = [
            r for r, p in enumerate(self.places) if all(p[a] == mine[a] for a in p if a not in axes)
        ]
        found = [
            self.board[r]
            for r in sorted(others, key=lambda r: part_of(axes, self.places[r], self.mesh))
        ]
        self.barrier.wait(60)
        return found

    def _mine(self, axes: Sequence[str]) -> int:
        return part_of(axes, self.places[self.rank], self.mesh)

    def all_reduce(self, x: Any, reduction: str, axes: Any) -> Any:
        return reduce(JOIN[reduction], self._meet(x, axes))

    def all_gather(self, x: Any, axes: Any) -> list[Any]:
        return self._meet(x, axes)

    def reduce_scatter(self, parts: Sequence[Any], axes: Any) -> Any:
        given = self._meet(list(parts), axes)
        return reduce(torch.add, [each[self._mine(axes)] for each in given])

    def permute(self, x: Any, pairs: Any, axes: Any) -> Any:
        given = self._meet(x, axes)
        [since] = [a for a, b in pairs if b == self._mine(axes)]
        return given[since]

    def all_to_all(self, parts: Sequence[Any], axes: Any) -> list[Any]:
        return [each[self._mine(axes)] for each in self._meet(list(parts), axes)]


def run_ranks(
    program: LocalProgram, inputs: Sequence[Any], arrays: Mapping[int, Any] = {}
) -> list[Any]:
    """Whole results of whole inputs. Ranks that hold the same part must agree to the last bit."""
    mesh = program.mesh
    board: list[Any] = [None] * mesh.size
    barrier = Barrier(mesh.size)

    def one(rank: int) -> tuple[Any, ...]:
        try:
            step = LocalStep(program, arrays, rank, InMemory(mesh, rank, board, barrier))
            given = [
                part(x, program.shards[v].sharding, mesh, rank)
                for x, v in zip(inputs, program.inputs, strict=True)
            ]
            found = step(*given)
            for value, x in zip(program.outputs, found, strict=True):
                assert tuple(x.shape) == program.local(value).shape, value
            return found
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(mesh.size) as pool:
        results = list(pool.map(one, range(mesh.size)))
    return [
        whole([found[k] for found in results], program.shards[v].sharding, mesh)
        for k, v in enumerate(program.outputs)
    ]


def meetings(program: LocalProgram) -> Counter[tuple[str, tuple[str, ...], int]]:
    """What each rank meets for when it runs a program, as that says: kind, axes and bytes of the larger side."""
    found = Counter[tuple[str, tuple[str, ...], int]]()

    def walk(ops: Sequence[LocalOp], times: int) -> None:
        for op in ops:
            turns = {MICROBATCHES: program.microbatches}.get(op.kind, 1)
            turns = op.integer("length") if op.kind == "scan" else turns
            for region in op.regions:
                walk(region.ops, times * turns)
            if op.kind in COLLECTIVES:
                sides = [
                    sum(program.local(v).nbytes for v in side) for side in (op.inputs, op.outputs)
                ]
                found[op.kind, op.axes, max(sides)] += times

    walk(program.ops, 1)
    return found


def whole(parts: Sequence[Any], layout: Sharding, mesh: Mesh) -> Any:
    """What the ranks hold together."""
    shape = [n * mesh.ways(axes) for n, axes in zip(parts[0].shape, layout.dims, strict=True)]
    found, seen = torch.zeros(shape, dtype=parts[0].dtype), torch.zeros(shape, dtype=torch.bool)
    for rank, piece in enumerate(parts):
        here, met = (part(x, layout, mesh, rank) for x in (found, seen))
        assert not met.any() or torch.equal(here.nan_to_num(), piece.nan_to_num()), "copies differ"
        here.copy_(piece)
        met.fill_(True)
    assert seen.all()
    return found
