"""The collectives of a plan, read off its local program: what travels between ops, over which axes, how often.

`moves` and `settlements` say the same from the search's tables, for those who need them by reading (`price`, the
simulator).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from types import MappingProxyType

import numpy as np

from ...ir.graph import Op, Region
from ...ir.local.program import COLLECTIVES, ON_SHARDS, LocalOp
from ...ir.ops import FORWARDING
from ...ir.plan import Collective
from ...ir.rules.rule import Strategy, side_sharding
from ...ir.sharding import Sharding, reshard
from ..intra.inside import Inside
from ..intra.outline import Decides
from ..intra.space import Space, Transfer
from .local_prices import LocalPrices

SILENT = FORWARDING - {"broadcast_in_dim"}  # named by what they read


def spoken(space: Space) -> dict[str, str]:
    """Op tag -> what a reader knows its result by: "dot_general model.py:31", or the input
    that it casts, transposes or copies."""
    graph, tags = space.program.graph, space.program.value_tags
    values = {v: tags[v] for v in graph.inputs}
    found: dict[str, str] = {}
    for visit in graph.visits:
        op = visit.op
        for region in op.regions:
            values.update({v: tags[v] for v in region.inputs})
            values.update(_shown(op, region, values))
        silent = op.kind in SILENT and op.inputs[0] in values
        found[op.tag] = values[op.inputs[0]] if silent else f"{op.kind} {op.where}".strip()
        values.update(dict.fromkeys(op.outputs, found[op.tag]))
    return found


def _shown(op: Op, region: Region, names: Mapping[int, str]) -> dict[int, str]:
    """What a region sees of inputs of the step: those that stay the same in every turn, and rows."""
    consts, carry = op.loop_inputs
    pairs = enumerate(zip(op.inputs, region.inputs, strict=True))
    return {v: names[u] for k, (u, v) in pairs if u in names and not consts <= k < consts + carry}


def _say(names: Mapping[str, str], tag: str) -> str:
    """A value's or an op's tag in words; names of inputs stay."""
    if tag in names:
        return names[tag]
    op, _, _ = tag.rpartition(":")
    return names.get(op, tag)


def find_collectives(
    prices: LocalPrices, often: Mapping[str, int] = MappingProxyType({})
) -> list[Collective]:
    """Every communication of a local program, equal ones added up.

    Args:
        often: op tag -> on how many stages alike what it reads is brought and what it makes is settled.
    """
    found: dict[tuple, Collective] = {}
    names = spoken(prices.space)
    for op, runs in prices.runs():
        for entry in _sent(prices, op, runs, names):
            _count(found, repeated(entry, often.get(op.reader or op.tag, 1)))
    return sorted(found.values(), key=lambda c: -c.seconds)


def _sent(
    prices: LocalPrices, op: LocalOp, runs: float, names: Mapping[str, str]
) -> Iterator[Collective]:
    """What one op is, or sends while it runs."""
    many = max(1, round(runs))  # a branch seldom taken is there once
    if op.kind in ON_SHARDS:
        seconds = prices.move(op)
        if op.kind in COLLECTIVES and (nbytes := prices.nbytes(op)):
            what = f"{_say(names, op.source)} -> {_say(names, op.reader)}"
            yield Collective(
                kind=op.kind, axes=op.axes, nbytes=nbytes, count=many, seconds=runs * seconds,  # type: ignore[arg-type]
                what=what if op.reader else _own(prices, op), phase=op.phase,
            )  # fmt: skip
    elif prices.computes(op):
        for sent, nbytes, seconds in prices.inside(op):
            yield Collective(
                kind=sent.kind, axes=sent.axes, nbytes=nbytes, count=max(1, round(runs * sent.times)),
                seconds=runs * seconds, what=_own(prices, op), phase=op.phase,
            )  # fmt: skip


def _own(prices: LocalPrices, op: LocalOp) -> str:
    """Of what an op sends by itself."""
    whole = prices.graph_ops[op.tag]
    return f"{whole.kind} {whole.where}".strip()


def repeated(entry: Collective, times: int) -> Collective:
    """The same so many times."""
    return entry.model_copy(update={"count": entry.count * times, "seconds": entry.seconds * times})


def _count(found: dict[tuple, Collective], entry: Collective) -> None:
    key = (entry.kind, entry.axes, entry.nbytes, entry.what, entry.phase)
    old = found.get(key)
    if old is not None:
        entry = entry.model_copy(
            update={"count": old.count + entry.count, "seconds": old.seconds + entry.seconds}
        )
    found[key] = entry


def moves(
    space: Space, choices: tuple[int, ...], item: Transfer, names: Mapping[str, str]
) -> list[Collective]:
    source = _chosen(space, choices, item.have, item.producer)
    target = _chosen(
        space, choices, item.wanted, item.consumer if item.consumer is not None else item.producer
    )
    prices, share, entries = space.layouts.collectives, 1.0 / source.ways(space.mesh), []
    for step in reshard(source, target) or ():
        larger, share = prices.shares(step, share)
        if step.kind != "slice" and item.nbytes:
            nbytes = item.nbytes * larger
            line = prices.line(step.kind, step.axes)
            if prices.joins(step.kind, item.phase, source):
                line = replace(line, fixed=0.0)
            seconds = item.runs * line(nbytes)
            entries.append(
                Collective(
                    kind=step.kind,
                    axes=step.axes,
                    nbytes=nbytes,
                    count=max(1, round(item.runs)),  # a branch seldom taken is there once
                    seconds=seconds,
                    what=f"{_say(names, item.source)} -> {_say(names, item.reader)}",
                    phase=item.phase,
                )  # fmt: skip
            )
    return entries


def _chosen(
    space: Space, choices: tuple[int, ...], numbers: np.ndarray, node: int | None
) -> Sharding:
    index = 0 if node is None or len(numbers) == 1 else choices[node]
    return space.layouts.known[numbers[index]]


def settlements(space: Space, choices: tuple[int, ...]) -> list[tuple[Op, Collective]]:
    """What ops send while they run, each tag once for all its runs in a step."""
    readings = space.frame.outline.readings
    phases = {reader: reading.phase for (_, reader, _), reading in readings.items()}
    entries = list[tuple[Op, Collective]]()
    for step in space.frame.outline.decides:
        op, runs, x = step.op, space.runs[step.op.tag], choices[space.op_node[step.op.tag]]
        strategy: Strategy = space.strategies[op.tag][x]
        if not (inside := _inside(space, step, strategy)).sent():
            continue
        compute = float(space.own[op.tag][x] - space.settled[op.tag][x])
        for sent, seconds in zip(inside.sent(), inside.seconds(compute), strict=True):
            entry = Collective(
                kind=sent.kind, axes=sent.axes, nbytes=inside.nbytes(sent),
                count=max(1, round(runs * sent.times)), seconds=runs * seconds,
                what=f"{op.kind} {op.where}".strip(), phase=phases.get(op.tag, "forward"),
            )  # fmt: skip
            entries.append((op, entry))
    return entries


def _inside(space: Space, step: Decides, strategy: Strategy) -> Inside:
    ways = [
        float(side_sharding(step.rule, strategy, space.mesh, k).ways(space.mesh))
        * (space.microbatches if timed else 1)
        for k, timed in enumerate(step.timed)
    ]
    return space.inside(step.op, step.rule, strategy, ways)
