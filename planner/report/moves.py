"""The collectives of a plan, read off its local program: what travels between ops, over which axes, how often."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType

from ...ir.graph import Op, Region
from ...ir.local.program import COLLECTIVES, ON_SHARDS, LocalOp
from ...ir.ops import FORWARDING
from ...ir.plan import Collective
from ..intra.space import Space
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


def say(names: Mapping[str, str], tag: str) -> str:
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
    found: dict[object, Collective] = {}
    names = spoken(prices.space)
    for op, runs in prices.runs():
        for entry in sent_by(prices, op, runs, names):
            count_entry(found, repeated(entry, often.get(op.reader or op.tag, 1)))
    return sorted(found.values(), key=lambda c: -c.seconds)


def sent_by(
    prices: LocalPrices, op: LocalOp, runs: float, names: Mapping[str, str]
) -> Iterator[Collective]:
    """What one op is, or sends while it runs."""
    many = max(1, round(runs))  # a branch seldom taken is there once
    if op.kind in ON_SHARDS:
        seconds = prices.move(op)
        if op.kind in COLLECTIVES and (nbytes := prices.nbytes(op)):
            what = f"{say(names, op.source)} -> {say(names, op.reader)}"
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


def count_entry(found: dict[object, Collective], entry: Collective) -> None:
    """Add a communication to those found, its count and seconds to those of an equal one."""
    key = (entry.kind, entry.axes, entry.nbytes, entry.what, entry.phase)
    old = found.get(key)
    if old is not None:
        entry = entry.model_copy(
            update={"count": old.count + entry.count, "seconds": old.seconds + entry.seconds}
        )
    found[key] = entry
