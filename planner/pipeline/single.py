"""A pipeline as a single program for all stages, priced, and what the host takes to dispatch the other way.

    single = ticks * (layers forward + back, and a hand-over each) + share * (front and back of the step)
           + exchanges between stages + updates                                ticks = M + p - 1, share = ceil(M / p)
    stages = the schedule, simulated, with the host's dispatch of every instruction

In a tick all stages wait for the slowest. Front and back (embeddings, head and loss) are on every stage, which
runs them for its share of the microbatches; each stage keeps what all ticks of the forward pass leave (GPipe).

Leaves out: what both ways do once per step on the host, to place arrays and to take results apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Sequence
from itertools import pairwise
from math import ceil
from statistics import fmean
from typing import Literal

from ...ir.errors import InfeasibleError, PlanError
from ...ir.execution_model import ExecutionModel
from ...ir.mesh import STAGE
from ...ir.pipeline.schedule import Schedule
from ...ir.plan import Collective
from ...ir.units import format_bytes
from .priced import Place, Priced, Pricing
from .schedules import gpipe
from .simulate import StageSeconds, pipeline_tasks, simulate
from .stage_memory import Runs
from .unit_costs import UnitSeconds, together
from .units import HALVES, Units, runs_of

_Kind = Literal["all_reduce", "all_gather", "all_to_all", "permute"]
WHOLE = ("layer", *HALVES)  # what layers are made of


def with_dispatch(pricing: Pricing, priced: Priced, model: ExecutionModel) -> float:
    """Seconds of a step by programs of stages with the host's work, beside that of devices or before it."""
    host = dispatch_seconds(priced.schedule, shards_left(pricing, priced), pricing.hosts, model)
    return max(priced.seconds, host) if model.dispatches_beside else priced.seconds + host


def dispatch_seconds(
    schedule: Schedule, shards: Sequence[float], hosts: Collection[frozenset[int]],
    model: ExecutionModel,
) -> float:  # fmt: skip
    """What the busiest host takes to dispatch the passes of a step, and the hand-overs that it takes part in.

    Args:
        shards: by stage, what its forward pass leaves, on all its devices of one host.
        hosts: the ranks that have devices on each host; one process runs all of them.
    """
    return max(_dispatched_by(ranks, schedule, shards, model) for ranks in hosts)


def _dispatched_by(
    ranks: frozenset[int], schedule: Schedule, shards: Sequence[float], model: ExecutionModel
) -> float:
    passes = sum(len(schedule.orders[rank]) for rank in ranks)
    neighbours = [{a, b} for a, b in pairwise(schedule.homes) if a != b]
    moves = 2 * schedule.microbatches * sum(not ranks.isdisjoint(both) for both in neighbours)
    mean = fmean(shards[stage] for stage, rank in enumerate(schedule.homes) if rank in ranks)
    return (passes + moves) * (model.instruction_seconds + mean * model.shard_seconds)


def shards_left(pricing: Pricing, priced: Priced) -> list[float]:
    """By stage, what its forward pass leaves, as shards on one host."""
    shards: list[float] = []
    for stage, rank in enumerate(priced.schedule.homes):
        place = pricing.places[rank]
        left = sum(place.memory.holdings.left(priced.runs(pricing.units, stage)).values())
        shards.append(left * min(place.devices, pricing.cluster.group_at(place.first).per_host))
    return shards


def even_firsts(units: Units, stages: int) -> tuple[int, ...]:
    """The first unit of each stage where all hold equally many equal layers; the first also holds the front.

    Raises:
        PlanError: that cannot be.
    """
    layers, end = _layers(units)
    between = {units.names[kind] for kind in units.kinds[layers[0] : end]} if layers else set[str]()
    alike = (
        between.issubset(WHOLE)
        and len({b - a for a, b in pairwise(units.cuts[i] for i in layers)}) <= 1
    )
    if not layers or not alike or layers[0] == 0:
        what = (
            "nothing before its layers"
            if layers and alike
            else "layers of several kinds"
            if layers
            else "no layers"
        )
    elif len(layers) % stages:
        what = (
            f"{len(layers)} layers alike in both passes, which {stages} stages cannot share equally"
        )
    else:
        each = len(layers) // stages
        return (0, *(layers[each * stage] for stage in range(1, stages)))
    raise PlanError(f"the step has {what}.", where="request: program", fix="program=stages")


