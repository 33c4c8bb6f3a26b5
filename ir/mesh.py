"""A logical mesh: named axes over a cluster's devices, outermost first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import prod

STAGE = "stage"  # the axis of stages, where all of a pipeline are one program


@dataclass(frozen=True, slots=True)
class Axis:
    """`Axis("x", 4)`: one direction of the mesh."""

    name: str
    size: int


@dataclass(frozen=True)
class Mesh:
    """`Mesh((Axis("x", 4), Axis("y", 2)))`: 8 devices, `y` consecutive, `x` with stride 2.

    Devices are numbered row-major, so the last axis joins neighbours and gets
    the fastest tier of the fabric.
    """

    axes: tuple[Axis, ...]

    @classmethod
    def of(cls, **sizes: int) -> Mesh:
        return cls(tuple(Axis(name, size) for name, size in sizes.items()))

    @cached_property
    def sizes(self) -> dict[str, int]:
        return {axis.name: axis.size for axis in self.axes}

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(axis.name for axis in self.axes)

    @cached_property
    def shape(self) -> tuple[int, ...]:
        return tuple(axis.size for axis in self.axes)

    @cached_property
    def size(self) -> int:
        return prod(self.shape)

    def ways(self, axes: tuple[str, ...] | frozenset[str]) -> int:
        """Into how many parts these axes cut a dim."""
        return prod(self.sizes[name] for name in axes)

    def stride(self, name: str) -> int:
        """Distance in rank between neighbours along an axis."""
        position = self.names.index(name)
        return prod(self.shape[position + 1 :])

    def refines(self, other: Mesh) -> bool:
        """Whether every layout on the other mesh is one on this, its axes used together: (2, 2, 2) refines
        (2, 4), (4, 2), (8,) and itself."""
        strides, wanted = ({mesh.stride(name) for name in mesh.names} for mesh in (self, other))
        return self.size == other.size and strides >= wanted

    def __str__(self) -> str:
        return " × ".join(f"{axis.name}={axis.size}" for axis in self.axes)
