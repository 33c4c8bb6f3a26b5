"""Bytes alive on one device at every moment of a step, by liveness.

Time is counted in ticks, one per op in program order (ops of a loop's body
follow the loop). Each value is alive over some ticks; for a folded graph a tick
of a middle layer stands for many layers, so every segment of a life has two
weights: how many of the value's layers are alive when the *first* and when the
*last* of those layers runs. Between the two the total is a straight line, so
its maximum is at one of them.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from math import ceil

from ...ir.analysis.refusals import Refusal
from ...ir.composites.bodies import body_of
from ...ir.composites.free_dims import BLOCK
from ...ir.composites.loss_blocks import hidden_in, is_of_tokens, logits_in, most_logits
from ...ir.execution import OverlapKind
from ...ir.execution_model import ExecutionModel
from ...ir.graph import ITEM_BYTES, Graph, Op
from ...ir.ops import COMPOSITES, LOSSES
from ...ir.passes.copies import settles
from ...ir.passes.microbatch import TimeAxis
from ...ir.program import Program
from ...ir.values import block_instances
from ..cost.loss import SUM
from .ahead import early, late
from .lives import Lifetimes, Segment, Span
from .storage import Storage, is_fused, storage_of


def lifetimes(
    program: Program,
    microbatches: int,
    roles: Mapping[int, str],
    storage: Storage,
    overlap: Sequence[OverlapKind] = (),
    whole: Program | None = None,
) -> Lifetimes:
    """Work out every value's life.

    Args:
        program: a prepared graph.
        microbatches: how many a step has.
        roles: the part of each input position.
        storage: which of its values are stored.
        overlap: which communication runs beside computation.
        whole: the step that the program is a part of, which tells what that is; by itself it tells if None.
    """
    return _Analysis(program, microbatches, roles, storage, overlap, whole).run()


@dataclass(frozen=True, slots=True)
class CopyReading:
    """That an op reads a value, and the lives of a copy made for it, laid out as the op wants it.

    The lives bear the number of the op's first result, as they are on devices that make that.
    """

    value: int
    reader: str  # the op's tag
    lives: tuple[Segment, ...]


def readings(program: Program, storage: Storage) -> list[CopyReading]:
    """What top-level ops read; a schedule that is eager makes copies of the program's inputs at its start."""
    return list(_Analysis(program, 1, {}, storage).readings())


