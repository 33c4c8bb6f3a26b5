"""What a program asks to be decided and who reads what, in order: all of it that no mesh changes.

Walked once for a program; `frame.py` goes through the steps on each mesh. Ops of equal tag share everything but
the number of runs, so each tag is one step.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Literal

import numpy as np

from ...ir.graph import Op
from ...ir.passes.copies import settles
from ...ir.passes.microbatch import WHOLE, TimeAxis, time_factor, timed_sides
from ...ir.program import Program
from ...ir.rules import rule_of
from ...ir.rules.factors import FLOATS
from ...ir.rules.rule import Rule, cuttable
from ..cost.compute import Terms
from ..cost.kernels import LEADERS, Kernels, spreads_scalar

Outer = tuple[
    str, bool
]  # tag of the op itself or of the outermost loop around it; whether microbatches run it
RESULTS: Outer = ("", False)  # what the step gives back
Divides = tuple[int, bool]  # a size that axes may divide; whether microbatches cut it first
How = Literal[
    "as it lies", "lifted", "settled", "whole"
]  # lifted: under a loop's dim; settled: no sum is owed


@dataclass(frozen=True, slots=True)
class Slot:
    """An input of the step or a boundary of a loop; `dims` by number in `divides`. It may owe a sum if `owed`."""

    tag: str
    value: int
    dims: tuple[int, ...]
    owed: bool


@dataclass(frozen=True, slots=True)
class Free:
    """A value that every device makes for itself."""

    tag: str
    rank: int


@dataclass(frozen=True, slots=True)
class Named:
    """A value that lies as another does."""

    tag: str
    source: str
    how: How


@dataclass(frozen=True, slots=True)
class Decides:
    """The first op of a tag: tags of its operands and results, `cuts` the factors that may be cut or are cut in
    time, and codes of joints, each with the number of what divides it, `follows` the operands that it may follow, best
    first; which sides are cut in time (`timed`)."""

    op: Op
    rule: Rule
    operands: tuple[str, ...]
    results: tuple[str, ...]
    cuts: tuple[tuple[int, int], ...]
    follows: tuple[int, ...]
    timed: tuple[bool, ...]


ADDING = ("add", "add_any", "convert_element_type", "copy")  # what a sum that is owed goes through
SELDOM = 0.01  # how often branches count that are not the dearest: enough that they are laid out with care


def often(op: Op, number: int) -> float:
    """How often a region counts in each run of its op."""
    return op.runs(number) or SELDOM


Step = Slot | Free | Named | Decides


@dataclass(frozen=True, slots=True)
class Reading:
    """One place where a value may change layout; `at` is a value decided where it is read; `runs` by what
    decides how often."""

    value: int
    at: str
    phase: str
    runs: dict[Outer, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, slots=True)
class Runs:
    """How often each of many things runs, from how often each outer does."""

    count: int
    things: np.ndarray
    outers: np.ndarray
    times: np.ndarray  # that thing `things[i]` runs per run of outer `outers[i]`

    @classmethod
    def of(cls, times: Iterable[Mapping[Outer, float]], outers: list[Outer]) -> Runs:
        numbers, rows = {outer: k for k, outer in enumerate(outers)}, list(times)
        found = [
            (i, numbers[outer], many) for i, each in enumerate(rows) for outer, many in each.items()
        ]
        things, within, many = np.array(found).reshape(len(found), 3).T
        return cls(len(rows), things.astype(np.int64), within.astype(np.int64), many)

    def __call__(self, often: np.ndarray) -> np.ndarray:
        return np.bincount(self.things, self.times * often[self.outers], self.count)


@dataclass(eq=False)
class Outline:
    """`readings` by source, reader and operand; `wanted` says of readers that decide nothing, by operand, how it lies
    there: as a source does, or nearly; `runs` of each op tag; `divides` every size met, by number."""

    program: Program
    cut: bool  # into more than one microbatch
    steps: list[Step] = field(default_factory=lambda: [])
    wanted: dict[tuple[str, int], tuple[str, How]] = field(default_factory=lambda: {})
    readings: dict[tuple[str, str, int], Reading] = field(default_factory=lambda: {})
    runs: dict[str, dict[Outer, float]] = field(default_factory=lambda: {})
    divides: dict[Divides, int] = field(default_factory=lambda: {})
    # Kept by `fused_of`.
    terms: dict[tuple[Kernels, int], dict[int, Terms | None]] = field(default_factory=lambda: {})
    _forms: dict[Kernels, dict[str, int]] = field(default_factory=lambda: {})

    def parts(self, value: int, microbatches: int) -> int:
        """Into how many parts microbatches cut a value."""
        time = self.program.time
        return microbatches if isinstance(time, TimeAxis) and value in time.split else 1

    def forms(self, kernels: Kernels) -> dict[str, int]:
        """By op tag, equal for ops that cost the same if they are cut alike."""
        if kernels not in self._forms:
            types, numbers = self.program.graph.types, dict[object, int]()
            self._forms[kernels] = {}
            for step in self.decides:
                op = step.op
                form = op.kind, id(step.rule), kernels.form(op, types), step.timed
                self._forms[kernels][op.tag] = numbers.setdefault(form, len(numbers))
        return self._forms[kernels]

    @cached_property
    def decides(self) -> list[Decides]:
        return [step for step in self.steps if isinstance(step, Decides)]

    @cached_property
    def outers(self) -> list[Outer]:
        """Everything that decides how often something runs."""
        times = (*self.runs.values(), *(reading.runs for reading in self.readings.values()))
        return list(dict.fromkeys(outer for each in times for outer in each))

    @cached_property
    def op_runs(self) -> Runs:
        """Of each op, `runs` in order."""
        return Runs.of(self.runs.values(), self.outers)

    @cached_property
    def reading_runs(self) -> Runs:
        """Of each of `readings`."""
        return Runs.of((reading.runs for reading in self.readings.values()), self.outers)


@lru_cache(maxsize=16)
def outline_of(program: Program, cut: bool) -> Outline:
    """Walk a prepared graph; a search asks for those of a few graphs again and again."""
    return _Walk(program, cut).run()


def _round(op: Op, rule: Rule) -> tuple[int, ...]:
    """Factors that may be cut with keys alone, which are asked to go round."""
    joints = rule.joints if op.has("round") else ()
    return tuple(f for joint in joints for f in joint.factors)


class _Walk:
    def __init__(self, program: Program, cut: bool):
        self.outline, self.program = Outline(program, cut), program
        self.graph, self.types, self.tags = program.graph, program.graph.types, program.value_tags
        self.time = program.time if isinstance(program.time, TimeAxis) else None
        self.free: dict[str, bool] = {}  # by value tag, of all values met
        self.decided: set[str] = set()
        self.named: dict[str, Named] = {}
        self.spread: dict[
            tuple[str, str], int
        ] = {}  # tags of an op and of a scalar that it spreads -> a number
        self.outer = RESULTS

    def run(self) -> Outline:
        for value in self.graph.inputs:
            self._slot(self.tags[value], value)
        for constant in self.graph.constants:
            self._free(constant.value)
        for position, op in enumerate(self.graph.ops):
            self.outer = op.tag, self.time is not None and position in self.time.body
            self._op(op, op.count, self.program.phases[position])
        self.outer = RESULTS
        self._outputs()
        return self.outline

    def _op(self, op: Op, runs: float, phase: str) -> None:
        if op.regions:
            self._regions(op, runs, phase)
        elif op.kind == "optimization_barrier":
            for source, result in zip(op.inputs, op.outputs, strict=True):
                self._name(Named(self.tags[result], self.tags[source], "as it lies"))
        elif op.tag not in self.decided and self._is_free(op):
            for value in op.outputs:
                self._free(value)
            self._spread(op, runs, phase)
        else:
            self._count(op, runs, phase)

    def _count(self, op: Op, runs: float, phase: str) -> None:
        if op.tag not in self.decided:
            self._decide(op)
        self.outline.runs[op.tag][self.outer] += runs
        for k, value in enumerate(op.inputs):
            self._read(value, op.tag, k, self.tags[op.outputs[0]], runs, phase)

    def _read(self, value: int, reader: str, k: int, at: str, runs: float, phase: str) -> None:
        key = (self.tags[value], reader, k)
        known = self.outline.readings.setdefault(key, Reading(value, at, phase))
        known.runs[self.outer] += runs

    def _is_free(self, op: Op) -> bool:
        """Cheap and made from constants or one scalar alone: every device can make its own."""
        made = op.kind not in LEADERS and all(self.free[self.tags[v]] for v in op.inputs)
        return made or spreads_scalar(op, self.types)

    def _spread(self, op: Op, runs: float, phase: str) -> None:
        """A scalar that is spread must be known everywhere: no sum owed. Each layer may spread that of another op."""
        for value in op.inputs:
            tag = self.tags[value]
            if not self.free[tag]:
                k = self.spread.setdefault((op.tag, tag), len(self.spread))
                self.outline.wanted[op.tag, k] = tag, "whole"
                self._read(value, op.tag, k, tag, runs, phase)

    def _free(self, value: int) -> None:
        tag = self.tags[value]
        if tag not in self.free:
            self.free[tag] = True
            self.outline.steps.append(Free(tag, self.types[value].rank))

    def _name(self, named: Named) -> None:
        if self.named.get(named.tag) != named:
            self.named[named.tag], self.free[named.tag] = named, self.free[named.source]
            self.outline.steps.append(named)

    # ------------------------------------------------------------ nodes

    def _slot(self, tag: str, value: int, owed: bool = False) -> None:
        if tag in self.free:
            return
        dim = self._split_dim(value)
        dims = tuple(self._divide(size, d == dim) for d, size in enumerate(self.types[value].shape))
        self.free[tag] = False
        self.outline.steps.append(Slot(tag, value, dims, owed))

    def _divide(self, size: int, timed: bool) -> int:
        """The number of a size: the choices depend on what divides it."""
        return self.outline.divides.setdefault((size, timed), len(self.outline.divides))

    def _split_dim(self, value: int) -> int | None:
        return self.time.split.get(value) if self.time and self.outline.cut else None

    def _decide(self, op: Op) -> None:
        rule, types = rule_of(op, self.types), self.types
        lead = self._time_factor(op, rule)
        able = [f for f in cuttable(rule) if f == lead or f not in _round(op, rule)]
        cuts = {f: self._divide(rule.factors[f].size, f == lead) for f in able}
        for code, joint in enumerate(rule.joints, len(rule.factors)):
            if lead not in joint.factors:
                cuts[code] = self._divide(joint.divides, False)
        if lead is not None:
            cuts.setdefault(lead, self._divide(rule.factors[lead].size, True))
        follows = [] if op.kind in LEADERS else self._by_size(op)
        # a broadcast may be cut in dims that its operand does not have
        follows = [k for k in follows if types[op.outputs[0]].size <= types[op.inputs[k]].size]
        operands, results = (tuple(self.tags[v] for v in side) for side in (op.inputs, op.outputs))
        self.outline.steps.append(
            Decides(
                op,
                rule,
                operands,
                results,
                tuple(cuts.items()),
                tuple(follows),
                self._timed(op, rule),
            )
        )
        self.outline.runs[op.tag] = defaultdict(float)
        self.decided.add(op.tag)
        self.free.update(dict.fromkeys(results, False))

    def _time_factor(self, op: Op, rule: Rule) -> int | None:
        """The factor that is already cut into microbatches; an op that sees the whole batch has none."""
        if self.time is None or not self.outline.cut or op.tag.endswith(WHOLE):
            return None
        return time_factor(op, rule, self.time.split)

    def _timed(self, op: Op, rule: Rule) -> tuple[bool, ...]:
        split: Mapping[int, int] = self.time.split if self.time else {}
        _, in_body = self.outer
        if in_body:
            return timed_sides(op, rule, split)
        return tuple(v in split for v in (*op.inputs, *op.outputs))

    def _by_size(self, op: Op) -> list[int]:
        """Operands worth following: decided somewhere, the largest and latest first.

        Gradients that microbatches add up may owe their sum as long as they do, and then be settled at once.
        """
        added = self.added if self.outline.cut else ()
        decided = [
            i for i, v in enumerate(op.inputs) if not self.free[self.tags[v]] and v not in added
        ]
        return sorted(decided, key=lambda i: (-self.types[op.inputs[i]].size, -op.inputs[i]))

    @cached_property
    def added(self) -> frozenset[int]:
        """Gradients of weights, behind the copies that may settle their sums."""
        copies = (op for op in self.program.graph.ops if settles(op))
        return frozenset(v for op in copies for v in op.outputs)

    # ------------------------------------------------------------ loops and outputs

    def _regions(self, op: Op, runs: float, phase: str) -> None:
        """A slot for each operand and each result, the same in all regions; what is carried on shares its two.

        What decides about branches and turns is one number, whose slot is whole and owes nothing. So all devices
        read the same bits and go the same way, and collectives in there meet.
        """
        consts, carry = op.loop_inputs
        for i, outside in enumerate(op.inputs):
            tag, owed = f"{op.tag}/in{i}", self._adds_up(op, i)
            self._slot(tag, op.regions[0].inputs[i], owed)
            how: How = "lifted" if i >= consts + carry else "settled" if owed else "as it lies"
            self.outline.wanted[tag, 0] = tag, how
            self._read(outside, tag, 0, tag, runs, phase)
        for number, region in enumerate(op.regions):
            for inner in region.ops:
                self._op(inner, runs * often(op, number), phase)
            self._ends(op, number, runs * often(op, number), phase)
        for i, result in enumerate(op.outputs):
            rows = op.kind == "scan" and i >= carry
            self._name(
                Named(self.tags[result], self._end(op, i), "lifted" if rows else "as it lies")
            )

    def _adds_up(self, op: Op, i: int) -> bool:
        """Whether a carry starts as what any device can make (zeros) and is nothing but added to: a gradient of
        weights, a loss. It may owe its sum through the loop: of what it starts as, the first device counts all."""
        region, (consts, carry) = op.regions[-1], op.loop_inputs
        if (
            op.kind == "cond"
            or not consts <= i < consts + carry
            or not self.free[self.tags[op.inputs[i]]]
        ):
            return False
        value, end = region.inputs[i], region.outputs[i - consts]
        while value != end and self.types[value].dtype in FLOATS:
            readers = [inner for inner in region.ops if value in inner.inputs]
            if len(readers) != 1 or value in region.outputs or readers[0].kind not in ADDING:
                return False
            value = readers[0].outputs[0]
        return (
            value != region.inputs[i]
            and self.types[value].dtype in FLOATS
            and region.outputs.count(end) == 1
        )

    def _ends(self, op: Op, number: int, runs: float, phase: str) -> None:
        region = op.regions[number]
        for i, inside in enumerate(region.outputs):
            tag = self._end(op, i) if region in op.returning else f"{op.tag}/on"
            kind = op.outputs[i] if op.kind == "cond" else inside
            self._slot(tag, kind, owed=phase == "backward" and region in op.returning)
            self.outline.wanted[tag, 1 + number] = (
                tag,
                "settled" if self.free[self.tags[inside]] else "as it lies",
            )
            self._read(inside, tag, 1 + number, tag, runs, phase)

    def _end(self, op: Op, i: int) -> str:
        consts, carry = op.loop_inputs
        return f"{op.tag}/in{consts + i}" if i < carry else f"{op.tag}/out{i}"

    def _outputs(self) -> None:
        """Carried state returns to the layout it came in; everything else settles its sums."""
        entries = {o: i for i, o in self.graph.state}
        for position, value in enumerate(self.graph.outputs):
            source = self.tags[value]
            if position in entries:
                tag = self.tags[self.graph.inputs[entries[position]]]
                count = self.graph.input_counts[entries[position]] if self.graph.input_counts else 1
                self.outline.wanted[tag, 0] = tag, "as it lies"
                self._read(value, tag, 0, tag, count, "update")
            elif not self.free[source]:
                name = self.graph.output_name(position)
                self.outline.wanted[name, 0] = source, "settled"
                self._read(value, name, 0, source, 1, "update")
