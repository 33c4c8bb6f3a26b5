"""Every rule is checked by execution: cut the operands, run each shard, combine, compare.

The samples are those of `op_samples`. `vocabulary()` must be covered, so a kind can't be added without a sample.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from itertools import combinations, product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.emit import ShardPart
from meshwright.backends.xla.params import attrs_of, kept
from meshwright.backends.xla.replay import Walk
from meshwright.ir.attribute_table import unfit
from meshwright.ir.attrs import from_json, real, to_json
from meshwright.ir.graph import Op, TensorType
from meshwright.ir.ops import COMPOSITES
from meshwright.ir.rules import rule_of, vocabulary
from meshwright.ir.rules.rule import Rule, cuttable

from .op_samples import FAMILIES, PRIMITIVES, Sample, family, lax_take, normal, sample


@pytest.fixture(autouse=True, scope="module")
def quick_compiles() -> Iterator[None]:
    """Thousands of tiny programs: XLA's optimizations cost more than they save."""
    before = jax.config.values["jax_disable_most_optimizations"]
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


# Cutting and combining


def cut_operands(sample: Sample, cuts: Mapping[int, ShardPart]) -> list[Any]:
    return [
        jnp.asarray(cut_one(value if is_key(value) else np.asarray(value), dims, cuts))
        for value, dims in zip(sample.operands, sample.rule.operands, strict=True)
    ]


def cut_one(value: Any, dims: Any, cuts: Mapping[int, ShardPart]) -> Any:
    for axis, dim in enumerate(dims):
        for factor in dim:
            if factor in cuts:
                size = value.shape[axis] // cuts[factor].ways
                part = slice(cuts[factor].index * size, (cuts[factor].index + 1) * size)
                value = value[(slice(None),) * axis + (part,)]
    return value


COMBINE = {
    "sum": lambda parts: sum(parts[1:], start=parts[0]),
    "max": lambda parts: np.maximum.reduce(parts),
    "min": lambda parts: np.minimum.reduce(parts),
    "and": lambda parts: np.logical_and.reduce(parts),
    "or": lambda parts: np.logical_or.reduce(parts),
}


Ways = tuple[tuple[int, int], ...]  # (factor, parts) pairs


def ways_to_cut(rule: Rule) -> Iterator[Ways]:
    """Every factor in 2 and in 4, every pair of factors in 2 each."""
    even = [f for f in cuttable(rule) if rule.factors[f].size % 2 == 0]
    yield from (((f, 2),) for f in even)
    yield from (((f, 4),) for f in even if rule.factors[f].size % 4 == 0)
    yield from (((f, 2), (g, 2)) for f, g in combinations(even, 2))


def some_ways(rule: Rule) -> Iterator[Ways]:
    """Every factor in 2 alone, and the first with the last."""
    even = [ways for ways in ways_to_cut(rule) if len(ways) == 1 and ways[0][1] == 2]
    yield from even
    if len(even) > 1:
        yield (*even[0], *even[-1])


WAYS = [
    pytest.param(some_ways, id="some"),
    pytest.param(ways_to_cut, id="every", marks=pytest.mark.slow),
]


def places(ways: Ways) -> list[tuple[int, ...]]:
    return list(product(*(range(n) for _, n in ways)))


def cuts_at(ways: Ways, place: Any) -> dict[int, ShardPart]:
    return {f: ShardPart(i, n) for i, (f, n) in zip(place, ways, strict=True)}


def run_shards(sample: Sample, every: list[Ways], jit: bool = True) -> list[dict[Any, list[Any]]]:
    """The results of every shard of every way to cut, from one compiled program.

    The shard's index is a number being traced, as under shard_map, where one factor
    is cut in 2, and a plain int elsewhere.
    """
    jobs = [(ways, place) for ways in every for place in places(ways)]
    operands = [cut_operands(sample, cuts_at(*job)) for job in jobs]
    traced = [[jnp.int32(i) for i in place] for ways, place in jobs]

    def program(operands: Any, traced: Any) -> list[Any]:
        return [
            sample.run(local, cuts_at(ways, index if is_traced(ways) else place))
            for local, index, (ways, place) in zip(operands, traced, jobs, strict=True)
        ]

    results = (jax.jit(program) if jit else program)(operands, traced)
    shards: dict[Ways, dict[Any, Any]] = {ways: {} for ways in every}
    for (ways, place), result in zip(jobs, results, strict=True):
        shards[ways][place] = [host(value) for value in result]
    return list(shards.values())


