"""What must hold of every pipeline program, each law by its name.

passes   a pass keeps the laws of local programs, on the mesh of its stage, with a value for each input and output
meets    the k-th send or receive of a rank with another is, of the other with it, the receive or send of the same
         values, stages, microbatch and types
there    what a pass takes and a stage hands on lies on the stage by then, as it is taken
ends     ranks that wait for each other in sends and receives all come to their end
once     each pass runs once, or once per microbatch; each result of the step is made once
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import combinations, zip_longest

from ..errors import GraphError
from .checks import verify_local
from .pipeline import Move, PassProgram, PipelineProgram, RankOp, Run, show_rank_op
from .program import Shard, show_shard
from .turns import Turns, answer


def verify_pipeline(program: PipelineProgram) -> None:
    """Check a pipeline.

    Raises:
        GraphError: the first broken law, by name, with the line that breaks it.
    """
    for each in program.passes:
        _check_pass(program, each)
    for pair in combinations(range(len(program.ranks)), 2):
        _check_meetings(program, *pair)
    _check_once(program)
    _Walk(program).run()


def _check_pass(program: PipelineProgram, each: PassProgram) -> None:
    verify_local(each.program, whole=False)
    left = len(each.totals) + len(each.gives) + len(each.sends) + len(each.results)
    if (len(each.takes), left) != (len(each.program.inputs), len(each.program.outputs)):
        raise _broken("passes", "takes or leaves another number of values", each.name)
    if each.program.mesh != program.meshes[each.stage]:
        raise _broken("passes", f"is not on the mesh of stage {each.stage}", each.name)


# ---------------------------------------------------------------- sends meet receives


def _check_meetings(program: PipelineProgram, a: int, b: int) -> None:
    for mine, theirs in zip_longest(_moves(program, a, b), _moves(program, b, a)):
        if mine is None or theirs is None or answer(mine, a) != theirs:
            found = [
                f"rank {r} comes to {_shown(program, op)}" for r, op in ((a, mine), (b, theirs))
            ]
            raise _broken("meets", " while ".join(found), f"ranks {a} and {b}")


def _moves(program: PipelineProgram, rank: int, other: int) -> Iterator[Move]:
    return (op for op in program.ranks[rank].ops if isinstance(op, Move) and op.rank == other)


# ---------------------------------------------------------------- once


def _check_once(program: PipelineProgram) -> None:
    found = Counter(op for rank in program.ranks for op in rank.ops if isinstance(op, Run))
    every = range(program.microbatches)
    for each in program.passes:
        one = Run(each.name)
        wanted = [one] if one in found else [Run(each.name, m) for m in every]
        if any(found.pop(run, 0) != 1 for run in wanted):
            raise _broken("once", "does not run once, or once per microbatch", each.name)
    if found:
        raise _broken("once", "is no pass of the program", next(iter(found)).name)
    results = sorted(position for each in program.passes for position in each.results)
    if results != list(range(len(results))):
        raise _broken("once", f"makes results {results}", "the pipeline")


# ---------------------------------------------------------------- carried out

Place = tuple[int, int | None]  # a value, and the microbatch it is of


class _Walk:
    """All ranks side by side, with what each stage has so far."""

    def __init__(self, program: PipelineProgram):
        self.program, self.turns = program, Turns(program.ranks)
        self.has: list[dict[Place, Shard]] = [{} for _ in program.meshes]
        self.sent: list[dict[Place, Shard]] = [{} for _ in program.meshes]
        self.totals = {each.name: {v for v, _ in each.totals} for each in program.passes}
        for rank in program.ranks:
            for each in rank.inputs:
                self.has[each.stage][each.value, None] = each.shard

    def run(self) -> None:
        for _, found in self.turns:
            if isinstance(found, Run):
                self._pass(found)
            else:
                for move in found:
                    self._move(move)
        waiting = [(r, self.turns.next(r)) for r in range(len(self.program.ranks))]
        if stuck := [f"rank {r} at {_shown(self.program, op)}" for r, op in waiting if op]:
            raise _broken("ends", f"ranks wait for ever: {', '.join(stuck)}", "the pipeline")

    def _move(self, move: Move) -> None:
        for value in move.values:
            place = value, move.microbatch
            found = self.sent[move.sender].get(place, self.has[move.sender].get(place))
            self._same(found, move.leaves, value, _shown(self.program, move))
            self.has[move.receiver][place] = move.arrives

    def _pass(self, run: Run) -> None:
        each, totals = self.program.by_name[run.name], self.totals[run.name]
        for value, shard in each.taken.items():
            joined = value in each.joins
            found = self._all(each, value) if joined else self._found(each, value, run.microbatch)
            self._same(found, shard, value, _shown(self.program, run))
        for value, shard in each.given.items():
            self.has[each.stage][value, None if value in totals else run.microbatch] = shard
        for value, shard in each.sent.items():
            self.sent[each.stage][value, run.microbatch] = shard

    def _found(self, each: PassProgram, value: int, microbatch: int | None) -> Shard | None:
        """A value that a pass takes; of what passes of microbatches left, an update takes the last."""
        last = self.program.microbatches - 1 if microbatch is None else microbatch
        has = self.has[each.stage]
        return has.get((value, last), has.get((value, None)))

    def _all(self, each: PassProgram, value: int) -> Shard | None:
        """What all microbatches left of a value, side by side."""
        many = self.program.microbatches
        found = {self.has[each.stage].get((value, m)) for m in range(many)}
        one = found.pop()
        return None if found or one is None else one.stacked(many)

    def _same(self, found: Shard | None, wanted: Shard, value: int, where: str) -> None:
        if found is None:
            raise _broken("there", f"v{value} is not there", where)
        if found != wanted:
            what = f"v{value} lies as {found.whole} @ {show_shard(found)}"
            raise _broken("there", f"{what}, not {wanted.whole} @ {show_shard(wanted)}", where)


def _shown(program: PipelineProgram, op: RankOp | None) -> str:
    return "its end" if op is None else f"`{show_rank_op(program, op)}`"


def _broken(law: str, what: str, where: str) -> GraphError:
    return GraphError(f"a pipeline breaks `{law}`: {what}.", where=where)
