"""Bounds of shapes that follow from those of others.

A bound of a microbatch count holds for its multiples: parts cost no less, only the bubble shrinks. That of a mesh
holds for coarser ones, which can do nothing more.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field, replace

import numpy as np

from .choices import Choices, PipelineConfig


@dataclass
class InheritedBounds:
    """By family (a shape without a count): bounds by `choices.counts`."""

    choices: Choices
    # As they were added.
    found: dict[PipelineConfig, dict[int, float]] = field(default_factory=lambda: defaultdict(dict))
    # Of each count, were there no bubble.
    _even: dict[PipelineConfig, np.ndarray] = field(default_factory=lambda: {})
    _finer: dict[PipelineConfig, list[PipelineConfig]] = field(default_factory=lambda: {})
    _waits: dict[int, np.ndarray] = field(default_factory=lambda: {})

    def add(self, family: PipelineConfig, many: int, bound: float) -> None:
        """`bound` holds with any memory."""
        self.found[family][many] = bound
        counts = np.array(self.choices.counts)
        even = bound / self._waiting(family.stages)[self.choices.counts.index(many)]
        here = self._even.setdefault(family, np.zeros(len(counts)))
        here[counts % many == 0] = np.maximum(here[counts % many == 0], even)

    def bounds(self, family: PipelineConfig) -> np.ndarray:
        """The most that is known of each count."""
        rows = [self._even[each] for each in (family, *self.finer(family)) if each in self._even]
        floors = self.choices.floors(family)
        return np.maximum.reduce([floors, *(row * self._waiting(family.stages) for row in rows)])

    def finer(self, family: PipelineConfig) -> list[PipelineConfig]:
        """The same on finer meshes."""
        if family not in self._finer:
            meshes = [mesh for mesh in self.choices.meshes(family.stages) if mesh != family.mesh]
            self._finer[family] = [
                replace(family, mesh=mesh) for mesh in meshes if mesh.refines(family.mesh)
            ]
        return self._finer[family]

    def _waiting(self, stages: int) -> np.ndarray:
        """At most how much longer than without a bubble the passes take, by count."""
        if stages not in self._waits:
            bubbles = [
                self.choices.bubbles(stages, name) for name in ("forward", "backward", "weight")
            ]
            self._waits[stages] = 1 + np.maximum(0.0, np.maximum.reduce(bubbles)) / np.array(
                self.choices.counts
            )
        return self._waits[stages]