def is_traced(ways: Ways) -> bool:
    return len(ways) == 1 and ways[0][1] == 2


def combine(rule: Rule, ways: Ways, shards: Any, result: int) -> np.ndarray:
    """Put one result together again."""
    if not ways:
        return shards[()][result]
    (factor, n), *rest = ways
    inner = [
        combine(rule, tuple(rest), {p[1:]: v for p, v in shards.items() if p[0] == i}, result)
        for i in range(n)
    ]
    for axis, dim in enumerate(rule.results[result]):
        if factor in dim:
            return np.concatenate(inner, axis)
    if rule.factors[factor].kind == "reduced":
        return COMBINE[rule.factors[factor].reduction](inner)
    for part in inner[1:]:
        same(part, inner[0])
    return inner[0]


def is_key(value: Any) -> bool:
    return jnp.issubdtype(value.dtype, jax.dtypes.prng_key)


def host(value: Any) -> np.ndarray:
    if is_key(value):
        return np.asarray(jax.random.key_data(value))
    array = np.asarray(value)
    return array.astype(np.float32) if array.dtype == jnp.bfloat16 else array


def same(got: np.ndarray, wanted: np.ndarray, loose: float = 2e-5) -> None:
    assert got.shape == wanted.shape
    if wanted.dtype.kind in "biu":
        np.testing.assert_array_equal(got, wanted)
    else:
        finite = np.abs(wanted[np.isfinite(wanted)])
        scale = max(1.0, float(finite.max(initial=0.0)))
        np.testing.assert_allclose(got, wanted, rtol=loose, atol=loose * scale)


def tolerance(sample: Sample) -> float:
    rounds = {t.dtype for t in sample.types.values()} & {"bf16", "f16"}
    return 3e-2 if rounds or sample.op.kind == "reduce_precision" else 2e-5


def describe(sample: Sample) -> str:
    types = ", ".join(map(str, sample.types.values()))
    return f"{sample.op.kind}({types}) {dict(sample.op.attrs)}\n{sample.rule}"


@pytest.mark.parametrize("ways", WAYS)
@pytest.mark.parametrize("name", FAMILIES)
def test_shards_combine_to_the_whole_result(name: str, ways: Callable[[Rule], Iterator[Ways]]):
    for one in family(name):
        check_cuts(one, list(ways(one.rule)), jit=True)


def test_shards_need_no_jit():
    for one in family("indexing")[::7]:
        check_cuts(one, list(ways_to_cut(one.rule))[:1], jit=False)


def check_cuts(one: Sample, every: list[Ways], jit: bool) -> None:
    wanted = [host(result) for result in one.run(one.operands)]
    for ways, shards in zip(every, run_shards(one, every, jit), strict=True):
        got = [combine(one.rule, ways, shards, r) for r in range(len(wanted))]
        check(one, got, wanted, f"(factor, parts) {ways}")


def check(one: Sample, got: list[Any], wanted: list[Any], what: str) -> None:
    for g, w in zip(got, wanted, strict=True):
        try:
            same(g, w, tolerance(one))
        except AssertionError as error:
            raise AssertionError(f"{what} of {describe(one)}{error}") from None


@pytest.mark.parametrize("name", FAMILIES)
def test_a_linear_op_passes_an_owed_sum_on(name: str):
    for one in family(name):
        for owed in one.rule.linear:
            parts = [summand(one, owed, seed) for seed in (7, 8)]
            total = [a + b if o in owed else a for o, (a, b) in enumerate(zip(*parts, strict=True))]
            wanted = [host(result) for result in one.run(total)]
            halves = [map(host, one.run(part)) for part in parts]
            got = [a + b for a, b in zip(*halves, strict=True)]
            check(one, got, wanted, f"operands {owed}")


