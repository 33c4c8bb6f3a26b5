"""How values get from the ranks of one stage to those of another, whatever their meshes and layouts.

Each rank holds a box of a value. Of what a receiver wants, every box that it meets comes from one of the ranks that
hold it; ranks that hold the same box share the receivers out. What is still owed over some axes goes as a stack: a dim
in front, cut over them.

    2 ranks, rows      -> 2 ranks, columns       rank 0 sends the left of its rows to 2, the right to 3; so does 1
    4 ranks, replicated -> 2 ranks, replicated    0 sends to 4, 1 to 5
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
import torch.distributed as dist

from ...ir.mesh import Mesh
from ...ir.sharding import Sharding
from ..runtime.programs import Route
from .collectives import Met, meeting, part_of, places_of
from .dtypes import torch_dtype

Tensor = torch.Tensor
Span = tuple[int, int]
Box = tuple[Span, ...]  # of each dim, from where to where


@dataclass(frozen=True)
class RankMesh:
    """A mesh of ranks: of all, those from `first` on."""

    mesh: Mesh
    first: int

    @property
    def ranks(self) -> range:
        return range(self.first, self.first + self.mesh.size)


class Pending(Protocol):
    """What is on its way."""

    def wait(self) -> object: ...


class Post(Protocol):
    """What one rank hands to another; between two ranks, in the order in which both call."""

    def send(self, x: Tensor, to: int) -> Pending: ...

    def receive(self, x: Tensor, since: int) -> Pending:
        """Fill `x` with what the other sends."""
        ...


class ProcessPost:
    """By the default group of `torch.distributed`."""

    @meeting()
    def send(self, x: Tensor, to: int) -> Pending:
        return _Work(dist.isend(x, to))

    @meeting()
    def receive(self, x: Tensor, since: int) -> Pending:
        return _Work(dist.irecv(x, since))


@dataclass
class RecordingPost:
    """Hands on as another post does, and notes what: `send` or `receive`, and the bytes."""

    within: Post
    met: list[Met] = field(default_factory=list[Met])

    def send(self, x: Tensor, to: int) -> Pending:
        self.met.append(("send", (), x.nbytes))
        return self.within.send(x, to)

    def receive(self, x: Tensor, since: int) -> Pending:
        self.met.append(("receive", (), x.nbytes))
        return self.within.receive(x, since)


@dataclass(frozen=True)
class _Work:
    work: dist.Work | None

    @meeting()
    def wait(self) -> None:
        if self.work is not None:
            self.work.wait()


@dataclass(frozen=True)
class Sent:
    """What a rank has sent and others may not have taken yet."""

    pending: tuple[Pending, ...]

    def wait(self) -> None:
        for each in self.pending:
            each.wait()


@dataclass(frozen=True)
class Piece:
    """What one rank takes of a value that another holds."""

    sender: int
    receiver: int
    box: Box


@dataclass(frozen=True)
class Handover:
    """Arrays from one stage to another, as far as a rank takes part: a `Transfer` of the runtime."""

    routes: Sequence[Route]
    sender: RankMesh
    receiver: RankMesh
    rank: int
    post: Post

    def __call__(self, arrays: Sequence[Tensor] | None) -> tuple[list[Tensor] | None, Sent]:
        sent = [
            self.post.send(self._cut(route, arrays[k], piece), piece.receiver)
            for k, route, piece in self._pieces
            if arrays is not None and piece.sender == self.rank != piece.receiver
        ]
        return self._found(arrays), Sent(tuple(sent))

    def _found(self, arrays: Sequence[Tensor] | None) -> list[Tensor] | None:
        """What arrives here."""
        if self.rank not in self.receiver.ranks:
            return None
        found = [self._empty(route) for route in self.routes]
        coming: list[tuple[Pending, Tensor, Tensor]] = []
        for k, route, piece in self._pieces:
            if piece.receiver != self.rank:
                continue
            into = self._within(route.arrives, self.receiver, route, found[k], piece)
            if piece.sender == self.rank:
                assert arrays is not None
                into.copy_(self._cut(route, arrays[k], piece))
            else:
                buffer = into if into.is_contiguous() else torch.empty_like(into).contiguous()
                coming.append((self.post.receive(buffer, piece.sender), buffer, into))
        for pending, buffer, into in coming:
            pending.wait()
            if buffer is not into:
                into.copy_(buffer)
        return found

    @cached_property
    def _pieces(self) -> list[tuple[int, Route, Piece]]:
        """Those in which this rank takes part, in the order in which they are sent."""
        return [
            (k, route, piece)
            for k, route in enumerate(self.routes)
            for piece in pieces(route, self.sender, self.receiver)
            if self.rank in (piece.sender, piece.receiver)
        ]

    def _cut(self, route: Route, held: Tensor, piece: Piece) -> Tensor:
        return self._within(route.leaves, self.sender, route, held, piece).contiguous()

    def _within(
        self, layout: Sharding, ranks: RankMesh, route: Route, held: Tensor, piece: Piece
    ) -> Tensor:
        """The part of what this rank holds that a piece covers."""
        mine = _box(layout, ranks, route.shape, self.rank)
        view = held[None] if layout.partial else held
        for dim, ((begin, end), (start, _)) in enumerate(zip(piece.box, mine, strict=True)):
            view = view.narrow(dim, begin - start, end - begin)
        return view

    def _empty(self, route: Route) -> Tensor:
        box = _box(route.arrives, self.receiver, route.shape, self.rank)
        shape = [end - begin for begin, end in box[bool(route.arrives.partial) :]]
        return torch.empty(shape, dtype=torch_dtype(route.dtype))


def pieces(route: Route, sender: RankMesh, receiver: RankMesh) -> Iterator[Piece]:
    """All that is handed over for one array; a rank that holds what it wants sends it to nobody."""
    held = _holders(route.leaves, sender, route.shape)
    for wanted, takers in _holders(route.arrives, receiver, route.shape).items():
        for number, taker in enumerate(takers):
            for box, holders in held.items():
                if (met := _common(wanted, box)) is not None:
                    near = taker if taker in holders else holders[number % len(holders)]
                    yield Piece(near, taker, met)


def _holders(layout: Sharding, ranks: RankMesh, shape: Sequence[int]) -> dict[Box, list[int]]:
    """The ranks that hold each box."""
    found: dict[Box, list[int]] = {}
    for rank in ranks.ranks:
        found.setdefault(_box(layout, ranks, shape, rank), []).append(rank)
    return found


def _box(layout: Sharding, ranks: RankMesh, shape: Sequence[int], rank: int) -> Box:
    """What a rank holds of a value, of which `shape` is the whole with what is owed in front. A dim of which the layout
    says nothing is whole: several scalars go as a vector."""
    place = places_of(ranks.mesh)[rank - ranks.first]
    owed = (tuple(sorted(layout.partial)),) if layout.partial else ()
    found: list[Span] = []
    cuts = (*owed, *layout.dims, *((),) * len(shape))
    for size, axes in zip(shape, cuts, strict=False):
        each, number = size // ranks.mesh.ways(axes), part_of(axes, place, ranks.mesh)
        found.append((number * each, (number + 1) * each))
    return tuple(found)


def _common(one: Box, other: Box) -> Box | None:
    """Where two boxes meet; None where they do not."""
    found = tuple((max(a, c), min(b, d)) for (a, b), (c, d) in zip(one, other, strict=True))
    return None if any(begin >= end for begin, end in found) else found
