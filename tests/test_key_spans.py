"""Keys that masks leave out: which they are, that leaving them out changes nothing, and that intervals hold."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import meshwright as mw
from meshwright.backends.xla import emit_composite
from meshwright.backends.xla.capture import capture
from meshwright.ir.analysis.attention import attentions
from meshwright.ir.analysis.intervals import Interval, Unknown, chosen
from meshwright.ir.analysis.key_spans import KeySpans
from meshwright.ir.composites.attention_op import with_attention
from meshwright.ir.composites.bodies import FORWARD
from meshwright.ir.composites.evenly import pairs_kept

B, T, N, H = 8, 128, 2, 8  # batch, positions, heads, width of a head
Array = jax.Array
Mask = Callable[[Array, Array], Array]  # of rows [T, 1] and columns [1, S]


def normal(seed: int, *shape: int) -> Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def masked(mask: Mask, low: float = -1e30, added: bool = False) -> Callable[..., Array]:
    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k) / 3
        kept = mask(jnp.arange(q.shape[1])[:, None], jnp.arange(k.shape[1])[None])
        scores = scores + jnp.where(kept, 0, low) if added else jnp.where(kept, scores, low)
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    return attend


MASKS: dict[str, Mask] = {
    "causal": lambda r, c: r >= c,
    "sliding": lambda r, c: (r >= c) & (r - c < 24),
    "both sides": lambda r, c: jnp.abs(r - c) <= 16,
    "to the end": lambda r, c: r <= c,
    "documents of 32": lambda r, c: (r // 32 == c // 32) & (r >= c),
    "from the end": lambda r, c: ~((r < 100) & (c >= 64)),
}


def one_iota(q: Array, k: Array, v: Array) -> Array:
    i = jnp.arange(T)  # rows in one place, columns in another
    return masked(lambda r, c: i[:, None] >= i[None])(q, k, v)


def dropped(q: Array, k: Array, v: Array) -> Array:
    mask, key = nn.make_causal_mask(jnp.ones((B, T))), jax.random.key(0)
    return nn.dot_product_attention(
        q, k, v, mask=mask, dropout_rng=key, dropout_rate=0.1, deterministic=False, broadcast_dropout=False
    )  # fmt: skip


def causal(q: Array, k: Array, v: Array) -> Array:
    return jax.nn.dot_product_attention(q, k, v, is_causal=True)


def of_one_head(q: Array, k: Array, v: Array) -> Array:
    return causal(q, k[:, :, :1], v[:, :, :1])


FORMS: dict[str, Callable[..., Array]] = {
    **{name: masked(mask) for name, mask in MASKS.items() if name != "to the end"},
    "added": masked(MASKS["causal"], added=True),
    "one iota": one_iota,
    "dropout": dropped,
    "one head of keys": of_one_head,
    "made again": jax.checkpoint(causal),  # type: ignore[reportPrivateImportUsage]
}


def trained(attend: Callable[..., Array]) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *qkv: (attend(*qkv) ** 2).sum(), (0, 1, 2))


def spans(attend: Callable[..., Array], *more: Any, keys: int = T) -> KeySpans | None:
    q, kv = (jax.ShapeDtypeStruct((B, n, N, H), jnp.float32) for n in (T, keys))
    (one,) = attentions(capture(trained(attend), q, kv, kv, *more).graph)
    return one.spans


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("keys", [T, 2 * T])
def test_windows_hold_all_that_is_kept(name: str, keys: int):
    found = spans(masked(MASKS[name]), keys=keys)
    assert found is not None
    kept = np.asarray(MASKS[name](np.arange(T)[:, None], np.arange(keys)[None]))  # type: ignore[arg-type]
    rows, wide = T // len(found.spans), keys // found.blocks
    for run, (first, end) in enumerate(found.spans):
        columns = np.flatnonzero(kept[run * rows : (run + 1) * rows].any(axis=0))
        assert first * wide <= columns.min() and columns.max() < end * wide
        if "documents" not in name:  # the rest is tight
            assert columns.min() - first * wide < wide and end * wide - columns.max() <= wide


def after(change: Callable[[Array], Array]) -> Callable[..., Array]:
    """Causal, and something done to masked scores."""

    def attend(q: Array, k: Array, v: Array) -> Array:
        scores = jnp.einsum("btnh,bsnh->bnts", q, k)
        scores = change(jnp.where(jnp.tril(jnp.ones((T, T), bool)), scores, -2e4))
        return jnp.einsum("bnts,bsnh->btnh", jax.nn.softmax(scores), v)

    return attend


@pytest.mark.parametrize("change", [lambda s: s * 2, lambda s: s / 0.5, lambda s: s - 3.0])
def test_masked_scores_may_be_lowered_after(change: Callable[[Array], Array]):
    assert spans(after(change)) is not None


@pytest.mark.parametrize(
    "attend",
    [
        masked(lambda r, c: r > c),  # the first row weighs all keys alike
        masked(MASKS["causal"], low=-1e3),  # which a large score may outweigh
        masked(MASKS["causal"], low=1e30),
        masked(lambda r, c: r + c >= 0),
        lambda q, k, v: masked(lambda r, c: c < q[0, 0, 0, 0])(q, k, v),
        lambda q, k, v: masked(lambda r, c: (r >= c) & (c.astype(float) < q[0, 0, 0, 0]))(q, k, v),
        after(lambda s: s * 1e-4),
        after(lambda s: s / 1e4),
        after(lambda s: s * -1),
        after(lambda s: s + 2e4 * (jnp.arange(T) > 64)),
    ],
    ids=["strict", "not low", "high", "all kept", "by an input", "and by an input",
         "scaled down", "divided", "turned", "raised"],
)  # fmt: skip
def test_nothing_is_left_out_that_might_weigh_something(attend: Callable[..., Array]):
    assert spans(attend) is None


@pytest.mark.parametrize("name", FORMS)
def test_leaving_keys_out_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emit_composite, "SHORTEST", 16)
    monkeypatch.setattr(emit_composite, "BLOCK", 512)
    runs = []
    by_runs = emit_composite.Loop._by_runs

    def noted(self: Any, operands: Any) -> Any:
        runs.extend(self.runs)
        return by_runs(self, operands)

    monkeypatch.setattr(emit_composite.Loop, "_by_runs", noted)
    step, args = trained(FORMS[name]), [normal(seed, B, T, N, H) for seed in range(3)]
    have = mw.parallelize(step, cluster="8xcpu", mesh="8", attention="fused")(*args)
    assert min(keys.length for run in runs for keys in run.keys) < T
    for a, b in zip(jax.tree.leaves(have), jax.tree.leaves(step(*args)), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5 * float(np.abs(b).max()))


def test_a_window_that_is_too_narrow_shows(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(emit_composite, "SHORTEST", 16)
    runs = emit_composite.CompositeBody.runs

    def narrow(self: Any) -> Any:
        return tuple(
            replace(run, keys=tuple(replace(k, length=k.length - 8) for k in run.keys))
            for run in runs(self)
        )

    monkeypatch.setattr(emit_composite.CompositeBody, "runs", narrow)
    step, args = trained(causal), [normal(seed, B, T, N, H) for seed in range(3)]
    have = mw.parallelize(step, cluster="8xcpu", mesh="8", attention="fused")(*args)
    assert float(abs(have[0] - step(*args)[0])) > 1.0


def test_rows_dealt_in_runs_leave_the_last_device_most_to_do():
    q = jax.ShapeDtypeStruct((B, T, N, H), jnp.float32)
    graph = with_attention(capture(trained(causal), q, q, q).graph)
    op = next(visit.op for visit in graph.visits if visit.op.kind == FORWARD)
    assert pairs_kept(op) == pytest.approx(65 / 128)
    assert pairs_kept(op, 4) == pytest.approx((49 + 64) / 2 / 64)
    assert pairs_kept(op, 64) == 1.0


# ---------------------------------------------------------------- intervals

OPERATIONS: list[Callable[..., Any]] = [
    operator.add, operator.sub, operator.mul, np.maximum, np.minimum, np.abs, operator.neg, np.sign,
    np.fmod, np.floor_divide, np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal,
    lambda a, b: (a < b) & (a != b), lambda a, b: (a < b) | (b > 3), lambda a, b: (a < b) ^ (a > 1),
]  # fmt: skip
RANGES = st.tuples(st.integers(-6, 6), st.integers(0, 5)).map(lambda p: (p[0], p[0] + p[1]))


@given(st.sampled_from(OPERATIONS), RANGES, RANGES)
def test_an_interval_holds_what_its_numbers_give(operation: Any, a: Any, b: Any):
    unary = operation in (np.abs, operator.neg, np.sign)
    values = [
        operation(x) if unary else operation(x, y)
        for x in range(a[0], a[1] + 1) for y in range(b[0], b[1] + 1)
        if unary or operation not in (np.fmod, np.floor_divide) or y
    ]  # fmt: skip
    try:
        found = operation(Interval(*a)) if unary else operation(Interval(*a), Interval(*b))
    except Unknown:
        assert operation in (np.fmod, np.floor_divide)  # by more than one number, or of one below 0
        return
    assert found.low <= min(values) and found.high >= max(values)


def test_a_choice_by_a_truth_that_is_not_known_may_be_either():
    both = chosen(Interval(0, 1), Interval(5, 6), Interval(-1, 2))
    assert (both.low, both.high) == (-1, 6)
    assert chosen(Interval(1, 1), Interval(5, 6), Interval(-1, 2)).low == 5
    assert chosen(Interval(0, 0), Interval(5, 6), Interval(-1, 2)).high == 2
