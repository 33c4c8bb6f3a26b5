"""Everything that plans may hold, together: models, layouts, attention, recomputation, schedules; a tool and a test.

    python -m tests.all_kinds --seeds 0:180            an hour and a half on two cores
    python -m tests.all_kinds --seeds 17 --trace       one of them, with its traceback

Each number draws a model of the zoo, a mesh of one to three axes, how it is laid out (searched, given as degrees, or
at random: any choice that can be run), attention fused or plain, a recompute policy, a schedule with its chunks, and
whether gathers and reductions come as they do where they overlap. The plan runs on up to 16 emulated devices and gives
what the unsharded step gives: its state after a step of plain SGD in float32, so that gradients show. Outcomes are as
in `random_programs`.
"""

from __future__ import annotations

import argparse
import functools
import random
import sys
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Any

from .outcomes import (
    Outcome,
    attempt,
    here,
    numbers,
    off_by,
    outcomes,
    prepare_process,
    told,
)  # fmt: skip

if TYPE_CHECKING:
    from meshwright.backends.xla.capture import Captured
    from meshwright.ir.composites.attention_op import AttentionKind
    from meshwright.ir.passes.recompute import Policy
    from meshwright.ir.pipeline.schedule import Schedule
    from meshwright.ir.plan import Plan

DEVICES = 16
ROUNDING = 2e-4  # of what a step moves, in float32; what is farther off is measured
LANGUAGE = (
    "gpt-tiny",
    "gpt-tiny-scan",
    "llama-tiny",
    "llama-tied-tiny",
    "mixtral-tiny",
    "deepseek-tiny",
)
MODELS = (*LANGUAGE, *LANGUAGE, "vit-tiny", "dlrm-tiny", "wrn-tiny")
MESHES = {2: ((2,),), 4: ((4,), (2, 2)), 8: ((8,), (2, 4), (2, 2, 2), (2, 2, 2))}
DEGREES = {  # by devices: of one to three kinds of parallelism
    2: ("dp2", "dp2 zero3", "tp2 sp", "cp2", "dp2 ep2"),
    4: ("dp4 zero1", "dp4 zero3", "tp4 sp", "dp2 tp2", "dp2 tp2 zero3 sp", "dp2 cp2 zero3", "tp2 cp2", "dp4 ep2"),
    8: (
        *("dp8 zero2", "dp8 zero3", "dp2 tp4 sp zero1", "dp4 cp2 zero3", "dp2 tp2 cp2", "dp2 tp2 cp2 zero3 sp"),
        "dp4 ep4 tp2",
    ),
}  # fmt: skip
SCHEDULES = (
    "",
    "1f1b",
    "gpipe",
    "zb-h1",
    "zbv",
    "interleaved 2",
    "interleaved 3",
    "interleaved 5",
    "single",
)
RECOMPUTE: tuple[Policy, ...] = ("none", "elementwise", "selective", "full")
ATTENTION: tuple[AttentionKind, ...] = ("fused", "fused", "plain")
BATCH = 32


@dataclass(frozen=True)
class Kind:
    """One of everything; `shape` is the mesh of one stage, and `stages` is per rank."""

    number: int
    model: str
    layout: str  # searched, random, or degrees
    shape: tuple[int, ...]
    schedule: str  # or none
    ranks: int
    chunks: int
    halves: bool  # half as many layers as stages
    microbatches: int
    attention: AttentionKind
    recompute: Policy
    overlap: bool

    @property
    def devices(self) -> int:
        return prod(self.shape) * self.ranks

    @property
    def words(self) -> str:
        mesh = "x".join(map(str, self.shape))
        pipe = (
            f"{self.schedule} x{self.chunks} on {self.ranks} ranks"
            if self.schedule
            else "no stages"
        )
        more = f"{self.attention}, recompute {self.recompute}{', overlap' * self.overlap}{', halves' * self.halves}"
        return (
            f"{self.model}, {mesh}, {self.layout}, {pipe}, {self.microbatches} microbatches, {more}"
        )