def summand(one: Sample, owed: tuple[int, ...], seed: int) -> list[Any]:
    return [
        normal(*value.shape, dtype=value.dtype, seed=seed + 10 * o) if o in owed else value
        for o, value in enumerate(one.operands)
    ]


# Completeness


def everything() -> list[Sample]:
    return [one for name in FAMILIES for one in family(name)]


def test_every_kind_of_the_vocabulary_is_exercised():
    exercised = {one.op.kind for one in everything() if not one.rule.opaque}
    assert (vocabulary() & PRIMITIVES.keys()) - exercised == set()


def test_most_of_the_vocabulary_exists_in_this_jax():
    ours = COMPOSITES | {"averaged", "estimated", "log_sum_exp", "scaled"}
    assert vocabulary() - PRIMITIVES.keys() <= {"log2", "one_minus_square"} | ours


def test_samples_are_opaque_only_where_named():
    opaque = {one.op.kind for one in everything() if one.rule.opaque}
    assert opaque == set()


def test_attributes_survive_json():
    for one in everything():
        text = json.dumps(to_json(one.op.attrs), allow_nan=False)
        assert from_json(json.loads(text)) == one.op.attrs


def test_ops_say_what_the_table_knows_in_words_of_no_framework():
    """Of each kind that has a rule; `<jaxpr>...`, `GatherScatterMode.CLIP` and the like are for opaque ones."""
    plain = re.compile(r"[\w ]*")
    for one in everything():
        for name, value in one.op.attrs:
            assert unfit(one.op.kind, name, value) is None
            assert all(plain.fullmatch(text) for text in texts(value)) or name == "function"


def texts(value: Any) -> list[str]:
    if isinstance(value, tuple):
        return [text for each in value for text in texts(each)]
    return [value] if isinstance(value, str) else []


def test_equal_attributes_mean_equal_parameters():
    seen: dict[Any, Any] = {}
    for one in everything():
        params = kept(one.op.kind, one.bound[1])
        assert repr(seen.setdefault((one.op.kind, one.op.attrs), params)) == repr(params)


ALIKE = [1, 1.0, "1", "<float>1.0", (1,), (1.0,), [1], "f32", np.dtype("float32"), None, "None"]
ALIKE += [0.0, -0.0, 0, np.float32(1), np.float64(1), float("nan"), "nan", "<str>f32"]
ALIKE += [lax.Precision.DEFAULT, "Precision.DEFAULT", lax.GatherScatterMode.CLIP, "CLIP"]
ALIKE += [jax.make_jaxpr(jnp.sin)(1.0), jax.make_jaxpr(jnp.cos)(1.0), jnp.ones(2), jnp.ones(3)]
ALIKE += [jax.random.key(0).dtype, jax.random.key(0, impl="rbg").dtype, jax.nn.relu, lambda: 0]


def test_look_alikes_keep_apart():
    assert len({attrs_of("any", {"p": value}) for value in ALIKE}) == len(ALIKE)


def test_products_say_their_precision_and_dims_in_plain_words():
    levels, presets = [*lax.Precision], [*lax.DotAlgorithmPreset]
    given = [None, *levels, *presets, (lax.Precision.HIGH, lax.Precision.HIGHEST)]
    numbers = (((1,), (0,)), ((), ()))
    found = [
        dict(attrs_of("dot_general", {"precision": each, "dimension_numbers": numbers}))
        for each in given
    ]
    assert len({attrs.get("precision") for attrs in found}) == len(given)
    assert found[2]["precision"] == "high" and found[-1]["precision"] == ("high", "highest")
    assert found[1 + len(levels)]["precision"] == "any_any_any"
    assert found[0]["lhs_contracting"] == (1,) and found[0]["rhs_contracting"] == (0,)


