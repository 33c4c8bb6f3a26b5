"""What a step sends, by who reads it, from the search's tables: jobs are priced by readings of a short model.

Plans tell the same of their local programs (`report/moves.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from ...ir.graph import Op
from ...ir.plan import Collective
from ...ir.rules.rule import Strategy, side_sharding
from ...ir.sharding import Sharding, reshard
from ..intra.inside import Inside
from ..intra.outline import Decides
from ..intra.space import Space, Transfer
from ..report.moves import say


def moves(
    space: Space, choices: tuple[int, ...], item: Transfer, names: Mapping[str, str]
) -> list[Collective]:
    source = _chosen(space, choices, item.have, item.producer)
    target = _chosen(
        space, choices, item.wanted, item.consumer if item.consumer is not None else item.producer
    )
    prices, share = space.layouts.collectives, 1.0 / source.ways(space.mesh)
    entries: list[Collective] = []
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
                    what=f"{say(names, item.source)} -> {say(names, item.reader)}",
                    phase=item.phase,
                )  # fmt: skip
            )
    return entries


def _chosen(
    space: Space, choices: tuple[int, ...], numbers: np.ndarray, node: int | None
) -> Sharding:
    index = 0 if node is None or len(numbers) == 1 else choices[node]
    number: int = numbers[index]
    return space.layouts.known[number]


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
