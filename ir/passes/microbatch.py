"""The time axis: which ops run once per microbatch, and where their sums are taken.

A microbatch is the batch factor cut over *time* instead of over devices. A
value that carries the factor exists once per microbatch (`split`, with the dim
it is cut in). Contracting the factor leaves a sum over time (`totals`), which
is gradient accumulation. What uses totals (clipping, optimizer) runs once, after.

    before   ops that see no microbatch             casts of parameters, early totals
    body     ops on split values                    forward, backward
    after    ops on totals                          clipping, optimizer

An op of the body that needs a total cannot run before the last microbatch has
(batch norm). Such a graph has no time axis, and `Refusal` names the op. Totals of the
inputs alone are taken early (`early.py`): a copy then shows the whole batch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from math import gcd, lcm

from ..analysis import refusals
from ..analysis.refusals import Refusal
from ..graph import Graph, Op, Region, deciding
from ..mesh import Mesh
from ..ops import ELEMENTWISE
from ..rules import rule_of
from ..rules.rule import Factor, Rule, cuttable
from .copies import settles

_MADE_ANYWHERE = ELEMENTWISE - {"copy"} | {"broadcast_in_dim"}
ESTIMATED, AVERAGED = "estimated", "averaged"  # see `batch_stats.py`
WHOLE = "~whole~prepare"  # ends the tag of a copy that shows all microbatches of an input at once


@dataclass(frozen=True)
class TimeAxis:
    """`split`: value -> dim cut over time. `totals`: value -> reduction that joins its
    parts ("sum", "max", ...). `body`: positions of top-level ops run per microbatch.
    `batch`: the size of the factor. `parts`: equal runs of neighbours into which every value's dim can be cut, fewer
    where examples are taken in groups (`x.reshape(4, 4)` of 16 has 4); microbatch counts divide it."""

    batch: int
    parts: int
    split: Mapping[int, int]
    totals: Mapping[int, str]
    body: frozenset[int]

    @property
    def grouped(self) -> str:
        """Words that say so where examples are taken in groups."""
        return f", taken in {self.parts} groups," if self.parts < self.batch else ""


def time_groups(parts: int, mesh: Mesh, count: int) -> int:
    """Into how many runs of neighbours a batch of so many parts is dealt out to `count` microbatches.

        parts 8, count 2, groups 2     rows 0 1 4 5 | 2 3 6 7

    Every shard must find its part of each microbatch in its own rows, whichever
    axes cut the batch; so there is a group for each shard of the finest cut, and
    a coarser shard has several of them.
    """
    ways = {1}
    for size in mesh.shape:
        ways |= {found * size for found in ways}
    return lcm(*(n for n in ways if parts % (n * count) == 0))


def time_axis(graph: Graph, batch: Mapping[int, int]) -> TimeAxis | Refusal:
    """Follow the batch dims of the inputs through the whole step."""
    if not batch:
        return Refusal("no input of the step carries a batch dim", "step arguments")
    split = {graph.inputs[p]: dim for p, dim in batch.items()}
    size = graph.types[next(iter(split))].shape[next(iter(split.values()))]
    flow, body = _Flow(graph, split, {}, set()), set[int]()
    for i, op in enumerate(graph.ops):
        try:
            body |= {i} if flow.visit(op) else set()
        except _Stop as stop:
            return refusals.for_results(graph, op, stop.refusal)
    if flow.whole or flow.own:
        _spread_late(graph, flow, body)
    if leaving := flow.own_left(body):
        return refusals.left(leaving)
    same = {v: "max" for v in flow.same if graph.types[v].dtype != "key"}
    parts = gcd(size, *(graph.types[v].shape[dim] for v, dim in flow.split.items()))
    return TimeAxis(size, parts, flow.split, {**flow.totals, **same}, frozenset(body))


@dataclass(frozen=True)
class Followed:
    """A graph followed as if nothing had to wait. `waits`: values known after the last microbatch that ops of the
    body read; `late`: all that are made of totals; `whole`: to its end."""

    split: Mapping[int, int]
    totals: Mapping[int, str]
    late: frozenset[int]
    waits: frozenset[int]
    whole: bool


def follow(graph: Graph, batch: Mapping[int, int]) -> Followed:
    """Follow the batch dims of the inputs as far as that goes."""
    split = {graph.inputs[p]: dim for p, dim in batch.items()}
    waits, whole = set[int](), True
    flow = _Flow(graph, split, {}, set(), waits=waits)
    try:
        for op in graph.ops:
            flow.visit(op)
    except _Stop:
        whole = False
    return Followed(flow.split, flow.totals, frozenset(flow.late), frozenset(waits), whole)


def totals_waited_for(graph: Graph, batch: Mapping[int, int]) -> frozenset[int]:
    """Totals that ops of the body need, themselves or something made of them, as far as the graph can be followed."""
    flow = follow(graph, batch)
    writer = {v: op for op in graph.ops for v in op.outputs}
    found, stack = set[int](), list(flow.waits)
    while stack:
        value = stack.pop()
        if value not in found:
            found.add(value)
            known = value in flow.totals or value not in writer
            stack.extend(() if known else writer[value].inputs)
    return frozenset(found & flow.totals.keys())


def time_factor(op: Op, rule: Rule, split: Mapping[int, int]) -> int | None:
    """The factor that is cut over time, of an op that reads or makes values of one microbatch."""
    sides = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
    return next((_leading(rule.factors, dims[split[v]]) for v, dims in sides if v in split), None)


def timed_sides(op: Op, rule: Rule, split: Mapping[int, int]) -> tuple[bool, ...]:
    """Of which operands and results an op that runs for each microbatch reads or makes a part: those that exist per
    microbatch, and of others the rows that go with them."""
    lead = time_factor(op, rule, split)
    sides = zip((*op.inputs, *op.outputs), (*rule.operands, *rule.results), strict=True)
    return tuple(v in split or any(lead in dim for dim in dims) for v, dims in sides)


def _spread_late(graph: Graph, flow: _Flow, body: set[int]) -> None:
    """What is made of early totals, or of statistics per microbatch, for each example (their inverse, spread over the
    batch) is made for each microbatch, where microbatches alone read it."""
    known = flow.whole | flow.own
    wanted: dict[int, set[int | None]] = {v: {None} for v in graph.outputs}
    for i in range(len(graph.ops) - 1, -1, -1):
        op = graph.ops[i]
        if op.kind in _MADE_ANYWHERE and known.issuperset(op.outputs):
            dims, rule = wanted.get(op.outputs[0], {None}), rule_of(op, graph.types)
            dim = next(iter(dims)) if len(dims) == 1 else None
            if dim is not None and _leading(rule.factors, rule.results[0][dim]) in cuttable(rule):
                flow.split[op.outputs[0]] = dim
                body.add(i)
        if not known.isdisjoint(op.inputs):
            for value, dim in _parts_read(graph, op, i in body, flow.split):
                wanted.setdefault(value, set()).add(dim)


def _parts_read(
    graph: Graph, op: Op, timed: bool, split: Mapping[int, int]
) -> Iterator[tuple[int, int | None]]:
    """Operands, each with the dim of which the op takes one microbatch's part, if it does."""
    if not timed or op.regions or op.kind == "optimization_barrier":
        yield from ((v, None) for v in op.inputs)
        return
    rule = rule_of(op, graph.types)
    number = time_factor(op, rule, split)
    for value, dims in zip(op.inputs, rule.operands, strict=True):
        yield value, next((d for d, factors in enumerate(dims) if number in factors), None)


