"""Loops and branches of the user on local shards.

Operands and results of regions lie as the plan's slots say, in every region alike. What decides
(the index of a branch, whether a loop goes on) is one number that owes nothing and is worked out
from the same bits on every device: whole values are equal everywhere, since each comes out of the
same program on whole values or out of a collective, whose result is one and the same for all. So
all devices take the same branch and as many turns, and collectives inside meet.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from jax import lax

from ...ir.graph import Op, Region
from ...ir.sharding import Sharding
from .scope import Held, Scope, stacked

if TYPE_CHECKING:
    from .spmd import LocalStep


def end_tag(op: Op, k: int) -> str:
    """The slot in which a region leaves the k-th result."""
    consts, carry = op.loop_inputs
    return f"{op.tag}/in{consts + k}" if k < carry else f"{op.tag}/out{k}"


def run_regions(step: LocalStep, op: Op, scope: Scope) -> None:
    """Run a scan, a while or a cond, and note its results."""
    _Running(step, op, scope).run()


class _Running:
    def __init__(self, step: LocalStep, op: Op, scope: Scope):
        self.step, self.op, self.scope = step, op, scope
        self.consts, self.carry = op.loop_inputs
        self.layouts = [step.slot(f"{op.tag}/in{i}") for i in range(len(op.inputs))]
        self.ends = [step.slot(end_tag(op, k)) for k in range(len(op.outputs))]
        wanted = [
            stacked(layout) if self._is_row(i) else layout for i, layout in enumerate(self.layouts)
        ]
        self.tied = step.tied(op, dict(zip(op.inputs, wanted, strict=True)), scope)
        self.given = [self._given(i, target) for i, target in enumerate(wanted)]

    def run(self) -> None:
        made = {"scan": self._scan, "while": self._while, "cond": self._cond}[self.op.kind]()
        for k, (value, array) in enumerate(zip(self.op.outputs, made, strict=True)):
            rows = self.op.kind == "scan" and k >= self.carry
            self.scope.values[value] = Held(array, stacked(self.ends[k]) if rows else self.ends[k])

    def _is_row(self, i: int) -> bool:
        return i >= self.consts + self.carry

    def _given(self, i: int, target: Sharding) -> Any:
        """An operand as regions want it; in a microbatch, its part."""
        op, split = self.op, self.step.split
        outside, inside, row = op.inputs[i], op.regions[0].inputs[i], self._is_row(i)
        held = self.tied.get(outside, self.scope.values[outside])
        if self.scope.moment is None or inside not in split or outside in split:
            return self.step.bring(held, target)
        return self.step.now(held, target, split[inside] + row, self.scope)

    def _scan(self) -> Sequence[Any]:
        first = self.consts + self.carry
        [region] = self.op.regions

        def body(state: Sequence[Any], rows: Sequence[Any]) -> tuple[Any, Any]:
            found = self._region(region, (*self.given[: self.consts], *state, *rows), self.ends)
            return tuple(found[: self.carry]), tuple(found[self.carry :])

        final, pieces = lax.scan(
            body, tuple(self.given[self.consts : first]), tuple(self.given[first:]),
            length=self.op.trips, reverse=bool(dict(self.op.attrs).get("reverse", False)),
        )  # fmt: skip
        return (*final, *pieces)

    def _while(self) -> Sequence[Any]:
        (whether, turn), fixed = self.op.regions, self.given[: self.consts]
        on = [self.step.slot(f"{self.op.tag}/on")]
        return lax.while_loop(
            lambda state: self._region(whether, (*fixed, *state), on)[0],
            lambda state: tuple(self._region(turn, (*fixed, *state), self.ends)),
            tuple(self.given[self.consts :]),
        )

    def _cond(self) -> Sequence[Any]:
        def branch(region: Region) -> Any:
            return lambda *given: tuple(self._region(region, given, self.ends))

        return lax.switch(self.given[0], [branch(r) for r in self.op.regions], *self.given)

    def _region(self, region: Region, given: Sequence[Any], ends: Sequence[Sharding]) -> list[Any]:
        step, known = (
            self.step,
            {c.value: self.scope.values[c.value] for c in self.step.graph.constants},
        )
        inner = Scope(known, self.scope.moment)
        for value, array, layout in zip(region.inputs, given, self.layouts, strict=True):
            inner.values[value] = Held(array, layout)
        step.run(region.ops, inner)
        return [self._end(region, k, end, inner) for k, end in enumerate(ends)]

    def _end(self, region: Region, k: int, end: Sharding, inner: Scope) -> Any:
        """What a region leaves. Of what is the same for all microbatches (zeros, say) its part,
        where another region leaves one microbatch's."""
        value, split = region.outputs[k], self.step.split
        result = self.op.outputs[k] if region in self.op.returning else value
        if inner.moment is None or value in split or self.op.kind != "cond" or result not in split:
            return self.step.bring(inner.values[value], end)
        return self.step.now(inner.values[value], end, split[result], inner)
