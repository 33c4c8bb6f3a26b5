"""What travels between ranks, and slices of it: the ops of a local program that are none of the graph.

    all_reduce      every rank gets all parts joined       reduce_scatter   every rank gets its part of the sum
    all_gather      every rank gets all parts              all_to_all       every rank gets its part of every part
    permute         every rank gets the part of one other

Parts of several axes are in the order in which an op names the axes, major to minor.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from ...ir.local.program import COLLECTIVES, LocalOp
from ...ir.mesh import Mesh
from ...ir.sharding import Sharding

Tensor = torch.Tensor
Axes = tuple[str, ...]
Pairs = Sequence[tuple[int, int]]
Later = Callable[[], Any]  # waits for a meeting, and gives what it brings


class Communicator(Protocol):
    """How ranks meet that differ in their place along some axes; every one of them calls alike."""

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        """`reduction`: "sum", "max" or "min". `x` is given up: it may be written over."""
        ...

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]: ...

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor: ...

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]: ...

    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        """What the rank before has, by pairs of places along the axes: from, to."""
        ...


@runtime_checkable
class Starting(Protocol):
    """A communicator that need not be waited for."""

    def start(self, kind: str, *given: Any) -> Later:
        """Begin what the method called `kind` does. All ranks begin meetings in one order."""
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
    def start(self, kind: str, *given: Any) -> Later:
        begin = {
            "all_reduce": self._all_reduce, "all_gather": self._all_gather,
            "reduce_scatter": self._reduce_scatter, "all_to_all": self._all_to_all,
        }[kind]  # fmt: skip
        work, result = begin(*given)

        @meeting()
        def wait() -> Any:
            if work is not None:
                work.wait()
            return result()

        return wait

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        return self.start("all_reduce", x, reduction, axes)()

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]:
        return self.start("all_gather", x, axes)()

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor:
        return self.start("reduce_scatter", parts, axes)()

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return self.start("all_to_all", parts, axes)()

    def _all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> tuple[dist.Work | None, Later]:
        found = x.contiguous()
        how = {"sum": dist.ReduceOp.SUM, "max": dist.ReduceOp.MAX, "min": dist.ReduceOp.MIN}[
            reduction
        ]
        return dist.all_reduce(found, how, self._groups[axes], async_op=True), lambda: found

    def _all_gather(self, x: Tensor, axes: Axes) -> tuple[dist.Work | None, Later]:
        order = self._orders[axes]
        found = x.new_empty((len(order) * x.numel(),))
        work = dist.all_gather_single(
            found, x.contiguous().flatten(), self._groups[axes], async_op=True
        )
        return work, lambda: [found.chunk(len(order))[k].view(x.shape) for k in order]

    def _reduce_scatter(
        self, parts: Sequence[Tensor], axes: Axes
    ) -> tuple[dist.Work | None, Later]:
        """Parts are exchanged, and each rank adds up its own. On 4 ranks 1 KB takes 0.3 ms so, and 8 MB 6.9, by gloo's
        own reduce-scatter 1.5 and 17 (the fastest of many, on 2 cores with other work, torch 2.13)."""
        given = torch.stack(self._by_rank(parts, axes))
        found = torch.empty_like(given)
        work = dist.all_to_all_single(found, given, group=self._groups[axes], async_op=True)
        return work, lambda: found.sum(0, dtype=found.dtype)

    def _all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> tuple[dist.Work | None, Later]:
        given = torch.stack(self._by_rank(parts, axes))
        found = torch.empty_like(given)
        work = dist.all_to_all_single(found, given, group=self._groups[axes], async_op=True)
        return work, lambda: [found[k] for k in self._orders[axes]]

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
        return [given[k] for k in range(len(parts))]


Met = tuple[str, Axes, int]  # kind, axes, and bytes of the larger side on this rank


@dataclass
class Recording:
    """Meets as another communicator does, and notes what met."""

    within: Communicator
    met: list[Met] = field(default_factory=list[Met])

    def all_reduce(self, x: Tensor, reduction: str, axes: Axes) -> Tensor:
        self.met.append(("all_reduce", axes, x.nbytes))
        return self.within.all_reduce(x, reduction, axes)

    def all_gather(self, x: Tensor, axes: Axes) -> list[Tensor]:
        return self.start("all_gather", x, axes)()

    def reduce_scatter(self, parts: Sequence[Tensor], axes: Axes) -> Tensor:
        return self.start("reduce_scatter", parts, axes)()

    def all_to_all(self, parts: Sequence[Tensor], axes: Axes) -> list[Tensor]:
        return self.start("all_to_all", parts, axes)()

    def permute(self, x: Tensor, pairs: Pairs, axes: Axes) -> Tensor:
        self.met.append(("permute", axes, x.nbytes))
        return self.within.permute(x, pairs, axes)

    def start(self, kind: str, *given: Any) -> Later:
        """Noted when it has ended, as the sizes of what is gathered are known then."""
        wait, axes = started(self.within, kind, *given), given[-1]

        def noted() -> Any:
            found = wait()
            parts = {"all_reduce": [given[0]], "all_gather": found}.get(kind, given[0])
            self.met.append((kind, axes, sum(part.nbytes for part in parts)))
            return found

        return noted


def started(communicator: Communicator, kind: str, *given: Any) -> Later:
    """A meeting that has begun; with a communicator that waits, one that has ended."""
    if isinstance(communicator, Starting):
        return communicator.start(kind, *given)
    found = getattr(communicator, kind)(*given)
    return lambda: found


@dataclass(frozen=True)
class Shards:
    """Runs such ops for one rank of a mesh."""

    mesh: Mesh
    place: Mapping[str, int]
    microbatches: int
    communicator: Communicator

    def run(self, op: LocalOp, operands: Sequence[Tensor], moment: int | None) -> list[Tensor]:
        if op.kind in COLLECTIVES:
            return self.start(op, operands)()
        return [self._moved(op, operands[0], moment)]

    def start(self, op: LocalOp, operands: Sequence[Tensor]) -> Callable[[], list[Tensor]]:
        """Begin a collective. Several operands travel end to end, as one array."""
        axes, ways = op.axes, self.mesh.ways(op.axes)
        if not any(x.numel() for x in operands):
            found = [_of_nothing(op, x, ways) for x in operands]
            return lambda: found
        sizes = [x.numel() for x in operands]
        match op.kind:
            case "all_reduce" if op.text("reduction") == "sum":
                wait = started(self.communicator, "all_reduce", _line(operands), "sum", axes)
                return lambda: _apart(wait(), sizes, [x.shape for x in operands])
            case "all_reduce":
                line = joined(_line(operands), op.text("reduction"), axes, self.communicator)
                return lambda: _apart(line, sizes, [x.shape for x in operands])
            case "all_gather":
                return self._gathered(op, operands, sizes, ways)
            case "reduce_scatter":
                cut = [x.chunk(ways, op.integer("dim")) for x in operands]
                shapes = [parts[0].shape for parts in cut]
                whole = list(cut[0]) if len(cut) == 1 else [*map(_line, zip(*cut, strict=True))]
                wait = started(self.communicator, "reduce_scatter", whole, axes)
                return lambda: _apart(wait(), [n // ways for n in sizes], shapes)
            case _:
                assert op.kind == "all_to_all", op.kind
                parts = operands[0].chunk(ways, op.integer("to"))
                wait = started(self.communicator, "all_to_all", parts, axes)
                return lambda: [torch.cat(list(wait()), op.integer("dim"))]

    def _gathered(
        self, op: LocalOp, operands: Sequence[Tensor], sizes: Sequence[int], ways: int
    ) -> Callable[[], list[Tensor]]:
        line, dim = operands[0] if len(operands) == 1 else _line(operands), op.integer("dim")
        wait, shapes = (
            started(self.communicator, "all_gather", line, op.axes),
            [x.shape for x in operands],
        )

        def result() -> list[Tensor]:
            ranks = [_apart(part, sizes, shapes) for part in wait()]
            return [torch.cat(parts, dim) for parts in map(list, zip(*ranks, strict=True))]

        return result

    def _moved(self, op: LocalOp, x: Tensor, moment: int | None) -> Tensor:
        """What needs no others."""
        match op.kind:
            case "take_microbatch":
                assert moment is not None
                return take_microbatch(
                    x, op.integer("dim"), moment, self.microbatches, op.integer("groups")
                )
            case "join_microbatches":
                return join_microbatches(x, op.integer("dim"), op.integer("groups"))
            case "local_slice":
                size = x.shape[op.integer("dim")] // self.mesh.ways(op.axes)
                mine = part_of(op.axes, self.place, self.mesh)
                return x.narrow(op.integer("dim"), mine * size, size)
            case _:
                assert op.kind == "keep_first", op.kind
                first = part_of(op.axes, self.place, self.mesh) == 0
                return x if first else torch.zeros_like(x)


def _line(operands: Sequence[Tensor]) -> Tensor:
    """All elements end to end, in memory of their own."""
    if len(operands) == 1:
        return operands[0].clone(memory_format=torch.contiguous_format)
    return torch.cat([x.flatten() for x in operands])


def _apart(line: Tensor, sizes: Sequence[int], shapes: Sequence[torch.Size]) -> list[Tensor]:
    """Arrays that lie end to end."""
    pieces = [line] if len(sizes) == 1 else line.split(list(sizes))
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def _of_nothing(op: LocalOp, x: Tensor, ways: int) -> Tensor:
    """What a collective makes of arrays without elements."""
    shape = list(x.shape)
    if op.kind in ("all_gather", "all_to_all"):
        shape[op.integer("dim")] *= ways
    if op.kind in ("reduce_scatter", "all_to_all"):
        shape[op.integer("dim" if op.kind == "reduce_scatter" else "to")] //= ways
    return x.new_empty(shape)


def joined(x: Tensor, reduction: str, axes: Axes, communicator: Communicator) -> Tensor:
    """All parts joined: sums, extremes in which NaN stays, all and any. What is given is given up."""
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
