"""The ops of all ranks of a pipeline in one order, which every process that shares in them can follow.

Ranks take turns. A rank comes to the next of its ops; sends and receives are there once both ranks have come to
them. Neighbours of one way (from stage to stage, of one microbatch) go together.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import takewhile

from .pipeline import Move, RankOp, RankProgram, Run


@dataclass
class Turns:
    """Goes through the ops of all ranks: `(rank, a pass or moves)`, of a send and its receive the send.

    It ends where all ranks have, or where none can go on; `next` tells at what a rank then is.
    """

    ranks: Sequence[RankProgram]
    place: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.place = [0] * len(self.ranks)

    def __iter__(self) -> Iterator[tuple[int, Run | tuple[Move, ...]]]:
        moved = True
        while moved:
            moved = False
            for rank in range(len(self.ranks)):
                found = self._turn(rank)
                if found is not None:
                    moved = True
                    yield found

    def next(self, rank: int) -> RankOp | None:
        """What a rank comes to next; None at its end."""
        ops = self.ranks[rank].ops
        return ops[self.place[rank]] if self.place[rank] < len(ops) else None

    def _turn(self, rank: int) -> tuple[int, Run | tuple[Move, ...]] | None:
        op = self.next(rank)
        if op is None:
            return None
        if isinstance(op, Run):
            self.place[rank] += 1
            return rank, op
        mine = self._moves(rank)
        if op.rank is not None:
            theirs = (answer(move, op.rank) for move in self._moves(op.rank))
            pairs = takewhile(lambda pair: pair[0] == pair[1], zip(mine, theirs, strict=False))
            mine = tuple(move for move, _ in pairs)
            self.place[op.rank] += len(mine)
        if not mine:
            return None
        self.place[rank] += len(mine)
        if op.kind == "receive" and op.rank is not None:
            return op.rank, tuple(answer(move, rank) for move in mine)
        return rank, mine

    def _moves(self, rank: int) -> tuple[Move, ...]:
        """The next moves of a rank, as far as they go one way."""
        first, ops = self.next(rank), self.ranks[rank].ops
        found = list[Move]()
        for k in range(self.place[rank], len(ops)):
            op = ops[k]
            if not isinstance(first, Move) or not isinstance(op, Move) or _way(op) != _way(first):
                break
            found.append(op)
        return tuple(found)


def _way(move: Move) -> tuple[object, ...]:
    return move.kind, move.phase, move.sender, move.receiver, move.rank, move.microbatch


def answer(move: Move, rank: int) -> Move:
    """What the other rank does at a rank's send or receive."""
    return replace(move, kind="receive" if move.kind == "send" else "send", rank=rank)