def kind(number: int, devices: int = DEVICES) -> Kind:
    """What a number draws; the same always. Schedules take turns, and within these recomputation."""
    draw, turn = random.Random(number), number // len(SCHEDULES)
    model, named = draw.choice(MODELS), SCHEDULES[number % len(SCHEDULES)]
    schedule, _, chunks = named.partition(" ")
    ranks = draw.choice((2, 4)) if schedule else 1
    size = draw.choice([n for n in (2, 4, 8, 8) if n * ranks <= devices and (schedule or n > 2)])
    shape = draw.choice(MESHES[size])
    layouts = ["searched", "random"]
    if model in LANGUAGE and schedule != "single":
        layouts += [draw.choice(DEGREES[size])] * 2
    whole = model == "wrn-tiny"  # batch norm: one microbatch
    microbatches = (
        1 if whole else draw.choice((ranks, 2 * ranks)) if schedule else draw.choice((1, 2))
    )
    layout = draw.choice(layouts) if schedule != "single" else "searched"
    return Kind(
        number, model, layout, shape, "" if whole and schedule == "single" else schedule,
        ranks, int(chunks or (2 if schedule == "zbv" else 1)), draw.random() < 0.2, microbatches,
        draw.choice(ATTENTION), RECOMPUTE[turn % len(RECOMPUTE)], draw.random() < 0.5,
    )  # fmt: skip


def run_kind(number: int, devices: int = DEVICES, trace: bool = False) -> Outcome:
    """Plan, run and compare one of them."""
    drawn = kind(number, devices)
    return attempt(number, drawn.words, lambda: _compare(drawn), trace)


def _compare(drawn: Kind) -> None:
    import jax

    import meshwright as mw
    from meshwright.backends.xla.lower import lower
    from meshwright.backends.xla.verify import reference, verify_outputs

    captured, leaves, flat = _case(
        drawn.model, _layers(drawn), drawn.schedule != "" and drawn.layout != "searched"
    )
    if drawn.layout == "searched":
        plan = _searched(drawn, captured)
    else:
        plan = _staged(drawn, captured, _laid_out(drawn, captured))
    if plan.pipeline is not None and plan.pipeline.unstacked:
        example = _example(drawn.model, _layers(drawn))
        run = mw.lower(plan, example.step, example.state, example.batch, donate_argnums=0)
        tree = jax.tree.structure((example.state, example.batch))
        results = jax.tree.leaves(run(*jax.tree.unflatten(tree, leaves)))
    else:
        results = lower(plan, captured).jitted(*leaves)
    wanted = jax.tree.leaves(flat(*leaves))
    before = {o: leaves[i] for i, o in captured.graph.state}
    pairs = enumerate(zip(wanted, jax.tree.leaves(results), strict=True))
    if max(off_by(want, have, before.get(o)) for o, (want, have) in pairs) > ROUNDING:
        truth = replace(reference(flat, captured, leaves), tolerance=0.0)
        verify_outputs(truth, results, captured.graph.output_names)


# ---------------------------------------------------------------- the step


