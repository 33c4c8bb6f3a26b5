"""Which values exist per example, and in which dims.

The batch dims of the inputs are followed through every op by its dim rule:

    x [B*, T]   reshape -> [B·T]    the first B groups of that dim are the batch
    y [B*, D] · w [D, F] -> [B*, F]
    y [B*, D] · d [B*, F] -> [D, F]  contracted: no longer per example

`dims` has, for each per-example value, its batch dims and how many groups, counted
from the major end, the batch makes of them (B of B·T). A loop over the batch leaves
values inside that are per example in no dim. `depends` are all values that a batch
input reaches, contracted ones too; a barrier makes all its results depend on all it holds.

Unlike `microbatch`, which refuses what it cannot cut, this follows every graph to its end.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from ..composites.bodies import body_of
from ..graph import Op, Region, TensorType, deciding
from ..ops import COMPOSITES
from ..rules import rule_of
from ..rules.rule import Rule

Dims = dict[int, int]  # dim -> groups of the batch in it


@dataclass
class Examples:
    """Facts gathered so far; ids are unique over the graph, so regions share the maps."""

    types: Mapping[int, TensorType]
    dims: dict[int, Dims] = field(default_factory=lambda: {})
    depends: set[int] = field(default_factory=lambda: set())

    def holds(self, values: Iterable[int]) -> bool:
        """Whether one of the values is per example."""
        return any(v in self.dims for v in values)

    def run(self, ops: Sequence[Op]) -> None:
        for op in ops:
            if self.depends.isdisjoint(op.inputs):
                continue
            if op.regions:
                self._regions(op)
                continue
            self.depends.update(op.outputs)
            if op.kind == "optimization_barrier":
                for source, result in zip(op.inputs, op.outputs, strict=True):
                    if source in self.dims:
                        self.dims[result] = self.dims[source]
            elif self.holds(op.inputs):
                self._composite(op) if op.kind in COMPOSITES else self._simple(op)

    def _composite(self, op: Op) -> None:
        """Follow what it stands for."""
        body = body_of(op.text("body"))
        within = Examples(body.types)
        for value, inside in zip(op.inputs, body.inputs, strict=True):
            if value in self.depends:
                within.depends.add(inside)
            if value in self.dims:
                within.dims[inside] = self.dims[value]
        within.run(body.ops)
        for result, inside in zip(op.outputs, body.outputs, strict=True):
            if inside in within.dims:
                self.dims[result] = within.dims[inside]

    def _simple(self, op: Op) -> None:
        rule = rule_of(op, self.types)
        if rule.opaque:
            self._guess(op)
            return
        shares = self.shares(op, rule)
        in_no_dim = any(self.dims.get(v) == {} for v in op.inputs)
        for k, result in enumerate(op.outputs):
            found = _spread(rule, rule.results[k], shares) | self._unruly(op, rule, k, shares)
            if found or in_no_dim:
                self.dims[result] = found

    def shares(self, op: Op, rule: Rule) -> dict[int, int]:
        """Factor -> groups of the batch in it, as the operands say."""
        shares: dict[int, int] = {}
        for value, dims in zip(op.inputs, rule.operands, strict=True):
            for d, groups in self.dims.get(value, {}).items():
                for factor in dims[d]:
                    size = rule.factors[factor].size
                    if groups <= 1:
                        break
                    shares[factor] = max(shares.get(factor, 1), min(size, groups))
                    groups = -(-groups // size)
        return shares

    def _unruly(self, op: Op, rule: Rule, k: int, shares: Mapping[int, int]) -> Dims:
        """Dims that an op cuts or joins (slice, concatenate) are the batch still, in their place."""
        kept = {factor for dim in rule.results[k] for factor in dim}
        lost = {f for f in shares if f not in kept and rule.factors[f].kind in ("whole", "halo")}
        shape = self.types[op.outputs[k]].shape
        return {
            d: shape[d]
            for dims in rule.operands
            if lost and len(dims) == len(shape)
            for d, dim in enumerate(dims)
            if shape[d] > 1 and not lost.isdisjoint(dim)
        }

    def _guess(self, op: Op) -> None:
        """No rule: a result is per example where it has a dim as long as the batch dim."""
        known = {
            (d, self.types[v].shape[d]): n
            for v in op.inputs
            for d, n in self.dims.get(v, {}).items()
        }
        sizes = {size: n for (_, size), n in known.items()}
        for result in op.outputs:
            shape = self.types[result].shape
            found = {d: known[d, size] for d, size in enumerate(shape) if (d, size) in known}
            other = [d for d, size in enumerate(shape) if size in sizes]
            if found or other:
                self.dims[result] = found or {other[0]: sizes[shape[other[0]]]}

    # ------------------------------------------------------------ loops and branches

    def _regions(self, op: Op) -> None:
        over_batch = max(self._enter(op, region) for region in op.regions)
        while True:
            for region in op.regions:
                self.run(region.ops)
            if not max(self._join(op, region) for region in op.returning):
                break
        for region in op.returning:
            self._leave(op, region, over_batch)
        if not self.depends.isdisjoint(deciding(op)):
            self.depends.update(op.outputs)

    def _enter(self, op: Op, region: Region) -> bool:
        """What a region knows of its operands; whether it takes rows of the batch."""
        first_xs, over_batch = sum(op.loop_inputs), False
        for i, (outside, inside) in enumerate(zip(op.inputs, region.inputs, strict=True)):
            if outside in self.depends:
                self.depends.add(inside)
            if outside in self.dims:
                over_batch |= i >= first_xs and 0 in self.dims[outside]
                self.dims[inside] = _shifted(self.dims[outside], -1 if i >= first_xs else 0)
        return over_batch

    def _join(self, op: Op, region: Region) -> bool:
        """Hand each carry's end to its start; True when that taught something."""
        learnt = False
        consts, carry = op.loop_inputs
        for k in range(carry):
            start, end = region.inputs[consts + k], region.outputs[k]
            if end in self.depends and start not in self.depends:
                self.depends.add(start)
                learnt = True
            if (
                end in self.dims
                and not self.dims[end].keys() <= self.dims.get(start, {-1: 0}).keys()
            ):
                self.dims[start] = {**self.dims[end], **self.dims.get(start, {})}
                learnt = True
        return learnt

    def _leave(self, op: Op, region: Region, over_batch: bool) -> None:
        _, carry = op.loop_inputs
        for k, (result, end) in enumerate(zip(op.outputs, region.outputs, strict=True)):
            if end in self.depends:
                self.depends.add(result)
            inner = self.dims.get(end)
            stacked = k >= carry and op.kind == "scan"
            found = _shifted(inner or {}, 1 if stacked else 0)
            if stacked and over_batch and end in self.depends:
                found[0] = op.trips
            if found or (inner == {} and not over_batch):
                self.dims[result] = {**self.dims.get(result, {}), **found}


def _spread(rule: Rule, dims: tuple[tuple[int, ...], ...], shares: Mapping[int, int]) -> Dims:
    """Batch dims of a result whose dims are these factors."""
    found: Dims = {}
    for d, dim in enumerate(dims):
        sizes = [rule.factors[f].size for f in dim]
        groups, leading = 1, True
        for factor, size in zip(dim, sizes, strict=True):
            share = shares.get(factor, 1)
            if share > 1:
                groups = groups * share if leading else prod(sizes)
            leading = leading and share == size
        if groups > 1:
            found[d] = min(groups, prod(sizes))
    return found


def _shifted(dims: Mapping[int, int], by: int) -> Dims:
    return {d + by: n for d, n in dims.items() if d + by >= 0}
