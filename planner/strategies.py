"""The strategies of one op: every way mesh axes may cut its factors."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product
from math import prod

from ..ir.mesh import Mesh
from ..ir.rule import NONE, Rule, Strategy, cuttable, owing
from ..ir.sharding import Sharding


def strategies(rule: Rule, mesh: Mesh, time: Mapping[int, int]) -> list[Strategy]:
    """All assignments of axes to factors that divide evenly, in a fixed order.

    `time[f]` is the number of microbatches that factor f is already cut into.
    An axis may also carry a sum through the op when it is linear in all operands together.
    """
    options = [NONE, *cuttable(rule), *_carried(rule)]
    return [
        Strategy(codes)
        for codes in product(options, repeat=len(mesh.axes))
        if _divides(rule, mesh, codes, time)
    ]


def cut_ways(strategy: Strategy, mesh: Mesh) -> int:
    """Into how many parts a strategy cuts the op's work."""
    return prod(size for size, code in zip(mesh.shape, strategy.axes, strict=True) if code >= 0)


def _carried(rule: Rule) -> list[int]:
    everyone = set(range(len(rule.operands)))
    return [owing(i) for i, operands in enumerate(rule.linear) if set(operands) == everyone]


def _divides(rule: Rule, mesh: Mesh, codes: tuple[int, ...], time: Mapping[int, int]) -> bool:
    ways = dict(time)
    for size, code in zip(mesh.shape, codes, strict=True):
        if code >= 0:
            ways[code] = ways.get(code, 1) * size
    return all(rule.factors[factor].size % way == 0 for factor, way in ways.items())


def follow(
    rule: Rule, operand: int, layout: Sharding, mesh: Mesh, time: Mapping[int, int]
) -> Strategy | None:
    """The strategy that takes this operand exactly as it lies; None where there is none.

    Axes that cut the operand cut the same factors; a sum owed is carried on when
    the op is linear in this operand alone; other axes cut nothing.
    """
    codes = dict.fromkeys(mesh.names, NONE)
    allowed = cuttable(rule)
    for dim, axes in zip(rule.operands[operand], layout.dims, strict=True):
        lead = next((f for f in dim if rule.factors[f].size > 1), NONE)
        if axes and lead not in allowed:
            return None
        codes.update(dict.fromkeys(axes, lead))
    if layout.partial:
        alone = next((i for i, who in enumerate(rule.linear) if who == (operand,)), None)
        if alone is None:
            return None
        codes.update(dict.fromkeys(layout.partial, owing(alone)))
    chosen = tuple(codes[name] for name in mesh.names)
    return Strategy(chosen) if _divides(rule, mesh, chosen, time) else None
