"""The decisions of a program on a mesh, before anything is priced: what may be chosen, and who reads what how laid out.

A frame depends on the sizes of the mesh and on the microbatch count only through which axes divide which
sizes, so a search over both lays out few frames and prices each of them many times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Protocol

import numpy as np

from ..ir.graph import Op
from ..ir.microbatch import TimeAxis
from ..ir.program import Program
from ..ir.rule import NONE, Rule, Strategy, cuttable
from ..ir.rules import rule_of
from ..ir.sharding import Sharding, replicated
from .catalogue import Taken
from .cost.kernels import LEADERS, Kernels, spreads_scalar
from .layouts import Layouts

if TYPE_CHECKING:
    from .fused import Fused

Outer = tuple[str, bool]  # tag of the op itself or of the outermost loop around it; whether microbatches run it
RESULTS: Outer = ("", False)  # what the step gives back


@dataclass
class Decision:
    """`choices` are strategies (op) or layouts (slot); `members` the op tags that it settles."""

    tag: str
    choices: list[Strategy] | list[Sharding]
    members: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Home:
    """Where the layout of a value is decided: layout numbers per choice of a node.

    `node` is None for values that any device can make for itself (constants,
    masks): they lie replicated and slicing them is free.
    """

    node: int | None
    layouts: np.ndarray


@dataclass
class Reading:
    """One place where a value may change layout; `runs` by what decides how often."""

    value: int
    consumer: int | None
    phase: str
    runs: dict[Outer, float] = field(default_factory=lambda: defaultdict(float))


@dataclass(frozen=True, slots=True)
class Alike:
    """Tags of ops of equal cost, and one of the ops: by choice, how its operands and results lie (`sides`, a row
    each; `timed` where microbatches cut them) and which axes cut its work; whether it `settles` reductions."""

    tags: list[str]
    op: Op
    rule: Rule
    sides: np.ndarray
    timed: np.ndarray
    cuts: np.ndarray
    settles: bool


Place = tuple[int | None, int | None]  # the nodes that have a value and that read it


@dataclass(frozen=True, slots=True)
class Change:
    """From each layout that a value may have to each that is wanted; `late`: among the updates."""

    have: np.ndarray
    wanted: np.ndarray
    value: int
    late: bool


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
        found = [(i, numbers[outer], many) for i, each in enumerate(rows) for outer, many in each.items()]
        things, within, many = np.array(found).reshape(len(found), 3).T
        return cls(len(rows), things.astype(np.int64), within.astype(np.int64), many)

    def __call__(self, often: np.ndarray) -> np.ndarray:
        return np.bincount(self.things, self.times * often[self.outers], self.count)


@dataclass(frozen=True)
class Changes:
    """`sums[i]` is where a change, by number, counts; `runs` how often."""

    changes: list[Change]
    sums: list[tuple[Place, int]]
    runs: Runs

    def seconds(self, layouts: Layouts, nbytes: Sequence[float]) -> list[np.ndarray]:
        """Of one run of each change, from each layout to each; `nbytes` of each change's value.

        The moves of all changes lie one after another, those among the updates last.
        """
        order, shapes, starts, moves, late = self._laid_out(layouts)
        sizes = np.repeat(np.array(nbytes)[order], [rows * columns for rows, columns in shapes])
        flat = np.concatenate([layouts.line_seconds(moves[:late], sizes[:late], ""),
                               layouts.line_seconds(moves[late:], sizes[late:], "update")])  # fmt: skip
        found: list[np.ndarray] = [flat] * len(order)
        for number, start, (rows, columns) in zip(order.tolist(), starts, shapes, strict=True):
            found[number] = flat[start : start + rows * columns].reshape(rows, columns)
        return found

    def _laid_out(self, layouts: Layouts) -> tuple[np.ndarray, list[tuple[int, int]], list[int], np.ndarray, int]:
        """Of the changes in order: shapes, where each begins, all moves, and where those among the updates begin."""
        if "moves" not in self.__dict__:
            order = np.argsort([change.late for change in self.changes], kind="stable")
            tables = [layouts.moves(self.changes[k].have, self.changes[k].wanted) for k in order.tolist()]
            sizes = [table.size for table in tables]
            starts = [0, *accumulate(sizes)][: len(sizes)]
            late = sum(size for k, size in zip(order.tolist(), sizes, strict=True) if not self.changes[k].late)
            moves = np.concatenate([table.ravel() for table in tables]) if tables else np.zeros(0, np.int32)
            self.__dict__["moves"] = order, [table.shape for table in tables], starts, moves, late
        return self.__dict__["moves"]


Divides = tuple[int, bool]  # a size that axes may divide; whether microbatches cut it first


@dataclass(eq=False)
class Frame:
    """`wants[reader, k]` is the layout that the reader's operand k has, per choice; `readings` by source,
    reader and operand; `runs` of each op tag; `splits` the sets of axes that divide each size met."""

    program: Program
    cut: bool  # into more than one microbatch
    nodes: list[Decision] = field(default_factory=list)
    homes: dict[str, Home] = field(default_factory=dict)
    strategies: dict[str, list[Strategy]] = field(default_factory=dict)
    op_node: dict[str, int] = field(default_factory=dict)
    first: dict[str, tuple[Op, Rule]] = field(default_factory=dict)  # op tag -> one op that carries it
    taken: dict[str, Taken] = field(default_factory=dict)
    wants: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    readings: dict[tuple[str, str, int], Reading] = field(default_factory=dict)
    runs: dict[str, dict[Outer, float]] = field(default_factory=dict)
    splits: dict[Divides, int] = field(default_factory=dict)
    fused: dict[tuple[Kernels, int], Fused] = field(default_factory=dict)  # kept by `fused_of`
    _alike: dict[Kernels, list[Alike]] = field(default_factory=dict)

    def serves(self, layouts: Layouts, microbatches: int) -> bool:
        """Whether the choices are the same on that mesh with so many microbatches."""
        if self.cut != (microbatches > 1):
            return False
        return all(
            layouts.split(size, microbatches if timed else 1) == known
            for (size, timed), known in self.splits.items()
        )

    def alike(self, kernels: Kernels) -> list[Alike]:
        """Ops that cost the same, choice by choice, on any mesh."""
        if kernels not in self._alike:
            found: dict[tuple, list[str]] = defaultdict(list)
            tags, types = self.program.value_tags, self.program.graph.types
            for tag, (op, rule) in self.first.items():
                sides = [self.wants[tag, k].tobytes() for k in range(len(op.inputs))]
                sides += [self.homes[tags[v]].layouts.tobytes() for v in op.outputs]
                timed = tuple(self.parts(v, 2) for v in (*op.inputs, *op.outputs))
                cuts = self.taken[tag].cuts.tobytes()
                found[op.kind, id(rule), kernels.form(op, types), timed, cuts, *sides].append(tag)
            self._alike[kernels] = [self._one_of(group) for group in found.values()]
        return self._alike[kernels]

    def _one_of(self, group: list[str]) -> Alike:
        (op, rule), tags = self.first[group[0]], self.program.value_tags
        wanted = [self.wants[group[0], k] for k in range(len(op.inputs))]
        made = [self.homes[tags[v]].layouts for v in op.outputs]
        timed = np.array([self.parts(v, 2) > 1 for v in (*op.inputs, *op.outputs)])
        settles = any(factor.reduction not in ("", "sum") for factor in rule.factors)
        sides, cuts = np.stack([*wanted, *made]), self.taken[group[0]].cuts
        return Alike(group, op, rule, sides, timed[:, None], cuts, settles)

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

    @cached_property
    def changes(self) -> Changes:
        """The readings that cost something, those of equal price and place added up."""
        numbers: dict[tuple, int] = {}
        changes: list[Change] = []
        sums: dict[tuple[Place, int], dict[Outer, float]] = {}
        for (source, reader, k), reading in self.readings.items():
            home, wanted, late = self.homes[source], self.wants[reader, k], reading.phase == "update"
            place = home.node, reading.consumer
            if place == (None, None) or (place[0] == place[1] and np.array_equal(home.layouts, wanted)):
                continue
            kind, parts = self.program.graph.types[reading.value], self.parts(reading.value, 2)
            key = home.layouts.tobytes(), wanted.tobytes(), kind, parts, late
            if key not in numbers:
                numbers[key] = len(changes)
                changes.append(Change(home.layouts, wanted, reading.value, late))
            times = sums.setdefault((place, numbers[key]), defaultdict(float))
            for outer, many in reading.runs.items():
                times[outer] += many
        return Changes(changes, list(sums), Runs.of(sums.values(), self.outers))

    def parts(self, value: int, microbatches: int) -> int:
        """Into how many parts microbatches cut a value."""
        time = self.program.time
        return microbatches if isinstance(time, TimeAxis) and value in time.split else 1


class Decided(Protocol):
    """Decisions already made: the one strategy of each op, the order in which its axes cut one dim
    (empty: the mesh's), the one layout of each slot."""

    def strategy(self, op: Op, rule: Rule) -> Strategy: ...

    def order(self, op: Op) -> tuple[str, ...]: ...

    def layout(self, tag: str, value: int) -> Sharding: ...


def frame_of(program: Program, microbatches: int, layouts: Layouts, decided: Decided | None = None) -> Frame:
    """Lay out the decisions of a prepared graph on the mesh of `layouts`; kept for meshes and counts that
    leave the same choices."""
    if decided is not None:
        return _Walk(program, microbatches, layouts, decided).run()
    known = layouts.catalogue.frames.setdefault(program, [])
    for frame in known:
        if frame.serves(layouts, microbatches):
            return frame
    known.append(_Walk(program, microbatches, layouts, None).run())
    return known[-1]


class _Walk:
    """Walks the graph once. Ops of equal tag share everything but the number of runs, so each tag is
    looked at once."""

    def __init__(self, program: Program, microbatches: int, layouts: Layouts, decided: Decided | None):
        self.frame = Frame(program, microbatches > 1)
        self.program, self.microbatches, self.layouts, self.decided = program, microbatches, layouts, decided
        self.graph, self.types, self.tags = program.graph, program.graph.types, program.value_tags
        self.time = program.time if isinstance(program.time, TimeAxis) else None
        self.outer = RESULTS

    def run(self) -> Frame:
        for value in self.graph.inputs:
            if self.tags[value] not in self.frame.homes:
                self._slot(self.tags[value], value)
        for constant in self.graph.constants:
            self._free(constant.value)
        for position, op in enumerate(self.graph.ops):
            self.outer = op.tag, self.time is not None and position in self.time.body
            self._op(op, op.count, self.program.phases[position])
        self.outer = RESULTS
        self._outputs()
        return self.frame

    def _op(self, op: Op, runs: float, phase: str) -> None:
        if op.kind == "scan":
            self._scan(op, runs, phase)
        elif op.kind == "optimization_barrier":
            for source, result in zip(op.inputs, op.outputs, strict=True):
                self.frame.homes[self.tags[result]] = self._home(source)
        elif op.tag not in self.frame.op_node and self._is_free(op):
            for value in op.outputs:
                self._free(value)
            self._settle_scalar(op, runs, phase)
        else:
            self._count(op, runs, phase)

    def _count(self, op: Op, runs: float, phase: str) -> None:
        if op.tag not in self.frame.op_node:
            rule = rule_of(op, self.types)
            self.frame.first[op.tag] = (op, rule)
            self.frame.runs[op.tag] = defaultdict(float)
            self._decide(op, rule)
        self.frame.runs[op.tag][self.outer] += runs
        for k, value in enumerate(op.inputs):
            self._read(value, op.tag, k, self.frame.op_node[op.tag], runs, phase)

    def _read(
        self, value: int, reader: str, k: int, node: int | None, runs: float, phase: str
    ) -> None:
        key = (self.tags[value], reader, k)
        self.frame.readings.setdefault(key, Reading(value, node, phase)).runs[self.outer] += runs

    def _is_free(self, op: Op) -> bool:
        """Cheap and made from constants or one scalar alone: every device can make its own."""
        made = op.kind not in LEADERS and all(self._home(v).node is None for v in op.inputs)
        return made or spreads_scalar(op, self.types)

    def _settle_scalar(self, op: Op, runs: float, phase: str) -> None:
        """A scalar that is spread must be known everywhere: no sum owed."""
        for k, value in enumerate(op.inputs):
            home = self._home(value)
            if home.node is not None:
                whole = self.layouts.number(replicated(self.types[value].rank))
                self.frame.wants[op.tag, k] = np.full(len(home.layouts), whole)
                self._read(value, op.tag, k, home.node, runs, phase)

    def _free(self, value: int) -> None:
        layout = self.layouts.numbers([replicated(self.types[value].rank)])
        self.frame.homes.setdefault(self.tags[value], Home(None, layout))

    def _home(self, value: int) -> Home:
        return self.frame.homes[self.tags[value]]

    # ------------------------------------------------------------ nodes

    def _slot(self, tag: str, value: int, owed: bool = False) -> int:
        shape = list(self.types[value].shape)
        dim = self._split_dim(value)
        for d, size in enumerate(shape):
            self._divides(size, d == dim)
        if dim is not None:
            shape[dim] //= self.microbatches
        choices, numbers = self.layouts.slot(tuple(shape), owed)
        if self.decided:
            choices = [self.decided.layout(tag, value)]
            numbers = self.layouts.numbers(choices)
        node = self._node(Decision(tag, choices))
        self.frame.homes[tag] = Home(node, numbers)
        return node

    def _divides(self, size: int, timed: bool) -> None:
        """The choices depend on what divides this size."""
        if (size, timed) not in self.frame.splits:
            self.frame.splits[size, timed] = self.layouts.split(size, self.microbatches if timed else 1)

    def _node(self, node: Decision) -> int:
        self.frame.nodes.append(node)
        return len(self.frame.nodes) - 1

    def _split_dim(self, value: int) -> int | None:
        return self.time.split.get(value) if self.time and self.microbatches > 1 else None

    def _decide(self, op: Op, rule: Rule) -> None:
        """Let the op follow one of its operands, or make it a node."""
        if self.decided:
            taken = self.layouts.only(rule, self.decided.strategy(op, rule), self.decided.order(op))
            self._settle(op, self._node(Decision(op.tag, taken.strategies)), taken)
            return
        time = self._time_factors(op, rule)
        for f in cuttable(rule):
            if f not in time:
                self._divides(rule.factors[f].size, False)
        if op.kind not in LEADERS and any(
            self._try_follow(op, rule, k, time) for k in self._by_size(op)
        ):
            return
        taken = self.layouts.taken(rule, time)
        if op.kind == "copy":
            taken = taken.at(np.array([min(s.axes) >= NONE for s in taken.strategies]))
        node = self._node(Decision(op.tag, taken.strategies))
        self._settle(op, node, taken)

    def _time_factors(self, op: Op, rule: Rule) -> dict[int, int]:
        """The factor that is already cut into microbatches."""
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            dim = self._split_dim(value)
            if dim is not None:
                lead = next((f for f in dims[dim] if rule.factors[f].size > 1), None)
                if lead is None:
                    return {}
                self._divides(rule.factors[lead].size, True)
                return {lead: self.microbatches}
        return {}

    def _by_size(self, op: Op) -> list[int]:
        """Operands worth following: decided somewhere, the largest and latest first."""
        decided = [i for i, v in enumerate(op.inputs) if self._home(v).node is not None]
        return sorted(decided, key=lambda i: (-self.types[op.inputs[i]].size, -op.inputs[i]))

    def _try_follow(self, op: Op, rule: Rule, operand: int, time: dict[int, int]) -> bool:
        home = self._home(op.inputs[operand])
        assert home.node is not None
        node = self.frame.nodes[home.node]
        if self.types[op.outputs[0]].size > self.types[op.inputs[operand]].size:
            return False  # a broadcast may be cut in dims that its operand does not have
        taken, matched = self.layouts.followed(rule, operand, home.layouts, time)
        if not matched.all():
            if not np.all(_carries_sum(node)[~matched]):
                return False
            self._drop(home.node, matched)
        self._settle(op, home.node, taken)
        return True

    def _drop(self, number: int, keep: np.ndarray) -> None:
        """Give up choices of a node that one of its followers cannot take."""
        frame, node = self.frame, self.frame.nodes[number]
        node.choices = [c for c, k in zip(node.choices, keep, strict=True) if k]  # type: ignore[assignment]
        for tag, home in frame.homes.items():
            if home.node == number:
                frame.homes[tag] = Home(number, home.layouts[keep])
        for tag in node.members:
            self.frame.taken[tag] = self.frame.taken[tag].at(keep)
            frame.strategies[tag] = self.frame.taken[tag].strategies
            for k in range(len(self.frame.first[tag][0].inputs)):
                self.frame.wants[tag, k] = self.frame.wants[tag, k][keep]

    def _settle(self, op: Op, node: int, taken: Taken) -> None:
        self.frame.taken[op.tag] = taken
        self.frame.strategies[op.tag] = taken.strategies
        self.frame.op_node[op.tag] = node
        self.frame.nodes[node].members.append(op.tag)
        for k, value in enumerate(op.outputs):
            self.frame.homes[self.tags[value]] = Home(node, taken.numbers[len(op.inputs) + k])
        for k in range(len(op.inputs)):
            self.frame.wants[op.tag, k] = taken.numbers[k]

    # ------------------------------------------------------------ loops and outputs

    def _scan(self, op: Op, runs: float, phase: str) -> None:
        region = op.regions[0]
        consts, carry = int(op.attr("num_consts")), int(op.attr("num_carry"))  # type: ignore[arg-type]
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            tag = f"{op.tag}/in{i}"
            if tag not in self.frame.homes:
                self._slot(tag, inside)
            home = self.frame.homes[tag]
            self.frame.wants[tag, 0] = self._lifted(home) if i >= consts + carry else home.layouts
            self._read(outside, tag, 0, home.node, runs, phase)
        for inner in region.ops:
            self._op(inner, runs * op.trips, phase)
        for i, (result, inside) in enumerate(zip(op.outputs, region.outputs, strict=True)):
            tag = f"{op.tag}/in{consts + i}" if i < carry else f"{op.tag}/out{i}"
            if tag not in self.frame.homes:
                self._slot(tag, inside, owed=phase == "backward")
            home = self.frame.homes[tag]
            self.frame.wants[tag, 1] = home.layouts
            self._read(inside, tag, 1, home.node, runs * op.trips, phase)
            layouts = home.layouts if i < carry else self._lifted(home)
            self.frame.homes[self.tags[result]] = Home(home.node, layouts)

    def _lifted(self, home: Home) -> np.ndarray:
        """Layouts of the stacked tensor: the loop's dim stays whole."""
        known = [self.layouts.known[n] for n in home.layouts]
        return self.layouts.numbers([Sharding(((), *k.dims), k.partial) for k in known])

    def _outputs(self) -> None:
        """Carried state returns to the layout it came in; everything else settles its sums."""
        source = {o: i for i, o in self.graph.state}
        for position, value in enumerate(self.graph.outputs):
            if position in source:
                entry = self.graph.inputs[source[position]]
                tag = self.tags[entry]
                count = self.graph.input_counts[source[position]] if self.graph.input_counts else 1
                self.frame.wants[tag, 0] = self.frame.homes[tag].layouts
                self._read(value, tag, 0, self.frame.homes[tag].node, count, "update")
            elif self._home(value).node is not None:
                home, name = self._home(value), self.graph.output_name(position)
                known = [self.layouts.known[n] for n in home.layouts]
                self.frame.wants[name, 0] = self.layouts.numbers([Sharding(k.dims) for k in known])
                self._read(value, name, 0, home.node, 1, "update")


def _carries_sum(node: Decision) -> np.ndarray:
    """Which choices of a node take in a sum that is still owed."""
    return np.array(
        [isinstance(c, Strategy) and min(c.axes, default=0) < NONE for c in node.choices]
    )
