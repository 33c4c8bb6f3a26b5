"""Run a captured step again on one device, op by op: the oracle of every lowering.

    again = replay(captured)
    again(state, batch)      # what step(state, batch) gives, static arguments left out

The sharded lowering is the same walk; it brings operands to a layout before each op.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import numpy as np
from jax import lax

from ...ir.composites.attention_form import LSE
from ...ir.composites.bodies import body_of
from ...ir.errors import MismatchError
from ...ir.graph import Constant, Graph, Op, Region, TensorType
from ...ir.ops import COMPOSITES
from ...ir.rules import rule_of
from .capture import Bound, Captured
from .dtypes import jax_dtype
from .emit import emit
from .emit_composite import log_of_sum

Env = dict[int, Any]


def replay(captured: Captured) -> Callable[..., Any]:
    """The step made from its graph, jitted, with the user's arguments and donations."""
    graph, binding = captured.graph, captured.binding
    walk = Walk(graph, binding.ops, binding.arrays)
    jitted = jax.jit(walk, donate_argnums=tuple(sorted(graph.donated)))

    def step(*args: Any, **kwargs: Any) -> Any:
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree != binding.in_tree:
            raise MismatchError(
                "the arguments have another structure than those of the capture.",
                where=f"captured {binding.in_tree}, called with {tree}",
                fix="capture again with these arguments; static ones are left out of the call",
            )
        return jax.tree.unflatten(binding.out_tree, jitted(*leaves))

    return step


@dataclass(frozen=True, eq=False)
class Walk:
    """Callable on the graph's inputs; returns its outputs."""

    graph: Graph
    bound: Mapping[Any, Bound]
    arrays: Mapping[int, Any]

    def __call__(self, *inputs: Any) -> tuple[Any, ...]:
        env: Env = {c.value: self.constant(c) for c in self.graph.constants}
        env.update(zip(self.graph.inputs, inputs, strict=True))
        self.run(self.graph.ops, env)
        return tuple(env[value] for value in self.graph.outputs)

    def constant(self, constant: Constant) -> Any:
        if constant.value in self.arrays:
            return self.arrays[constant.value]
        return number(constant.data, self.graph.types[constant.value])

    def run(self, ops: Sequence[Op], env: Env) -> None:
        for op in ops:
            operands = [env[value] for value in op.inputs]
            results = (
                self.branch_or_loop(op, operands, env) if op.regions else self.op(op, operands)
            )
            env.update(zip(op.outputs, results, strict=True))

    def op(self, op: Op, operands: Sequence[Any]) -> Sequence[Any]:
        if op.kind in COMPOSITES:
            return replace(self, graph=body_of(op.text("body")), arrays={})(*operands)
        if op.kind == LSE:
            return [log_of_sum(*operands)]
        rule = rule_of(op, self.graph.types)
        return emit(op, self.bound[op.kind, op.attrs], operands, rule, {})

    def branch_or_loop(self, op: Op, operands: Sequence[Any], env: Env) -> Sequence[Any]:
        run = {"scan": self.scan, "while": self.whilst, "cond": self.cond}[op.kind]
        return run(op, operands, env)

    def cond(self, op: Op, operands: Sequence[Any], env: Env) -> Sequence[Any]:
        branches = [lambda *given, r=r: tuple(self.region(r, given, env)) for r in op.regions]
        return lax.switch(operands[0], branches, *operands)

    def whilst(self, op: Op, operands: Sequence[Any], env: Env) -> Sequence[Any]:
        (whether, turn), (consts, _) = op.regions, op.loop_inputs
        fixed = operands[:consts]
        return lax.while_loop(
            lambda state: self.region(whether, (*fixed, *state), env)[0],
            lambda state: tuple(self.region(turn, (*fixed, *state), env)),
            tuple(operands[consts:]),
        )

    def scan(self, op: Op, operands: Sequence[Any], env: Env) -> Sequence[Any]:
        (region,), (consts, carry) = op.regions, op.loop_inputs
        first_xs = consts + carry

        def body(state: Sequence[Any], xs: Sequence[Any]) -> tuple[Any, Any]:
            results = self.region(region, (*operands[:consts], *state, *xs), env)
            return tuple(results[:carry]), tuple(results[carry:])

        final, stacked = lax.scan(
            body,
            tuple(operands[consts:first_xs]),
            tuple(operands[first_xs:]),
            length=op.trips,
            reverse=op.flag("reverse"),
            unroll=op.integer("unroll"),
        )
        return (*final, *stacked)

    def region(self, region: Region, inputs: Sequence[Any], env: Env) -> list[Any]:
        """A region sees its inputs and the graph's constants."""
        inner = {value: env[value] for value in self.graph.constant_ids}
        inner.update(zip(region.inputs, inputs, strict=True))
        self.run(region.ops, inner)
        return [inner[value] for value in region.outputs]


def number(data: Any, kind: TensorType) -> Any:
    """A scalar constant as an array of its own type, never weakly typed."""
    return np.asarray(data, jax_dtype(kind.dtype))
