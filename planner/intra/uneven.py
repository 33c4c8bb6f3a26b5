"""How much more than its share of attention the busiest device computes, by how its rows and keys are cut."""

from __future__ import annotations

from math import prod

from ...ir.composites.bodies import body_of
from ...ir.composites.evenly import pairs_kept
from ...ir.composites.ring import first_ops, passes
from ...ir.graph import Op
from ...ir.mesh import Mesh
from ...ir.ops import CONTRACTIONS
from ...ir.rules import rule_of
from ...ir.rules.rule import Rule, Strategy
from ..cost.flop import flop
from .inside import ring_under


def unevenness(op: Op, rule: Rule, strategy: Strategy, mesh: Mesh) -> float:
    """Where masks leave keys out; 1 for a ring, which is told by `ring_work`."""
    rows, codes = op.integer("rows"), strategy.axes
    joints = [joint.how for code in codes if (joint := rule.joint(code)) is not None]
    if "ring" in joints:
        return 1.0
    cuts = zip(mesh.shape, codes, strict=True)
    ways = prod(n for n, code in cuts if rows in rule.cut_by(code))
    return pairs_kept(op, ways, "even" in joints) / pairs_kept(op)


def ring_work(op: Op, rule: Rule, strategy: Strategy, mesh: Mesh) -> tuple[float, int]:
    """The same of a ring, with the products that it does twice, and how many kernels it runs."""
    ring = ring_under(op, rule, strategy, mesh)
    if ring is None:
        return 1.0, 1
    often, graph = passes(op), body_of(op.text("body"))
    found = [
        sum(flop(o, rule_of(o, graph.types), graph.types) for o in ops if o.kind in CONTRACTIONS)
        for ops in (graph.ops, first_ops(op) if often > 1 else ())
    ]
    more = sum(ring.work) * ring.ways / pairs_kept(op)
    return more * (found[0] + found[1]) / found[0], ring.steps * often
