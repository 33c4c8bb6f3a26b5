"""Dim rules against DTensor's: what its registry lets each operation of ATen do on one mesh axis, ours lets it do too.

A strategy of DTensor's says how operands and results lie: `S(0) R -> S(0)`; `P` owes a sum. An operation of ATen is a
few of ours, so ours has it if those run from such operands to such results, shard by shard, with nothing that travels
between. What is left out is named in `LEFT_OUT`, with the reason; a difference that no reason covers fails. DTensor has
such strategies for 1014 operations, of which 116 have a mapping; samples and their gradients have 98 of these.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from torch.utils import _pytree as pytree  # noqa: E402

from meshwright.backends.torch import compat  # noqa: E402
from meshwright.backends.torch.decompose import table  # noqa: E402
from meshwright.backends.torch.map import Builder, type_of  # noqa: E402
from meshwright.backends.torch.map.builder import MAPPED  # noqa: E402
from meshwright.ir.graph import Graph  # noqa: E402
from meshwright.ir.mesh import Mesh  # noqa: E402
from meshwright.ir.rules import rule_of  # noqa: E402
from meshwright.ir.rules.rule import (  # noqa: E402
    NONE,
    Strategy,
    operand_sharding,
    owing,
    result_sharding,
)
from meshwright.ir.sharding import Sharding  # noqa: E402

from .test_torch_map import SAMPLES, with_gradients  # noqa: E402

WAYS = (2, 3, 5, 7)


@cache
def registry() -> Mapping[Any, Any]:
    """DTensor's strategies for one axis, by operation."""
    from torch.distributed.tensor import DTensor

    propagator: Any = DTensor._op_dispatcher.sharding_propagator
    return propagator.op_single_dim_strategy_funcs


def word(placement: Any) -> str:
    if placement is None:
        return "-"
    name = type(placement).__name__
    if name in ("Shard", "_ShardingPlaceholder"):
        return f"S({placement.dim})"
    if name == "Replicate":
        return "R"
    if name in ("Partial", "_MaskPartial", "MaskPartial"):
        return "P" if placement.reduce_op == "sum" else f"P({placement.reduce_op})"
    return name


def lies(placement: str, rank: int) -> Sharding | None:
    """A placement as one of ours; None where there is none."""
    empty: tuple[tuple[str, ...], ...] = ((),) * rank
    if placement == "R":
        return Sharding(empty)
    if placement == "P":
        return Sharding(empty, frozenset({"x"}))
    if placement.startswith("S("):
        dim = int(placement[2:-1]) % max(rank, 1)
        return Sharding(tuple(("x",) if d == dim else () for d in range(rank)))
    return None


def is_tensor(arg: Any) -> bool:
    return isinstance(arg, torch.Tensor)


class Case:
    """One operation of ATen with operands, and what it is in our graph."""

    def __init__(self, node: Any):
        self.target = node.target
        given = (node.args, node.kwargs)
        self.args, self.kwargs = pytree.tree_map(
            lambda a: a.meta["val"] if isinstance(a, torch.fx.Node) else a, given
        )
        self.tensors = [*filter(is_tensor, pytree.tree_leaves((self.args, self.kwargs)))]
        b = Builder()
        self.inputs = [b.value(type_of(a)) for a in self.tensors]
        values = iter(self.inputs)
        args, kwargs = pytree.tree_map(
            lambda a: next(values) if is_tensor(a) else a, (self.args, self.kwargs)
        )
        b.result = node.meta["val"]
        found = MAPPED[node.target](b, *args, **kwargs)
        self.outputs = list(found) if isinstance(found, tuple | list) else [found]
        kept = [v for v in self.outputs if v is not None]
        inputs, outputs = (tuple(v.number for v in each) for each in (self.inputs, kept))
        self.graph = Graph(b.types, inputs, tuple(b.ops), outputs, tuple(b.constants))

    @property
    def key(self) -> str:
        told = pytree.tree_map(
            lambda a: (tuple(a.shape), str(a.dtype)) if is_tensor(a) else str(a),
            (self.args, self.kwargs),
        )
        return f"{self.target} {told}"

    def theirs(self) -> list[list[str]]:
        """DTensor's strategies: results, then operands. Ids whose look-up it masks are those of all devices."""
        from torch.distributed.tensor._dtensor_spec import TensorMeta

        args, kwargs = pytree.tree_map(
            lambda a: TensorMeta(a.shape, a.stride(), a.dtype) if is_tensor(a) else a,
            (self.args, self.kwargs),
        )
        found = []
        for each in registry()[self.target].func(self.target, args, kwargs):
            many = len(each) - len(self.inputs)
            held = ["R" if "Mask" in type(p).__name__ else word(p) for p in each[many:]]
            found.append([*map(word, each[:many]), *held])
        return found

    def shown(self, strategy: Sequence[str]) -> str:
        many = len(strategy) - len(self.inputs)
        return f"{' '.join(strategy[many:])} -> {' '.join(strategy[:many])}"

    def has(self, strategy: Sequence[str]) -> bool:
        """Whether our operations run so."""
        many = len(self.inputs)
        wanted, held = strategy[: len(strategy) - many], strategy[len(strategy) - many :]
        types = self.graph.types
        known: dict[int, Sharding] = {}
        for value, placement in zip(self.inputs, held, strict=True):
            layout = lies("R" if placement == "-" else placement, len(value.shape))
            if layout is None:
                return False
            known[value.number] = layout
        ends: dict[int, Sharding] = {}
        for value, placement in zip(self.outputs, wanted, strict=False):
            if value is None or placement == "-":
                continue
            layout = lies(placement, len(value.shape))
            if layout is None:
                return False
            ends[value.number] = layout
        ways = ways_of([(types[v].shape, s) for v, s in (*known.items(), *ends.items())])
        if ways is None:
            raise Indivisible
        free = {c.value for c in self.graph.constants}
        for op in self.graph.ops:
            if free.issuperset(op.inputs):
                free.update(op.outputs)
        return any(
            all(value in free or found[value] == layout for value, layout in ends.items())
            for found in runs(self.graph, 0, known, free, Mesh.of(x=ways))
        )