class _Analysis:
    def __init__(
        self,
        program: Program,
        microbatches: int,
        roles: Mapping[int, str],
        storage: Storage,
        overlap: Sequence[OverlapKind] = (),
        whole: Program | None = None,
    ):
        self.program, self.microbatches, self.roles = program, microbatches, roles
        self.overlap, self.whole = overlap, whole or program
        self.graph: Graph = program.graph
        self.time = (
            program.time if microbatches > 1 and isinstance(program.time, TimeAxis) else None
        )
        self.storage = storage
        self.defined: dict[int, int] = {}
        self.used: dict[int, list[int]] = defaultdict(list)
        self.fused: dict[int, list[int]] = defaultdict(list)  # of these, by ops that are fused
        self.spans: list[Span] = []  # one per top-level op
        self.bounds: list[tuple[int, int]] = []  # ticks of each top-level op
        self.position: dict[int, int] = {}  # value -> top-level op that makes it
        self.blocks: list[tuple[Op, int, int]] = []  # what runs block by block, with its ticks
        self.alone = storage.model.runs_ops_alone

    def run(self) -> Lifetimes:
        ticks = self._tick()
        self._read_siblings()
        self._read_sources()
        self._read_copies()
        self._lend_results()
        self._stretch()
        segments = [
            s for v in self.defined if v in self.storage.kept for s in self._life(v, ticks - 1)
        ]
        segments += self._blocks()
        causes = {s.value: self._cause(s.value) for s in segments}
        scale = {v: self._scale(v) for v in causes}
        copies = {
            v: source for v, source in self.copies.items() if v in causes and source in causes
        }
        return Lifetimes(
            self.program, self.microbatches, tuple(segments), ticks, causes, scale, copies
        )

    def readings(self) -> Iterator[CopyReading]:
        self._tick()
        inputs = set(self.graph.inputs) if self.storage.model.eager_schedule else set[int]()
        for op, (start, end) in zip(self.graph.ops, self.bounds, strict=True):
            result = op.outputs[0]
            for v in dict.fromkeys(op.inputs):
                now = (Segment(result, start, end, 1, 1),)
                yield CopyReading(
                    v,
                    op.tag,
                    tuple(self._until_read(result, 0, end, op.count)) if v in inputs else now,
                )

    # ------------------------------------------------------------ ticks

    def _tick(self) -> int:
        tick = 1  # tick 0: the step has its inputs
        for value in self.graph.inputs:
            self.defined[value] = 0
        bounds: list[tuple[int, int]] = []
        for position, op in enumerate(self.graph.ops):
            start = tick
            tick = self._visit(op, tick)
            self.position.update(dict.fromkeys(op.outputs, position))
            bounds.append((start, tick - 1))
        self.bounds = bounds
        for value in self.graph.outputs:
            self.used[value].append(tick - 1)
        self._make_spans(bounds)
        return tick

    def _visit(self, op: Op, tick: int) -> int:
        end = tick + 1
        for region in op.regions:
            self.defined.update(dict.fromkeys(region.inputs, tick))
            for inner in region.ops:
                end = self._visit(inner, end)
            for value in (*region.inputs, *region.outputs):
                self.used[value].append(end - 1)
        if op.kind in (COMPOSITES if self.alone else LOSSES):
            self.blocks.append((op, tick, end - 1))
        for value in op.outputs:
            self.defined[value] = tick
            self.used[value].append(end - 1)
        for value in () if settles(op) else op.inputs:
            self.used[value].append(end - 1)
            if is_fused(op):
                self.fused[value].append(end - 1)
        return end

    def _read_siblings(self) -> None:
        """In a folded graph a middle layer reads the first layer's value where, in the whole
        one, all but one of its layers read a middle layer's: those are read here too."""
        tags = self.program.value_tags
        middle = {tags[v]: v for op in self.graph.ops if op.count > 1 for v in op.outputs}
        for op, (_, end) in zip(self.graph.ops, self.bounds, strict=True):
            for value in op.inputs if op.count > 1 else ():
                sibling = middle.get(tags[value])
                if sibling is not None and sibling != value and self.defined[sibling] < end:
                    self.used[sibling].append(end)
                    if is_fused(op):
                        self.fused[sibling].append(end)

    def _read_sources(self) -> None:
        """Who reads what is made again reads what it is made of."""
        for value, sources in self.storage.made.items():
            for source in sources:
                self.used[source].extend(self.used[value])
                self.fused[source].extend(self.used[value])
        for value, sources in self.storage.twice.items():
            for source in sources:
                self.used[source].extend(self.fused.get(value, ()))

    def _read_copies(self) -> None:
        """A copy of a parameter (or of its copy for the step) may be the same memory: it lives as long. So may one
        of a parameter's cast, which matters where microbatches read both: with one, it lives for a layer."""
        self.copies: dict[int, int] = {}
        prepared = set(self.graph.inputs)
        for op, phase in zip(self.graph.ops, self.program.phases, strict=True):
            copied = op.kind == "copy" and op.inputs[0] in prepared
            if copied:
                self.copies[op.outputs[0]] = op.inputs[0]
            if phase == "prepare" and (copied or self.time is not None):
                prepared.update(op.outputs)
        for copy, source in reversed(self.copies.items()):
            self.used[source].extend(self.used[copy])

    def _stretch(self) -> None:
        """What travels beside computation is there earlier, or later, as far as its layer goes."""
        for value, before in early(self.whole, self.overlap).items():
            if self._together(value, before):
                self.defined[value] = min(self.defined[value], self._at(before))
        for value, after in late(self.whole, self.overlap).items():
            if self._together(value, after):
                self.used[value].append(self._at(after))

    def _at(self, value: int) -> int:
        """The tick of the op that makes a value."""
        position = self.position.get(value)
        return self.defined[value] if position is None else self.bounds[position][0]

    def _together(self, value: int, other: int) -> bool:
        """Whether one repeat of a block or one body of a loop makes both, or the first is of one layer alone."""
        if value not in self.position or other not in self.position:
            return value in self.defined and other in self.defined
        here, there = (self.spans[self.position[v]] for v in (value, other))
        return here == there or here.count == 1

    def _make_spans(self, bounds: list[tuple[int, int]]) -> None:
        groups = block_instances(self.graph.ops)
        edge: dict[tuple[str, int], tuple[int, int]] = {}
        for group, (start, end) in zip(groups, bounds, strict=True):
            if group:
                low, high = edge.get(group, (start, end))
                edge[group] = (min(low, start), max(high, end))
        current: tuple[str, int] | None = None
        coming = _coming(self.graph.ops, groups)
        for position, (op, (start, end)) in enumerate(zip(self.graph.ops, bounds, strict=True)):
            inside = current if current and start <= edge[current][1] else None
            current = groups[position] or inside or coming[position]
            if current:
                edge[current] = (min(edge[current][0], start), edge[current][1])
            low, high = edge[current] if current else (start, end)
            self.spans.append(Span(low, high, op.count, current))

    # ------------------------------------------------------------ lives

    def _life(self, value: int, last_tick: int) -> Iterator[Segment]:
        if value in self.graph.inputs:
            position = self.graph.inputs.index(value)
            count = self.graph.input_counts[position] if self.graph.input_counts else 1
            yield Segment(value, 0, last_tick, count, count)
            for _ in range(int(self.storage.widths.get(value, 1.0)) - 1):
                yield from self._until_read(value, 0, max(self.used[value], default=0), count)
            return
        start, end = self.defined[value], max(self.used[value], default=self.defined[value])
        if value not in self.position:
            yield Segment(value, start, end, 1, 1)  # inside a loop's body
            return
        if self._reuses_input(value):
            return
        span = self.spans[self.position[value]]
        if value in self._own_results:
            yield Segment(value, 0, last_tick, span.count, span.count)
            return
        first, last = self._across_time(value, start, end)
        if self.alone and value in self._added_up:  # what one microbatch adds, until its end
            yield from self._weighted(value, start, self._leave, span)
        if (first, last) != (start, end):
            yield from self._through_loop(value, first, last, span)
        elif value in self.storage.early:
            yield from self._until_read(value, 0, end, span.count)
        else:
            yield from self._weighted(value, start, end, span)

    def _across_time(self, value: int, start: int, end: int) -> tuple[int, int]:
        """With microbatches, what the loop reads or adds up lives as long as the loop."""
        if self.time is None:
            return start, end
        inside = [self.spans[p] for p in self.time.body]
        first, last = min(s.start for s in inside), max(s.end for s in inside)
        if value in self._added_up:
            return first, max(end, last)
        if self.position[value] not in self.time.body and start <= last and end >= first:
            return min(start, first), max(end, last)
        return start, end

    def _through_loop(self, value: int, start: int, end: int, own: Span) -> Iterator[Segment]:
        """What every microbatch needs: all layers are alive from the loop's start, or from
        where they are made before it, to the loop's end; then until they are read."""
        many, leave = own.count, self._leave
        if start >= own.start and own.end < leave:
            yield Segment(value, start, own.end, 1, many)
            start = own.end + 1
        yield Segment(value, start, leave, many, many)
        yield from self._until_read(value, leave + 1, end, many)

    @cached_property
    def _leave(self) -> int:
        """The last tick of the loop over microbatches."""
        return max(self.spans[p].end for p in self.time.body)  # type: ignore[union-attr]

    def _blocks(self) -> Iterator[Segment]:
        """What ops hold while they run block by block, told as so many of their results."""
        for op, start, end in self.blocks:
            held = _held_within if op.kind in LOSSES else _held_by_attention
            for result, many in held(op, self.storage.model):
                yield Segment(op.outputs[result], start, end, many, many)

    def _until_read(self, value: int, start: int, end: int, many: int) -> Iterator[Segment]:
        """From `start`, where all layers are alive, through the readers' span, where they go."""
        reader = self._span_at(end)
        if start > end or reader is None or reader.count == 1:
            yield from [Segment(value, start, end, many, many)] if start <= end else []
            return
        if start < reader.start:
            yield Segment(value, start, reader.start - 1, many, many)
        yield Segment(value, max(reader.start, start), end, many, 1)
        if end < reader.end:
            yield Segment(value, end + 1, reader.end, many - 1, 0)

    def _weighted(self, value: int, start: int, end: int, own: Span) -> Iterator[Segment]:
        many = own.count
        if many == 1 or end <= own.end or self._handed_on(value, own):
            yield Segment(value, start, end, 1, 1)
            return
        if start > own.start:
            yield Segment(value, own.start, start - 1, 0, many - 1)
        yield Segment(value, start, own.end, 1, many)
        yield from self._until_read(value, own.end + 1, end, many)

    def _span_at(self, tick: int) -> Span | None:
        low, high = 0, len(self.spans) - 1
        while low < high:
            middle = (low + high) // 2
            if self._op_end(middle) < tick:
                low = middle + 1
            else:
                high = middle
        return self.spans[low] if self.spans else None

    @cached_property
    def _ends(self) -> list[int]:
        tick, ends = 1, list[int]()
        for op in self.graph.ops:
            tick += ticks_of(op)
            ends.append(tick - 1)
        return ends

    def _op_end(self, position: int) -> int:
        return self._ends[position]

    def _handed_on(self, value: int, own: Span) -> bool:
        """Read only by the next repeat of its own block: one is alive at a time."""
        if own.name is None or value in self.graph.outputs:
            return False
        following = (own.name[0], own.name[1] + 1)
        spans = (self._span_at(tick) for tick in self.used[value] if tick > own.end)
        return all(span is not None and span.name == following for span in spans)

    def _reuses_input(self, value: int) -> bool:
        """New state is written over the donated old state."""
        return value in self._donated_outputs

    @cached_property
    def _donated_outputs(self) -> frozenset[int]:
        if self.alone:
            return frozenset()
        return frozenset(
            self.graph.outputs[o] for i, o in self.graph.state if i in self.graph.donated
        )

    @cached_property
    def _own_results(self) -> frozenset[int]:
        """New state that is written over nothing: XLA gives results memory of their own for the whole step."""
        if self.alone:
            return frozenset()
        new = {self.graph.outputs[o] for _, o in self.graph.state} - self._donated_outputs
        return frozenset(v for v in new if self._phase(v) == "update")

    def _lend_results(self) -> None:
        """A gradient may lie where the last new state that is made of it will be written."""
        made = (v for v in self.position if self._phase(v) == "backward" and v in self.storage.kept)
        gradients = [v for v in made if v not in self._fresh]
        for result in sorted(self._own_results, key=self.defined.__getitem__, reverse=True):
            kind, written, scale = (
                self.graph.types[result],
                self.defined[result],
                self._scale(result),
            )
            alike = (
                v for v in gradients if self.graph.types[v] == kind and self._scale(v) == scale
            )
            last = [v for v in alike if max(self.used[v]) <= written]
            if last:
                lent = max(last, key=lambda v: max(self.used[v]))
                gradients.remove(lent)
                self.copies[lent] = result

    @cached_property
    def _fresh(self) -> frozenset[int]:
        """Gradients before they may be settled: whatever is kept of them, until the update or over microbatches, is
        their copy."""
        return frozenset(v for op in self.graph.ops if settles(op) for v in op.inputs)

    @cached_property
    def _added_up(self) -> frozenset[int]:
        """Sums of the microbatches."""
        totals = self.time.totals.keys() if self.time else ()
        return frozenset(v for v in totals if self.position.get(v) in self.time.body) - self._fresh  # type: ignore[union-attr]

    def _phase(self, value: int) -> str | None:
        position = self.position.get(value)
        return None if position is None else self.program.phases[position]

    # ------------------------------------------------------------ labels

    def _cause(self, value: int) -> str:
        if value in self.graph.inputs:
            return self.roles.get(self.graph.inputs.index(value), "inputs")
        if value not in self.position:
            return "loop bodies"
        op = self.graph.ops[self.position[value]]
        phase = self.program.phases[self.position[value]]
        if op.kind == "copy" and phase != "update" and not settles(op):
            return "gathered"
        return {"forward": "activations", "backward": "gradients", "prepare": "casts"}.get(
            phase, "update"
        )

    def _scale(self, value: int) -> float:
        if value in self.graph.inputs:
            return 1.0
        width = self.storage.widths.get(value, 1.0)
        if self.time is None:
            return width
        if value in self.time.split:
            return width / self.microbatches
        if value in self._added_up:
            return max(width, 4 / max(1, ITEM_BYTES[self.graph.types[value].dtype]))
        return width


