"""The graph of one training step: flat SSA with loop regions.

Everything else (rules, planner, backends) speaks about these few types. They
know no solver and no framework, and every one of them is frozen.

    graph {
      in  %0 w: f32[16, 4] %1 x: f32[8, 16]
      %2: f32[8, 4] = dot_general %1 %0 ...
      out %2
    }
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Literal

from .attrs import Attr, Attributed

ITEM_BYTES = {
    "bool": 1, "s4": 1, "u4": 1, "s8": 1, "u8": 1, "s16": 2, "u16": 2, "s32": 4, "u32": 4,
    "s64": 8, "u64": 8, "f8e4m3fn": 1, "f8e5m2": 1, "bf16": 2, "f16": 2, "f32": 4, "f64": 8,
    "c64": 8, "c128": 16, "key": 8, "token": 0,
}  # fmt: skip

TURNS = 10  # that a while counts as, as nobody knows: more than one, since what is inside repeats


@dataclass(frozen=True, slots=True)
class TensorType:
    """Element type and shape: `TensorType("f32", (8, 4))` prints `f32[8, 4]`."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def rank(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.size * ITEM_BYTES[self.dtype]

    @property
    def is_float(self) -> bool:
        """Whether it holds real or complex numbers."""
        return self.dtype.startswith(("f", "bf", "c"))

    def __str__(self) -> str:
        return f"{self.dtype}[{', '.join(map(str, self.shape))}]"


@dataclass(frozen=True, slots=True)
class Region:
    """The body of a loop or branch: its own inputs, ops and outputs.

    Value ids are unique over the whole graph, so a region never shadows. It
    reads only its own inputs, its own results and the graph's constants.
    """

    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Op(Attributed):
    """One operation: `outputs = kind(inputs, **attrs)`.

    `attrs` is a sorted tuple of (name, value), hashable and JSON-able, in words of no framework;
    it is enough to know the op's dim rule. They are read by type: `op.integers("permutation")`.
    `where` is the user's `file:line`. `fold` gives ops at the same place of repeated layers one
    `tag`; in a folded graph an op stands for `count` ops of the whole one.
    Loops and branches are ops too. Their regions have an input for each operand, in order:

        scan   consts + carry + xs -> carry + ys    attrs `length`, `num_consts`, `num_carry`, `reverse`
        while  consts + carry -> carry              two regions: whether to go on, and one turn
        cond   index + operands -> results          a region per branch; attr `dearest`: which does most work
    """

    kind: str
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    attrs: tuple[tuple[str, Attr], ...] = ()
    regions: tuple[Region, ...] = ()
    where: str = ""
    tag: str = ""
    count: int = 1

    @property
    def loop_inputs(self) -> tuple[int, int]:
        """How many inputs stay the same in every turn, and how many are carried on; what follows is taken in rows."""
        if self.kind == "cond":
            return len(self.inputs), 0
        return self.integer("num_consts"), self.integer("num_carry")

    @property
    def returning(self) -> tuple[Region, ...]:
        """The regions that end in the op's results: all but the condition of a while."""
        return self.regions[1:] if self.kind == "while" else self.regions

    def runs(self, number: int) -> int:
        """How often a region counts: as often as it runs; of branches one alone does, the dearest."""
        if self.kind == "while":
            return TURNS
        return int(self.integer("dearest") == number) if self.kind == "cond" else self.trips

    @property
    def trips(self) -> int:
        """How often the regions run: the length of a scan, else once."""
        return self.integer("length") if self.kind == "scan" else 1


def deciding(op: Op) -> tuple[int, ...]:
    """What says which branch is taken, or whether a loop goes on."""
    return (
        op.inputs[:1] if op.kind == "cond" else op.regions[0].outputs if op.kind == "while" else ()
    )


@dataclass(frozen=True, slots=True)
class Constant:
    """A value fixed at capture. Scalars carry their number; arrays live in the
    backend's binding and carry a content digest instead."""

    value: int
    data: bool | int | float | str


@dataclass(frozen=True, slots=True)
class Batch:
    """The dims of the inputs that are the batch: (input position, dim), by position.

    `evidence` says in words what speaks for it; `doubt` names dims for which as much does. `statistics` says over
    what batch norm and the like take theirs.
    """

    dims: tuple[tuple[int, int], ...]
    evidence: str = "told"
    doubt: str = ""
    statistics: Literal["batch", "microbatch"] = "batch"


@dataclass(frozen=True, slots=True)
class Visit:
    """One op met on a walk: its index in walk order, how many times it runs per
    step (trip counts around it, times `count`; none in a branch that is not the dearest),
    and the indices of the loops around it."""

    index: int
    op: Op
    times: int
    parents: tuple[int, ...]


@dataclass(frozen=True)
class Graph:
    """A whole step.

    Invariants (`verify` checks them): every value is defined once, before its
    uses; types cover every value; `state` pairs inputs and outputs of equal type.
    `batch` is None until it is told or `ir.batch` has inferred it.
    """

    types: Mapping[int, TensorType]
    inputs: tuple[int, ...]
    ops: tuple[Op, ...]
    outputs: tuple[int, ...]
    constants: tuple[Constant, ...] = ()
    input_names: tuple[str, ...] = ()
    output_names: tuple[str, ...] = ()
    state: tuple[tuple[int, int], ...] = ()  # (input position, output position) of carried state
    donated: frozenset[int] = frozenset()  # input positions
    input_tags: tuple[str, ...] = ()  # given by `fold`, like `Op.tag`
    input_counts: tuple[int, ...] = ()
    batch: Batch | None = None

    @cached_property
    def visits(self) -> tuple[Visit, ...]:
        """Every op, those inside regions right after their loop, with trip counts."""
        return tuple(_walk(self.ops, 1, (), [0]))

    @cached_property
    def constant_ids(self) -> frozenset[int]:
        return frozenset(c.value for c in self.constants)

    def input_name(self, position: int) -> str:
        return self.input_names[position] if self.input_names else f"input{position}"

    def output_name(self, position: int) -> str:
        return self.output_names[position] if self.output_names else f"output{position}"


def _walk(
    ops: tuple[Op, ...], times: int, parents: tuple[int, ...], next_index: list[int]
) -> Iterator[Visit]:
    for op in ops:
        index = next_index[0]
        next_index[0] += 1
        runs = times * op.count
        yield Visit(index, op, runs, parents)
        for number, region in enumerate(op.regions):
            yield from _walk(region.ops, runs * op.runs(number), (*parents, index), next_index)