class Indivisible(Exception):
    """No number of devices divides all dims that are cut."""


def ways_of(values: Sequence[tuple[tuple[int, ...], Sharding]]) -> int | None:
    """How many devices divide all dims that are cut."""
    sizes = [
        n for shape, layout in values for n, axes in zip(shape, layout.dims, strict=True) if axes
    ]
    return next((w for w in WAYS if all(n and n % w == 0 for n in sizes)), None)


def runs(
    graph: Graph, number: int, known: dict[int, Sharding], free: set[int], mesh: Mesh
) -> Iterator[dict[int, Sharding]]:
    """Layouts of all values, with which no operand has to travel. What is made of constants lies as it is wanted."""
    if number == len(graph.ops):
        yield known
        return
    op = graph.ops[number]
    if free.issuperset(op.outputs):
        yield from runs(graph, number + 1, known, free, mesh)
        return
    rule = rule_of(op, graph.types)
    codes = [
        NONE,
        *(
            f
            for f, factor in enumerate(rule.factors)
            if factor.divisible and factor.size % mesh.size == 0
        ),
    ]
    seen = []
    for code in (*codes, *(owing(k) for k in range(len(rule.linear)))):
        strategy = Strategy((code,))
        operands = [operand_sharding(rule, strategy, mesh, k) for k in range(len(op.inputs))]
        if any(
            v not in free and known[v] != want for v, want in zip(op.inputs, operands, strict=True)
        ):
            continue
        results = [result_sharding(rule, strategy, mesh, k) for k in range(len(op.outputs))]
        if results not in seen:
            seen.append(results)
            made = dict(zip(op.outputs, results, strict=True))
            yield from runs(graph, number + 1, {**known, **made}, free, mesh)


# ---------------------------------------------------------------- what is left out


def extremes(case: Case, strategy: Sequence[str]) -> bool:
    return any(each.startswith("P(") for each in strategy)


def whole_numbers(case: Case, strategy: Sequence[str]) -> bool:
    return "P" in strategy and not all(a.dtype.is_floating_point for a in case.tensors)


def padding(case: Case, strategy: Sequence[str]) -> bool:
    return "P" in strategy and "constant_pad" in str(case.target)


LEFT_OUT: Mapping[str, Callable[[Case, Sequence[str]], bool]] = {
    "only sums are owed: means are sums of shares, extremes and products are settled inside an operation": extremes,
    "sums of whole numbers and truth values are settled before they change type or are rounded": whole_numbers,
    "padding would be added once for each device; DTensor knows that it is zero": padding,
}


def compared(samples: Sequence[Any]) -> tuple[Counter[str], list[str]]:
    """How many strategies ours has, and for each reason has not; those that no reason covers."""
    counts, strange = Counter[str](), list[str]()
    for key, case in cases(samples).items():
        for strategy in case.theirs():
            try:
                held = case.has(strategy)
            except Indivisible:
                counts["indivisible"] += 1
                continue
            reasons = [why for why, covers in LEFT_OUT.items() if covers(case, strategy)]
            if not held and not reasons:
                strange.append(f"{case.shown(strategy)} of {key}")
            counts["held" if held else (*reasons, "strange")[0]] += 1
    return counts, strange


def cases(samples: Sequence[Any]) -> dict[str, Case]:
    """Each operation with other operands that samples and their gradients consist of."""
    found: dict[str, Case] = {}
    for _, function, args in samples:
        mode = compat.fakes()
        given = [compat.fake_like(mode, a) for a in args]
        with mode:
            traced = compat.traced(with_gradients(function, args), given, table())
        for node in traced.graph.nodes:
            if node.op == "call_function" and node.target in MAPPED and node.target in registry():
                case = Case(node)
                found.setdefault(case.key, case)
    return found


def test_what_dtensor_allows_some_operations_ours_allows_too():
    counts, strange = compared(SAMPLES[::6])
    assert not strange, strange
    assert counts["held"] > 300


@pytest.mark.slow
def test_what_dtensor_allows_every_operation_ours_allows_too():
    """Of 748 operations with their operands 2115 strategies are held, 1003 left out; 102 do not divide."""
    counts, strange = compared(SAMPLES)
    assert not strange, strange
    assert counts["held"] > 2000
    assert counts["indivisible"] < 150
    assert all(counts[why] for why in LEFT_OUT), counts


def test_a_rule_that_says_less_than_dtensors_is_told(monkeypatch: pytest.MonkeyPatch):
    """Where ours could not cut the summed dim of a product, nor carry a sum through it, DTensor's could."""
    less = rule_of

    def narrowed(op: Any, types: Any) -> Any:
        rule = less(op, types)
        if op.kind != "dot_general":
            return rule
        factors = tuple(
            replace(f, kind="whole", reduction="") if f.kind == "reduced" else f
            for f in rule.factors
        )
        return replace(rule, factors=factors, linear=())

    monkeypatch.setattr(f"{__name__}.rule_of", narrowed)
    _, strange = compared([sample for sample in SAMPLES if sample[0] == "linear"])
    assert any(line.startswith("S(1) S(0) -> P") for line in strange)
    assert any(line.startswith("P R -> P") for line in strange)