def test_functions_say_how_accurate_they_have_to_be_where_the_step_does():
    asked = [None, lax.AccuracyMode.HIGHEST, lax.Tolerance(rtol=0.5, ulps=2)]
    said = [dict(attrs_of("exp", {"accuracy": each})) for each in asked]
    assert said == [{}, {"accuracy": "highest"}, {"accuracy": (real(0.0), real(0.5), 2)}]


def test_updates_by_a_function_are_opaque():
    """All else is said by the kind: what is added or set."""
    ones, ids = jnp.ones((8, 4)), jnp.arange(3)
    applied = [
        op
        for function in (jnp.sin, jnp.cos)
        for op in capture(lambda x, f=function: x.at[ids].apply(f), ones).graph.ops
        if op.kind == "scatter"
    ]
    assert len({op.text("update") for op in applied}) == 2
    types = {
        0: TensorType("f32", (8, 4)),
        1: TensorType("s32", (3, 1)),
        2: TensorType("f32", (3, 4)),
    }
    for op in applied:
        op = replace(op, inputs=(0, 1, 2), outputs=(3,))
        without = replace(op, attrs=tuple(pair for pair in op.attrs if pair[0] != "update"))
        assert rule_of(op, {**types, 3: types[0]}).opaque
        assert not rule_of(without, {**types, 3: types[0]}).opaque


def test_sums_of_types_that_differ_share_their_attributes():
    """Programs of updates are of a type, which jax makes anew."""

    def step(x: Any) -> Any:
        wide = jnp.zeros((8, 4)).at[jnp.arange(3)].add(x)
        return wide, jnp.zeros((8, 4), jnp.bfloat16).at[jnp.arange(3)].add(x.astype(jnp.bfloat16))

    captured, x = capture(step, normal(3, 4)), normal(3, 4)
    sums = [op for op in captured.graph.ops if op.kind == "scatter-add"]
    assert len(sums) == 2 and sums[0].attrs == sums[1].attrs
    walk = Walk(captured.graph, captured.binding.ops, captured.binding.arrays)
    for found, wanted in zip(walk(x), step(x), strict=True):
        assert found.dtype == wanted.dtype
        np.testing.assert_array_equal(found, wanted)


def test_programs_are_told_apart_by_content():
    def traced(constant: float) -> Any:
        return jax.make_jaxpr(lambda x: x + np.full(3, constant, np.float32))(1.0)

    digests = [attrs_of("any", {"jaxpr": traced(c)}) for c in (1.5, 2.5, 1.5)]
    assert digests[0] == digests[2] != digests[1]


def test_a_sharding_without_a_mesh_says_nothing():
    mesh = jax.sharding.AbstractMesh((), ())
    empty = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    assert attrs_of("any", {"sharding": empty, "out_sharding": None}) == ()


MATRIX = {0: TensorType("f32", (4, 8)), 1: TensorType("f32", (4, 8))}


def test_an_unknown_primitive_is_opaque():
    rule = rule_of(Op("unheard_of", (0,), (1,)), MATRIX)
    assert rule.opaque
    assert cuttable(rule) == ()


def test_unusual_parameters_are_opaque():
    assert rule_of(Op("transpose", (0,), (1,)), MATRIX).opaque  # no permutation
    mode = (("mode", "one_hot"),)
    assert rule_of(Op("gather", (0, 1), (1,), mode), MATRIX).opaque


def test_look_ups_and_updates_say_in_plain_words_what_an_index_out_of_range_does():
    told = {dict(one.op.attrs).get("mode") for one in family("indexing")}
    assert told == {"clip", "fill_or_drop", "promise_in_bounds"}


@pytest.mark.parametrize(
    "fill, owes", [(None, True), (0.0, True), (-0.0, True), (float("nan"), True), (5.0, False)]
)
def test_a_look_up_that_fills_with_a_number_owes_no_sum(fill: float | None, owes: bool):
    table, ids = np.ones((8, 4), np.float32), np.ones((2,), np.int32)
    (eqn,) = jax.make_jaxpr(lambda t, i: lax_take(t, i, fill))(table, ids).eqns[-1:]
    assert bool(sample(eqn, (table, ids[:, None])).rule.linear) == owes


