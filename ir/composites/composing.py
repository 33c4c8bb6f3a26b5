"""Ops that stand for a part of a graph: how they are put in its place (see `composites.py`, `losses.py`).

Of a softmax that was found, the ops between its boundary and its closings become the body of one op, or of one for
the forward pass and one for the backward pass. A body is a graph of its own, kept as text, so that equal layers have
equal ops. Which of its dims may be cut is told by the kind of composite.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import count
from typing import Generic, TypeVar

from ..analysis.dealt import Parts, followed, spread
from ..analysis.links import Links
from ..analysis.softmax import Softmax
from ..attrs import Attr
from ..graph import Constant, Graph, Op
from ..ops import CONTRACTIONS
from ..passes.dead import drop_dead_ops
from ..text import show

One = TypeVar("One", bound=Softmax)


def rewritten(graph: Graph, found: Sequence[One], start: Callable[[Graph], Rewrite[One]]) -> Graph:
    """The graph with composites for what was found; those that cannot be taken apart stay as they are."""
    while found:
        rewrite = start(graph)
        done = [one for one in found if rewrite.add(one)]
        fused = drop_dead_ops(rewrite.graph())
        alive = {v for visit in fused.visits for v in visit.op.outputs}
        stuck = [one for one in done if not alive.isdisjoint(one.made)]
        if not stuck:
            return fused if done else graph
        found = [one for one in done if one not in stuck]
    return graph


def left_plain(
    graph: Graph, found: Sequence[One], start: Callable[[Graph], Rewrite[One]]
) -> list[tuple[str, str]]:
    """Where each of those is that could not be made composites, and why."""
    told: list[tuple[str, str]] = []
    for one in found:
        rewrite = start(graph)
        try:
            rewrite.try_put(one, rewrite.groups(one))
            left = drop_dead_ops(rewrite.graph())
            reading = (v.op for v in left.visits if not one.made.isdisjoint(v.op.inputs))
            kinds = (op.kind for op in reading if one.made.isdisjoint(op.outputs))
            why = f"`{next(kinds, 'the step')}` reads what is as large as its scores"
        except Refused as error:
            why = str(error)
        told.append((rewrite.links.writer[one.softmax].where, why))
    return told


class Refused(Exception):
    """This softmax stays as it is: why."""


NOT_HANDED = (
    "its two passes are in loops of their own, and one of them makes what the other is not handed"
)


class Rewrite(Generic[One]):
    """Composites to be put in the place of closings. What they stand for is told by those who derive from this."""

    def __init__(self, graph: Graph):
        self.old, self.links = graph, Links(graph)
        self.types = dict(graph.types)
        self.unused = count(max(self.types) + 1)
        self.home: dict[
            int, int
        ] = {}  # value -> the loop that it lives in, by its first result; 0 outside
        self.made: dict[int, Op] = {}  # closing -> the composite that makes it
        self._cuts: dict[Hashable, dict[str, Attr]] = {}  # of equal bodies, as layers have
        self.added: dict[int, Added] = {}  # of loops, by their first results
        _note_homes(graph.ops, self.home)

    # ------------------------------------------------------------ told by kinds of composites

    def groups(self, one: One) -> list[tuple[str, Sequence[int]]]:
        """Kinds of ops, each with the closings that are its results."""
        raise NotImplementedError

    def remade(self, one: One) -> Collection[int]:
        """What is made inside though it has not all dims: maxima, sums, what becomes of them, closings."""
        raise NotImplementedError

    def cuts(self, kind: str, body: Body[One], closings: Sequence[int]) -> dict[str, Attr]:
        """What the rule of a composite is made of; see `rules/composite.py`."""
        raise NotImplementedError

    def finished(self, ops: list[Op]) -> list[Op]:
        """The composites of one softmax, as they are put in place."""
        return ops

    def more_results(self, kind: str, body: Body[One], closings: Sequence[int]) -> Sequence[int]:
        """Further results of a composite."""
        return ()

    # ------------------------------------------------------------ put in place

    def add(self, one: One) -> bool:
        """Whether a softmax could be made a composite; its closings are it from now on."""
        return self.put(one, self.groups(one))

    def put(self, one: One, found: Sequence[tuple[str, Sequence[int]]]) -> bool:
        """The same of ops of these kinds with these results."""
        try:
            self.try_put(one, found)
        except Refused:
            return False
        return True

    def try_put(self, one: One, found: Sequence[tuple[str, Sequence[int]]]) -> None:
        groups = [(kind, closings) for kind, closings in found if closings]
        ops = [self.composite(kind, one, closings) for kind, closings in groups]
        for op, (_, closings) in zip(self.finished(ops), groups, strict=True):
            self.made |= dict.fromkeys(closings, op)

    def composite(self, kind: str, one: One, closings: Sequence[int]) -> Op:
        homes = {self.home[v] for v in closings}
        if len(homes) > 1:
            raise Refused("what leaves one pass of it is in several loops")
        body = Body(self, one, homes.pop())
        for value in closings:
            body.need(value)
        where = self.links.writer[closings[0]].where
        closings = (*closings, *self.more_results(kind, body, closings))
        text, shape = show(body.graph(closings)), self.old.types[one.softmax].shape
        alike = (kind, text, shape, one.keys, body.told(), *self.beside(body))
        if alike not in self._cuts:
            self._cuts[alike] = self.cuts(kind, body, closings)
        attrs = {"body": text, **self._cuts[alike]}
        return Op(
            kind, tuple(body.inputs), tuple(closings), tuple(sorted(attrs.items())), where=where
        )

    def beside(self, body: Body[One]) -> tuple[Hashable, ...]:
        """What else cuts depend on."""
        return ()

    def reached(self, start: Iterable[int], ends: Collection[int] = ()) -> frozenset[int]:
        """What cheap ops make of values, in the loops that these are handed to too."""
        waiting, found = list(start), set(start)
        while waiting:
            value = waiting.pop()
            new = [other for other, _ in self.links.down[value]]
            new += [
                v
                for op in self.links.readers[value]
                if not op.regions and op.kind not in CONTRACTIONS
                for v in op.outputs
            ]
            new = [v for v in new if v not in found and v not in ends]
            found.update(new)
            waiting += new
        return frozenset(found)

    @cached_property
    def free(self) -> frozenset[int]:
        """What is made of numbers alone."""
        found = {c.value for c in self.old.constants if not isinstance(c.data, str)}
        for visit in self.old.visits:
            if not visit.op.regions and found.issuperset(visit.op.inputs):
                found.update(visit.op.outputs)
        return frozenset(found)

    def handed(self, home: int) -> tuple[int, ...]:
        """What a loop's turns are handed."""
        op = self.links.writer.get(home)
        return () if op is None else op.regions[0].inputs

    # ------------------------------------------------------------ from one loop to another

    def bring(self, value: int, home: int) -> int:
        """A value as a loop knows it: what its turns are handed of it, or could be.

        What another loop makes by cheap ops (masks of what its turns are handed) is made again here.
        """
        if self.home.get(value, 0) == home or value in self.old.constant_ids:
            return value
        if not home or self.links.writer[home].kind != "scan":
            raise Refused(NOT_HANDED)
        there = self.links.origins(value)
        for mine in self.handed(home):
            if any(there.get(v) == gained for v, gained in self.links.origins(mine).items()):
                return mine
        op = self.links.writer.get(value)
        if op is None or self.home.get(value, 0) == self.home.get(home, 0):
            return self._lent(value, home)
        return self._again(op, value, home)

    def _again(self, op: Op, value: int, home: int) -> int:
        added = self.added.setdefault(home, Added())
        if value in added.again:
            return added.again[value]
        if op.regions or op.kind in CONTRACTIONS:
            raise Refused(NOT_HANDED)
        inputs = tuple(self.bring(v, home) for v in op.inputs)
        results = tuple(self._new(v, home) for v in op.outputs)
        added.ops.append(replace(op, inputs=inputs, outputs=results))
        added.again.update(zip(op.outputs, results, strict=True))
        return added.again[value]

    def _lent(self, value: int, home: int) -> int:
        """What is around a loop, or what the turns of another one are handed of that. Rows are the same rows: the two
        are passes of one softmax, told by what one stacks for the other."""
        around, outside, rows = self.home.get(home, 0), value, False
        if self.home.get(value, 0) != around:
            theirs = self.links.writer[self.home[value]]
            if theirs.kind != "scan" or len(self.links.up[value]) != 1:
                raise Refused(NOT_HANDED)  # carried on from turn to turn
            ((outside, gained),) = self.links.up[value]
            rows = gained > 0
            if rows and theirs.trips != self.links.writer[home].trips:
                raise Refused(NOT_HANDED)
        key, added = (self.bring(outside, around), rows), self.added.setdefault(home, Added())
        if key not in added.handed:
            added.handed[key] = self._new(value, home)
        return added.handed[key]

    def _new(self, like: int, home: int) -> int:
        value = next(self.unused)
        self.types[value], self.home[value] = self.types[like], home
        return value

    # ------------------------------------------------------------ the graph with them

    def graph(self) -> Graph:
        new = {v: self.types[v] for op in self.made.values() for v in op.outputs}
        for added in self.added.values():
            new |= {v: self.types[v] for v in (*added.handed.values(), *added.again.values())}
        return replace(
            self.old, types={**self.old.types, **new}, ops=tuple(self._placed(self.old.ops))
        )

    def _placed(self, ops: Sequence[Op]) -> list[Op]:
        """Ops in their order, each as soon as all it reads is there; composites in the place of their first closing."""
        wanted: list[Op] = []
        placed: set[int] = set()  # first results of composites
        for op in ops:
            composite = self.made.get(op.outputs[0]) if op.outputs else None
            if composite is None:
                wanted.append(op)
            elif composite.outputs[0] not in placed:
                placed.add(composite.outputs[0])
                wanted.append(composite)
        return _in_order([self._inside(op) for op in wanted])

    def _inside(self, op: Op) -> Op:
        if not op.regions:
            return op
        added = self.added.get(op.outputs[0], Added()) if op.outputs else Added()
        regions = tuple(
            replace(r, ops=tuple(self._placed([*added.ops, *r.ops]))) for r in op.regions
        )
        return _taking(replace(op, regions=regions), added.handed)


