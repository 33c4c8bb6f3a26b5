"""How one tensor lies on a mesh, and the steps from one such layout to another."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .errors import GraphError
from .graph import TensorType
from .mesh import Mesh


@dataclass(frozen=True, slots=True)
class Sharding:
    """How one tensor lies on one mesh.

    `Sharding((("x",), (), ("y", "z")))` splits dim 0 over axis `x`, keeps dim 1
    whole, and splits dim 2 over `y` (major), then `z` (minor). The tensor is
    replicated over every axis not named.

    Invariants (`check` holds them): one entry per dim; every axis belongs to
    the mesh; no axis appears twice, `partial` included; each dim divides.
    """

    dims: tuple[tuple[str, ...], ...]
    partial: frozenset[str] = frozenset()  # axes whose sum is still owed

    @property
    def axes(self) -> tuple[str, ...]:
        return tuple(axis for dim in self.dims for axis in dim)

    def __str__(self) -> str:
        text = ", ".join("·".join(dim) or "-" for dim in self.dims)
        owed = f" + owes {'·'.join(sorted(self.partial))}" if self.partial else ""
        return f"[{text}]{owed}"

    def local_shape(self, shape: tuple[int, ...], mesh: Mesh) -> tuple[int, ...]:
        return tuple(size // mesh.ways(axes) for size, axes in zip(shape, self.dims, strict=True))

    def ways(self, mesh: Mesh) -> int:
        """How many different shards there are."""
        return mesh.ways(self.axes)

    def check(self, kind: TensorType, mesh: Mesh) -> None:
        used = [*self.axes, *self.partial]
        if len(self.dims) != kind.rank:
            raise GraphError(f"sharding {self} has {len(self.dims)} dims, {kind} has {kind.rank}")
        if unknown := [axis for axis in used if axis not in mesh.sizes]:
            raise GraphError(f"sharding {self} names axis {unknown[0]!r}; the mesh has {mesh}")
        if len(set(used)) != len(used):
            raise GraphError(f"sharding {self} uses an axis twice")
        for dim, (size, axes) in enumerate(zip(kind.shape, self.dims, strict=True)):
            if size % mesh.ways(axes):
                raise GraphError(
                    f"dim {dim} of {kind} does not divide over {'·'.join(axes)} = {mesh.ways(axes)}"
                )


def replicated(rank: int) -> Sharding:
    return Sharding(((),) * rank)


@dataclass(frozen=True, slots=True)
class ReshardStep:
    """One move of a resharding. `dim` is the dim that gains or loses the axes
    (`to` the gaining one of an all_to_all); `all_reduce` has neither."""

    kind: Literal["slice", "reduce_scatter", "all_to_all", "all_reduce", "all_gather"]
    axes: tuple[str, ...]
    dim: int = -1
    to: int = -1


def reshard(source: Sharding, target: Sharding) -> tuple[ReshardStep, ...] | None:
    """The moves from one layout to another; None where none exists.

        [x, -] -> [-, x]         all_to_all x from dim 0 to dim 1; [x·y, -] -> [-, x·y] one over both
        [-, -] owes x -> [x, -]  reduce_scatter x onto dim 0
        [x·y]  -> [y]            all_gather y, all_gather x, slice y

    Moves that shrink the local tensor come first. A dim's axes are a major-to-
    minor list, so only its minor end can be gathered or extended. A tensor can't
    be made to owe a sum that it does not owe already.
    """
    if not target.partial <= source.partial:
        return None
    return merge_steps(_moves([list(dim) for dim in source.dims], set(source.partial), target))


def _moves(now: list[list[str]], owed: set[str], target: Sharding) -> list[ReshardStep]:
    steps: list[ReshardStep] = []
    while True:
        step = _grow(now, owed, target) or _shrink(now, owed, target)
        if step is None:
            return steps
        steps.append(step)
        _apply(step, now, owed)


def _grow(now: list[list[str]], owed: set[str], target: Sharding) -> ReshardStep | None:
    """The best move that adds an axis where the target wants it, if one is possible."""
    options: list[tuple[int, ReshardStep]] = []
    for dim, (have, want) in enumerate(zip(now, target.dims, strict=True)):
        if len(have) >= len(want) or tuple(have) != want[: len(have)]:
            continue
        axis = want[len(have)]
        holder = next((d for d, axes in enumerate(now) if axis in axes), None)
        if axis in owed:
            options.append((1, ReshardStep("reduce_scatter", (axis,), dim)))
        elif holder is None:
            options.append((0, ReshardStep("slice", (axis,), dim)))
        elif axes := _joint(now[holder], want[len(have) :]):
            options.append((2, ReshardStep("all_to_all", axes, holder, dim)))
    return min(options, key=lambda option: option[0])[1] if options else None


def _joint(held: list[str], wanted: tuple[str, ...]) -> tuple[str, ...]:
    """The longest run of axes at the minor end of a dim that another one wants next, in the same order."""
    lengths = range(min(len(held), len(wanted)), 0, -1)
    return next((wanted[:n] for n in lengths if tuple(held[-n:]) == wanted[:n]), ())


def _shrink(now: list[list[str]], owed: set[str], target: Sharding) -> ReshardStep | None:
    """Settle what is owed, then gather the minor end of a dim that has too much."""
    if settle := sorted(owed - target.partial):
        return ReshardStep("all_reduce", tuple(settle))
    for dim, (have, want) in enumerate(zip(now, target.dims, strict=True)):
        if tuple(have) != want[: len(have)]:
            return ReshardStep("all_gather", (have[-1],), dim)
    return None


def _apply(step: ReshardStep, now: list[list[str]], owed: set[str]) -> None:
    match step.kind:
        case "slice":
            now[step.dim].extend(step.axes)
        case "reduce_scatter":
            now[step.dim].extend(step.axes)
            owed.difference_update(step.axes)
        case "all_to_all":
            del now[step.dim][-len(step.axes) :]
            now[step.to].extend(step.axes)
        case "all_reduce":
            owed.difference_update(step.axes)
        case "all_gather":
            del now[step.dim][-len(step.axes) :]


def moved_to(layout: Sharding, step: ReshardStep) -> Sharding:
    """A layout after one move of a resharding."""
    dims, partial = [list(dim) for dim in layout.dims], set(layout.partial)
    _apply(step, dims, partial)
    return Sharding(tuple(map(tuple, dims)), frozenset(partial))


def merge_steps(steps: list[ReshardStep]) -> tuple[ReshardStep, ...]:
    """Join neighbours of one kind on one dim into one collective over several axes."""
    merged: list[ReshardStep] = []
    for step in steps:
        last = merged[-1] if merged else None
        if last and last.kind == step.kind and last.dim == step.dim and step.kind != "all_to_all":
            axes = (
                (*step.axes, *last.axes) if step.kind == "all_gather" else (*last.axes, *step.axes)
            )
            merged[-1] = ReshardStep(step.kind, axes, step.dim)
        else:
            merged.append(step)
    return tuple(merged)