def test_integers_owe_no_sum():
    types = {i: TensorType("s32", (4, 8)) for i in range(3)}
    assert rule_of(Op("add", (0, 1), (2,)), types).linear == ()


# Properties


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.data())
def test_reshape_cuts_into_contiguous_parts(sizes: list[int], data: st.DataObject):
    size = int(np.prod(sizes))
    new: list[int] = []
    while size > 1:
        new.append(data.draw(st.sampled_from([d for d in range(2, size + 1) if size % d == 0])))
        size //= new[-1]
    values = np.arange(np.prod(sizes)).reshape(sizes)
    types = {0: TensorType("s32", tuple(sizes)), 1: TensorType("s32", tuple(new))}
    attrs = (("new_sizes", tuple(new)),)
    rule = rule_of(Op("reshape", (0,), (1,), attrs), types)
    assert not rule.opaque
    for factor in cuttable(rule):
        ways = rule.factors[factor].size
        parts = [
            cut_one(values, rule.operands[0], {factor: ShardPart(i, ways)}) for i in range(ways)
        ]
        wanted = [
            cut_one(values.reshape(new), rule.results[0], {factor: ShardPart(i, ways)})
            for i in range(ways)
        ]
        for part, want in zip(parts, wanted, strict=True):
            np.testing.assert_array_equal(np.ravel(part), np.ravel(want))


# The zoo

OPAQUE_IN_THE_ZOO: set[str] = set()


@pytest.mark.parametrize(
    "name", ["gpt-tiny", "llama-tiny", "mixtral-tiny", "vit-tiny", "wrn-tiny", "dlrm-tiny"]
)
def test_the_zoo_speaks_the_vocabulary(name: str):
    models = pytest.importorskip("meshwright.models")
    example = models.build(name)
    jaxpr = jax.make_jaxpr(example.step)(example.state, example.batch).jaxpr
    opaque = {kind for kind, rule in zoo_rules(jaxpr) if rule.opaque}
    assert opaque == OPAQUE_IN_THE_ZOO


def zoo_rules(jaxpr: Any) -> Iterator[tuple[str, Rule]]:
    for eqn in jaxpr.eqns:
        bodies = [eqn.params[k] for k in ("jaxpr", "call_jaxpr") if k in eqn.params]
        for body in bodies:
            yield from zoo_rules(getattr(body, "jaxpr", body))
        if not bodies:
            one = sample(eqn, tuple(eqn.invars))
            yield one.op.kind, one.rule


@pytest.mark.parametrize(("dtype", "owes"), [("f8e4m3fn", ()), ("f8e5m2", ()), ("bf16", ((0,),))])
def test_no_sum_is_owed_in_eight_bits(dtype, owes):
    types = {0: TensorType("f32", (8,)), 1: TensorType(dtype, (8,)), 2: TensorType("f32", (8,))}
    for read, made in ((0, 1), (1, 2)):
        assert rule_of(Op("convert_element_type", (read,), (made,)), types).linear == owes


def test_gradients_of_casts_to_eight_bits_are_summed_before_the_cast():
    """Else each shard's part would be rounded to three bits: 3 % of a weight's change."""
    eight = jnp.float8_e4m3fn

    def step(params, x, y):
        def loss(params):
            a, b = params
            h = jnp.dot(x.astype(eight), a.astype(eight), preferred_element_type=jnp.float32)
            return jnp.mean((jnp.tanh(h) @ b - y) ** 2)

        gradients = jax.grad(loss)(params)
        return [p - 0.1 * g for p, g in zip(params, gradients, strict=True)]

    a, b, x, y = (normal(*shape) for shape in ((8, 16), (16, 4), (32, 8), (32, 4)))
    ours = mw.parallelize(step, cluster="8xcpu", mesh=(8,))([a, b], x, y)
    for one, other in zip(ours, jax.jit(step)([a, b], x, y), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
