"""Repeated layers, found by structure.

A step of 96 equal layers is one long list of ops in which stretches repeat:
the forward layers, the backward layers, one stretch per stage of the optimizer.
`fold` finds these tandem repeats, gives ops at the same place one `tag`, and
makes a small graph that keeps the first, the second and the last repeat. The
second stands for all those between. Planning works on the small graph, so its
cost depends on the number of *different* blocks, never on depth.

    a b c  a b c  a b c  a b c  d     four repeats of period 3, then d
    a b c  a b c         a b c  d     kept, with counts 1, 2, 1
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from ..graph import Batch, Graph, Op, Region, TensorType
from ..ops import CONTRACTIONS, CONTROL_FLOW
from ..passes.keys_first import with_keys_first
from .batch import with_batch

HEAVY = CONTRACTIONS | CONTROL_FLOW
FEWEST_SAVED = 4  # a repeat that saves fewer ops than this is left alone
FEW = 64  # elements, as of keys and scalars
MOST_PERIODS = 96  # candidate periods tried per round, the most promising first


@dataclass(frozen=True, slots=True)
class Block:
    """A stretch of `period` ops, repeated `repeats` times from op `start` on."""

    name: str
    start: int
    period: int
    repeats: int

    def place(self, position: int) -> tuple[int, int] | None:
        """(repeat, offset) of a top-level op, or None outside."""
        inside = position - self.start
        if not 0 <= inside < self.period * self.repeats:
            return None
        return divmod(inside, self.period)

    def kept(self, repeat: int) -> int:
        """The repeat that stands for this one in the small graph."""
        return repeat if self.repeats <= 3 or repeat in (0, 1, self.repeats - 1) else 1

    def count(self, repeat: int) -> int:
        """How many repeats a kept one stands for."""
        return self.repeats - 2 if self.repeats > 3 and repeat == 1 else 1


@dataclass(frozen=True)
class Folded:
    """`whole` is the graph with tags; `small` has at most three repeats of each block."""

    whole: Graph
    small: Graph
    blocks: tuple[Block, ...]


def fold(graph: Graph) -> Folded:
    """Tag the graph and shrink its repeated blocks; see the module's docstring."""
    graph = with_keys_first(graph)
    blocks = find_blocks(_symbols(graph), [op.kind in HEAVY for op in graph.ops])
    blocks = _reading_alike(graph, blocks)
    places = _places(blocks, len(graph.ops))
    ops = tuple(
        _tagged(op, _tag(place, i))
        for i, (op, place) in enumerate(zip(graph.ops, places, strict=True))
    )
    groups = _input_groups(replace(graph, ops=ops))
    tags = _input_tags(graph, groups)
    whole = replace(graph, ops=ops, input_tags=tags, input_counts=(1,) * len(graph.inputs))
    return _with_batch(whole, _shrink(whole, places, groups), blocks)


def _with_batch(whole: Graph, small: Graph, blocks: tuple[Block, ...]) -> Folded:
    """Both graphs with the batch: as told of the whole one, else as inferred from the small one."""
    if whole.batch is None:
        small = with_batch(small)
        assert small.batch is not None
        dims = {small.input_tags[p]: d for p, d in small.batch.dims}
        return Folded(replace(whole, batch=_by_tag(whole, small.batch, dims)), small, blocks)
    dims = {whole.input_tags[p]: d for p, d in whole.batch.dims}
    return Folded(whole, replace(small, batch=_by_tag(small, whole.batch, dims)), blocks)


def told_statistics(folded: Folded, statistics: Literal["microbatch"] | None) -> Folded:
    """Both graphs with what batch norm and the like are taken over, if that was told."""
    if statistics is None:
        return folded
    graphs = (folded.whole, folded.small)
    whole, small = (
        replace(g, batch=g.batch and replace(g.batch, statistics=statistics)) for g in graphs
    )
    return Folded(whole, small, folded.blocks)


def _by_tag(graph: Graph, batch: Batch, dims: Mapping[str, int]) -> Batch:
    found = ((p, dims[tag]) for p, tag in enumerate(graph.input_tags) if tag in dims)
    return replace(batch, dims=tuple(found))


# ---------------------------------------------------------------- finding repeats


def find_blocks(symbols: np.ndarray, heavy: Sequence[bool]) -> tuple[Block, ...]:
    """Disjoint tandem repeats, those that save most ops first.

    First the repeats with real work in them (layers); then, among the rest,
    repeats with the same count (their optimizer updates) or many more (a sum over
    all leaves, one after another). Chance repeats of a few small ops are no blocks.
    """
    free = np.ones(len(symbols), bool)
    work = np.concatenate([[0], np.cumsum(heavy)])
    found = _take_repeats(symbols, free, lambda block: bool(work[_end(block)] - work[block.start]))
    counts = {near for block in found for near in (block.repeats - 1, block.repeats)} - {1}
    many = 2 * max(counts, default=len(symbols))
    found += _take_repeats(
        symbols, free, lambda block: block.repeats in counts or block.repeats > many
    )
    found.sort(key=lambda block: block.start)
    return tuple(replace(block, name=f"block{i}") for i, block in enumerate(found))


