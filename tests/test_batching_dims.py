"""`lp[jnp.arange(B), y]` is a lookup within a batch: same numbers, and rows that can be cut.

Each form is captured and run again op by op, then run under a plan on eight devices, with labels
within and beyond the table, in every mode.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import meshwright as mw
from meshwright.backends.xla.capture import capture
from meshwright.backends.xla.replay import replay
from meshwright.ir.rules import rule_of

B, T, V = 16, 4, 8
rows, steps = jnp.arange(B), jnp.arange(T)

TABLE = np.random.default_rng(0).normal(size=(B, T, V)).astype("f4")
LABELS = (
    np.random.default_rng(1).integers(-2 * V, 2 * V, size=(B, T)).astype("i4")
)  # half are out of range
MODES = ("clip", "fill", "promise_in_bounds")


def here(labels, mode):
    """What in-bounds promises allow; else the labels as they are."""
    return labels % V if mode == "promise_in_bounds" else labels


READS = {
    "pairs": lambda x, y, mode: x[:, 0].at[jnp.arange(B), y[:, 0]].get(mode=mode),
    "both batch dims": lambda x, y, mode: x.at[rows[:, None], steps[None], y].get(mode=mode),
    "a window between": lambda x, y, mode: x.at[jnp.arange(B), :, y[:, 0]].get(mode=mode),
    "last dim is the batch": lambda x, y, mode: x[:, 0].T.at[y[:, 0], jnp.arange(B)].get(mode=mode),
    "iota of two dims": lambda x, y, mode: x[:, :, 0].at[
        jax.lax.broadcasted_iota("int32", (B, 3), 0), y[:, :3]
    ].get(mode=mode),
    "numpy counts": lambda x, y, mode: x[:, 0].at[np.arange(B), y[:, 0]].get(mode=mode),
    "small integers": lambda x, y, mode: x[:, 0].at[jnp.arange(B, dtype="int8"), y[:, 0]].get(mode=mode),
    "diagonal": lambda x, y, mode: x[:, :, :1].at[jnp.arange(B), jnp.arange(B) % T, 0 * y[:, 0]].get(mode=mode),
}  # fmt: skip

WRITES = {
    "set": lambda x, y, mode: x[:, 0].at[jnp.arange(B), y[:, 0]].set(2.0, mode=mode),
    "add": lambda x, y, mode: x.at[rows[:, None], steps[None], y].add(x[:, :, 0], mode=mode),
    "max": lambda x, y, mode: x.at[jnp.arange(B), :, y[:, 0]].max(0.5, mode=mode),
    "gradient": lambda x, y, mode: jax.grad(
        lambda x: jnp.sum(jnp.sin(x.at[rows[:, None], steps[None], y].get(mode=mode)))
    )(x),
}


def looked_up(captured) -> int:
    """Lookups left that are not within the rows of the batch."""
    graph, found = captured.graph, 0
    for op in graph.ops:
        if op.kind.startswith(("gather", "scatter")):
            batch = [dims for dims in rule_of(op, graph.types).operands[0] if dims]
            rule = rule_of(op, graph.types)
            found += not any(
                rule.factors[f].size == B and f in rule.operands[1][0] for dim in batch for f in dim
            )
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", [*READS.values(), *WRITES.values()], ids=[*READS, *WRITES])
def test_numbers_stay_and_rows_are_a_batch(form, mode):
    labels = here(LABELS, mode)
    captured = capture(lambda x, y: form(x, y, mode), TABLE, labels)
    assert looked_up(captured) == 0
    np.testing.assert_array_equal(
        replay(captured)(TABLE, labels), jax.jit(form, static_argnums=2)(TABLE, labels, mode)
    )


OTHERS = {
    "another order": lambda x, y: x[:, 0][jnp.arange(B)[::-1], y[:, 0]],
    "from one on": lambda x, y: x[:, 0][jnp.arange(1, B + 1), y[:, 0]],
    "some rows": lambda x, y: x[:, 0][jnp.arange(B // 2), y[: B // 2, 0]],
    "rows of one example": lambda x, y: x[:, 0][jnp.arange(B) * 0, y[:, 0]],
    "wrapped": lambda x, y: x[:, 0][(jnp.arange(B) + 1) % B, y[:, 0]],
}


@pytest.mark.parametrize("form", OTHERS.values(), ids=OTHERS)
def test_what_does_not_count_every_row_stays_a_lookup(form):
    captured = capture(form, TABLE, LABELS)
    assert looked_up(captured) == 1
    np.testing.assert_array_equal(replay(captured)(TABLE, LABELS), jax.jit(form)(TABLE, LABELS))


def picking(pick):
    def step(w, x, y):
        def loss(w):
            h = x
            for k in range(len(w)):
                h = h + jax.nn.relu(h @ w[k])
            return -jnp.mean(pick(jax.nn.log_softmax(h), y))

        value, grad = jax.value_and_grad(loss)(w)
        return jax.tree.map(lambda w, g: w - 0.5 * g, w, grad), value

    w = [np.random.default_rng(k).normal(size=(V, V)).astype("f4") for k in range(4)]
    return step, w


PICKS = {
    "one label": (lambda lp, y: lp[jnp.arange(B), y[:, 0]], TABLE[:, 0]),
    "one label a step": (lambda lp, y: lp[rows[:, None], steps[None], y], TABLE),
}


@pytest.mark.parametrize(
    "request_",
    [
        pytest.param({"microbatches": 4, "mesh": (4, 2)}, marks=pytest.mark.slow),
        {"pp": 2, "microbatches": 2},
    ],
    ids=["microbatches", "stages"],
)  # fmt: skip
@pytest.mark.parametrize("name", PICKS)
def test_label_picks_are_cut_over_time_and_stages(name, request_):
    pick, x = PICKS[name]
    step, w = picking(pick)
    running = mw.parallelize(step, cluster="8xcpu", verify=True, time_limit=20, **request_)
    found, truth = running(w, x, LABELS), jax.jit(step)(w, x, LABELS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), found, truth)
