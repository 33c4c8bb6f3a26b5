"""What travels between ranks, and slices of it: the ops of a local program that are none of the graph.

    all_reduce      every rank gets all parts joined       reduce_scatter   every rank gets its part of the sum
    all_gather      every rank gets all parts              all_to_all       every rank gets its part of every part
    permute         every rank gets the part of one other

Parts of several axes are in the order in which an op names the axes, major to minor.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Protocol

import torch
import torch.distributed as dist

from ...ir.local.program import LocalOp
from ...ir.mesh import Mesh
from ...ir.sharding import Sharding

Tensor = torch.Tensor
Axes = tuple[str, ...]
Pairs = Sequence[tuple[int, int]]


class Communicator(Protocol):
    """How ranks meet that differ in their place along some axes; every one of them calls alike."""

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        """`reduction`: "sum", "max" or "min"."""
        ...

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]: ...

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor: ...

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]: ...

    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        """What the rank before has, by pairs of places along the axes: from, to."""
        ...


def places_of(mesh: Mesh) -> list[dict[str, int]]:
    """Of each rank, its place along the axes; ranks count the last axis fastest."""
    return [dict(zip(mesh.names, place, strict=True)) for place in product(*map(range, mesh.shape))]


def part_of(axes: Sequence[str], place: Mapping[str, int], mesh: Mesh) -> int:
    """Which part of a dim cut over these axes, major to minor, a rank has."""
    found = 0
    for axis in axes:
        found = found * mesh.sizes[axis] + place[axis]
    return found


def part(x: Tensor, layout: Sharding, mesh: Mesh, rank: int) -> Tensor:
    """The part of a value that a rank has."""
    place = places_of(mesh)[rank]
    for dim, axes in enumerate(layout.dims):
        size = x.shape[dim] // mesh.ways(axes)
        x = x.narrow(dim, part_of(axes, place, mesh) * size, size)
    return x


@contextmanager
def meeting() -> Generator[None]:
    """What fails while ranks meet is a ConnectionError: `torch.distributed` raises what any op of torch does."""
    try:
        yield
    except RuntimeError as error:
        raise ConnectionError(str(error)) from error


@dataclass
class ProcessGroups:
    """Meetings by `torch.distributed`, whose default group has a process for each device of the mesh, from `first` on.

    Every process of the default group has to make the groups of all axes that programs name, in one order (`prepare`).

    Args:
        rank: of the mesh; of a process that is not of it, any other number.
    """

    mesh: Mesh
    rank: int
    first: int = 0
    _groups: dict[Axes, dist.ProcessGroup] = field(default_factory=dict[Axes, dist.ProcessGroup])
    _orders: dict[Axes, list[int]] = field(default_factory=dict[Axes, list[int]])

    def prepare(self, every: Sequence[Axes]) -> None:
        """Make the groups of these axes."""
        places = places_of(self.mesh)
        for axes in every:
            if axes in self._groups:
                continue
            groups: dict[tuple[int, ...], list[int]] = {}
            for rank, place in enumerate(places):
                others = tuple(n for name, n in place.items() if name not in axes)
                groups.setdefault(others, []).append(rank)
            for ranks in groups.values():
                group = dist.new_group([self.first + rank for rank in ranks])
                if self.rank in ranks:
                    assert isinstance(group, dist.ProcessGroup)
                    self._groups[axes] = group
                    # of each part, the rank within the group
                    self._orders[axes] = sorted(
                        range(len(ranks)), key=lambda k: part_of(axes, places[ranks[k]], self.mesh)
                    )

    @meeting()
    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        found = x.clone(memory_format=torch.contiguous_format)
        how = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[
            reduction
        ]
        dist.all_reduce(found, how, self._groups[axes])
        return found

    @meeting()
    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]:
        x = x.contiguous()
        found = [torch.empty_like(x) for _ in self._orders[axes]]
        dist.all_gather(found, x, self._groups[axes])
        return [found[k] for k in self._orders[axes]]

    @meeting()
    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor:
        given = self._by_rank(parts, axes)
        found = torch.empty_like(given[0])
        dist.reduce_scatter(found, given, group=self._groups[axes])
        return found

    @meeting()
    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        given = torch.stack(self._by_rank(parts, axes))
        found = torch.empty_like(given)
        dist.all_to_all_single(found, given, group=self._groups[axes])
        return [found[k] for k in self._orders[axes]]

    @meeting()
    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        places = places_of(self.mesh)
        here = places[self.rank]
        mine = part_of(axes, here, self.mesh)
        ranks = {
            part_of(axes, place, self.mesh): self.first + rank
            for rank, place in enumerate(places)
            if all(place[name] == here[name] for name in place if name not in axes)
        }
        [to] = [b for a, b in pairs if a == mine]
        [since] = [a for a, b in pairs if b == mine]
        if to == mine:
            return x
        x = x.contiguous()
        found = torch.empty_like(x)
        sends = [dist.P2POp(dist.isend, x, ranks[to]), dist.P2POp(dist.irecv, found, ranks[since])]
        for work in dist.batch_isend_irecv(sends):
            work.wait()
        return found

    def _by_rank(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        """Parts in the order of the group's ranks."""
        given = dict(zip(self._orders[axes], parts, strict=True))
        return [given[k].contiguous() for k in range(len(parts))]


