"""All layouts on one mesh, numbered, and the price of every change between them.

The price of a change is a straight line in the tensor's bytes that does not
depend on its shape, so it is worked out once per pair and mesh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product

import numpy as np

from ..ir.mesh import Axis, Mesh
from ..ir.rule import Rule, Strategy, operand_sharding, result_sharding
from ..ir.sharding import Sharding
from .cost.collectives import Collectives
from .strategies import cut_ways, follow, strategies


@dataclass(frozen=True, slots=True)
class Taken:
    """Strategies of one op and what each implies; shared, so nothing here changes.

    `numbers[k]` are the layouts of operand k by strategy, then of the results; `cuts` into
    how many parts the work is cut.
    """

    strategies: list[Strategy]
    numbers: np.ndarray
    cuts: np.ndarray

    def at(self, keep: np.ndarray) -> Taken:
        chosen = [s for s, k in zip(self.strategies, keep, strict=True) if k]
        return Taken(chosen, self.numbers[:, keep], self.cuts[keep])


class Layouts:
    """Numbers layouts as they are met; `seconds` prices whole matrices of changes."""

    def __init__(self, collectives: Collectives):
        self.collectives = collectives
        self.mesh: Mesh = collectives.mesh
        self.known: list[Sharding] = []
        self._numbers: dict[Sharding, int] = {}
        self._lines = {late: np.full((2, 64, 64), np.nan) for late in (False, True)}
        self._ways: list[int] = []
        self._rules: dict[int, Rule] = {}  # kept alive, so that an id names one rule
        self._taken: dict[tuple, Taken] = {}
        self._followed: dict[tuple, tuple[Taken, np.ndarray]] = {}

    def number(self, layout: Sharding) -> int:
        if layout not in self._numbers:
            self._numbers[layout] = len(self.known)
            self.known.append(layout)
            self._ways.append(layout.ways(self.mesh))
        return self._numbers[layout]

    def numbers(self, layouts: list[Sharding]) -> np.ndarray:
        return np.array([self.number(layout) for layout in layouts], np.int64)

    def ways(self, numbers: np.ndarray) -> np.ndarray:
        """Number of different shards of each layout."""
        return np.array(self._ways)[numbers]

    def taken(self, rule: Rule, time: Mapping[int, int]) -> Taken:
        """All strategies of an op; equal ops share the answer."""
        key = (id(rule), *time.items())
        if key not in self._taken:
            self._taken[key] = self._around(rule, strategies(rule, self.mesh, time))
        return self._taken[key]

    def only(self, rule: Rule, strategy: Strategy, order: tuple[str, ...] = ()) -> Taken:
        """One given strategy of an op; `order` names axes as they cut one dim, major to minor, if
        not in the mesh's order."""
        names = order or self.mesh.names
        codes = dict(zip(self.mesh.names, strategy.axes, strict=True))
        mesh = Mesh(tuple(Axis(name, self.mesh.sizes[name]) for name in names))
        taken = self._around(rule, [Strategy(tuple(codes[name] for name in names))], mesh)
        return replace(taken, strategies=[strategy])

    def followed(
        self, rule: Rule, operand: int, numbers: np.ndarray, time: Mapping[int, int]
    ) -> tuple[Taken, np.ndarray]:
        """The strategies that take an operand as it lies, and which layouts have one."""
        key = (id(rule), operand, numbers.tobytes(), *time.items())
        if key not in self._followed:
            layouts = [self.known[n] for n in numbers.tolist()]
            matched = [follow(rule, operand, layout, self.mesh, time) for layout in layouts]
            taken = self._around(rule, [m for m in matched if m is not None])
            self._followed[key] = taken, np.array([m is not None for m in matched])
        return self._followed[key]

    def _around(self, rule: Rule, chosen: list[Strategy], mesh: Mesh | None = None) -> Taken:
        self._rules[id(rule)] = rule
        mesh = mesh or self.mesh
        rows = []
        for strategy in chosen:
            wanted = [operand_sharding(rule, strategy, mesh, k) for k in range(len(rule.operands))]
            left = [result_sharding(rule, strategy, mesh, k) for k in range(len(rule.results))]
            rows.append([self.number(layout) for layout in (*wanted, *left)])
        numbers = np.array(rows, np.int64).reshape(len(rows), len(rule.operands) + len(rule.results))
        return Taken(chosen, numbers.T, np.array([cut_ways(s, self.mesh) for s in chosen]))

    def seconds(
        self, sources: np.ndarray, targets: np.ndarray, nbytes: float, phase: str
    ) -> np.ndarray:
        """Seconds to change a tensor of `nbytes` from each source to each target layout."""
        rows, row_of = np.unique(sources, return_inverse=True)
        columns, column_of = np.unique(targets, return_inverse=True)
        cell = np.ix_(rows, columns)
        fixed, slope = self._filled(rows, columns, phase)
        with np.errstate(invalid="ignore"):
            unique = fixed[cell] + slope[cell] * nbytes
        return unique[np.ix_(row_of, column_of)]

    def _filled(self, rows: np.ndarray, columns: np.ndarray, phase: str) -> np.ndarray:
        """The table of lines (fixed, slope), with these cells worked out."""
        late = phase == "update"
        size, table = max(int(rows.max()), int(columns.max())) + 1, self._lines[late]
        while table.shape[1] < size:
            extra = table.shape[1]
            table = np.pad(table, ((0, 0), (0, extra), (0, extra)), constant_values=np.nan)
        for i, j in np.argwhere(np.isnan(table[0][np.ix_(rows, columns)])):
            source, target = rows[i], columns[j]
            line = self.collectives.resharding(self.known[source], self.known[target], phase)
            table[:, source, target] = (np.inf, 0.0) if line is None else (line.fixed, line.slope)
        self._lines[late] = table
        return table


def layouts_of(shape: tuple[int, ...], mesh: Mesh, owed: bool = False) -> list[Sharding]:
    """Every way to lay a tensor of this shape on the mesh, in a fixed order.

    Each axis cuts one dim (if the dim divides), or none, or, when `owed`, is owed a sum.
    """
    places = [*range(len(shape)), -1, *([-2] if owed else [])]
    found = []
    for choice in product(places, repeat=len(mesh.axes)):
        dims = tuple(
            tuple(name for name, place in zip(mesh.names, choice, strict=True) if place == dim)
            for dim in range(len(shape))
        )
        if all(size % mesh.ways(axes) == 0 for size, axes in zip(shape, dims, strict=True)):
            partial = frozenset(
                name for name, place in zip(mesh.names, choice, strict=True) if place == -2
            )
            found.append(Sharding(dims, partial))
    return found