@dataclass
class Added:
    """What a loop has beside what it had: of another loop, for composites in it.

    handed  (what is outside, whether in rows) -> the same inside
    again   what the other loop makes -> the same made here, by `ops`
    """

    handed: dict[tuple[int, bool], int] = field(default_factory=lambda: {})
    again: dict[int, int] = field(default_factory=lambda: {})
    ops: list[Op] = field(default_factory=lambda: [])


def _taking(op: Op, lent: Mapping[tuple[int, bool], int]) -> Op:
    """A scan that is handed more: in every turn the same, or a row."""
    if not lent:
        return op
    consts, region = op.loop_inputs[0], op.regions[0]
    same = [(v, inside) for (v, rows), inside in lent.items() if not rows]
    rows = [(v, inside) for (v, rows), inside in lent.items() if rows]
    old = list(zip(op.inputs, region.inputs, strict=True))
    pairs = [*old[:consts], *same, *old[consts:], *rows]
    attrs = {**dict(op.attrs), "num_consts": consts + len(same)}
    return replace(
        op, inputs=tuple(v for v, _ in pairs), attrs=tuple(sorted(attrs.items())),
        regions=(replace(region, inputs=tuple(inside for _, inside in pairs)),),
    )  # fmt: skip


def _in_order(ops: Sequence[Op]) -> list[Op]:
    missing = {v for op in ops for v in op.outputs}
    placed, waiting = list[Op](), list[Op]()
    for op in ops:
        waiting.append(op)
        while ready := [op for op in waiting if missing.isdisjoint(op.inputs)]:
            waiting = [op for op in waiting if not missing.isdisjoint(op.inputs)]
            placed += ready
            missing.difference_update(v for op in ready for v in op.outputs)
    assert not waiting
    return placed


