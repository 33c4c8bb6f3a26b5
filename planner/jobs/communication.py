"""What a step sends, reading by reading, read off its local program: parts of jobs are told by who reads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

from ...ir.local.program import ON_SHARDS, LocalOp
from ...ir.plan import Collective
from ...ir.sharding import Sharding
from ..report.local_prices import LocalPrices
from ..report.moves import count_entry, sent_by, spoken


@dataclass
class Communication:
    """What it takes to bring a value to a reader as it is `wanted`, in all layers alike; or what an op sends by
    itself, where that is None."""

    source: str  # tag of the value
    reader: str  # tag of the op or slot
    phase: str
    wanted: Sharding | None
    found: dict[object, Collective] = field(default_factory=lambda: {})

    @property
    def entries(self) -> list[Collective]:
        return list(self.found.values())


def communications(prices: LocalPrices) -> list[Communication]:
    """All that a local program sends, in order."""
    found: dict[tuple[str, str, Sharding | None], Communication] = {}
    names, shards = spoken(prices.space), prices.local.shards
    brought = set[tuple[object, ...]]()
    for chain, runs in _chains(prices):
        first = chain[0]
        moves = first.kind in ON_SHARDS and bool(first.reader)
        wanted = shards[chain[-1].outputs[0]].sharding if moves else None
        key = first.source, first.reader or first.tag, wanted
        each = found.setdefault(key, Communication(*key[:2], first.phase, wanted))
        entries = [entry for op in chain for entry in sent_by(prices, op, runs, names)]
        once = (*first.inputs, *key)  # an op may read one value twice
        if moves and once in brought:
            continue
        brought.add(once)
        for entry in entries:
            count_entry(each.found, entry.model_copy(update={"phase": each.phase}))
    return list(found.values())


def _chains(prices: LocalPrices) -> Iterator[tuple[list[LocalOp], float]]:
    """The ops, and how often they run; the steps that bring a value to one reader go together."""
    chain, often = list[LocalOp](), 0.0
    for op, runs in prices.runs():
        if chain and not _follows(chain[-1], op):
            yield chain, often
            chain = []
        chain, often = [*chain, op], runs
    if chain:
        yield chain, often


def _follows(last: LocalOp, op: LocalOp) -> bool:
    moves = last.kind in ON_SHARDS and op.kind in ON_SHARDS and op.inputs == last.outputs
    return moves and bool(op.reader) and (op.source, op.reader) == (last.source, last.reader)