class _Stop(Exception):
    def __init__(self, refusal: Refusal):
        self.refusal = refusal


@dataclass
class _Flow:
    """Facts gathered on the way; `late` holds values known only after the last microbatch, `same` those that a
    loop of the body makes of no example: every microbatch makes them anew, equal, so their maximum is what they are.
    `whole`: those made of the whole batch before the first. `zeros`: inputs of a loop that are zero.
    `waits` collects late values that the body needs; None: refused. `own`: statistics that each microbatch
    takes for itself, and what is made of them alone."""

    graph: Graph
    split: dict[int, int]
    totals: dict[int, str]
    late: set[int]
    strict: bool = True  # False until the carries of a loop are known
    same: set[int] = field(default_factory=lambda: set())
    waits: set[int] | None = None
    whole: set[int] = field(default_factory=lambda: set())
    zeros: set[int] = field(default_factory=lambda: set())
    own: set[int] = field(default_factory=lambda: set())

    def visit(self, op: Op) -> bool:
        """Classify one top-level op; True when it belongs to the body."""
        if op.kind == "copy" and op.tag.endswith(WHOLE):
            self.whole.update(op.outputs)
            return False
        if op.kind == AVERAGED:
            self.totals[op.outputs[0]] = "sum"
            return True
        if settles(op) and op.inputs[0] in self.totals:
            self.totals[op.outputs[0]] = self.totals[op.inputs[0]]
            return True
        if not any(v in self.split for v in op.inputs):
            if op.kind == ESTIMATED or not self.own.isdisjoint(op.inputs):
                self.own.update(op.outputs)
                return True
            if any(self._waits(v) for v in op.inputs):
                self.late.update(op.outputs)
                return False
            if not self.same.isdisjoint(op.inputs):
                self.same.update(op.outputs)
                return True
            self.whole.update(op.outputs if not self.whole.isdisjoint(op.inputs) else ())
            return False
        self.cut(op)
        return True

    def own_left(self, body: Collection[int]) -> Op | None:
        """An op after the body that reads a microbatch's own statistic, not its mean."""
        own = self.own - self.split.keys()
        after = (op for i, op in enumerate(self.graph.ops) if i not in body)
        return next((op for op in after if not own.isdisjoint(op.inputs)), None)

    def _waits(self, value: int) -> bool:
        """Whether a value is known after the last microbatch only."""
        return value in self.totals or value in self.late

    def cut(self, op: Op) -> None:
        if op.kind == "optimization_barrier":
            self._pass_through(op)
            return
        self._refuse_late(op)
        if op.regions:
            self._regions(op)
        else:
            self._simple(op, rule_of(op, self.graph.types))

    def _refuse_late(self, op: Op) -> None:
        late = [v for v in op.inputs if self._waits(v)]
        if late and self.waits is None:
            raise _Stop(refusals.statistic(self.graph, op, late, self.totals))
        if late and self.waits is not None:
            self.waits.update(late)

    def _pass_through(self, op: Op) -> None:
        """What a barrier holds keeps its nature; `held` sees to it that all of that is split."""
        for source, result in zip(op.inputs, op.outputs, strict=True):
            if source in self.split:
                self.split[result] = self.split[source]
            elif source in self.totals:
                self.totals[result] = self.totals[source]
            elif source in self.late:
                self.late.add(result)
            elif source in self.own:
                self.own.add(result)

    def _simple(self, op: Op, rule: Rule) -> None:
        number = self._factor(op, rule)
        factor = rule.factors[number]
        if op.kind.startswith(("gather", "scatter")) and _is_looked_up(op, rule, number):
            raise _Stop(refusals.places(op))
        for dims, result in zip(rule.results, op.outputs, strict=True):
            dim = next((d for d, factors in enumerate(dims) if number in factors), None)
            if dim is not None:
                self.split[result] = dim
            elif factor.kind == "reduced":
                self.totals[result] = factor.reduction
            else:
                raise _Stop(refusals.dropped(op))

    def _factor(self, op: Op, rule: Rule) -> int:
        """The one factor that is the batch, or a refusal."""
        found = {
            _leading(rule.factors, dims[self.split[v]])
            for v, dims in zip(op.inputs, rule.operands, strict=True)
            if v in self.split
        }
        if None in found:
            raise _Stop(refusals.together(op))
        if len(found) != 1:
            raise _Stop(refusals.compares(op))
        number = found.pop()
        assert number is not None
        if number not in cuttable(rule):
            raise _Stop(refusals.together(op))
        return number

    def _regions(self, op: Op) -> None:
        """A loop or branch in the body: what a carry is settles after at most two rounds."""
        inner = _Flow(self.graph, {}, {}, set(), waits=self.waits)
        for region in op.regions:
            self._enter(op, region, inner)
        inner.strict = False
        for _ in range(op.loop_inputs[1] + 1):
            for region in op.regions:
                inner.run(region)
            if op.kind == "cond" or not inner.join_carry(op, op.regions[-1]):
                break
            inner.join_condition(op)
        inner.strict = True
        for region in op.regions:
            inner.run(region)
        self.split.update(inner.split)
        for i, result in enumerate(op.outputs):
            self._leave(op, i, result, inner)
        if any(v in inner.totals for v in deciding(op)):
            raise _Stop(refusals.inside_loop(op))

    def _enter(self, op: Op, region: Region, inner: _Flow) -> None:
        first_row = sum(op.loop_inputs)
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            if outside in self.split:
                dim = self.split[outside] - (1 if i >= first_row else 0)
                if dim < 0:
                    raise _Stop(refusals.looped(op))
                inner.split[inside] = dim
            elif (i < op.loop_inputs[0] or op.kind == "cond") and self._starts_at_zero(outside):
                inner.zeros.add(inside)

    def _leave(self, op: Op, i: int, result: int, inner: _Flow) -> None:
        """What a result is, as its regions end. A branch may leave zeros where another leaves a sum over the batch,
        and anything that is the same for all examples where another leaves a part for each."""
        ends = [region.outputs[i] for region in op.returning]
        dims = {inner.split[v] for v in ends if v in inner.split}
        sums = {inner.totals[v] for v in ends if v in inner.totals}
        plain = [v for v in ends if v not in inner.split and v not in inner.totals]
        if len(dims) + len(sums) > 1 or (sums and not all(map(self._starts_at_zero, plain))):
            raise _Stop(refusals.unlike(op))
        if dims:
            self.split[result] = dims.pop() + (op.kind == "scan" and i >= op.loop_inputs[1])
        elif sums:
            self.totals[result] = sums.pop()
        else:
            (self.same if self.own.isdisjoint(op.inputs) else self.own).add(result)

    def run(self, region: Region) -> None:
        for op in region.ops:
            sums = [v for v in op.inputs if v in self.totals]
            if sums:
                self._add_totals(op, sums)
            elif any(v in self.split for v in op.inputs):
                self.cut(op)

    def _add_totals(self, op: Op, sums: list[int]) -> None:
        """Inside a loop a sum may only be carried on by linear ops; zero is a sum of whatever there is."""
        alternatives = rule_of(op, self.graph.types).linear if not op.regions else ()
        owed = {i for i, v in enumerate(op.inputs) if v in self.totals}
        others = [v for i, v in enumerate(op.inputs) if i not in owed]
        known = owed | {i for i, v in enumerate(op.inputs) if self._starts_at_zero(v)}
        fits = any(owed <= set(a) <= known if self.strict else owed <= set(a) for a in alternatives)
        if any(v in self.split for v in others) or not fits:
            raise _Stop(refusals.inside_loop(op))
        self.totals.update(dict.fromkeys(op.outputs, "sum"))

    def join_carry(self, op: Op, region: Region) -> bool:
        """Make each carry the same at both ends; True when something changed."""
        changed, (consts, carry) = False, op.loop_inputs
        for i in range(carry):
            start, end = region.inputs[consts + i], region.outputs[i]
            if end in self.split and start not in self.split:
                self.split[start] = self.split[end]
                changed = True
            if end in self.totals and start not in self.totals:
                if not self._starts_at_zero(op.inputs[consts + i]):
                    raise _Stop(refusals.no_zero(op))
                self.totals[start] = "sum"
                changed = True
            if start in self.split and end not in self.split and end not in self.totals:
                self.split[end] = self.split[start]
        return changed

    def join_condition(self, op: Op) -> None:
        """The condition of a while sees the carry as its turns do."""
        first, last = (region.inputs for region in (op.regions[0], op.regions[-1]))
        for whether, turn in zip(first, last, strict=True) if op.kind == "while" else ():
            for facts in (self.split, self.totals):
                if turn in facts:
                    facts[whether] = facts[turn]  # type: ignore[literal-required]

    def _starts_at_zero(self, value: int) -> bool:
        """Whether a value is zero, spread out, converted or added to zero."""
        op = self._writers.get(value)
        if op is None or op.kind not in ("broadcast_in_dim", "convert_element_type", "copy", "add"):
            return value in self._zeros
        return all(map(self._starts_at_zero, op.inputs))

    @cached_property
    def _writers(self) -> Mapping[int, Op]:
        return {v: visit.op for visit in self.graph.visits for v in visit.op.outputs}

    @cached_property
    def _zeros(self) -> set[int]:
        return self.zeros | {c.value for c in self.graph.constants if c.data == 0}


def _is_looked_up(op: Op, rule: Rule, number: int) -> bool:
    """Whether ids choose places along this factor: a shard does not hold neighbours then."""
    chosen = "start_index_map" if op.kind == "gather" else "scatter_dims_to_operand_dims"
    return any(number in rule.operands[0][d] for d in op.integers(chosen))


def _leading(factors: tuple[Factor, ...], dim: tuple[int, ...]) -> int | None:
    return next((number for number in dim if factors[number].size > 1), None)