def _coming(
    ops: Sequence[Op], groups: Sequence[tuple[str, int] | None]
) -> list[tuple[str, int] | None]:
    """For ops of many layers outside any block (recomputed ones, copies): the block instance
    right after them, which they are made for, if it stands for as many layers."""
    found: list[tuple[str, int] | None] = []
    following, count = None, 1
    for op, group in zip(reversed(ops), reversed(groups), strict=True):
        if group:
            following, count = group, op.count
        found.append(following if op.count == count > 1 else None)
    return found[::-1]


def ticks_of(op: Op) -> int:
    """One, and those of the ops in its body."""
    return 1 + sum(ticks_of(o) for region in op.regions for o in region.ops)


@lru_cache(maxsize=64)
def _held_by_attention(op: Op, model: ExecutionModel) -> tuple[tuple[int, int], ...]:
    """What attention holds beside its operands and results: of a block, what its body stores of the size of scores.

    Leaves out: devices that have all scores in less than a block hold less.
    """
    graph = body_of(op.text("body"))
    scores = max(kind.size for kind in graph.types.values() if kind.is_float)
    block = _block_of(graph, scores, op.where, model) * min(1.0, BLOCK / scores)
    largest = max(graph.outputs, key=lambda v: graph.types[v].nbytes)
    many = ceil(block / graph.types[largest].nbytes)
    return ((graph.outputs.index(largest), many),)


