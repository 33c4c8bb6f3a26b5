"""Random graphs and random layouts of them: what `localize` is tried on, with no framework.

graph = random_graph(seed)                 a few inputs, ten ops or so, everything of sizes that divide by 8
plan = random_layouts(graph, mesh, seed)   a strategy for every op, a layout for every input
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from meshwright.ir.analysis.blocks import fold
from meshwright.ir.graph import Batch, Constant, Graph, Op, TensorType
from meshwright.ir.mesh import Mesh
from meshwright.ir.program import Program, prepare
from meshwright.ir.rules import rule_of
from meshwright.ir.rules.rule import NONE, cuttable, owing
from meshwright.ir.sharding import Sharding

SIZES = (8, 16)
UNARY = ("tanh", "neg", "sin")
BINARY = ("add", "sub", "mul", "max")


def random_graph(seed: int, batch: bool = False) -> Graph:
    """With `batch`, the first input carries examples in dim 0 and a sum over them is returned."""
    return _Drawing(random.Random(seed), batch).graph()


@dataclass
class _Drawing:
    rng: random.Random
    batch: bool
    types: dict[int, TensorType] = field(default_factory=dict)
    ops: list[Op] = field(default_factory=list)
    examples: set[int] = field(default_factory=set)  # values that carry the batch in dim 0

    def graph(self) -> Graph:
        rng = self.rng
        inputs = [self.new(self.shape(2)), self.new(self.shape(2)), self.new(self.shape(1))]
        if self.batch:
            self.types[inputs[0]] = TensorType("f32", (16, rng.choice(SIZES)))
            self.examples.add(inputs[0])
        number = self.new(())
        for _ in range(rng.randint(6, 12)):
            self.draw(number)
        outputs = [rng.choice(self.made())]
        if self.batch:
            last = [v for v in self.made() if v in self.examples] or [inputs[0]]
            outputs = [
                *last[-1:],
                self.add("reduce_sum", [last[-1]], self.types[last[-1]].shape[1:], axes=(0,)),
            ]
        outputs += [op.outputs[0] for op in self.ops[-2:]]
        known = Batch(((0, 0),)) if self.batch else None
        return Graph(
            self.types,
            tuple(inputs),
            tuple(self.ops),
            tuple(dict.fromkeys(outputs)),
            (Constant(number, 0.5),),
            batch=known,
        )

    def shape(self, rank: int) -> tuple[int, ...]:
        return tuple(self.rng.choice(SIZES) for _ in range(rank))

    def new(self, shape: tuple[int, ...]) -> int:
        value = len(self.types)
        self.types[value] = TensorType("f32", shape)
        return value

    def made(self) -> list[int]:
        return [v for v, kind in self.types.items() if kind.rank]

    def add(self, kind: str, inputs: list[int], result: tuple[int, ...], **attrs: Any) -> int:
        value = self.new(result)
        self.ops.append(
            Op(
                kind,
                tuple(inputs),
                (value,),
                tuple(sorted(attrs.items())),
                where=f"line {len(self.ops)}",
            )
        )
        return value

    def draw(self, number: int) -> None:
        rng = self.rng
        x = rng.choice(self.made())
        shape, kept = self.types[x].shape, x in self.examples
        like = [
            v for v in self.made() if self.types[v].shape == shape and (v in self.examples) == kept
        ]
        match rng.randrange(8):
            case 0:
                made = self.add(rng.choice(UNARY), [x], shape)
            case 1:
                made = self.add(rng.choice(BINARY), [x, rng.choice(like)], shape)
            case 2:
                made = self.add("mul", [x, self.spread(number, shape, ())], shape)
            case 3 if len(shape) == 2:
                made = self.product(x, kept)
            case 4 if len(shape) == 2:
                axis = 1 if kept else rng.randrange(2)
                kind = rng.choice(["reduce_sum", "reduce_max"])
                made = self.add(kind, [x], (shape[1 - axis],), axes=(axis,))
            case 5 if len(shape) == 2 and not kept:
                made = self.add("transpose", [x], shape[::-1], permutation=(1, 0))
            case 6 if not kept:
                full = (*shape, rng.choice(SIZES))
                made = self.spread(x, full, (0,)) if len(shape) == 1 else x
            case 7 if not kept:
                told = {"dimension": 0, "shape": shape, "dtype": "f32"}
                counted = self.add("iota", [], shape, **told)
                made = self.add("add", [x, counted], shape)
            case _:
                made = self.add("tanh", [x], shape)
        if kept:
            self.examples.add(made)

    def spread(self, x: int, shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
        return self.add("broadcast_in_dim", [x], shape, broadcast_dimensions=dims, shape=shape)

    def product(self, x: int, kept: bool) -> int:
        rows, width = self.types[x].shape
        kinds = {v: self.types[v].shape for v in self.made() if v not in self.examples}
        fits = [v for v, shape in kinds.items() if len(shape) == 2 and shape[0] == width]
        if not fits:
            return self.add("sin", [x], (rows, width))
        y = self.rng.choice(fits)
        return self.add(
            "dot_general",
            [x, y],
            (rows, self.types[y].shape[1]),
            lhs_batch=(),
            lhs_contracting=(1,),
            rhs_batch=(),
            rhs_contracting=(0,),
            out_dtype="f32",
        )


def random_layouts(
    graph: Graph, mesh: Mesh, seed: int, microbatches: int = 1
) -> tuple[Program, Any]:
    """The program and what `localize` reads of a plan."""
    rng = random.Random(seed)
    program = prepare(fold(graph).whole, "none")
    types = program.graph.types
    strategies = {}
    for op in program.graph.ops:
        rule = rule_of(op, types)
        strategies[op.tag] = _strategy(rng, rule, mesh)
    slots = {
        program.value_tags[v]: SimpleNamespace(sharding=_layout(rng, types[v], mesh))
        for v in program.graph.inputs
    }
    decided = {"strategies": strategies, "slots": slots}
    return program, SimpleNamespace(name="random", mesh=mesh, microbatches=microbatches, **decided)


def _strategy(rng: random.Random, rule: Any, mesh: Mesh) -> tuple[int, ...]:
    codes = []
    for _ in mesh.axes:
        able = [NONE, *cuttable(rule), *(owing(j) for j in range(len(rule.linear)))]
        codes.append(rng.choice(able))
    ways = dict.fromkeys(cuttable(rule), 1)
    for k, code in enumerate(codes):
        if code >= 0:
            ways[code] *= mesh.axes[k].size
            if rule.factors[code].size % (2 * ways[code]):  # with room for two microbatches
                codes[k] = NONE
                ways[code] //= mesh.axes[k].size
    return tuple(codes)


def _layout(rng: random.Random, kind: TensorType, mesh: Mesh) -> Sharding:
    dims: list[tuple[str, ...]] = [()] * kind.rank
    for axis in mesh.axes:
        where = rng.randrange(-1, kind.rank)
        if where >= 0 and kind.shape[where] % (mesh.ways(dims[where]) * axis.size * 2) == 0:
            dims[where] = (*dims[where], axis.name)
    return Sharding(tuple(dims))
