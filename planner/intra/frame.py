"""The decisions of a program on a mesh, before anything is priced: what may be chosen, and who reads what how laid out.

A frame depends on the sizes of the mesh and on the microbatch count only through which axes divide which
sizes, so a search over both lays out few frames and prices each of them many times.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Protocol

import numpy as np

from ...ir.graph import Op
from ...ir.passes.copies import SETTLING, settles
from ...ir.program import Program
from ...ir.rules.rule import NONE, Rule, Strategy
from ...ir.sharding import Sharding, replicated
from ..cost.kernels import Kernels
from .catalogue import StrategyTable
from .inside import may_send
from .layouts import Layouts
from .outline import Decides, Free, How, Named, Outline, Reading, Slot, outline_of
from .strategies import Splits


@dataclass
class Decision:
    """`choices` are strategies (op) or layouts (slot); `members` the op tags that it settles."""

    tag: str
    choices: list[Strategy] | list[Sharding]
    members: list[str] = field(default_factory=lambda: [])


@dataclass(frozen=True, slots=True)
class LayoutVariable:
    """Where the layout of a value is decided: layout numbers per choice of a node.

    `node` is None for values that any device can make for itself (constants,
    masks): they lie replicated and slicing them is free.
    """

    node: int | None
    layouts: np.ndarray


@dataclass(frozen=True, slots=True)
class CostClass:
    """Tags of ops of equal cost and form, and one of the ops: by choice, how its operands and results lie (`sides`,
    a row each; `timed` where microbatches cut them) and which axes cut its work; whether it `settles` reductions."""

    tags: list[str]
    form: int
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


@dataclass(frozen=True)
class Changes:
    """`sums[i]` is where a change, by number, counts; `sum_of` by reading, -1 where nothing changes."""

    changes: list[Change]
    sums: list[tuple[Place, int]]
    sum_of: np.ndarray

    def runs(self, read: np.ndarray) -> np.ndarray:
        """How often each of `sums` counts; `read`: how often each reading happens."""
        some = self.sum_of >= 0
        return np.bincount(self.sum_of[some], read[some], len(self.sums))

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

    def _laid_out(
        self, layouts: Layouts
    ) -> tuple[np.ndarray, list[tuple[int, int]], list[int], np.ndarray, int]:
        """Of the changes in order: shapes, where each begins, all moves, and where those among the updates begin."""
        if "moves" not in self.__dict__:
            order = np.argsort([change.late for change in self.changes], kind="stable")
            in_order: list[int] = order.tolist()
            tables = [layouts.moves(self.changes[k].have, self.changes[k].wanted) for k in in_order]
            sizes = [table.size for table in tables]
            starts = [0, *accumulate(sizes)][: len(sizes)]
            late = sum(
                size for k, size in zip(in_order, sizes, strict=True) if not self.changes[k].late
            )
            moves = (
                np.concatenate([table.ravel() for table in tables])
                if tables
                else np.zeros(0, np.int32)
            )
            self.__dict__["moves"] = order, [table.shape for table in tables], starts, moves, late
        return self.__dict__["moves"]


@dataclass(eq=False)
class Frame:
    """`wants[reader, k]` is the layout that the reader's operand k has, per choice; `splits` the sets of axes that
    divide each of the outline's sizes."""

    outline: Outline
    splits: tuple[int, ...]
    nodes: list[Decision] = field(default_factory=lambda: [])
    homes: dict[str, LayoutVariable] = field(default_factory=lambda: {})
    taken: dict[str, StrategyTable] = field(default_factory=lambda: {})
    op_node: dict[str, int] = field(default_factory=lambda: {})
    wants: dict[tuple[str, int], np.ndarray] = field(default_factory=lambda: {})
    memo: dict[object, Any] = field(default_factory=lambda: {})  # what others work out once of it
    _alike: dict[Kernels, list[CostClass]] = field(default_factory=lambda: {})

    @cached_property
    def strategies(self) -> dict[str, list[Strategy]]:
        """By op tag."""
        return {tag: taken.strategies for tag, taken in self.taken.items()}

    def reader(self, reading: Reading) -> int | None:
        """The node that reads."""
        return self.homes[reading.at].node

    def alike(self, kernels: Kernels) -> list[CostClass]:
        """Ops that cost the same, choice by choice, on any mesh."""
        if kernels not in self._alike:
            forms = self.outline.forms(kernels)
            found: dict[tuple[int, bytes, bytes], list[Decides]] = defaultdict(list)
            for step in self.outline.decides:
                taken = self.taken[step.op.tag]
                found[forms[step.op.tag], taken.numbers.tobytes(), taken.cuts.tobytes()].append(
                    step
                )
            self._alike[kernels] = [
                self._one_of(form, group) for (form, *_), group in found.items()
            ]
        return self._alike[kernels]

    def _one_of(self, form: int, group: list[Decides]) -> CostClass:
        op, rule, taken = group[0].op, group[0].rule, self.taken[group[0].op.tag]
        timed = np.array(group[0].timed)
        return CostClass(
            [s.op.tag for s in group],
            form,
            op,
            rule,
            taken.numbers,
            timed[:, None],
            taken.cuts,
            may_send(op, rule),
        )

    @cached_property
    def changes(self) -> Changes:
        """The readings that cost something, those of equal price and place added up."""
        changes, types = dict[object, tuple[int, Change]](), self.outline.program.graph.types
        sums, sum_of = dict[tuple[Place, int], int](), list[int]()
        for (source, reader, k), reading in self.outline.readings.items():
            home, wanted, late = (
                self.homes[source],
                self.wants[reader, k],
                reading.phase == "update",
            )
            place = home.node, self.reader(reading)
            if place == (None, None) or (
                place[0] == place[1] and np.array_equal(home.layouts, wanted)
            ):
                sum_of.append(-1)
                continue
            timed = self.outline.parts(reading.value, 2)
            key = home.layouts.tobytes(), wanted.tobytes(), types[reading.value], timed, late
            if key not in changes:
                changes[key] = len(changes), Change(home.layouts, wanted, reading.value, late)
            sum_of.append(sums.setdefault((place, changes[key][0]), len(sums)))
        return Changes(
            [change for _, change in changes.values()], list(sums), np.array(sum_of, np.int64)
        )


