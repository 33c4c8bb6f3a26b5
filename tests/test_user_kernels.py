"""Kernels of users with a declared rule: one op forward, one backward, cut as declared, equal to the plain step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.blocks import fold
from meshwright.ir.cluster.cluster import Cluster
from meshwright.ir.errors import UsageError, VerificationError
from meshwright.ir.fingerprint import fingerprint
from meshwright.ir.rules import rule_of
from meshwright.ir.rules.rule import cuttable
from meshwright.planner.cost.flop import flop

B, H, T, D = 4, 8, 16, 8
Array = jax.Array
RULE = "b h q d, b h k d, b h k d -> b h q d"


def flop_of(q: Any, k: Any, v: Any) -> float:
    return 2 * q.size * (k.shape[2] + v.shape[2])


def body(q_ref: Any, k_ref: Any, v_ref: Any, o_ref: Any) -> None:
    """One head of one example, all its positions at once."""
    scores = q_ref[0, 0] @ k_ref[0, 0].T / D**0.5
    e = jnp.exp(scores - scores.max(-1, keepdims=True))
    o_ref[0, 0] = (e / e.sum(-1, keepdims=True)) @ v_ref[0, 0]


def forward(q: Array, k: Array, v: Array) -> Array:
    """A kernel by hand; its grid is as large as what it is given."""
    one = pl.BlockSpec((1, 1, T, D), lambda b, h: (b, h, 0, 0))
    return pl.pallas_call(
        body, grid=q.shape[:2], in_specs=[one] * 3, out_specs=one, interpret=True,
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
    )(q, k, v)  # fmt: skip


def plain(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.softmax(q @ k.swapaxes(2, 3) / D**0.5) @ v


@jax.custom_vjp
def flash(q: Array, k: Array, v: Array) -> Array:
    return forward(q, k, v)


flash.defvjp(
    lambda q, k, v: (forward(q, k, v), (q, k, v)), lambda kept, do: jax.vjp(plain, *kept)[1](do)
)
declared = mw.kernel(flash, rule=RULE, cut="b h", flop=flop_of)


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


WEIGHTS = {name: normal(k, 16, H, D) / 4 for k, name in enumerate("qkv")}
X = normal(9, B, T, 16)


def trained(core: Callable[..., Array]) -> Callable[..., Any]:
    """Plain SGD, so that gradients show."""

    def loss(params: dict[str, Array], x: Array) -> Array:
        q, k, v = (jnp.einsum("btm,mhd->bhtd", x, params[name]) for name in "qkv")
        return (core(q, k, v) ** 2).mean()

    def step(params: dict[str, Array], x: Array) -> tuple[Any, Array]:
        value, grads = jax.value_and_grad(loss)(params, x)
        return jax.tree.map(lambda w, g: w - g, params, grads), value

    return step


def close(have: Any, want: Any) -> None:
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=1e-5, atol=1e-6)


def ops_of(step: Any, *args: Any) -> tuple[Any, list[Any]]:
    graph = capture(step, *args).graph
    return graph, [visit.op for visit in graph.visits if visit.op.kind == "user_kernel"]


def test_a_kernel_and_its_gradient_are_one_op_each_with_the_declared_rule():
    graph, (first, second) = ops_of(trained(declared), WEIGHTS, X)
    for op in (first, second):
        rule = rule_of(op, graph.types)
        assert [rule.factors[f].size for f in cuttable(rule)] == [B, H]
    assert not any(visit.op.kind == "pallas_call" for visit in graph.visits)
    assert flop(first, rule_of(first, graph.types), graph.types) == 4 * B * H * T * T * D
    assert flop(second, rule_of(second, graph.types), graph.types) == 3.5 * 4 * B * H * T * T * D


def test_a_step_with_a_kernel_by_hand_runs_as_the_plain_step():
    """Said to take so long that it must be cut, over devices and over time."""
    slow = mw.kernel(flash, rule=RULE, cut="b h", flop=lambda *qkv: 1e6 * flop_of(*qkv))
    ours = mw.parallelize(trained(slow), cluster="4xcpu", mesh="2x2", microbatches=2)
    close(ours(WEIGHTS, X), jax.jit(trained(plain))(WEIGHTS, X))
    plan = ours.plan(WEIGHTS, X)
    graph = fold(capture(trained(slow), WEIGHTS, X).graph).whole
    tags = [visit.op.tag for visit in graph.visits if visit.op.kind == "user_kernel"]
    assert len(tags) == 2
    assert all(code >= 0 for tag in tags for code in plan.strategies[tag])  # cut, not done twice
    assert any("`mw.kernel` says" in note for note in plan.notes)


def test_what_all_examples_share_owes_its_gradients_sum():
    """The gradient of an operand that lacks a cut name is summed over the devices along it."""
    scaled = mw.kernel(
        lambda x, w: x * w, rule="b d, d -> b d", cut="b d", flop=lambda x, w: x.size
    )
    step = jax.value_and_grad(lambda w, x: (scaled(x, w) ** 2).sum())
    args = normal(1, 16), normal(2, 8, 16)
    close(mw.parallelize(step, cluster="8xcpu", mesh="8")(*args), jax.jit(step)(*args))
    plain_step = jax.value_and_grad(lambda w, x: ((x * w) ** 2).sum())
    close(step(*args), plain_step(*args))


def test_declared_work_is_what_is_priced():
    def seconds(work: float) -> float:
        big = jax.ShapeDtypeStruct((8, 8), jnp.bfloat16)
        same = mw.kernel(lambda x: x + 0, rule="a b -> a b", cut="", flop=work)
        return mw.plan(same, big, cluster="h100x1").estimate.step_seconds

    device = Cluster.parse("h100x1").device
    rate = device.peak_flops["bf16"] * device.attention_efficiency
    assert seconds(1e15) - seconds(0) == pytest.approx(1e15 / rate, rel=1e-3)


def test_other_kernels_make_other_graphs_and_the_same_kernel_the_same():
    def graph(by: float) -> str:
        k = mw.kernel(lambda x: x * by, rule="a -> a", cut="a", flop=1)
        return fingerprint(capture(lambda x: k(x), jnp.ones(8)).graph)

    assert graph(2.0) == graph(2.0) != graph(3.0)


@pytest.mark.parametrize(
    ("rule", "cut", "message"),
    [
        ("b h q d", "b", "has not one `->`"),
        ("b b, b -> b", "b", "`b b` in rule `b b, b -> b` is no list of different names"),
        ("b k -> b", "k", "`k` cannot be cut by rule `b k -> b`: a result is without it"),
        ("b -> b", "h", "`h` of cut `h` is no name of an operand"),
    ],
)
def test_rules_that_cannot_be_are_refused(rule: str, cut: str, message: str):
    with pytest.raises(UsageError, match=message):
        mw.kernel(lambda x: x, rule=rule, cut=cut, flop=1)


@pytest.mark.parametrize(
    ("function", "rule", "args", "message"),
    [
        (plain, RULE, (X,), "3 operands in the rule, 1 given"),
        (plain, RULE, (X, X, X), r"operand 0 has 3 dims \(4, 16, 16\), the rule names 4: `b h q d`"),
        (jnp.add, "a b, b a -> a b", (jnp.ones((2, 3)),) * 2, r"`b` is 2 in operand 1 \(2, 3\), 3 before"),
        (lambda x: x[:2], "a -> a", (jnp.ones(8),), r"`a` is 2 in result 0 \(2,\), 8 before"),
        (lambda x: (x, x), "a -> a", (jnp.ones(8),), "1 results in the rule, 2 made"),
        (lambda x: x.reshape(8) + 1, "a -> a", (jnp.ones(8),), "cannot run on half of `a`, on"),
        (lambda x: jnp.ones(8) + x[:1], "a -> a", (jnp.ones(8),), "result 0 on half of `a`"),
    ],
)  # fmt: skip
def test_rules_that_do_not_fit_are_refused_where_the_kernel_is_called(
    function: Any, rule: str, args: Any, message: str
):
    made = mw.kernel(function, rule=rule, cut=rule.split("->")[1], flop=1)
    if function is plain:
        made = mw.kernel(function, rule=rule, cut="b h", flop=1)
    with pytest.raises(UsageError, match=message) as error:
        made(*args)
    assert f"rule `{rule}`" in str(error.value) and "try" in str(error.value)


@mw.kernel(rule="b d -> b d, b", cut="b", flop=100)
def route(x: Array) -> tuple[Array, Array]:
    """Weights and the choice, as a router has them: an integer result has no gradient."""
    return jax.nn.softmax(x), jnp.argmax(x, 1)


def same_as_plain(weigh: Callable[[Array], Array], given: Array) -> tuple[Any, mw.Plan]:
    """A step of SGD on 4 devices, and its plan."""

    def step(w: Array, x: Array) -> tuple[Array, Array]:
        loss, gradient = jax.value_and_grad(lambda w: weigh(x @ w).mean())(w)
        return w - 0.1 * gradient, loss

    w = jax.random.normal(jax.random.key(0), (D, D))
    plan = mw.plan(step, w, given, cluster="4xcpu", request=mw.Request(mesh=(4,)))
    found = mw.lower(plan, step, w, given)(w, given)
    for mine, theirs in zip(found, jax.jit(step)(w, given), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-5, atol=1e-6)
    return found, plan


def test_a_kernel_with_an_integer_result_is_differentiated():
    def weigh(x: Array) -> Array:
        weights, choice = route(x)
        return jnp.take_along_axis(weights, choice[:, None], 1)

    same_as_plain(weigh, jax.random.normal(jax.random.key(1), (64, D)))


def test_under_vmap_a_kernel_keeps_its_rule_and_may_be_cut_along_the_batch():
    one = mw.kernel(rule="d -> d", cut="", flop=100)(lambda x: jax.nn.softmax(x))
    x = jax.random.normal(jax.random.key(1), (64, D))
    weigh = lambda x: jax.vmap(one)(x)[:, 0]  # noqa: E731
    same_as_plain(weigh, x)
    graph = capture(lambda x: jax.value_and_grad(lambda x: weigh(x).sum())(x), x).graph
    made = [op for op in graph.ops if op.kind == "user_kernel"]
    assert len(made) == 2, "a forward kernel and its gradient"
    for op in made:
        rule = rule_of(op, graph.types)
        assert [rule.factors[f].size for f in cuttable(rule)] == [64]
        assert flop(op, rule, graph.types) == 64 * (100 if op is made[0] else 350)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda x: mw.kernel(rule="b d -> b d", cut=["b"], flop=1), "cut cannot be"),  # type: ignore[arg-type]
        (lambda x: mw.kernel(rule="b d -> b d", cut="b, d", flop=1), "no name of an operand"),
        (lambda x: mw.kernel(3, rule="b d -> b d", cut="b", flop=1), "a kernel is a function"),  # type: ignore[arg-type]
        (lambda x: mw.kernel(rule="b d -> b d", cut="b", flop=-5)(lambda x: x)(x), "flop of a kernel cannot"),
        (lambda x: mw.kernel(rule="b d -> b d", cut="b", flop=1)(lambda x: {"a": x})(x), "type dict"),
        (lambda x: mw.kernel(rule="b d -> b d", cut="b", flop=1)(lambda x: x)(x=x), "given by its name"),
    ],
)  # fmt: skip
def test_wrong_declarations_and_calls_are_told(make, told):
    with pytest.raises(UsageError, match=told):
        make(jnp.ones((8, 4)))


def test_inside_a_step_a_wrong_kernel_is_told_as_it_is_outside():
    fixed = mw.kernel(rule="b d -> b d", cut="d", flop=1)(lambda x: x * jnp.ones((8, 4)))
    with pytest.raises(UsageError, match="cannot run on half of `d`") as caught:
        mw.plan(lambda x: fixed(x), jnp.ones((8, 4)), cluster="4xcpu")
    assert caught.value.where.startswith("mw.kernel of")


def test_verification_names_the_kernel_whose_cut_is_wrong():
    mean = mw.kernel(rule="b d -> b d", cut="b", flop=1)(lambda x: x - x.mean(0))
    step = lambda w, x: (w - 0.1 * jax.grad(lambda w: (mean(x @ w) ** 2).sum())(w), 0.0)  # noqa: E731
    run = mw.parallelize(step, cluster="4xcpu", mesh="4", verify=True)
    with pytest.raises(VerificationError, match=r"kernel declared at test_user_kernels\.py"):
        run(jnp.eye(D), jax.random.normal(jax.random.key(0), (64, D)) + jnp.arange(64)[:, None])


def test_a_kernel_in_bf16_is_compared_as_such():
    product = mw.kernel(rule="b d, d f -> b f", cut="b", flop=1)(lambda x, w: x @ w)
    short = lambda w, x: product(x.astype(jnp.bfloat16), w.astype(jnp.bfloat16))  # noqa: E731
    step = lambda w, x: (w - 0.1 * jax.grad(lambda w: short(w, x).astype("f4").mean())(w), 0.0)  # noqa: E731
    run = mw.parallelize(step, cluster="4xcpu", mesh="4", verify=True)
    run(
        jax.random.normal(jax.random.key(1), (D, D)),
        jax.random.normal(jax.random.key(0), (4096, D)),
    )