def _note_homes(ops: Sequence[Op], home: dict[int, int], here: int = 0) -> None:
    for op in ops:
        home |= dict.fromkeys(op.outputs, here)
        for region in op.regions:
            home |= dict.fromkeys(region.inputs, op.outputs[0])
            _note_homes(region.ops, home, op.outputs[0])


class Body(Generic[One]):
    """What is between the boundary of a softmax and some of its closings, as seen from where these are.

    In a backward loop, what the forward loop stacks for it is made again from what else was stacked.
    """

    def __init__(self, rewrite: Rewrite[One], one: One, home: int):
        self.rewrite, self.links, self.one, self.home = rewrite, rewrite.links, one, home
        self.types = rewrite.types
        self.remade = rewrite.remade(one)
        self.inputs: list[int] = []
        self.ops: list[Op] = []
        self.numbers = {c.value: c for c in rewrite.old.constants if not isinstance(c.data, str)}
        self.known: dict[tuple[int, Parts | None], int] = {}
        self.dims: dict[int, Parts] = {}  # of copies of masks and other numbers

    def need(self, value: int, parts: Parts | None = None) -> int:
        """The value as the body knows it, after what makes it was added to the body.

        What is made of numbers alone is made anew for each part that it plays: positions may be those of
        queries in one place and those of keys in another.
        """
        first = self.links.first(value)
        if first in self.rewrite.free or first in self.rewrite.old.constant_ids:
            value = first
        if value in self.numbers:
            return value
        part = (value, parts if value in self.rewrite.free else None)
        if part not in self.known:
            self.known[part] = self._found(*part)
        return self.known[part]

    def _found(self, value: int, parts: Parts | None) -> int:
        op = self.links.writer.get(value)
        within = value in self.one.inside or value in self.remade
        if within and (op is None or op.regions):
            return self.need(self.links.up[value][0][0])  # a row of what another loop stacks
        within = within or value in self.rewrite.free
        if op is None or op.regions or not within:
            return self._border(value)
        inputs = tuple(self.need(v, told) for v, told in self._told(op, value, parts))
        if op.kind == "optimization_barrier":
            return inputs[op.outputs.index(value)]
        results = op.outputs if parts is None else self._copies(op, value, parts)
        self.ops.append(Op(op.kind, inputs, results, op.attrs))
        if parts is not None:
            return results[op.outputs.index(value)]
        self.known |= {(v, None): v for v in op.outputs}
        return value

    def _told(self, op: Op, value: int, parts: Parts | None) -> list[tuple[int, Parts | None]]:
        """Operands, each with its dims as those of the softmax as far as this op tells them."""
        if parts is None and value not in self.one.dims:
            return [(v, None) for v in op.inputs]
        known = {value: self.one.dims[value] if parts is None else parts}
        found = followed(op, self.types, known)
        return [(v, found.get(v)) for v in op.inputs]

    def _copies(self, op: Op, value: int, parts: Parts) -> tuple[int, ...]:
        """New values for another copy of an op's results."""
        results = tuple(next(self.rewrite.unused) for _ in op.outputs)
        self.types.update(zip(results, (self.types[v] for v in op.outputs), strict=True))
        self.dims[results[op.outputs.index(value)]] = parts
        return results

    def _border(self, value: int) -> int:
        """Something from outside: as it is known here."""
        here = self.rewrite.bring(value, self.home)
        if here not in self.inputs:
            self.inputs.append(here)
        return here

    # ------------------------------------------------------------ as a graph

    @property
    def used(self) -> list[Constant]:
        return [c for v, c in self.numbers.items() if any(v in op.inputs for op in self.ops)]

    def order(self) -> list[int]:
        """Values in the order of their numbers in the body's graph."""
        made = (v for op in self.ops for v in op.outputs)
        return [*self.inputs, *(c.value for c in self.used), *made]

    def graph(self, closings: Sequence[int]) -> Graph:
        """The body with values numbered in order: equal for equal composites."""
        order = self.order()
        name = {value: number for number, value in enumerate(order)}
        ops = tuple(
            replace(
                op,
                inputs=tuple(name[v] for v in op.inputs),
                outputs=tuple(name[v] for v in op.outputs),
            )
            for op in self.ops
        )
        return Graph(
            types={name[v]: self.types[v] for v in order},
            inputs=tuple(name[v] for v in self.inputs),
            ops=ops,
            outputs=tuple(name[v] for v in closings),
            constants=tuple(Constant(name[c.value], c.data) for c in self.used),
        )

    def told(self) -> tuple[Parts | None, ...]:
        """Of each result, its dims as those of the softmax, where they are told from outside."""
        dims = {**self.one.dims, **self.dims}
        return tuple(dims.get(v) for op in self.ops for v in op.outputs)

    def parts(self) -> dict[int, Parts]:
        """Dims of all values of the body as those of the softmax."""
        results = (v for op in self.ops for v in op.outputs)
        told = zip(results, self.told(), strict=True)
        return spread(self.ops, self.types, {v: dims for v, dims in told if dims is not None})
