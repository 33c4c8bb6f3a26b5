"""Which kernels a compiler makes of the ops: what is written to memory, read, and launched.

Products, look-ups and the like are kernels of their own. Chains of cheap ops between
them are fused: a chain reads what enters it once and writes what leaves it.

    dot ─▶ [ add ─ gelu ] ─▶ dot        the chain reads one product and writes the operand of the next
    dot ─▶ [ mask ─ softmax ] ─▶ dot    with fused attention nothing between the products is written

Not everything is fused everywhere (`Fusion`): a framework may compile its layers alone and run
the loss op by op, or run everything so. An op that runs by itself reads its operands and writes
its results; what only shows a part of its operand, or the same turned, costs nothing then either.

A chain also ends at a reduction over leading dims (gradients of a bias) or down to one
number (a norm): what follows needs all of it, so it cannot be the same pass. What XLA computes
again for the backward pass runs in kernels like those of the forward pass, and is written for its
readers. Measured on an H100 (GPT-2, batch 32): recomputing all of each layer adds 39 ms to a step
of 117; priced as one chain with what reads it, it saved 4. Fused kernels of frameworks make again
inside what they need (`joined`). What stages make again within their backward pass (`ir/passes/saved.py`)
takes as long as if it were written and read, as it would be priced in one program for both passes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from typing import Literal

from ...ir.analysis.attention import Attention
from ...ir.graph import Op, TensorType
from ...ir.ops import ALIASES, DIVISION, KERNELS, MOVEMENT, REDUCTIONS, TRANSCENDENTAL, VIEWS
from ...ir.passes.recompute import AGAIN
from ...ir.passes.saved import WITHIN
from ...ir.program import Program
from .flop import KNOWN

FREE = ALIASES | {"copy", "broadcast_in_dim"}  # no kernel
# Ops that never follow another's layout: they do real work, or a layout of their own is the point.
LEADERS = KERNELS | MOVEMENT

# What a compiler fuses: all, repeated layers alone, nothing but the optimizer, nothing at all.
Fusion = Literal["all", "layers", "none", "eager"]
FUSIONS: tuple[Fusion, ...] = ("all", "layers", "none")  # of jobs
# Arithmetic per element of a fused op, in simple operations; one where not listed.
# Measured on one x86 core with XLA's vectorised expansions: exp and tanh take 10 to
# 20 times a multiplication, division and roots about 4 times.
WEIGHTS = dict.fromkeys(TRANSCENDENTAL, 16.0) | dict.fromkeys(DIVISION, 4.0)


def is_kernel(op: Op) -> bool:
    """Whether an op runs by itself. What nobody describes (a kernel by hand, a custom call) does."""
    return op.kind in KERNELS or op.kind not in KNOWN


@dataclass(slots=True)
class Chain:
    """One fused chain on whole tensors: bytes it moves, simple operations it does."""

    nbytes: float = 0.0
    work: float = 0.0


@dataclass(frozen=True, eq=False, slots=True)
class Kernels:
    """What of a program's values touches memory.

    `kept` exist in memory for some time; `ends` are those of them that end a fused
    chain; `stores` are written where they are made, also when only an alias of them (a
    copy, a reshape) is kept. `reads[v]` are the (operand, value) pairs that a chain
    first reads at the fused op whose first result is v; `chains[v]` is that op's chain in
    whole tensors: bytes read and written, and its arithmetic in simple operations.
    `inside` never leave a fused attention kernel; each is told with its attention.
    """

    kept: frozenset[int]
    ends: frozenset[int]
    stores: frozenset[int]
    reads: Mapping[int, tuple[tuple[int, int], ...]]
    chains: Mapping[int, Chain]
    inside: Mapping[int, Attention] = field(default_factory=lambda: {})

    def attention(self, op: Op) -> Attention | None:
        """The fused attention that an op is part of, if any."""
        return next((self.inside[v] for v in (*op.inputs, *op.outputs) if v in self.inside), None)

    def form(self, op: Op, types: Mapping[int, TensorType]) -> tuple[object, ...]:
        """What of all this decides the seconds of an op: ops of equal form and rule, cut alike, take equally long."""
        sides, first = (*op.inputs, *op.outputs), op.outputs[0]
        chain = self.chains.get(first)
        return (
            tuple(v in self.inside for v in sides),
            (within := self.attention(op)) and (within.share, within.longest, within.many_keys),
            tuple(v in self.stores for v in op.outputs),
            tuple((k, types[v].nbytes) for k, v in self.reads.get(first, ())),
            chain and (chain.nbytes, chain.work),
            self.ends.isdisjoint(op.outputs),
        )


@lru_cache(maxsize=16)
def kernels_of(
    program: Program, fused_attention: bool = False, fusion: Fusion = "all", joined: bool = False
) -> Kernels:
    """Work out the kernels of a prepared graph; a search asks for those of a few graphs again and again.

    With `joined`, what is computed again is part of the kernels that read it.
    """
    inside: Mapping[int, Attention] = attention_values(program) if fused_attention else {}
    return _Analysis(program, inside, _written(program, fusion), joined).run()


def _written(program: Program, fusion: Fusion) -> frozenset[int]:
    """Results of ops that run by themselves; the optimizer is one kernel, but where nothing is."""
    if fusion == "all":
        return frozenset()
    free = free_values(program)
    return frozenset(
        v
        for op, phase in zip(program.graph.ops, program.phases, strict=True)
        if (fusion == "eager" or phase in ("forward", "backward"))
        and (fusion in ("none", "eager") or not _in_block(op))
        and op.kind not in FREE | VIEWS  # run by themselves they move nothing
        for v in op.outputs
        if v not in free
    )


def _in_block(op: Op) -> bool:
    """Whether an op, or the one it repeats, belongs to a repeated block (`ir/analysis/blocks.py` names them)."""
    _, dot, offset = op.tag.partition("~")[0].partition(".")
    return bool(dot) and offset.isdigit()


class _Analysis:
    def __init__(
        self,
        program: Program,
        inside: Mapping[int, Attention],
        written: frozenset[int],
        joined: bool,
    ):
        self.joined = joined
        self.program, self.graph, self.inside = program, program.graph, inside
        self.found = {
            *self.graph.inputs,
            *self.graph.outputs,
            *written,
        }  # values at the border of a kernel
        self.waiting: set[int] = set()
        self.phase_of: dict[int, str] = {}
        self.roots: dict[int, int] = {}  # alias -> the value it shows
        self.chains = _Chains()
        self.ops = self._as_made_once()
        self.reads: dict[int, tuple[tuple[int, int], ...]] = {}

    def _as_made_once(self) -> tuple[tuple[Op, str], ...]:
        """The ops and their phases; what is made again within others is left out, for what was made before."""
        pairs = zip(self.graph.ops, self.program.phases, strict=True)
        if self.joined or not any(WITHIN in op.tag for op in self.graph.ops):
            return tuple(pairs)
        kept, first = list[tuple[Op, str]](), dict[tuple[str, tuple[int, ...]], Op]()
        same, copied = dict[int, int](), dict[int, int]()  # clone, or copy -> what it equals
        for op, phase in pairs:
            op = replace(op, inputs=tuple(same.get(v, v) for v in op.inputs))
            operands = tuple(copied.get(v, v) for v in op.inputs)
            source = op.tag.partition(WITHIN)[0], operands
            if op.tag.endswith(WITHIN) and source in first:  # which a part of a step may lack
                same |= dict(zip(op.outputs, first[source].outputs, strict=True))
                continue
            if op.kind == "copy":
                copied[op.outputs[0]] = operands[0]
            kept.append((op, phase))
            first[source] = op
        return tuple(kept)

    def run(self) -> Kernels:
        ops = [op for op, _ in self.ops]
        self._border(ops, lambda i: self.ops[i][1])
        self._join(ops)
        free = free_values(self.program)
        self._read(ops, free)
        kept = (self.found | self.waiting) - self.inside.keys()
        stores = kept | {self.roots.get(v, v) for v in kept}
        return Kernels(
            frozenset(kept), frozenset(self.found - self.inside.keys()), frozenset(stores), self.reads,
            self._measure(stores), self.inside,
        )  # fmt: skip

    def _measure(self, stores: Collection[int]) -> dict[int, Chain]:
        types, chains = self.graph.types, defaultdict[int, Chain](Chain)
        for visit in self.graph.visits:
            op = visit.op
            if op.outputs and op.outputs[0] in self.chains.parent:
                chain = chains[self.chains.of(op.outputs[0])]
                chain.nbytes += sum(types[v].nbytes for v in op.outputs if v in stores)
                chain.nbytes += sum(types[v].nbytes for _, v in self.reads.get(op.outputs[0], ()))
                chain.work += work(op, types)
        nothing = {v: Chain() for op in self.graph.ops for v in op.outputs if WITHIN in op.tag}
        return nothing | {v: chains[self.chains.of(v)] for v in self.chains.parent}

    def _border(self, ops: Iterable[Op], phase: Callable[[int], str]) -> None:
        for i, op in enumerate(ops):
            when = f"{phase(i)} again" if AGAIN in op.tag and not self.joined else phase(i)
            self.waiting.update(v for v in op.inputs if self.phase_of.get(v, when) != when)
            if is_kernel(op):
                self.found.update(op.inputs)
                self.found.update(op.outputs)
            elif _ends_chain(op, self.graph.types):
                self.found.update(op.outputs)
            self.phase_of.update(dict.fromkeys(op.outputs, when))
            for region in op.regions:
                self.found.update(region.inputs)
                self.found.update(region.outputs)
                self._border(region.ops, partial(_same, phase(i)))

    def _join(self, ops: Iterable[Op]) -> None:
        """Tie each fused op to the fused ops whose results it reads without memory between."""
        for op in ops:
            if op.kind in FREE:
                self._alias(op)
            elif _is_fused(op):
                self.chains.add(op)
                for value in op.inputs:
                    root = self.roots.get(value, value)
                    here = self.phase_of.get(root) == self.phase_of[op.outputs[0]]
                    if here and root not in self.found:
                        self.chains.tie(root, op.outputs[0])
            for region in op.regions:
                self._join(region.ops)

    def _alias(self, op: Op) -> None:
        for source, result in zip(op.inputs, op.outputs, strict=False):
            self.roots[result] = self.roots.get(source, source)

    def _read(self, ops: Iterable[Op], free: frozenset[int]) -> None:
        seen: set[tuple[int, int]] = set()
        for op in ops:
            if _is_fused(op):
                chain = self.chains.of(op.outputs[0])
                mine: list[tuple[int, int]] = []
                for k, value in enumerate(op.inputs):
                    root = self.roots.get(value, value)
                    apart = root in self.found or self.chains.of(root) != chain
                    if (
                        apart
                        and root not in free
                        and root not in self.inside
                        and (chain, root) not in seen
                    ):
                        seen.add((chain, root))
                        mine.append((k, root))
                if mine:
                    self.reads[op.outputs[0]] = tuple(mine)
            for region in op.regions:
                self._read(region.ops, free)


class _Chains:
    """Union-find over the first results of fused ops."""

    def __init__(self) -> None:
        self.parent: dict[int, int] = {}

    def add(self, op: Op) -> None:
        for value in op.outputs:
            self.parent[value] = op.outputs[0]

    def of(self, value: int) -> int:
        while (up := self.parent.get(value, value)) != value:
            self.parent[value] = value = self.parent[up]
        return value

    def tie(self, a: int, b: int) -> None:
        if a in self.parent:
            self.parent[self.of(b)] = self.of(a)


def work(op: Op, types: Mapping[int, TensorType]) -> float:
    """Simple operations of a fused op on whole tensors: elements of its largest side by weight."""
    return max(types[v].size for v in (*op.inputs, *op.outputs)) * WEIGHTS.get(op.kind, 1.0)


def _is_fused(op: Op) -> bool:
    return not is_kernel(op) and op.kind not in FREE and bool(op.outputs)


def _ends_chain(op: Op, types: Mapping[int, TensorType]) -> bool:
    """A reduction over leading dims, or of everything to one number."""
    if op.kind not in REDUCTIONS:
        return False
    shape, dims = types[op.inputs[0]].shape, {*op.integers("axes")}
    long = [d for d, size in enumerate(shape) if size > 1]
    over = [d for d in long if d in dims]
    return bool(over) and (len(over) == len(long) or over != long[-len(over) :])


def _same(phase: str, _: int) -> str:
    return phase


def attention_values(program: Program) -> Mapping[int, Attention]:
    """What a fused kernel never writes: scores, weights and their gradients, each with its attention."""
    return {value: one for one in program.attentions for value in one.inside}


def free_values(program: Program) -> frozenset[int]:
    """Results of cheap ops on constants alone (masks, zeros): made where they are read, never stored."""
    graph = program.graph
    known = set(graph.constant_ids)
    found: set[int] = set()
    for visit in graph.visits:
        op = visit.op
        if op.kind in LEADERS or op.regions:
            continue
        if known.issuperset(op.inputs) or spreads_scalar(op, graph.types):
            known.update(op.outputs)
            found.update(op.outputs)
    return frozenset(found)


def spreads_scalar(op: Op, types: Mapping[int, TensorType]) -> bool:
    return op.kind == "broadcast_in_dim" and types[op.inputs[0]].size == 1
