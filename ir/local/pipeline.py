"""What each rank of a pipeline runs: passes, whose programs stand here once, and sends and receives between them.

    pipeline 'gpt-tiny', 4 microbatches
    stage 0 on x=2 × y=2
    stage 1 on x=4

    pass of stage 0: takes v7 v50; gives v80; sends v337
    local 'forward 0' on x=2 × y=2, 4 microbatches {
      in %0: f32[64, 64] @ [x, -] 'v7 params.up'
      ...
    }

    rank 0 {
      in v7 of stage 0: f32[64, 64] @ [x, -] 'params.up'
      forward 0 microbatch 0
      send forward v337 from stage 0 to stage 1 of rank 1 microbatch 0: f32[4, 64] @ [x/m, -] as f32[2, 64] @ [x/m, -]
      receive backward v881 from stage 1 of rank 1 to stage 0 microbatch 0: f32[2, 64] @ [x/m, -] as f32[4, 64] @ ...
      backward 0 microbatch 0
      update 0 0
    }

`v7` is a value of the step. It has the same number on all stages, and may lie otherwise on each. What a pass of a
microbatch leaves is that microbatch's. A send and its receive both say how the value leaves and, where that differs,
how it arrives. They are one event, which each of the two ranks comes to in its turn; between stages of one rank they
are a `copy`. `update 0 1` is the update of stage 1 in round 0; rounds end with an exchange.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from ..mesh import Mesh
from .program import INDENT, LocalProgram, Shard, show_local, show_shard

MoveKind = Literal["send", "receive", "copy"]
MovePhase = Literal["start", "forward", "backward", "update"]


@dataclass(frozen=True, slots=True)
class PassProgram:
    """A pass of a stage: what one of its devices runs, and which values of the step it takes and leaves.

    `takes` are the inputs of the program in order. Of those in `joins` it takes what all microbatches made, side by
    side in a new dim in front. The outputs are `totals`, each with how it is joined over the microbatches; `gives`,
    for later passes of the stage; `sends`, for other stages; and those with positions `results` of the step's.
    """

    stage: int
    program: LocalProgram
    takes: tuple[int, ...]
    joins: tuple[int, ...] = ()
    totals: tuple[tuple[int, str], ...] = ()
    gives: tuple[int, ...] = ()
    sends: tuple[int, ...] = ()
    results: tuple[int, ...] = ()

    @property
    def name(self) -> str:
        """`forward 0`."""
        return self.program.name

    @property
    def taken(self) -> dict[int, Shard]:
        """How each value that it takes has to lie."""
        return self._shards(self.takes, self.program.inputs)

    @property
    def given(self) -> dict[int, Shard]:
        """How totals, and what later passes of the stage read, are left."""
        return self._shards((*(v for v, _ in self.totals), *self.gives), self.program.outputs)

    @property
    def sent(self) -> dict[int, Shard]:
        """How what other stages read is left."""
        return self._shards(self.sends, self.program.outputs[len(self.totals) + len(self.gives) :])

    def _shards(self, values: Iterable[int], local: Iterable[int]) -> dict[int, Shard]:
        return {v: self.program.shards[here] for v, here in zip(values, local, strict=False)}


@dataclass(frozen=True, slots=True)
class StageInput:
    """An input of the step as it lies on a stage that reads it."""

    value: int
    stage: int
    shard: Shard
    name: str = ""


@dataclass(frozen=True, slots=True)
class Run:
    """A pass, by its name; of one microbatch, or once per step."""

    name: str
    microbatch: int | None = None


@dataclass(frozen=True, slots=True)
class Move:
    """What stage `sender` hands to stage `receiver`; `rank` is the one at the other end, None of a copy.

    Several `values` are scalars of one type, and go as one vector. Moves of phase `start` bring inputs of the step
    from the stage where they lie to others that read them.
    """

    kind: MoveKind
    phase: MovePhase
    values: tuple[int, ...]
    sender: int
    receiver: int
    rank: int | None
    leaves: Shard
    arrives: Shard
    microbatch: int | None = None


RankOp = Run | Move


@dataclass(frozen=True, slots=True)
class RankProgram:
    """What one rank finds at the start of a step, and what it does, one thing after another."""

    inputs: tuple[StageInput, ...]
    ops: tuple[RankOp, ...]


@dataclass(frozen=True)
class PipelineProgram:
    """All ranks of a pipeline.

    Invariants: `pipeline_checks.verify_pipeline` holds them.
    """

    name: str
    microbatches: int
    meshes: tuple[Mesh, ...]  # of each stage
    passes: tuple[PassProgram, ...]
    ranks: tuple[RankProgram, ...]

    @cached_property
    def by_name(self) -> dict[str, PassProgram]:
        return {each.name: each for each in self.passes}

    def __str__(self) -> str:
        return show_pipeline(self)


# ---------------------------------------------------------------- text


def show_pipeline(found: PipelineProgram) -> str:
    """All of it as text, ending in a newline."""
    return "\n".join(_lines(found)) + "\n"


def _lines(found: PipelineProgram) -> Iterator[str]:
    yield f"pipeline {found.name!r}, {found.microbatches} microbatches"
    for stage, mesh in enumerate(found.meshes):
        yield f"stage {stage} on {mesh or '-'}"
    for each in found.passes:
        yield f"\npass of stage {each.stage}: {_border(each)}"
        yield show_local(each.program).rstrip()
    for number, rank in enumerate(found.ranks):
        yield f"\nrank {number} {{"
        yield from (INDENT + _input(found, each) for each in rank.inputs)
        yield from (INDENT + show_rank_op(found, op) for op in rank.ops)
        yield "}"


def _border(each: PassProgram) -> str:
    totals = [f"v{value}={how}" for value, how in each.totals]
    words = {
        "takes": _values(each.takes), "joins": _values(each.joins), "totals": totals,
        "gives": _values(each.gives), "sends": _values(each.sends), "results": [*map(str, each.results)],
    }  # fmt: skip
    return "; ".join(" ".join([word, *found]) for word, found in words.items() if found)


def _values(values: Iterable[int]) -> list[str]:
    return [f"v{value}" for value in values]


def _input(found: PipelineProgram, each: StageInput) -> str:
    shard = _typed(found, each.stage, each.shard)
    return f"in v{each.value} of stage {each.stage}: {shard} {each.name!r}"


def show_rank_op(found: PipelineProgram, op: RankOp) -> str:
    """`forward 0 microbatch 1`, or a send, receive or copy with its types."""
    if isinstance(op, Run):
        return name_rank_op(op)
    types = dict.fromkeys(
        (_typed(found, op.sender, op.leaves), _typed(found, op.receiver, op.arrives))
    )
    return f"{name_rank_op(op)}: {' as '.join(types)}"


def name_rank_op(op: RankOp) -> str:
    """The same without types."""
    time = "" if op.microbatch is None else f" microbatch {op.microbatch}"
    if isinstance(op, Run):
        return op.name + time
    sender, receiver = f"stage {op.sender}", f"stage {op.receiver}"
    if op.kind == "send":
        receiver += f" of rank {op.rank}"
    if op.kind == "receive":
        sender += f" of rank {op.rank}"
    values = " ".join(_values(op.values))
    return f"{op.kind} {op.phase} {values} from {sender} to {receiver}{time}"


def _typed(found: PipelineProgram, stage: int, shard: Shard) -> str:
    return f"{shard.local(found.meshes[stage], found.microbatches)} @ {show_shard(shard)}"
