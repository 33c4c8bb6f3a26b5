"""Dim rules: which dims of an op's operands and results are the same thing.

A matrix product `f32[8, 16] · f32[16, 4]` has three factors, m=8, n=4, k=16:

    operands (m, k) (k, n)   results (m, n)   k is reduced by sum

Cutting a factor over mesh axes cuts every dim it appears in. Everything a
planner needs (strategies, shardings, partial sums, local shapes) follows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

from ..mesh import Mesh
from ..sharding import Sharding

FactorKind = Literal["parallel", "reduced", "whole", "halo"]
Dim = tuple[int, ...]  # factor numbers of one dim, major to minor


@dataclass(frozen=True, slots=True)
class Factor:
    """One independent direction of an op.

    parallel  shards compute their part alone
    reduced   each shard computes a partial result; `reduction` combines them ("inside": the op itself does)
    whole     must not be cut
    halo      could be cut with exchange of borders; not cut today
    """

    size: int
    kind: FactorKind = "parallel"
    reduction: Literal["", "sum", "max", "min", "and", "or", "inside"] = ""

    @property
    def divisible(self) -> bool:
        return self.kind in ("parallel", "reduced") and self.size > 1


@dataclass(frozen=True, slots=True)
class Joint:
    """A further way for an axis to cut an op: factors that it cuts together, and how devices then work.

    even    one factor, of which each device works on two pieces that are not neighbours, so that all have equal work
    ring    two, rows and keys: keys go from device to device until all rows have met them

    Operands and results lie as if the axis cut the first of the factors that they have. `divides` is what the
    devices must divide.
    """

    how: Literal["even", "ring"]
    factors: tuple[int, ...]
    divides: int


@dataclass(frozen=True, slots=True)
class Rule:
    """Factors of an op and where they appear.

    `linear` lists sets of operands in which the op is linear, the others held
    fixed: when every operand of one set owes a sum over an axis (and no other
    does), the results owe it too. add: ((0, 1),); mul: ((0,), (1,)).

    A dim of several factors is their row-major product; only its first factor
    larger than one may be cut, so that a shard stays one contiguous piece.
    `opaque` rules describe nothing: all whole. Codes of `joints` follow those of factors.
    """

    factors: tuple[Factor, ...]
    operands: tuple[tuple[Dim, ...], ...]
    results: tuple[tuple[Dim, ...], ...]
    linear: tuple[tuple[int, ...], ...] = ()
    opaque: bool = False
    joints: tuple[Joint, ...] = ()

    def joint(self, code: int) -> Joint | None:
        """The joint that a code names, if it is one's."""
        return self.joints[code - len(self.factors)] if code >= len(self.factors) else None

    def cut_by(self, code: int) -> tuple[int, ...]:
        """The factors that an axis of this code cuts."""
        joint = self.joint(code)
        return joint.factors if joint is not None else (code,) if code >= 0 else ()


NONE = -1  # an axis that cuts nothing: the op runs replicated over it


@dataclass(frozen=True, slots=True)
class Strategy:
    """What each mesh axis does to one op.

    `axes[i]` belongs to the mesh's i-th axis: a factor number, `NONE`, one past all factors for each of
    `rule.joints`, or `owing(j)`: the operands of `rule.linear[j]` owe a sum over it, and so do the results.
    """

    axes: tuple[int, ...]


def owing(alternative: int) -> int:
    """The code of "carry a sum owed through `rule.linear[alternative]`"."""
    return -2 - alternative


def cut_twice(rule: Rule, codes: Iterable[int]) -> bool:
    """Whether some factor is cut in more ways than one."""
    by = [rule.cut_by(code) for code in {*codes}] if rule.joints else []
    return sum(map(len, by)) > len({f for each in by for f in each})


def operand_sharding(rule: Rule, strategy: Strategy, mesh: Mesh, operand: int) -> Sharding:
    """How the op wants this operand."""
    owed = frozenset(
        name
        for name, code in zip(mesh.names, strategy.axes, strict=True)
        if code <= -2 and operand in rule.linear[-2 - code]
    )
    dims = rule.operands[operand]
    return Sharding(_dims(dims, _codes(rule, dims, strategy), mesh.names), owed)


def result_sharding(rule: Rule, strategy: Strategy, mesh: Mesh, result: int) -> Sharding:
    """How the op leaves this result. Sums are left owed, by results that have not the factor; other
    reductions (max, min, and, or) are settled inside the op by an all-reduce."""
    owed = frozenset(
        name
        for name, code in zip(mesh.names, strategy.axes, strict=True)
        if code <= -2 or (code >= 0 and _sums(rule, code, result))
    )
    dims = rule.results[result]
    return Sharding(_dims(dims, _codes(rule, dims, strategy), mesh.names), owed)


def side_sharding(rule: Rule, strategy: Strategy, mesh: Mesh, side: int) -> Sharding:
    """Of an operand, or of a result, which are counted after those."""
    many = len(rule.operands)
    if side < many:
        return operand_sharding(rule, strategy, mesh, side)
    return result_sharding(rule, strategy, mesh, side - many)


def _codes(rule: Rule, dims: tuple[Dim, ...], strategy: Strategy) -> tuple[int, ...]:
    """By axis, the factor that it cuts of a tensor with these dims."""
    if not rule.joints:
        return strategy.axes
    here = {f for dim in dims for f in dim}
    return tuple(
        next((f for f in rule.cut_by(code) if f in here), NONE) if code >= 0 else code
        for code in strategy.axes
    )


def _sums(rule: Rule, code: int, result: int) -> bool:
    """Whether a result is summed over what a code cuts; other results of the op may have it as a dim."""
    cut = rule.cut_by(code)
    summed = any(rule.factors[f].reduction == "sum" for f in cut)
    return summed and not any(f in dim for dim in rule.results[result] for f in cut)


def settled_axes(rule: Rule, strategy: Strategy, mesh: Mesh) -> dict[str, tuple[str, ...]]:
    """Axes over which the op itself all-reduces its results: {"max": ("x",)}."""
    found: dict[str, tuple[str, ...]] = {}
    for name, code in zip(mesh.names, strategy.axes, strict=True):
        for factor in rule.cut_by(code):
            reduction = rule.factors[factor].reduction
            if reduction not in ("", "sum", "inside"):
                found[reduction] = (*found.get(reduction, ()), name)
    return found


@lru_cache(maxsize=1 << 17)
def _dims(
    dims: tuple[Dim, ...], codes: tuple[int, ...], names: tuple[str, ...]
) -> tuple[tuple[str, ...], ...]:
    return tuple(
        tuple(name for name, code in zip(names, codes, strict=True) if code in dim) for dim in dims
    )


@lru_cache(maxsize=1 << 14)
def cuttable(rule: Rule) -> tuple[int, ...]:
    """Factors that a mesh axis may cut: divisible, and leading in every dim they appear in."""
    return tuple(
        number
        for number, factor in enumerate(rule.factors)
        if factor.divisible and all(_leads(rule, number, dim) for dim in _all_dims(rule))
    )


def _all_dims(rule: Rule) -> list[Dim]:
    return [dim for dims in (*rule.operands, *rule.results) for dim in dims]


def _leads(rule: Rule, number: int, dim: Dim) -> bool:
    if number not in dim:
        return True
    return all(rule.factors[before].size == 1 for before in dim[: dim.index(number)])