class Decided(Protocol):
    """Decisions already made: the one strategy of each op, the order in which its axes cut one dim
    (empty: the mesh's), the one layout of each slot."""

    def strategy(self, op: Op, rule: Rule) -> Strategy: ...

    def order(self, op: Op) -> tuple[str, ...]: ...

    def layout(self, tag: str, value: int) -> Sharding: ...


def frame_of(
    program: Program, microbatches: int, layouts: Layouts, decided: Decided | None = None
) -> Frame:
    """Lay out the decisions of a prepared graph on the mesh of `layouts`; kept for meshes and counts that
    leave the same choices."""
    outline = outline_of(program, microbatches > 1)
    splits = tuple(
        layouts.split(size, microbatches if timed else 1) for size, timed in outline.divides
    )
    if decided is not None:
        return _Deciding(outline, splits, layouts, decided).run()
    known: dict[tuple[int, ...], Frame] = layouts.catalogue.memo.setdefault(outline, {})
    if splits not in known:
        known[splits] = _Deciding(outline, splits, layouts, None).run()
    return known[splits]


class _Deciding:
    """Goes through the steps of an outline."""

    def __init__(
        self, outline: Outline, splits: tuple[int, ...], layouts: Layouts, decided: Decided | None
    ):
        self.frame, self.outline, self.splits = Frame(outline, splits), outline, splits
        self.layouts, self.catalogue, self.decided = layouts, layouts.catalogue, decided

    def run(self) -> Frame:
        for step in self.outline.steps:
            match step:
                case Decides():
                    self._decide(step)
                case Slot():
                    self._slot(step)
                case Free(tag, rank):
                    self.frame.homes[tag] = LayoutVariable(
                        None, self.catalogue.numbers([replicated(rank)])
                    )
                case Named(tag, source, how):
                    home = self.frame.homes[source]
                    self.frame.homes[tag] = LayoutVariable(home.node, self._seen(home, how))
        for (reader, k), (source, how) in self.outline.wanted.items():
            self.frame.wants[reader, k] = self._seen(self.frame.homes[source], how)
        return self.frame

    def _seen(self, home: LayoutVariable, how: How) -> np.ndarray:
        """The layouts of a value, or of what is made of it without moving anything but sums."""
        if how == "as it lies":
            return home.layouts
        numbers: list[int] = home.layouts.tolist()
        known = [self.catalogue.known[n] for n in numbers]
        match how:
            case "lifted":
                seen = [Sharding(((), *k.dims), k.partial) for k in known]
            case "settled":
                seen = [Sharding(k.dims) for k in known]
            case "whole":
                seen = [replicated(len(k.dims)) for k in known]
        return self.catalogue.numbers(seen)

    # ------------------------------------------------------------ nodes

    def _slot(self, step: Slot) -> None:
        choices, numbers = self.catalogue.slot(tuple(self.splits[d] for d in step.dims), step.owed)
        if self.decided:
            choices = [self.decided.layout(step.tag, step.value)]
            numbers = self.catalogue.numbers(choices)
        self.frame.homes[step.tag] = LayoutVariable(
            self._node(Decision(step.tag, choices)), numbers
        )

    def _node(self, node: Decision) -> int:
        self.frame.nodes.append(node)
        return len(self.frame.nodes) - 1

    def _decide(self, step: Decides) -> None:
        """Let the op follow one of its operands, or make it a node."""
        op, rule = step.op, step.rule
        if self.decided:
            taken = self.layouts.only(rule, self.decided.strategy(op, rule), self.decided.order(op))
        else:
            splits = {factor: self.splits[d] for factor, d in step.cuts}
            taken = self.catalogue.taken(rule, splits)
            if any(
                self._try_follow(step, k, splits)
                for k in step.follows
                if self._open(step, k, taken)
            ):
                return
            if op.kind == "copy" and not settles(op):
                taken = taken.at(np.array([min(s.axes) >= NONE for s in taken.strategies]))
        self._settle(step, self._node(Decision(op.tag, taken.strategies)), taken)

    def _open(self, step: Decides, operand: int, taken: StrategyTable) -> bool:
        """Whether following this operand leaves something to choose, where the op has a choice.

        Random bits that every device draws whole would keep whole whatever a mask of them meets.
        """
        node = self.frame.homes[step.operands[operand]].node
        assert node is not None
        return len(self.frame.nodes[node].choices) > 1 or len(taken.strategies) == 1

    def _try_follow(self, step: Decides, operand: int, splits: Splits) -> bool:
        home = self.frame.homes[step.operands[operand]]
        assert home.node is not None
        taken, matched = self.catalogue.followed(step.rule, operand, home.layouts, splits)
        if not matched.all():
            node = self.frame.nodes[home.node]
            if node.tag.endswith(SETTLING) or not np.all(_carries_sum(node)[~matched]):
                return False
            self._drop(home.node, matched)
        self._settle(step, home.node, taken)
        return True

    def _drop(self, number: int, keep: np.ndarray) -> None:
        """Give up choices of a node that one of its followers cannot take."""
        frame, node = self.frame, self.frame.nodes[number]
        node.choices = [c for c, k in zip(node.choices, keep, strict=True) if k]  # type: ignore[assignment]
        for tag, home in frame.homes.items():
            if home.node == number:
                frame.homes[tag] = LayoutVariable(number, home.layouts[keep])
        for tag in node.members:
            frame.taken[tag] = frame.taken[tag].at(keep)
            for k in range(len(frame.taken[tag].numbers)):
                if (tag, k) in frame.wants:
                    frame.wants[tag, k] = frame.taken[tag].numbers[k]

    def _settle(self, step: Decides, node: int, taken: StrategyTable) -> None:
        frame, tag, many = self.frame, step.op.tag, len(step.operands)
        frame.taken[tag], frame.op_node[tag] = taken, node
        frame.nodes[node].members.append(tag)
        for k, result in enumerate(step.results):
            frame.homes[result] = LayoutVariable(node, taken.numbers[many + k])
        for k in range(many):
            frame.wants[tag, k] = taken.numbers[k]


def _carries_sum(node: Decision) -> np.ndarray:
    """Which choices of a node take in a sum that is still owed."""
    return np.array(
        [isinstance(c, Strategy) and min(c.axes, default=0) < NONE for c in node.choices]
    )
