"""All layouts on one mesh, numbered, and the price of every change between them.

The price of a change is a straight line in the tensor's bytes that does not
depend on its shape, so it is worked out once per kind of move and mesh.
"""

from __future__ import annotations

from math import inf

import numpy as np

from ...ir.mesh import Mesh
from ...ir.rules.rule import Rule, Strategy
from ...ir.sharding import Sharding
from ..cost.collectives import Collectives
from .catalogue import Catalogue, Move, StrategyTable
from .strategies import splits_of

NO_LINE = (inf, 0.0)


class Layouts:
    """A catalogue on one mesh; `seconds` prices whole matrices of changes."""

    def __init__(self, collectives: Collectives, catalogue: Catalogue | None = None):
        self.collectives = collectives
        self.mesh: Mesh = collectives.mesh
        self.catalogue = catalogue or Catalogue(self.mesh)
        self._shape = np.array(self.mesh.shape)
        self._ways = np.zeros(0, np.int64)
        self._lines = {late: np.zeros((2, 0)) for late in (False, True)}
        self._splits: dict[tuple[int, int], int] = {}

    @property
    def known(self) -> list[Sharding]:
        return self.catalogue.known

    def number(self, layout: Sharding) -> int:
        return self.catalogue.number(layout)

    def numbers(self, layouts: list[Sharding]) -> np.ndarray:
        return self.catalogue.numbers(layouts)

    def ways(self, numbers: np.ndarray) -> np.ndarray:
        """Number of different shards of each layout."""
        if len(self._ways) < len(self.known):
            new = [layout.ways(self.mesh) for layout in self.known[len(self._ways) :]]
            self._ways = np.concatenate([self._ways, np.array(new, np.int64)])
        return self._ways[numbers]

    def cut_ways(self, cuts: np.ndarray) -> np.ndarray:
        """Into how many parts each strategy cuts the op's work; `cuts[i]` says which axes do."""
        return np.multiply.reduce(np.where(cuts, self._shape, 1), axis=1)

    def only(self, rule: Rule, strategy: Strategy, order: tuple[str, ...] = ()) -> StrategyTable:
        """One given strategy of an op; `order` names axes as they cut one dim, major to minor, if
        not in the mesh's order."""
        return self.catalogue.around(rule, [strategy], order)

    def split(self, size: int, parts: int) -> int:
        """The sets of axes that divide a dim that is cut into so many parts already."""
        if (size, parts) not in self._splits:
            self._splits[size, parts] = 0 if size % parts else splits_of(size // parts, self.mesh)
        return self._splits[size, parts]

    def seconds(
        self, sources: np.ndarray, targets: np.ndarray, nbytes: float, phase: str
    ) -> np.ndarray:
        """Seconds to change a tensor of `nbytes` from each source to each target layout."""
        return self.line_seconds(self.moves(sources, targets), nbytes, phase)

    def moves(self, sources: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The number of the move from each source to each target layout, the same on meshes that share a catalogue."""
        return self.catalogue.moves_between(sources, targets)

    def line_seconds(self, moves: np.ndarray, nbytes: np.ndarray | float, phase: str) -> np.ndarray:
        """Seconds of each move of a tensor of so many bytes."""
        fixed, slope = self._priced(phase)
        return fixed[moves] + slope[moves] * nbytes

    def _priced(self, phase: str) -> np.ndarray:
        """The lines (fixed, slope) of all moves met so far."""
        late, moves = phase == "update", self.catalogue.moves
        known = self._lines[late].shape[1]
        if known < len(moves):
            new = np.array([self._line(move, phase) for move in moves[known:]]).T
            self._lines[late] = np.concatenate([self._lines[late], new], axis=1)
        return self._lines[late]

    def _line(self, move: Move | None, phase: str) -> tuple[float, float]:
        if move is None:
            return NO_LINE
        line = self.collectives.moving(move.steps, move.source, phase)
        return line.fixed, line.slope