def _reading_alike(graph: Graph, blocks: tuple[Block, ...]) -> tuple[Block, ...]:
    """Those of which no repeat reads what an op outside all blocks makes for it alone. Where one repeat stands for
    many, nobody would read the others' in the small graph, as if they need not be kept. Scalars and keys do not
    matter, nor do inputs, which are kept anyway.
    """
    while True:
        places = _places(blocks, len(graph.ops))
        made = zip(graph.ops, places, strict=True)
        maker = {v: i for i, (op, place) in enumerate(made) if place is None for v in op.outputs}
        read: dict[tuple[Block, int, int], set[int | None]] = defaultdict(set)
        for op, place in zip(graph.ops, places, strict=True):
            if place and 0 < place[1] < place[0].repeats - 1 and place[0].repeats > 3:
                for k, value in enumerate(op.inputs):
                    read[place[0], place[2], k].add(
                        maker.get(value) if graph.types[value].size > FEW else None
                    )
        unlike = {block for (block, _, _), makers in read.items() if len(makers) > 1}
        if not unlike:
            return blocks
        blocks = tuple(block for block in blocks if block not in unlike)


def _take_repeats(
    symbols: np.ndarray, free: np.ndarray, accept: Callable[[Block], bool]
) -> list[Block]:
    found: list[Block] = []
    while True:
        repeats = (r for p in _periods(symbols, free) for r in _repeats(symbols, free, p))
        best = max(filter(accept, repeats), key=_saved, default=None)
        if best is None or _saved(best) < FEWEST_SAVED:
            return found
        free[best.start : _end(best)] = False
        found.append(best)


def _saved(block: Block) -> int:
    return block.period * (block.repeats - 1)


def _end(block: Block) -> int:
    return block.start + block.period * block.repeats


def _periods(symbols: np.ndarray, free: np.ndarray) -> np.ndarray:
    """Distances between neighbouring equal symbols, the most frequent first."""
    positions = np.flatnonzero(free)
    order = positions[np.argsort(symbols[positions], kind="stable")]
    same = symbols[order[1:]] == symbols[order[:-1]]
    distances = (order[1:] - order[:-1])[same]
    values, counts = np.unique(distances, return_counts=True)
    return values[np.argsort(-values * counts, kind="stable")][:MOST_PERIODS]