def _layers(units: Units) -> tuple[list[int], int]:
    """The first unit of each layer, be it whole or in halves, and the unit after the last layer."""
    names = [units.names[kind] for kind in units.kinds]
    parts = [i for i, name in enumerate(names) if name in WHOLE]
    return [i for i in parts if names[i] != HALVES[1]], parts[-1] + 1 if parts else 0


def can_be_even(units: Units, stages: int) -> bool:
    try:
        return bool(even_firsts(units, stages))
    except PlanError:
        return False


def layer_runs(units: Units, stages: int) -> tuple[list[Runs], Runs]:
    """Units of each kind: the layers of each stage, and what all stages have, the front and the back."""
    firsts = even_firsts(units, stages)
    layers, end = _layers(units)
    starts = [layers[0], *firsts[1:], end]
    ends = with_ends(runs_of(units, 0, starts[0]), runs_of(units, starts[-1], len(units)))
    return [runs_of(units, *pair) for pair in pairwise(starts)], ends


def with_ends(runs: Runs, ends: Runs) -> Runs:
    return tuple(map(sum, zip(runs, ends, strict=True)))


def price_single(pricing: Pricing, microbatches: int) -> Priced:
    """One program for all stages, one per rank.

    Raises:
        PlanError: the stages cannot be equal, or there is one microbatch.
        InfeasibleError: what a stage then holds does not fit.
    """
    units, places = pricing.units, pricing.places
    stages, each = len(places), places[0].each
    if microbatches < 2:
        raise PlanError(
            "one program for all stages needs two microbatches or more.",
            where=f"pipeline of {stages} stages", fix="microbatches=2; or program=stages, which takes one",
        )  # fmt: skip
    firsts, (layers, ends) = even_firsts(units, stages), layer_runs(units, stages)
    ticks, share = microbatches + stages - 1, ceil(microbatches / stages)
    held = {
        runs: sum(memory_by_cause(pricing, microbatches, layers.index(runs)).values())
        for runs in set(layers)
    }
    peaks = tuple(held[runs] for runs in layers)
    peak, limit = max(peaks), places[0].limit
    if peak > limit:
        raise InfeasibleError(
            f"it holds {format_bytes(peak)} per device, {format_bytes(limit)} may be used.",
            where=f"a single program, {ticks} ticks of {stages} stages", fix="program=stages", needed_bytes=peak,
            limit_bytes=limit,
        )  # fmt: skip
    moved = exchanges(pricing, microbatches)
    hop = moved[0].seconds / moved[0].count
    once = tuple(together(with_ends(runs, ends), each).once for runs in layers)
    schedule = gpipe(stages, microbatches)
    seconds = tuple(_stage(each, runs, hop) for runs in layers)
    slowest = max(together(runs, each).passes for runs in layers)
    passes = ticks * slowest + share * together(ends, each).passes
    total = passes + sum(item.seconds for item in moved) + max(once)
    run = simulate(pipeline_tasks(schedule, seconds))
    return Priced(schedule, firsts, seconds, once, peaks, (float(ticks),) * stages, run, total)


