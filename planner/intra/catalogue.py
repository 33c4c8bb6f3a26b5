"""Layouts by number, what ops make of them, and the moves between them, whatever the axes' sizes.

All meshes with the same names of axes share one catalogue: a search over five meshes and
many microbatch counts works each of these out once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ...ir.mesh import Axis, Mesh
from ...ir.rules.rule import Rule, Strategy, cuttable, operand_sharding, result_sharding
from ...ir.sharding import ReshardStep, Sharding, reshard
from .strategies import Splits, divides, follow, layouts_by, strategies

UNKNOWN, IMPOSSIBLE = -1, 0  # numbers of moves


@dataclass(frozen=True, slots=True)
class StrategyTable:
    """Strategies of one op and what each implies; shared, so nothing here changes.

    `numbers[k]` are the layouts of operand k by strategy, then of the results; `cuts[i]` are
    the axes that cut the work of strategy i.
    """

    strategies: list[Strategy]
    numbers: np.ndarray
    cuts: np.ndarray

    def at(self, keep: np.ndarray) -> StrategyTable:
        chosen = [s for s, k in zip(self.strategies, keep, strict=True) if k]
        return StrategyTable(chosen, self.numbers[:, keep], self.cuts[keep])


@dataclass(frozen=True, slots=True)
class Move:
    """The steps from a layout to another; `source` is one layout from which they may start."""

    steps: tuple[ReshardStep, ...]
    source: Sharding


class Catalogue:
    """Numbers layouts and moves as they are met."""

    def __init__(self, mesh: Mesh):
        self.mesh = mesh  # only the names of its axes count
        self.known: list[Sharding] = []
        self.moves: list[Move | None] = [None]
        self.memo: dict[object, Any] = {}  # what others work out once for all meshes that share it
        self._numbers: dict[Sharding, int] = {}
        self._move_of = np.full((64, 64), UNKNOWN, np.int32)  # source, target -> number in `moves`
        self._move_numbers: dict[object, int] = {}
        self._by_dims: dict[object, int] = {}
        self._rules: dict[int, tuple[Rule, int]] = {}  # kept alive, so that an id names one rule
        self._forms: dict[object, int] = {}
        self._taken: dict[object, StrategyTable] = {}
        self._followed: dict[object, tuple[StrategyTable, np.ndarray]] = {}
        self._follows: dict[tuple[int, int, int], Strategy | None] = {}
        self._rows: dict[object, list[int]] = {}
        self._slots: dict[object, tuple[list[Sharding], np.ndarray]] = {}

    # ------------------------------------------------------------ layouts

    def number(self, layout: Sharding) -> int:
        if layout not in self._numbers:
            self._numbers[layout] = len(self.known)
            self.known.append(layout)
        return self._numbers[layout]

    def numbers(self, layouts: list[Sharding]) -> np.ndarray:
        return np.array([self.number(layout) for layout in layouts], np.int64)

    def slot(self, splits: tuple[int, ...], owed: bool) -> tuple[list[Sharding], np.ndarray]:
        """Every layout of a tensor whose dims divide so, and their numbers."""
        if (splits, owed) not in self._slots:
            found = layouts_by(splits, self.mesh.names, owed)
            self._slots[splits, owed] = found, self.numbers(found)
        return self._slots[splits, owed]

    # ------------------------------------------------------------ ops

    def taken(self, rule: Rule, splits: Splits) -> StrategyTable:
        """All strategies of an op; ops of equal form share the answer."""
        key = (self._form(rule), *splits.items())
        if key not in self._taken:
            self._taken[key] = self.around(rule, strategies(rule, len(self.mesh.axes), splits))
        return self._taken[key]

    def followed(
        self, rule: Rule, operand: int, numbers: np.ndarray, splits: Splits
    ) -> tuple[StrategyTable, np.ndarray]:
        """The strategies that take an operand as it lies, and which layouts have one."""
        key = (self._form(rule), operand, numbers.tobytes(), *splits.items())
        if key not in self._followed:
            matched = [self._following(rule, operand, n) for n in numbers.tolist()]
            matched = [m if m is not None and divides(m.axes, splits) else None for m in matched]
            taken = self.around(rule, [m for m in matched if m is not None])
            self._followed[key] = taken, np.array([m is not None for m in matched])
        return self._followed[key]

    def _following(self, rule: Rule, operand: int, number: int) -> Strategy | None:
        """The strategy that takes an operand as it lies, where all divides."""
        key = self._form(rule), operand, number
        if key not in self._follows:
            self._follows[key] = follow(rule, operand, self.known[number], self.mesh.names)
        return self._follows[key]

    def around(
        self, rule: Rule, chosen: list[Strategy], order: tuple[str, ...] = ()
    ) -> StrategyTable:
        """Given strategies of an op; `order` names the axes of one dim, major to minor, if not the mesh's."""
        form, names = self._form(rule), order or self.mesh.names
        mesh = (
            self.mesh
            if names == self.mesh.names
            else Mesh(tuple(Axis(n, self.mesh.sizes[n]) for n in names))
        )
        rows: list[list[int]] = []
        for strategy in chosen:
            key = form, strategy.axes, names
            if key not in self._rows:
                codes = dict(zip(self.mesh.names, strategy.axes, strict=True))
                turned = Strategy(tuple(codes[name] for name in names))
                wanted = [
                    operand_sharding(rule, turned, mesh, k) for k in range(len(rule.operands))
                ]
                left = [result_sharding(rule, turned, mesh, k) for k in range(len(rule.results))]
                self._rows[key] = [self.number(layout) for layout in (*wanted, *left)]
            rows.append(self._rows[key])
        numbers = np.array(rows, np.int64).reshape(
            len(rows), len(rule.operands) + len(rule.results)
        )
        codes = np.array([s.axes for s in chosen], np.int64).reshape(len(rows), len(self.mesh.axes))
        return StrategyTable(chosen, np.ascontiguousarray(numbers.T), codes >= 0)

    def _form(self, rule: Rule) -> int:
        """Rules of one form have the same strategies wherever their factors divide alike."""
        known = self._rules.get(id(rule))
        if known is None:
            kinds = tuple((f.reduction, f.size > 1) for f in rule.factors)
            joints = rule.joints and (len(rule.factors), rule.joints)
            key = (rule.operands, rule.results, rule.linear, cuttable(rule), kinds, joints)
            known = self._rules[id(rule)] = rule, self._forms.setdefault(key, len(self._forms))
        return known[1]

    # ------------------------------------------------------------ moves

    def moves_between(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The number of the move from each source to each target layout."""
        self._grow()
        found = self._move_of[sources[:, None], targets]
        if found.min(initial=0) == UNKNOWN:
            i, j = np.nonzero(found == UNKNOWN)
            pairs: zip[tuple[int, int]] = zip(sources[i].tolist(), targets[j].tolist(), strict=True)
            for source, target in set(pairs):
                self._move_of[source, target] = self._move(self.known[source], self.known[target])
            found = self._move_of[sources[:, None], targets]
        return found

    def _grow(self) -> None:
        size = len(self._move_of)
        if size < len(self.known):
            self._move_of = np.pad(self._move_of, (0, size), constant_values=UNKNOWN)
            self._grow()

    def _move(self, source: Sharding, target: Sharding) -> int:
        """Dims that are whole in both change nothing, so layouts that differ in these alone share it."""
        cut = tuple((a, b) for a, b in zip(source.dims, target.dims, strict=True) if a or b)
        key = (cut, source.partial, target.partial, bool(source.dims))
        if key not in self._by_dims:
            self._by_dims[key] = self._worked_out(source, target)
        return self._by_dims[key]

    def _worked_out(self, source: Sharding, target: Sharding) -> int:
        """Moves of the same kinds over the same axes, from equal shards, cost the same."""
        steps = reshard(source, target)
        if steps is None:
            return IMPOSSIBLE
        kinds = tuple((step.kind, step.axes) for step in steps)
        key = (kinds, frozenset(source.axes), bool(source.dims))
        if key not in self._move_numbers:
            self._move_numbers[key] = len(self.moves)
            self.moves.append(Move(steps, source))
        return self._move_numbers[key]
