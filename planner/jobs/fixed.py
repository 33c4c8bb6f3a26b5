"""A plan whose decisions are given as numbers: priced and written down, not searched."""

from __future__ import annotations

from ...ir.analysis.blocks import Folded
from ...ir.analysis.roles import roles
from ...ir.cluster.cluster import Cluster
from ...ir.composites.attention_op import AttentionKind
from ...ir.composites.losses import LossKind
from ...ir.errors import PlanError
from ...ir.execution import OverlapKind
from ...ir.passes.recompute import Policy
from ...ir.plan import Plan
from ..intra.layouts import Layouts
from ..intra.solve import Answer
from ..intra.space import build
from ..memory.ledger import Ledger
from ..memory.lifetimes import lifetimes
from ..memory.storage import storage_of
from ..problem import Problem, cost_of
from ..report.of_plan import write_plan
from ..request import Request, check
from ..search.candidates import Best, Candidate, SearchResult
from ..search.ties import in_fewest_bytes
from ..solver.onehot import Solution
from ..trace import Trace
from .pinned import Parallelism, Pinned


def fixed_plan(
    folded: Folded, cluster: Cluster, parallelism: Parallelism, *, microbatches: int = 1, recompute: Policy = "none",
    name: str, fingerprint: str, attention: AttentionKind = "plain", overlap: str | tuple[OverlapKind, ...] = (),
    loss: LossKind = "plain",
) -> Plan:  # fmt: skip
    """The plan of one stage that these degrees make for a model of the zoo; `attention`, `loss`: how `folded` has them.

    Its proof claims nothing: no bound is known, nothing else was looked at.

    Raises:
        PlanError: degrees that do not fit the cluster or need a pipeline, microbatches that do not divide.
    """
    if parallelism.pp > 1 or parallelism.devices != cluster.size:
        raise PlanError(
            f"tp x dp x cp is {parallelism.devices // parallelism.pp}, the cluster has {cluster.size} devices.",
            where="parallelism", fix=f"degrees that multiply to {cluster.size}, and pp=1",
        )  # fmt: skip
    runs = {"plain": ("all_gather",), "fused": ("all_gather", "p2p"), "ring": ("p2p",)}[attention]
    if parallelism.cp > 1 and parallelism.cp_kind not in runs:
        raise PlanError(
            f"context parallelism by `{parallelism.cp_kind}` can be priced, not run.",
            where=f"cp kind, attention {attention}", fix=" or ".join(runs),
        )  # fmt: skip
    request = Request(
        microbatches=microbatches,
        recompute=recompute,
        gap=0.0,
        attention=attention,
        loss=loss,
        overlap=overlap,
    )
    problem = Problem(folded, cluster, request, cost_of(cluster, request), name, fingerprint)
    program, trace = problem.program(recompute), Trace(request.time_limit)
    check(request, cluster, program.time)
    pinned = Pinned(program, parallelism, runs=True)
    beside, layouts = request.execution.overlap, Layouts(problem.cost.collectives(pinned.mesh))
    space = build(program, microbatches, problem.cost, layouts, pinned, overlap=beside)
    storage = storage_of(program, problem.cost.execution_model)
    lives = lifetimes(program, microbatches, roles(program.graph), storage, beside)
    choices = (0,) * len(space.nodes)
    ledger = Ledger(space, lives)
    solution = Solution("feasible", "proof", choices, space.seconds(choices), 0.0)
    answer = Answer(solution, *ledger.peak(ledger.local_bytes(choices)))
    best = Best(Candidate(pinned.mesh, recompute, microbatches), space, lives, answer)
    trace.log.append(f"{parallelism}: given, not searched")
    return write_plan(in_fewest_bytes(SearchResult(problem, best, 0.0, trace)))