def _block_of(graph: Graph, size: int, where: str, model: ExecutionModel) -> float:
    """The most bytes of values so large or larger that a body stores at a time."""
    alone = Program(graph, ("forward",) * len(graph.ops), Refusal("a body", where))
    lives = lifetimes(alone, 1, {}, storage_of(alone, model))
    large = [v for v in lives.causes if graph.types[v].size >= size and v not in graph.inputs]
    sizes = {v: lives.scale[v] * graph.types[v].nbytes * (v in large) for v in lives.causes}
    return float(lives.profile(sizes).max())


@lru_cache(maxsize=64)
def _held_within(op: Op, model: ExecutionModel) -> tuple[tuple[int, int], ...]:
    """What a loss holds beside its operands and results: a block of what its body stores for each logit, as so many
    times a result that has all tokens; the sum so far of a weight's gradient, in fp32, and what one block adds unless
    products add that themselves.

    Leaves out: devices that share so much of the vocabulary that one block has all their logits hold less.
    """
    graph, logits, hidden = body_of(op.text("body")), logits_in(op), hidden_in(op)
    share = min(1.0, float(most_logits(hidden)) / logits)
    block = _block_of(graph, logits, op.where, model) * share
    results, found = [graph.types[v] for v in graph.outputs], list[tuple[int, int]]()
    of_tokens = [k for k in range(len(results)) if is_of_tokens(op, k)]
    if of_tokens:
        largest = max(of_tokens, key=lambda k: results[k].size)
        found.append((largest, ceil(block / results[largest].nbytes)))
    sums = [k for k in range(len(graph.outputs)) if k not in of_tokens and share < 1]
    each = SUM * (1 if model.adds_in_products else 2)
    return (*found, *((k, ceil(each * results[k].size / results[k].nbytes)) for k in sums))
