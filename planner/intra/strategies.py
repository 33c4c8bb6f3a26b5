"""The strategies of one op: every way mesh axes may cut its factors.

Which sets of axes cut a size evenly is given as bits (`splits`): bit 5 is the set of the
first and the third axis. So nothing here depends on the sizes themselves.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

from ...ir.mesh import Mesh
from ...ir.rules.rule import NONE, Rule, Strategy, cut_twice, cuttable, owing
from ...ir.sharding import Sharding

Splits = Mapping[int, int]  # factor, or code of a joint -> the sets of axes that cut it evenly


def splits_of(size: int, mesh: Mesh) -> int:
    """The sets of axes whose product divides a size, a bit per set; an axis of one device cuts nothing.

    `splits_of(6, Mesh.of(x=4, y=2))` is 0b101: no axis at all, or y.
    """
    single = sum(1 << i for i, ways in enumerate(mesh.shape) if ways == 1)
    sets = (s for s in range(1 << len(mesh.axes)) if not s & single)
    return sum(1 << s for s in sets if size % mesh.ways(members(s, mesh.names)) == 0)


def members(axes: int, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of a set of axes, in the mesh's order."""
    return tuple(name for i, name in enumerate(names) if axes >> i & 1)


def strategies(rule: Rule, axes: int, splits: Splits) -> list[Strategy]:
    """All assignments of so many axes to factors that divide evenly, in a fixed order.

    An axis may also carry a sum through the op when it is linear in all operands together.
    """
    joints = [code for code in splits if rule.joint(code) is not None]
    able = [factor for factor in cuttable(rule) if factor in splits]
    options = [NONE, *able, *joints, *_carried(rule)]
    return [
        Strategy(codes)
        for codes in product(options, repeat=axes)
        if divides(codes, splits) and not cut_twice(rule, codes)
    ]


def _carried(rule: Rule) -> list[int]:
    everyone = set(range(len(rule.operands)))
    return [owing(i) for i, operands in enumerate(rule.linear) if set(operands) == everyone]


def divides(codes: tuple[int, ...], splits: Splits) -> bool:
    """Whether every factor divides over the axes that cut it."""
    cut: dict[int, int] = {}
    for i, code in enumerate(codes):
        if code >= 0:
            cut[code] = cut.get(code, 0) | 1 << i
    return all(splits[factor] >> axes & 1 for factor, axes in cut.items())


def follow(rule: Rule, operand: int, layout: Sharding, names: tuple[str, ...]) -> Strategy | None:
    """The strategy that takes this operand exactly as it lies, if all divides; None where there is none.

    Axes that cut the operand cut the same factors; a sum owed is carried on when
    the op is linear in this operand alone; other axes cut nothing.
    """
    codes = dict.fromkeys(names, NONE)
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
    return Strategy(tuple(codes[name] for name in names))


def layouts_by(
    splits: tuple[int, ...], names: tuple[str, ...], owed: bool = False
) -> list[Sharding]:
    """Every way to lay a tensor on the mesh, in a fixed order; `splits[d]` are those of dim d.

    Each axis cuts one dim (if the dim divides), or none, or, when `owed`, is owed a sum.
    """
    places = [*range(len(splits)), -1, *([-2] if owed else [])]
    found: list[Sharding] = []
    for choice in product(places, repeat=len(names)):
        cut = [
            sum(1 << i for i, place in enumerate(choice) if place == dim)
            for dim in range(len(splits))
        ]
        if all(split >> axes & 1 for split, axes in zip(splits, cut, strict=True)):
            partial = frozenset(
                name for name, place in zip(names, choice, strict=True) if place == -2
            )
            found.append(Sharding(tuple(members(axes, names) for axes in cut), partial))
    return found


def layouts_of(shape: tuple[int, ...], mesh: Mesh, owed: bool = False) -> list[Sharding]:
    """`layouts_by` for a tensor of this shape on a mesh."""
    return layouts_by(tuple(splits_of(size, mesh) for size in shape), mesh.names, owed)
