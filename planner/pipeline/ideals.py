"""The sets of a graph's units that a pipeline may have done: closed under "comes before".

Between two of them, one within the other, lies a stage; a chain of n units has n + 1, a graph with
parallel branches more. Sets are ints, bit i for unit i. Source: Tarnawski et al., Efficient Algorithms
for Device Placement of DNN Graph Operators, NeurIPS 2020, section 5.
"""

from __future__ import annotations

from collections.abc import Iterable

from ...ir.errors import PlanError


def closed_sets(units: int, edges: Iterable[tuple[int, int]], most: int) -> list[int]:
    """All of them, smaller ones first.

    Args:
        edges: pairs (before, after).
        most: more sets than that are refused.

    Raises:
        PlanError: there are too many, or the edges make a cycle.
    """
    needs = [0] * units
    for before, after in edges:
        needs[after] |= 1 << before
    found, level = [0], {0}
    while level:
        level = {
            done | 1 << unit
            for done in level
            for unit in range(units)
            if not done >> unit & 1 and needs[unit] & done == needs[unit]
        }
        found += sorted(level)
        if len(found) > most:
            raise PlanError(
                f"a graph of {units} units can be cut in more than {most} places.",
                where="edges", fix="a graph with fewer parallel branches, or units joined into larger ones",
            )  # fmt: skip
    if found[-1] != (1 << units) - 1:
        stuck = next(unit for unit in range(units) if not found[-1] >> unit & 1)
        raise PlanError(
            f"unit {stuck} comes before itself.", where="edges", fix="edges without a cycle"
        )
    return found


def members(some: int) -> list[int]:
    """The units of a set, in order."""
    found: list[int] = []
    while some:
        low = some & -some
        found.append(low.bit_length() - 1)
        some ^= low
    return found