@dataclass
class Recording:
    """Meets as another communicator does, and notes what met: kind, axes, and bytes of the larger side on this rank."""

    within: Communicator
    met: list[tuple[str, Axes, int]] = field(default_factory=list[tuple[str, Axes, int]])

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        self.met.append(("all_reduce", axes, x.nbytes))
        return self.within.all_reduce(x, reduction, axes)

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]:
        found = self.within.all_gather(x, axes)
        self.met.append(("all_gather", axes, sum(part.nbytes for part in found)))
        return found

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor:
        self.met.append(("reduce_scatter", axes, sum(part.nbytes for part in parts)))
        return self.within.reduce_scatter(parts, axes)

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        self.met.append(("all_to_all", axes, sum(part.nbytes for part in parts)))
        return self.within.all_to_all(parts, axes)

    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        self.met.append(("permute", axes, x.nbytes))
        return self.within.permute(x, pairs, axes)


@dataclass(frozen=True)
class Shards:
    """Runs such ops for one rank of a mesh."""

    mesh: Mesh
    place: Mapping[str, int]
    microbatches: int
    communicator: Communicator

    def run(self, op: LocalOp, operands: Sequence[Tensor], moment: int | None) -> list[Tensor]:
        """Several operands travel end to end, as one array."""
        if len(operands) == 1:
            return [self._run(op, operands[0], moment)]
        line = torch.cat([x.flatten() for x in operands])
        parts = self._run(op, line, moment).split([x.numel() for x in operands])
        return [part.reshape(x.shape) for part, x in zip(parts, operands, strict=True)]

    def _run(self, op: LocalOp, x: Tensor, moment: int | None) -> Tensor:
        match op.kind:
            case "take_microbatch":
                assert moment is not None
                return take_microbatch(
                    x, op.integer("dim"), moment, self.microbatches, op.integer("groups")
                )
            case "join_microbatches":
                return join_microbatches(x, op.integer("dim"), op.integer("groups"))
        axes, ways = op.axes, self.mesh.ways(op.axes)
        mine = part_of(axes, self.place, self.mesh)
        match op.kind:
            case "local_slice":
                size = x.shape[op.integer("dim")] // ways
                return x.narrow(op.integer("dim"), mine * size, size)
            case "keep_first":
                return x if mine == 0 else torch.zeros_like(x)
            case "all_reduce":
                return joined(x, op.text("reduction"), axes, self.communicator)
            case "all_gather":
                parts = self.communicator.all_gather(x, axes) if x.numel() else [x] * ways
                return torch.cat(parts, op.integer("dim"))
            case "reduce_scatter":
                parts = x.chunk(ways, op.integer("dim")) if x.numel() else ()
                return (
                    self.communicator.reduce_scatter(parts, axes)
                    if parts
                    else _emptied(x, op, ways)
                )
            case _:
                assert op.kind == "all_to_all", op.kind
                parts = (
                    x.chunk(ways, op.integer("to"))
                    if x.numel()
                    else [_emptied(x, op, ways, "to")] * ways
                )
                found = self.communicator.all_to_all(parts, axes) if x.numel() else parts
                return torch.cat(list(found), op.integer("dim"))


def _emptied(x: Tensor, op: LocalOp, ways: int, dim: str = "dim") -> Tensor:
    """A part of nothing."""
    return x.narrow(op.integer(dim), 0, x.shape[op.integer(dim)] // ways)


def joined(x: Tensor, reduction: str, axes: Axes, communicator: Communicator) -> Tensor:
    """All parts joined: sums, extremes in which NaN stays, all and any."""
    if not x.numel():
        return x
    if reduction == "sum":
        return communicator.all_reduce(x, reduction, axes)
    if reduction in ("and", "or"):
        how = "min" if reduction == "and" else "max"
        return communicator.all_reduce(x.to(torch.uint8), how, axes).to(x.dtype)
    if not x.dtype.is_floating_point:
        return communicator.all_reduce(x, reduction, axes)
    wide = x.double() if x.dtype == torch.float64 else x.float()
    return _floats(
        communicator.all_reduce(_ranks(wide, reduction), reduction, axes), wide.dtype
    ).to(x.dtype)


def _ranks(x: Tensor, reduction: str) -> Tensor:
    """Integers in the order of these floats, NaN beyond the end that is looked for, as extremes of collectives may drop
    NaN. Floats of one sign are in the order of their bits; those of negative ones run backwards (IEEE 754, 5.10)."""
    whole = torch.int64 if x.dtype == torch.float64 else torch.int32
    ends = torch.iinfo(whole)
    return torch.where(
        x.isnan(), ends.max if reduction == "max" else ends.min, _turned(x.view(whole))
    )


def _floats(ranks: Tensor, dtype: torch.dtype) -> Tensor:
    return _turned(ranks).view(dtype)


def _turned(bits: Tensor) -> Tensor:
    """Negative numbers in the opposite order; its own inverse."""
    return torch.where(bits < 0, bits ^ torch.iinfo(bits.dtype).max, bits)


def take_microbatch(x: Tensor, dim: int, moment: int, count: int, groups: int) -> Tensor:
    """The rows of one microbatch, in order: its part of each of `groups` runs of neighbours."""
    shape = x.shape
    dealt = x.reshape(
        *shape[:dim], groups, count, shape[dim] // (groups * count), *shape[dim + 1 :]
    )
    return dealt.select(dim + 1, moment).reshape(
        *shape[:dim], shape[dim] // count, *shape[dim + 1 :]
    )


def join_microbatches(pieces: Tensor, dim: int, groups: int) -> Tensor:
    """The inverse: `pieces` has the microbatches stacked in front."""
    count, *shape = pieces.shape
    dealt = pieces.reshape(count, *shape[:dim], groups, shape[dim] // groups, *shape[dim + 1 :])
    return dealt.movedim(0, dim + 1).reshape(*shape[:dim], count * shape[dim], *shape[dim + 1 :])