def exchanges(pricing: Pricing, microbatches: int) -> list[Collective]:
    """What each device exchanges with those of other stages; the hand-overs of the ticks come first.

    Front and back run for a share of the microbatches on each stage: results of the front are gathered for the
    layers, as gradients of the back, and those of the layers are dealt out. Their gradients are added up over stages.
    """
    units, places = pricing.units, pricing.places
    stages, ticks = len(places), microbatches + len(places) - 1
    sent = max(_sent(places[0], units.kinds[first - 1]) for first in even_firsts(units, stages)[1:])
    hop = max(
        pricing.sending(sent, place.first, place.end + place.devices) for place in places[:-1]
    )
    every = ceil(microbatches / stages) * stages * sent

    def item(
        kind: _Kind, nbytes: float, count: int, seconds: float, what: str, phase: str
    ) -> Collective:
        return Collective(
            kind=kind,
            axes=(STAGE,),
            nbytes=nbytes,
            count=count,
            seconds=count * seconds,
            what=what,
            phase=phase,
        )

    once = pricing.sending(every, 0, pricing.cluster.size)
    found = [item("permute", sent, ticks, hop, f"microbatches to the {way} stage", phase)
             for way, phase in (("next", "forward"), ("last", "backward"))]  # fmt: skip
    found += [item("all_gather", every, 1, once, "results of the front", "forward"),
              item("all_to_all", every, 1, once, "results of the layers", "forward"),
              item("all_gather", every, 1, once, "gradients of the back", "backward"),
              item("all_to_all", every, 1, once, "gradients of the layers", "backward")]  # fmt: skip
    for nbytes, count in _sums(places[0], layer_runs(units, stages)[1]).items():
        seconds = 2 * (stages - 1) / stages * nbytes
        found.append(item("all_reduce", nbytes, count, pricing.sending(seconds, 0, pricing.cluster.size),
                          "gradients of front and back", "backward"))  # fmt: skip
    return found


def once_alike(pricing: Pricing) -> set[str]:
    """Tags of ops that run once per step on every stage: updates of front and back."""
    units, cut = pricing.units, pricing.places[0].memory.holdings.cut
    ends = {kind for kind, many in enumerate(layer_runs(units, len(pricing.places))[1]) if many}
    found: tuple[set[str], set[str]] = set(), set()  # of layers, of ends
    for fragments in cut.stages.updates:
        for kind, fragment in enumerate(fragments):
            found[kind in ends].update(op.tag for op in fragment.ops)
    return found[True] - found[False]


def _sent(place: Place, kind: int) -> float:
    """Bytes that one device hands to the next stage per microbatch, as they travel."""
    memory = place.memory
    return sum(memory.travelling(value) for value in memory.holdings.cut.crossing(kind))


def _sums(place: Place, ends: Runs) -> Counter[float]:
    """Bytes of one device's part -> how many sums over microbatches of front and back have so many."""
    memory = place.memory
    owners, ours = memory.holdings.cut.owners, {kind for kind, many in enumerate(ends) if many}
    totals = [v for v in memory.holdings.passes.totals if owners[v] <= ours]
    return Counter(memory.held_bytes(v) for v in totals)


def _stage(each: Sequence[UnitSeconds], runs: Runs, hop: float) -> StageSeconds:
    work = together(runs, each)
    backward = work.backward.seconds
    return StageSeconds(work.forward.seconds, backward, work.whole - backward, hop, hop)


def memory_by_cause(pricing: Pricing, microbatches: int, rank: int) -> dict[str, float]:
    """Bytes at the peak of a rank: the stage's layers and both ends with one microbatch on its way, what the ticks
    leave of the layers, and activations of all microbatches: the front's results, and the gradients that the back
    gives. What one tick leaves is there twice: as it is made, and with the others."""
    stages, place = len(pricing.places), pricing.places[rank]
    layers, ends = layer_runs(pricing.units, stages)
    feed = ceil(microbatches / stages) * stages
    return place.memory.by_cause(with_ends(layers[rank], ends), 1) | {
        "left by all ticks": (microbatches + stages - 1) * place.memory.parts(layers[rank])[1],
        "between front, layers and back": 2 * feed * max(unit.sent for unit in place.each),
    }
