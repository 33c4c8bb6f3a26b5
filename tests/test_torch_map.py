"""Operations of ATen as those of the graph: each against torch, with its gradient, as mapped and with dims apart."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest

torch = pytest.importorskip("torch")

import torch.nn.functional as F  # noqa: E402

from meshwright.backends.torch import compat  # noqa: E402
from meshwright.backends.torch.decompose import table  # noqa: E402
from meshwright.backends.torch.map import Builder, type_of, write  # noqa: E402
from meshwright.backends.torch.replay import replay  # noqa: E402
from meshwright.backends.torch.unflatten import unflatten  # noqa: E402
from meshwright.ir.graph import Graph  # noqa: E402
from meshwright.ir.ops import KINDS  # noqa: E402
from meshwright.ir.rules import rule_of  # noqa: E402
from meshwright.ir.text import parse  # noqa: E402
from meshwright.ir.verify import verify  # noqa: E402

RANDOM = torch.Generator().manual_seed(0)  # of their own, whatever ran before


def x(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=RANDOM)


def above(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=RANDOM) + 0.5


def ids(high: int, *shape: int) -> torch.Tensor:
    return torch.randint(high, shape, generator=RANDOM)


def by_one(name: str, *operands: Any) -> tuple[str, Callable[..., Any], tuple[Any, ...]]:
    return name, getattr(torch, name), operands


SAMPLES: list[tuple[str, Callable[..., Any], tuple[Any, ...]]] = [
    # element by element
    *(by_one(name, x(4, 6)) for name in [
        "abs", "atan", "ceil", "cos", "cosh", "erf", "erfc", "exp", "exp2", "expm1", "floor", "neg", "sigmoid", "sign",
        "sin", "sinh", "tan", "tanh", "relu", "trunc", "square", "isnan", "isinf", "isfinite", "logical_not", "round",
    ]),
    *(by_one(name, above(4, 6)) for name in ["log", "log1p", "log2", "rsqrt", "sqrt", "reciprocal", "lgamma"]),
    *(by_one(name, above(4, 6) - 1) for name in ["acos", "asin"]),
    *(by_one(name, x(4, 6), x(6)) for name in [
        "add", "sub", "mul", "maximum", "minimum", "atan2", "eq", "lt", "ge",
    ]),
    by_one("div", x(4, 1, 6), above(3, 1)),
    by_one("fmod", x(4, 6), above(6)),
    by_one("remainder", x(4, 6), above(6)),
    ("remainder of integers", torch.remainder, (ids(20, 9) - 10, ids(5, 9) + 1)),
    ("floor divide", lambda a, b: torch.div(a, b, rounding_mode="floor"), (ids(20, 9) - 10, ids(5, 9) + 1)),
    ("truncated divide", lambda a, b: torch.div(a, b, rounding_mode="trunc"), (ids(20, 9) - 10, ids(5, 9) + 1)),
    ("floor divide of reals", lambda a, b: torch.div(a, b, rounding_mode="floor"), (x(9), above(9))),
    ("scaled sums", lambda a, b: torch.add(a, b, alpha=3) - torch.sub(b, a, alpha=0.5) + (2 - a), (x(4), x(4))),
    ("mixed types", lambda a, b: a * 2 + b.to(torch.int32) * a.half() + (b > 1), (x(4, 6), ids(3, 6))),
    ("an integer and a real", lambda a: (a * 0.5, a + 1, a / 3), (ids(9, 5),)),
    *((f"power {n}", lambda a, n=n: a**n, (above(4, 6),)) for n in (2, 3, -2, 0.5, -0.5, 1.7)),
    ("powers", lambda a, b: (0.9**a, a**b), (above(6), above(6))),
    ("shifts", lambda a: (a >> 2, a << 3, torch.bitwise_right_shift(a, 1)), (ids(90, 9) - 40,)),
    ("clamp", lambda a: (a.clamp(-0.5, 0.5), a.clamp_min(0.1), a.clamp(max=0.2)), (x(4, 6),)),
    ("where", lambda a, b: torch.where(a > 0, b, 1.0), (x(4, 6), x(6))),
    ("masked fill", lambda a, b: a.masked_fill(b > 0, -1.0), (x(4, 6), x(6))),
    *((f"lerp {w}", lambda a, b, w=w: torch.lerp(a, b, w), (x(6), x(6))) for w in (0.1, 0.9)),
    ("addcmul", lambda a, b, c: torch.addcmul(a, b, c, value=0.5), (x(4, 6), x(4, 6), x(6))),
    ("addcdiv", lambda a, b, c: torch.addcdiv(a, b, c, value=0.5), (x(4, 6), x(4, 6), above(6))),
    ("logic", lambda a, b: (a > 0) & (b > 0) | torch.logical_xor(a, b) ^ (a < b), (x(4, 6), x(4, 6))),
    *((name, getattr(F, name), (x(4, 6),)) for name in [
        "gelu", "silu", "elu", "mish", "softplus", "leaky_relu", "hardtanh", "hardswish", "hardsigmoid", "logsigmoid",
        "relu6",
    ]),
    # shapes
    ("views", lambda a: (a.view(8, 3), a.flatten().view(2, 12), a[None, :, None]), (x(4, 6),)),
    ("transposes", lambda a: (a.permute(2, 0, 1), a.transpose(0, -1), a.mT), (x(2, 3, 4),)),
    ("squeezes", lambda a: (a.squeeze(), a.squeeze(1), a.squeeze(0)), (x(2, 1, 4),)),
    ("expand", lambda a: a.expand(3, 2, 5, 4), (x(2, 1, 4),)),
    ("repeat", lambda a: a.repeat(2, 3, 1), (x(2, 4),)),
    ("repeat interleave", lambda a: a.repeat_interleave(3, 1), (x(2, 4),)),
    ("joins", lambda a, b: (torch.cat([a, b], 1), torch.stack([a, a], -1)), (x(2, 4), x(2, 3))),
    ("slices", lambda a: (a[1:3], a[:, ::2], a[..., -2:], a[2], a[:, 1:0]), (x(4, 6),)),
    ("splits", lambda a: (*a.split(4, 1), *a.chunk(3, 1), *a.unbind(0)), (x(2, 6),)),
    ("pad", lambda a: F.pad(a, (1, 2, -1, 0), value=3.0), (x(4, 6),)),
    ("columns put in", lambda a, b: torch.slice_scatter(a, b, 1, 1, 3), (x(4, 6), x(4, 2))),
    ("a column put in", lambda a, b: torch.select_scatter(a, b, 1, -1), (x(4, 6), x(4))),
    ("flip and roll", lambda a: (a.flip(0, 1), a.roll(2, 1), a.roll((1, 2), (0, 1)), a.roll(5)), (x(4, 6),)),
    ("triangles", lambda a: (a.tril(), a.triu(1), a.tril(-1)), (x(2, 4, 4),)),
    ("made of nothing", lambda a: (torch.arange(2, 9, 3) + a, torch.ones_like(a), torch.full((3,), 7.0) * a), (x(3),)),
    # reductions
    ("sums", lambda a: (a.sum(), a.sum(1), a.sum((0, 2), keepdim=True), a.mean(-1)), (x(2, 3, 4),)),
    ("variances", lambda a: (a.var(1), *torch.var_mean(a, (0, 2), correction=0, keepdim=True), a.std()), (x(2, 3, 4),)),
    ("maxima", lambda a: (a.amax(1), a.amin((0, 1)), a.max(), *a.max(1), *a.min(0, keepdim=True)), (x(4, 6),)),
    ("places", lambda a: (a.argmax(1), a.argmin(), a.argmax(0, keepdim=True)), (x(4, 6),)),
    ("any and all", lambda a: ((a > 0).any(1), (a > 0).all(), (a > -9).all(0, keepdim=True)), (x(4, 6),)),
    ("products of elements", lambda a: (a.prod(1),), (above(4, 6),)),
    ("running", lambda a: (a.cumsum(1), a.logsumexp(0)), (x(4, 6),)),
    ("sorts", lambda a: (*a.sort(1), *a.sort(0, descending=True), a.argsort(1)), (x(4, 6),)),
    ("largest", lambda a: (*a.topk(2, 1), *a.topk(3, 0, largest=False)), (x(4, 6),)),
    ("norms", lambda a: (a.norm(), a.norm(dim=1), torch.linalg.vector_norm(a, 1)), (x(4, 6),)),
    # products
    ("linear", lambda a, w, b: F.linear(a, w, b), (x(2, 3, 4), x(5, 4), x(5))),
    ("matmul", torch.matmul, (x(2, 3, 4, 5), x(2, 1, 5, 6))),
    ("vectors", lambda a, b: (a @ b, b @ b), (x(3, 4), x(4))),
    ("einsum", lambda a, b: torch.einsum("btnd,bsnd->bnts", a, b), (x(2, 3, 4, 5), x(2, 6, 4, 5))),
    ("baddbmm", lambda a, b, c: torch.baddbmm(a, b, c, beta=0.5, alpha=2), (x(2, 3, 5), x(2, 3, 4), x(2, 4, 5))),
    ("folded heads", lambda a, w: _folded(a, w), (x(2, 3, 8), x(8, 8))),
    *((
        f"convolution {name}", lambda a, w, b, o=o: F.conv2d(a, w, b, **o),
        (x(2, 4, 9, 8), x(6, 4 // o["groups"], 3, 2), x(6)),
    ) for name, o in {
        "plain": {"groups": 1}, "strided": {"stride": (2, 3), "padding": (1, 2), "groups": 1},
        "dilated": {"dilation": 2, "padding": 1, "groups": 1}, "grouped": {"groups": 2, "stride": 2, "padding": 1},
    }.items()),
    ("convolution of a line", lambda a, w: F.conv1d(a, w, stride=2), (x(2, 3, 9), x(5, 3, 3))),
    (
        "grouped products", lambda a, w: torch._grouped_mm(
            a.bfloat16(), w.bfloat16(), offs=torch.tensor([3, 3, 8], dtype=torch.int32)
        ), (x(8, 16), x(3, 16, 8)),
    ),
    # by index
    ("embedding", lambda t, i: F.embedding(i, t), (x(10, 4), ids(10, 3, 5))),
    ("padded embedding", lambda t, i: F.embedding(i, t, padding_idx=2), (x(4, 4), ids(4, 3, 5))),
    ("take along", lambda a, i: a.gather(1, i), (x(4, 6), ids(6, 3, 2))),
    ("index", lambda a, i: (a[i], a[:, i], a[i, :, i], a[i[:, None], i]), (x(6, 6, 3), ids(3, 4))),
    ("index from the end", lambda a, i: a[-1 - i], (x(6, 3), ids(6, 4))),
    ("index select", lambda a, i: a.index_select(1, i), (x(4, 6), ids(6, 3))),
    ("scatter", lambda a, i, s: a.scatter(1, i, s), (x(4, 6), torch.arange(6).expand(4, 6)[:, :3].flip(1), x(4, 3))),
    ("scatter a number", lambda a, i: a.scatter(1, i, 2.0), (x(4, 6), ids(6, 4, 1))),
    ("scatter add", lambda a, i, s: a.scatter_add(0, i, s), (x(4, 6), ids(4, 5, 6), x(5, 6))),
    ("index add", lambda a, i, s: a.index_add(0, i, s), (x(4, 6), ids(4, 5), x(5, 6))),
    ("index put", lambda a, i, s: (a.index_put((i,), s, accumulate=True),), (x(6, 3), ids(6, 4), x(4, 3))),
    # softmax, norms, losses
    ("softmax", lambda a: (a.softmax(1), a.log_softmax(-1), a.bfloat16().softmax(0)), (x(4, 6),)),
    ("layer norm", lambda a, w, b: F.layer_norm(a, (3, 4), w, b), (x(2, 3, 4), x(3, 4), x(3, 4))),
    ("RMS norm", lambda a, w: F.rms_norm(a, (4,), w), (x(2, 3, 4), x(4))),
    ("group norm", lambda a, w, b: F.group_norm(a, 2, w, b), (x(2, 4, 3, 3), x(4), x(4))),
    ("batch norm", lambda a, w, b: F.batch_norm(a, None, None, w, b, training=True), (x(4, 3, 5), x(3), x(3))),
    ("settled batch norm", lambda a, m, v: F.batch_norm(a, m.detach(), v.detach()), (x(4, 3, 5), x(3), above(3))),
    *((f"cross entropy {name}", lambda a, t, o=o: F.cross_entropy(a, t, **o), (x(6, 5), ids(5, 6)))
      for name, o in {
        "mean": {}, "sum": {"reduction": "sum"}, "smoothed": {"label_smoothing": 0.1}, "ignoring": {"ignore_index": 2},
    }.items()),
    ("cross entropy of shares", lambda a, t: F.cross_entropy(a, t.softmax(1)), (x(6, 5), x(6, 5))),
    *((name, getattr(F, name), (x(6, 5), x(6, 5))) for name in ("mse_loss", "smooth_l1_loss", "huber_loss", "l1_loss")),
    ("binary cross entropy", lambda a, t: F.binary_cross_entropy_with_logits(a, t.sigmoid()), (x(6, 5), x(6, 5))),
    # windows
    *((f"max pool {i}", lambda a, o=o: F.max_pool2d(a, **o), (x(2, 3, 9, 8),)) for i, o in enumerate((
        {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": (3, 2), "ceil_mode": True},
    ))),
    *((f"average pool {i}", lambda a, o=o: F.avg_pool2d(a, **o), (x(2, 3, 9, 8),)) for i, o in enumerate((
        {"kernel_size": 2}, {"kernel_size": 3, "stride": 2, "padding": 1},
    ))),
    ("adaptive pool", lambda a: (F.adaptive_avg_pool2d(a, (2, 4)), F.adaptive_avg_pool2d(a, 1)), (x(2, 3, 8, 8),)),
]  # fmt: skip


def _folded(a: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """Tokens of all rows in one dim, heads moved and joined again."""
    rows = (a.view(-1, 8) @ w).view(2, 3, 4, 2).transpose(1, 2)
    scores = (rows @ rows.mT).reshape(8, 3, 3).softmax(-1)
    return (scores.view(2, 4, 3, 3) @ rows).transpose(1, 2).reshape(6, 8)


def with_gradients(function: Callable[..., Any], args: Sequence[Any]) -> Callable[..., list[Any]]:
    """Results, and gradients of a sum of those that are real."""
    real = tuple(k for k, arg in enumerate(args) if arg.is_floating_point())

    def total(*given: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        found = function(*given)
        results = [*found] if isinstance(found, tuple | list) else [found]
        parts = [
            (r.float() * (k + 1)).cos().sum()
            for k, r in enumerate(results)
            if r.is_floating_point()
        ]
        return sum(parts, start=given[0].sum() * 0.0), results

    def both(*given: torch.Tensor) -> list[torch.Tensor]:
        gradients, results = torch.func.grad(total, real, has_aux=True)(*given)
        return [*results, *gradients]

    return both if real else lambda *given: total(*given)[1]


def graph_of(
    function: Callable[..., Any], args: Sequence[torch.Tensor]
) -> tuple[Graph, dict[int, Any]]:
    graph = compat.traced(function, args, table())
    b = Builder()
    nodes = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = [b.value(type_of(arg)) for arg in args]
    values = write(b, graph, dict(zip(nodes, inputs, strict=True)))
    [output] = [node for node in graph.graph.nodes if node.op == "output"]
    results = [values[node] for node in output.args[0]]
    made = Graph(
        b.types, tuple(v.number for v in inputs), tuple(b.ops), tuple(v.number for v in results), tuple(b.constants)
    )  # fmt: skip
    return made, b.arrays


@pytest.mark.parametrize(
    ("function", "args"), [pytest.param(f, a, id=name) for name, f, a in SAMPLES]
)
def test_an_operation_does_what_torch_does(function, args):
    both = with_gradients(function, args)
    wanted = both(*args)
    graph, arrays = graph_of(both, args)
    for one in (graph, unflatten(graph)):
        verify(one)
        assert all(op.kind in KINDS for op in one.ops)
        assert not [op.kind for op in one.ops if rule_of(op, one.types).opaque]
        half = any(want.dtype in (torch.bfloat16, torch.float16) for want in wanted)
        close = 2e-2 if half else 2e-5
        for found, want in zip(replay(one, arrays, args), wanted, strict=True):
            assert found.dtype == want.dtype and found.shape == want.shape
            torch.testing.assert_close(found, want, rtol=close, atol=close, equal_nan=True)


# ---------------------------------------------------------------- dims apart


def test_a_product_of_folded_dims_keeps_them_apart():
    graph = parse("""
        in %0: f32[4, 8, 64] 'x'
        in %1: f32[16, 64] 'w'
        %2: f32[32, 64] = reshape %0 (new_sizes=(32, 64))
        %3: f32[64, 16] = transpose %1 (permutation=(1, 0))
        %4: f32[32, 16] = dot_general %2 %3 (lhs_batch=(), lhs_contracting=(1,), rhs_batch=(), rhs_contracting=(0,))
        %5: f32[4, 8, 16] = reshape %4 (new_sizes=(4, 8, 16))
        out %5 'y'
    """)
    [op] = unflatten(graph).ops
    assert op.kind == "dot_general" and op.inputs == (0, 1)
    assert op.integers("lhs_contracting") == (2,) and op.integers("rhs_contracting") == (1,)


def test_repeated_keys_are_not_made():
    """Nor their gradients before they are summed."""

    def attention(q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return q @ k.repeat_interleave(2, 1).mT

    args = x(3, 8, 5, 6), x(3, 4, 5, 6)
    graph, _ = graph_of(with_gradients(attention, args), args)
    made = unflatten(graph)
    repeated = [
        op for op in made.ops if op.kind == "broadcast_in_dim" and made.types[op.inputs[0]].rank
    ]
    assert not repeated and not [op for op in made.ops if op.kind == "reduce_sum"]


def test_what_is_folded_and_read_so_stays():
    graph = parse("""
        in %0: f32[4, 6] 'x'
        %1: f32[8, 3] = reshape %0 (new_sizes=(8, 3))
        out %1 'y'
    """)
    assert [op.kind for op in unflatten(graph).ops] == ["reshape"]


def test_values_that_are_to_stay_as_they_were_do():
    graph = parse("""
        in %0: f32[4, 8, 2] 'x'
        %1: f32[32, 2] = reshape %0 (new_sizes=(32, 2))
        %2: f32[32, 2] = neg %1
        %3: f32[32, 2] = exp %2
        out %3 'y'
    """)
    assert [op.kind for op in unflatten(graph).ops] == ["neg", "exp", "reshape"]
    assert [op.kind for op in unflatten(graph, [2]).ops] == ["neg", "reshape", "exp"]