def _layers(drawn: Kind) -> int | None:
    if drawn.model not in LANGUAGE or not drawn.schedule:
        return None
    stages = drawn.ranks * drawn.chunks
    return max(2, stages // 2 if drawn.halves and drawn.layout == "searched" else stages)


def _example(model: str, layers: int | None):
    from meshwright.models import build

    sized: dict[str, Any] = (
        {} if model.startswith("deepseek") or layers is None else {"layers": layers}
    )
    return build(model, optimizer="sgd", dtype="f32", batch=BATCH, **sized)


@functools.lru_cache(maxsize=4)
def _case(model: str, layers: int | None, apart: bool) -> tuple[Captured, list[Any], Any]:
    """The captured step, its inputs, and the step on flat leaves; loops over layers taken apart where asked."""
    import jax
    import numpy as np

    from meshwright.backends.xla.capture import capture
    from meshwright.backends.xla.unstack import unstack

    example = _example(model, layers)
    captured = capture(example.step, example.state, example.batch, donate_argnums=0)
    state, batch = example.init(jax.random.key(0)), example.make_batch(np.random.default_rng(0))
    leaves, tree = jax.tree.flatten((jax.tree.map(_later, state), batch))
    leaves = list(map(np.asarray, leaves))
    flat = jax.jit(lambda *leaves: example.step(*jax.tree.unflatten(tree, leaves)))
    if apart and model.endswith("-scan"):
        pieces = unstack(captured)
        assert pieces is not None
        captured, leaves, flat = (
            pieces.captured,
            list(map(np.asarray, pieces.apart(leaves))),
            pieces.in_pieces(flat),
        )
    return captured, leaves, flat


def _later(leaf: Any) -> Any:
    """Counters as after a few steps: a learning rate that warms up from 0 would hide every gradient."""
    import numpy as np

    return leaf + 5 if leaf.ndim == 0 and np.issubdtype(leaf.dtype, np.integer) else leaf


# ---------------------------------------------------------------- its plan


def _cluster(drawn: Kind, devices: int) -> str:
    """Of GPUs where communication is to overlap: what runs is laid out the same on CPUs."""
    if not drawn.overlap:
        return f"{devices}xcpu"
    return f"h100x{devices}" if devices <= 8 else f"{devices // 8}xh100x8@ib400"


def _searched(drawn: Kind, captured: Captured) -> Plan:
    from meshwright.api import plan_captured
    from meshwright.planner.request import Request

    several = drawn.chunks if drawn.schedule == "interleaved" else None
    stages: dict[str, Any] = {
        "pp": drawn.ranks, "chunks": several, "program": "single" if drawn.schedule == "single" else "stages",
        "schedule": None if drawn.schedule == "single" else drawn.schedule,
    }  # fmt: skip
    request = Request(
        mesh=drawn.shape, microbatches=drawn.microbatches, recompute=drawn.recompute, attention=drawn.attention,
        overlap="all" if drawn.overlap else "none", time_limit=20, gap=0.1, seed=drawn.number,
        **(stages if drawn.schedule else {}),
    )  # type: ignore[arg-type] # fmt: skip
    return plan_captured(captured, _cluster(drawn, drawn.devices), request, drawn.model)


def _laid_out(drawn: Kind, captured: Captured) -> Plan:
    """One stage's devices, as degrees say or at random."""
    from meshwright.ir.analysis.blocks import fold
    from meshwright.ir.cluster.cluster import Cluster
    from meshwright.ir.composites.attention_op import composed
    from meshwright.ir.fingerprint import fingerprint
    from meshwright.planner.jobs.fixed import fixed_plan

    from .random_plans import random_plans

    given: dict[str, Any] = {"recompute": drawn.recompute, "attention": drawn.attention}
    cluster = _cluster(drawn, prod(drawn.shape))
    if drawn.layout == "random":
        return next(
            random_plans(
                captured,
                drawn.shape,
                1,
                drawn.microbatches,
                cluster=cluster,
                seed=drawn.number,
                **given,
            )
        )
    given_cluster = Cluster.parse(cluster)
    return fixed_plan(
        fold(composed(captured.graph, drawn.attention, given_cluster)), given_cluster, degrees(drawn.layout),
        microbatches=drawn.microbatches, name=drawn.model, fingerprint=fingerprint(captured.graph), **given,
        overlap="all" if drawn.overlap else "none",
    )  # type: ignore[arg-type] # fmt: skip


def degrees(text: str):
    """`dp2 tp2 zero3 sp` as numbers."""
    from meshwright.planner.jobs.pinned import Parallelism

    words = text.split()
    given: dict[str, Any] = {word[:-1]: int(word[-1]) for word in words if word != "sp"}
    return Parallelism(**given, sequence_parallel="sp" in words)


def _staged(drawn: Kind, captured: Captured, plan: Plan) -> Plan:
    """Every stage with the decisions of `plan`, in the order of the schedule."""
    from meshwright.ir.composites.attention_op import composed

    from .pipelines import even_cuts, pipelined

    if not drawn.schedule:
        return plan
    schedule = _schedule(drawn)
    graph = composed(captured.graph, drawn.attention, plan.cluster)
    whole = replace(captured, graph=graph)
    return pipelined(plan, captured, schedule, even_cuts(whole, schedule.stages))


def _schedule(drawn: Kind) -> Schedule:
    from meshwright.planner.pipeline.schedules import schedule_named

    several = drawn.chunks if drawn.schedule == "interleaved" else None
    return schedule_named(drawn.schedule, drawn.ranks, drawn.microbatches, several)


# ---------------------------------------------------------------- the tool


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0:180", help="a range 0:180, or numbers 3,7,11")
    parser.add_argument("--trace", action="store_true", help="in this process, with tracebacks")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    seeds = numbers(given.seeds)
    if given.child or given.trace:
        return here(run_kind(seed, trace=given.trace) for seed in seeds)
    return told(outcomes("tests.all_kinds", seeds, [], lambda seed: kind(seed).words))


if __name__ == "__main__":
    prepare_process(DEVICES)
    sys.exit(main())