def _repeats(symbols: np.ndarray, free: np.ndarray, period: int) -> Iterable[Block]:
    """Maximal stretches in which every symbol equals the one a period later."""
    equal = (symbols[:-period] == symbols[period:]) & free[:-period] & free[period:]
    edges = np.flatnonzero(np.diff(np.concatenate([[0], equal.astype(np.int8), [0]])))
    starts, ends = edges.reshape(-1, 2).T
    long = ends - starts >= period
    for start, end in zip(starts[long].tolist(), ends[long].tolist(), strict=True):
        yield Block("", start, int(period), (end - start) // int(period) + 1)


def _symbols(graph: Graph) -> np.ndarray:
    """A number per top-level op; equal ops (kind, attrs, types, literals) get equal numbers."""
    literals = {constant.value: constant.data for constant in graph.constants}
    numbers: dict[object, int] = {}
    return np.array(
        [numbers.setdefault(_symbol(op, graph, literals), len(numbers)) for op in graph.ops],
        np.int64,
    )


def _symbol(op: Op, graph: Graph, literals: Mapping[int, object]) -> object:
    operands = tuple((graph.types[i], literals.get(i)) for i in op.inputs)
    results = tuple(graph.types[i] for i in op.outputs)
    bodies = tuple(tuple(_symbol(o, graph, literals) for o in region.ops) for region in op.regions)
    return (op.kind, op.attrs, operands, results, bodies)


# ---------------------------------------------------------------- tags


def _places(blocks: tuple[Block, ...], count: int) -> list[tuple[Block, int, int] | None]:
    places: list[tuple[Block, int, int] | None] = [None] * count
    for block in blocks:
        for position in range(block.start, _end(block)):
            repeat, offset = divmod(position - block.start, block.period)
            places[position] = (block, repeat, offset)
    return places


def _tag(place: tuple[Block, int, int] | None, position: int) -> str:
    return f"{place[0].name}.{place[2]}" if place else f"op{position}"


def _tagged(op: Op, tag: str) -> Op:
    regions = tuple(
        replace(
            region,
            ops=tuple(
                _tagged(o, f"{tag}/{f'{n}-' * (n > 0)}{i}") for i, o in enumerate(region.ops)
            ),
        )
        for n, region in enumerate(op.regions)
    )
    return replace(op, tag=tag, regions=regions)


def _input_groups(graph: Graph) -> list[list[int]]:
    """Input positions that play the same part: same type, same (tag, operand) readers
    and, for carried state, the same writer. Each group in order of first use."""
    readers: dict[int, list[tuple[str, int]]] = defaultdict(list)
    first_use: dict[int, int] = {}
    writer = {v: (op.tag, k) for op in graph.ops for k, v in enumerate(op.outputs)}
    for position, op in enumerate(graph.ops):
        for operand, value in enumerate(op.inputs):
            readers[value].append((op.tag, operand))
            first_use.setdefault(value, position)
    next_value = {i: graph.outputs[o] for i, o in graph.state}
    groups: dict[object, list[int]] = defaultdict(list)
    for position, value in enumerate(graph.inputs):
        written = writer.get(next_value.get(position, -1))
        groups[graph.types[value], frozenset(readers[value]), written].append(position)
    return [
        sorted(group, key=lambda p: first_use.get(graph.inputs[p], 0)) for group in groups.values()
    ]


def _input_tags(graph: Graph, groups: list[list[int]]) -> tuple[str, ...]:
    tags = [""] * len(graph.inputs)
    taken: set[str] = set()
    for group in groups:
        name = _common_name([graph.input_name(p) for p in group])
        while name in taken:
            name += "'"
        taken.add(name)
        for position in group:
            tags[position] = name
    return tuple(tags)


def _common_name(names: list[str]) -> str:
    """`layers[0].w`, `layers[1].w` -> `layers[*].w`."""
    parts = [re.split(r"(\d+)", name) for name in names]
    if len({len(part) for part in parts}) > 1:
        return names[0]
    return "".join(
        column[0] if len(set(column)) == 1 else "*" for column in zip(*parts, strict=True)
    )


# ---------------------------------------------------------------- the small graph


def _shrink(
    graph: Graph, places: list[tuple[Block, int, int] | None], groups: list[list[int]]
) -> Graph:
    inputs, stand_in, counts = _kept_inputs(graph, groups)
    for position, place in enumerate(places):
        if place and place[0].kept(place[1]) != place[1]:
            block, _, offset = place
            kept = graph.ops[block.start + block.period + offset]
            stand_in.update(zip(graph.ops[position].outputs, kept.outputs, strict=True))
    ops = tuple(
        replace(
            op,
            inputs=tuple(stand_in.get(v, v) for v in op.inputs),
            count=place[0].count(place[1]) if place else 1,
        )
        for op, place in zip(graph.ops, places, strict=True)
        if place is None or place[0].kept(place[1]) == place[1]
    )
    return _select(graph, ops, inputs, counts, stand_in)


def _kept_inputs(
    graph: Graph, groups: list[list[int]]
) -> tuple[list[int], dict[int, int], dict[int, int]]:
    """Positions kept, stand-ins for the values of the others, and what each kept one counts for."""
    stand_in: dict[int, int] = {}
    counts: dict[int, int] = {}
    for group in groups:
        if len(group) <= 3:
            counts.update(dict.fromkeys(group, 1))
            continue
        counts.update({group[0]: 1, group[1]: len(group) - 2, group[-1]: 1})
        stand_in.update({graph.inputs[p]: graph.inputs[group[1]] for p in group[2:-1]})
    return sorted(counts), stand_in, counts


def _select(
    graph: Graph,
    ops: tuple[Op, ...],
    inputs: list[int],
    counts: dict[int, int],
    stand_in: dict[int, int],
) -> Graph:
    carried = dict(graph.state)
    state_outputs = {o: i for i, o in graph.state}
    outputs = [
        o
        for o in range(len(graph.outputs))
        if state_outputs.get(o, -1) in counts or o not in state_outputs
    ]
    new_input, new_output = (
        {old: new for new, old in enumerate(kept)} for kept in (inputs, outputs)
    )
    values = [stand_in.get(graph.outputs[o], graph.outputs[o]) for o in outputs]
    return Graph(
        types=_used_types(graph, ops, inputs),
        inputs=tuple(graph.inputs[p] for p in inputs),
        ops=ops,
        outputs=tuple(values),
        constants=graph.constants,
        input_names=tuple(graph.input_name(p) for p in inputs),
        output_names=tuple(graph.output_name(o) for o in outputs),
        state=tuple((new_input[i], new_output[carried[i]]) for i in inputs if i in carried),
        donated=frozenset(new_input[p] for p in graph.donated if p in new_input),
        input_tags=tuple(graph.input_tags[p] for p in inputs),
        input_counts=tuple(counts[p] for p in inputs),
    )


def _used_types(graph: Graph, ops: tuple[Op, ...], inputs: list[int]) -> dict[int, TensorType]:
    values = [graph.inputs[p] for p in inputs] + [c.value for c in graph.constants]
    stack: list[Op | Region] = list(ops)
    while stack:
        item = stack.pop()
        values.extend(item.outputs if isinstance(item, Op) else item.inputs)
        stack.extend(item.regions if isinstance(item, Op) else item.ops)
    return {v: graph.types[v] for v in values}
