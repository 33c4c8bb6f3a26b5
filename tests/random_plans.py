"""Any plan of a step at random, good or bad: a program of each must give what one device gives."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from meshwright.api import plan_captured
from meshwright.backends.xla.capture import Captured
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.composites.attention_op import AttentionKind, composed
from meshwright.ir.errors import PlanError
from meshwright.ir.mesh import Axis, Mesh
from meshwright.ir.passes.recompute import Policy
from meshwright.ir.plan import Plan
from meshwright.ir.program import prepare
from meshwright.planner.cost.model import Roofline
from meshwright.planner.intra.layouts import Layouts
from meshwright.planner.intra.space import Space, build
from meshwright.planner.report.chosen import slots_of
from meshwright.planner.request import Request

CLUSTER = "8xcpu"


def random_plans(
    captured: Captured, shape: tuple[int, ...], count: int, microbatches: int = 1, *, cluster: str = CLUSTER,
    seed: int = 0, recompute: Policy = "none", attention: AttentionKind = "plain",
) -> Iterator[Plan]:  # fmt: skip
    """`count` plans on a mesh, each choice drawn from those that can be reached from what is drawn before."""
    request = Request(
        mesh=shape, microbatches=microbatches, recompute=recompute, attention=attention, time_limit=20, gap=0.5
    )  # fmt: skip
    found = plan_captured(captured, cluster, request, "random")
    mesh = Mesh(tuple(Axis(name, size) for name, size in zip(found.mesh.names, shape, strict=True)))
    cost = Roofline(Cluster.parse(cluster))
    graph = composed(captured.graph, attention, found.cluster)
    program = prepare(fold(graph).small, recompute)
    space = build(program, microbatches, cost, Layouts(cost.collectives(mesh)))
    rng = np.random.default_rng(seed)
    for _ in range(count):
        choices = _drawn(space, rng)
        strategies = {
            tag: each[choices[space.op_node[tag]]].axes for tag, each in space.strategies.items()
        }
        yield found.model_copy(update={"strategies": strategies, "slots": slots_of(space, choices)})


def _drawn(space: Space, rng: np.random.Generator) -> tuple[int, ...]:
    for _ in range(1000):
        able = [np.isfinite(node.seconds) for node in space.nodes]
        choices = [-1] * len(able)
        for node in rng.permutation(len(able)):
            if not able[node].any():
                break
            choices[node] = int(rng.choice(np.flatnonzero(able[node])))
            for (a, b), table in space.edges.items():
                if node in (a, b):
                    other, row = (
                        (b, table[choices[node]]) if node == a else (a, table[:, choices[node]])
                    )
                    able[other] = able[other] & np.isfinite(row)
        else:
            return tuple(choices)
    raise PlanError("no plan was drawn: nothing chosen so far goes with what is left.")
