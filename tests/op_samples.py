"""Samples of every op: one equation met while a small jax function runs, with the values it met."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.extend.core import Primitive

from meshwright.backends.xla.emit import ShardPart, emit
from meshwright.backends.xla.params import attrs_of, dtype_name, marks_of
from meshwright.backends.xla.user_kernels import kernel as by_hand
from meshwright.ir.graph import Op, TensorType
from meshwright.ir.rules import rule_of
from meshwright.ir.rules.factors import WRITERS
from meshwright.ir.rules.rule import Rule

PRIMITIVES = {
    value.name: value
    for name, module in [*sys.modules.items()]
    if name.partition(".")[0] in ("jax", "meshwright")
    for value in vars(module).values()
    if isinstance(value, Primitive)
}


@dataclass(frozen=True)
class Sample:
    """One equation with the values of its operands."""

    op: Op
    types: Mapping[int, TensorType]
    bound: tuple[Any, dict[str, Any]]
    operands: tuple[Any, ...]

    @property
    def rule(self) -> Rule:
        return rule_of(self.op, self.types)

    def run(self, operands: Any, cuts: Mapping[int, ShardPart] | None = None) -> list[Any]:
        return emit(self.op, self.bound, operands, self.rule, cuts or {})


# Samples


def samples(function: Callable[..., Any], *args: Any) -> Iterator[Sample]:
    """The equations of a traced function, calls inlined, with the values they meet."""
    closed = jax.make_jaxpr(function)(*args)
    yield from _walk(closed.jaxpr, closed.consts, jax.tree.leaves(args))[0]


def _walk(jaxpr: Any, consts: Any, args: Any) -> tuple[list[Sample], list[Any]]:
    values = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*consts, *args], strict=True))
    found: list[Sample] = []

    def read(atom: Any) -> Any:
        raw = atom.val if hasattr(atom, "val") else values[atom]
        keyed = jnp.issubdtype(atom.aval.dtype, jax.dtypes.extended)
        return raw if keyed else jnp.asarray(np.asarray(raw, atom.aval.dtype))

    for eqn in jaxpr.eqns:
        operands = tuple(map(read, eqn.invars))
        if (body := _inlined(eqn)) is not None:
            inner, results = _walk(body.jaxpr, body.consts, operands)
            found += inner
        else:
            found.append(sample(eqn, operands))
            results = found[-1].run(operands)
        values.update(zip(eqn.outvars, results, strict=True))
    return found, [read(atom) for atom in jaxpr.outvars]


def _inlined(eqn: Any) -> Any:
    if eqn.primitive.name not in ("jit", "pjit", "custom_jvp_call", "custom_vjp_call"):
        return None
    return eqn.params["jaxpr" if "jaxpr" in eqn.params else "call_jaxpr"]


def sample(eqn: Any, operands: tuple[Any, ...]) -> Sample:
    atoms = [*eqn.invars, *eqn.outvars]
    ids = tuple(range(len(atoms)))
    attrs = tuple(sorted((*attrs_of(eqn.primitive.name, eqn.params), *marks_of(eqn))))
    op = Op(eqn.primitive.name, ids[: len(operands)], ids[len(operands) :], attrs)
    types = {i: type_of(atom.aval) for i, atom in enumerate(atoms)}
    return Sample(op, types, (eqn.primitive, eqn.params), operands)


def type_of(aval: Any) -> TensorType:
    return TensorType(dtype_name(aval.dtype), tuple(aval.shape))


def normal(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def uniform(*shape: int, seed: int = 0) -> jax.Array:
    """Inside (0.1, 0.9), where every elementwise function here is defined."""
    return jnp.asarray(np.random.default_rng(seed).uniform(0.1, 0.9, shape), jnp.float32)


def integers(high: int, *shape: int, low: int = 0, dtype: Any = jnp.int32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(1).integers(low, high, shape), dtype)


def grad(function: Callable[..., Any], *which: int) -> Callable[..., Any]:
    """Gradients of a function's summed square, so that no cotangent is constant."""

    def loss(*args: Any) -> Any:
        return sum((leaf**2).sum() for leaf in jax.tree.leaves(function(*args)))

    return jax.grad(loss, which or (0,))


def bind(kind: str, **params: Any) -> Callable[..., Any]:
    return lambda *args: PRIMITIVES[kind].bind(*args, **params)


def _elementwise() -> Iterator[tuple[Any, ...]]:
    floats = """acos asin asinh atan atanh bessel_i0e bessel_i1e cbrt ceil cos cosh digamma erf_inv
        erfc exp2 expm1 floor lgamma log log1p logistic rsqrt sin sinh sqrt tan tanh square exp abs
        is_finite sign neg erf round"""
    yield from ((getattr(lax, name), uniform(8)) for name in floats.split())
    newer = PRIMITIVES.keys() & {"log2", "one_minus_square"}  # since jax 0.12
    yield from ((getattr(lax, name), uniform(8)) for name in newer)
    yield lax.acosh, uniform(4, 8) + 1
    yield from ((getattr(lax, name), integers(9, 4, 8)) for name in ("clz", "population_count"))
    yield lax.bitwise_not, integers(9, 4, 8)
    yield partial(lax.integer_pow, y=3), normal(8, 4)
    words = integers(9, 4, 8), integers(5, 4, 8, low=1)
    bits = "bitwise_and bitwise_or bitwise_xor shift_left shift_right_arithmetic"
    yield from ((getattr(lax, name), *words) for name in f"{bits} shift_right_logical".split())
    yield bind("mulhi"), *words
    two = "add sub mul div max min pow atan2 rem nextafter eq ne lt le gt ge"
    for name in two.split():
        yield getattr(lax, name), uniform(8), uniform(8, seed=1)
    yield lambda x: lax.max(x, jnp.float32(0.5)), uniform(4, 8)
    for name in ("add_any", "eq_to", "le_to", "lt_to"):
        yield bind(name), uniform(8), uniform(8, seed=1)
    yield lambda x, y: x * y + y / x - y, uniform(4, 8), uniform(4, 1, seed=1)
    yield lambda x, y: x + y, normal(4, 8), normal(8)
    yield lax.clamp, uniform(4, 8) - 1, normal(4, 8), uniform(4, 8) + 1
    yield lax.clamp, jnp.float32(-1), normal(4, 8), jnp.float32(1)
    yield lambda x: jnp.where(x > 0, x, 2 * x), normal(4, 8)
    yield lambda p, x, y: lax.select_n(p, x, y), jnp.bool_(True), normal(4, 8), uniform(4, 8)
    yield lambda w, *x: lax.select_n(w, *x), integers(3, 8), *(normal(8, seed=s) for s in range(3))
    yield lambda x: lax.real(lax.conj(lax.complex(x, 2 * x))) + lax.imag(x + 1j), normal(4, 8)
    for new in (jnp.bfloat16, jnp.int32, jnp.float16):
        yield lambda x, new=new: x.astype(new).astype(jnp.float32), 3 * normal(4, 8)
    yield lambda x: lax.reduce_precision(x, 8, 7), normal(4, 8)
    yield lambda x: checkpoint_name(jnp.copy(lax.stop_gradient(x)), "x"), normal(4, 8)
    yield bind("copy"), normal(4, 8)
    yield lambda x: lax.bitcast_convert_type(x, jnp.int32), normal(4, 8)
    yield lambda x: lax.bitcast_convert_type(x, jnp.uint8), normal(4, 8)
    yield lambda x: lax.bitcast_convert_type(x, jnp.float32), integers(99, 4, 8, 4, dtype=jnp.uint8)


def _shape() -> Iterator[tuple[Any, ...]]:
    for old, new in (
        *[((8, 4, 6), (32, 6)), ((32, 6), (8, 4, 6)), ((2, 8, 24), (2, 8, 3, 4, 2))],
        *[((6, 4), (4, 6)), ((8, 24), (12, 16)), ((4, 1, 8), (4, 8)), ((8,), (1, 8, 1))],
        *[((4, 9, 5), (6, 6, 5)), ((12,), (4, 3)), ((2, 4, 8), (64,)), ((1,), ())],
    ):
        yield lambda x, new=new: x.reshape(new), normal(*old)
    yield lambda x: lax.reshape(x, (8, 8), dimensions=(2, 0, 1)), normal(4, 2, 8)
    yield lambda x: x[:, None, :, None] + jnp.zeros((4, 3, 8, 2)), normal(4, 8)
    yield lambda x: lax.broadcast_in_dim(x, (2, 4, 8), (0, 2)), normal(1, 8)
    yield lambda x: jnp.squeeze(x, (0, 2)), normal(1, 4, 1, 8)
    yield lambda x: x.transpose(2, 0, 1)[..., ::-1], normal(4, 2, 8)
    yield lambda x: jnp.concatenate([x, 2 * x, x[:, :1]], 1), normal(4, 8)
    yield grad(lambda x, y: jnp.concatenate([x, y], 1), 0, 1), normal(4, 8), normal(4, 4)
    yield grad(lambda x, y: jnp.stack([x, y], 1)), normal(4, 8), normal(4, 8)
    yield grad(lambda x: jnp.split(x, 2, 1)[0]), normal(4, 8)
    yield grad(lambda x: jnp.tile(x, (2, 4))), normal(4, 8)
    yield lambda x: jnp.tile(x, (4, 1)), normal(4, 8)
    yield lambda x: lax.slice(x, (0, 1, 0), (4, 7, 8), (1, 2, 1)), normal(4, 8, 8)
    yield grad(lambda x: x[:, 1:5]), normal(4, 8)
    yield lambda x: jnp.pad(x, ((0, 0), (1, 2)), constant_values=3.0), normal(4, 8)
    yield lambda x: lax.pad(x, 0.0, ((0, 0, 0), (-1, 2, 1))), normal(4, 8)
    yield grad(lambda x, i: lax.dynamic_slice(x, (i, i), (4, 3))), normal(4, 8), jnp.int32(2)
    yield lambda x, i: lax.dynamic_update_slice(x, x[:, :3], (i, i)), normal(4, 8), jnp.int32(3)
    for dtype in (jnp.int32, jnp.float32, jnp.uint8):
        for dimension in (0, 1):
            yield (lambda t=dtype, d=dimension: lax.broadcasted_iota(t, (4, 8), d),)


def _contraction() -> Iterator[tuple[Any, ...]]:
    yield grad(jnp.matmul, 0, 1), normal(8, 4), normal(4, 2)
    attention = partial(jnp.einsum, "bthk,bshk->bhts")
    yield grad(attention, 0, 1), normal(2, 4, 4, 8), normal(2, 6, 4, 8)
    yield partial(jnp.einsum, "abcd,bce->ade"), normal(2, 4, 4, 8), normal(4, 4, 6)
    yield partial(jnp.einsum, "ab,bc->ac"), integers(9, 4, 8), integers(9, 8, 4)
    half = normal(8, 4, dtype=jnp.bfloat16)
    yield partial(jnp.einsum, "ab,bc->ac", preferred_element_type=jnp.float32), half, half.T
    for sizes in (jnp.array([1, 2, 5]), jnp.array([3, 0, 1, 3])):  # the second leaves a row to none
        grouped = grad(partial(lax.ragged_dot, group_sizes=sizes), 0, 1)
        yield grouped, normal(8, 4), normal(len(sizes), 4, 8)
    for image, kernel, settings_ in (
        ((4, 8, 8, 4), (3, 3, 4, 8), {}),
        ((4, 9, 8, 4), (3, 3, 4, 8), {"window_strides": (2, 2)}),
        ((4, 8, 8, 4), (1, 1, 4, 8), {}),
        ((4, 8, 8, 4), (1, 1, 4, 8), {"window_strides": (2, 2)}),
        ((4, 8, 8, 4), (4, 4, 4, 8), {"window_strides": (4, 4), "padding": "VALID"}),
        ((4, 8, 8, 4), (8, 8, 4, 2), {"padding": "VALID"}),
        ((4, 8, 8, 4), (3, 3, 4, 8), {"rhs_dilation": (2, 2)}),
        ((4, 8, 8, 4), (3, 3, 1, 8), {"feature_group_count": 4}),
        ((4, 8, 8, 8), (3, 3, 2, 8), {"feature_group_count": 4}),
        ((8, 8, 8, 4), (3, 3, 4, 8), {"batch_group_count": 4}),
    ):
        yield grad(partial(convolve, **settings_), 0, 1), normal(*image), normal(*kernel)


def convolve(x: Any, w: Any, **settings_: Any) -> Any:
    given = {"window_strides": (1, 1), "padding": "SAME", **settings_}
    layout = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, w, dimension_numbers=layout, **given)


def _reduction() -> Iterator[tuple[Any, ...]]:
    yield lambda x: (x.sum(0), x.sum(), x.max(1), x.min(0), jnp.prod(x, 1)), normal(4, 8)
    yield lambda x: (x.sum(0), x.max(1), x.min(0)), integers(9, 4, 8)
    yield lambda x: (jnp.any(x, 0), jnp.all(x, 1)), normal(4, 8) > -1
    yield bind("reduce_and", axes=(0,)), integers(9, 4, 8)
    yield bind("reduce_xor", axes=(0,)), integers(9, 4, 8)
    yield bind("reduce_prod", axes=(0,)), normal(4, 8)
    yield lambda x: (jnp.argmax(x, 1), jnp.argmin(x, 0)), normal(4, 8)
    for name in ("cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp"):
        yield lambda x, name=name: getattr(lax, name)(x, axis=1), uniform(4, 8)
    pool = (1, 2, 2, 1)
    for start, combine in ((-jnp.inf, lax.max), (0.0, lax.add)):
        for padding in ("SAME", "VALID"):
            pooled = partial(pooling, start=start, combine=combine, window=pool, padding=padding)
            yield grad(pooled), normal(4, 8, 8, 4)
    yield lambda x: pooling(x, jnp.inf, lax.min, pool, "VALID"), normal(4, 8, 8, 4)
    pooled = partial(pooling, start=-jnp.inf, combine=lax.max, window=pool, padding="VALID")
    image = normal(4, 8, 8, 4)
    yield lambda x, t: jax.jvp(pooled, (x,), (t,)), image, normal(4, 8, 8, 4, seed=1)


def pooling(x: Any, start: Any, combine: Any, window: Any, padding: str) -> Any:
    return lax.reduce_window(x, start, combine, window, window, padding)


MODES = ("clip", "fill", "promise_in_bounds")


def _indexing() -> Iterator[tuple[Any, ...]]:
    table, ids = normal(16, 8), integers(16, 4, 2)
    outside = integers(24, 4, 2, low=-6)
    for mode in MODES:
        yield grad(lambda t, i, m=mode: t.at[i].get(mode=m)), table, ids
        if mode != "promise_in_bounds":
            yield lambda t, i, m=mode: look_up(t, i, m), table, outside
            yield lambda t, i, m=mode: t.at[i].add(1.5, mode=m), table, outside
            yield lambda t, i, m=mode: t.at[:, i].add(2.0, mode=m), normal(4, 16), outside
            yield lambda t, i, m=mode: look_up(t, i, m), integers(9, 16, 8), outside
            byte = integers(255, 8, dtype=jnp.uint8)
            yield lambda t, i, m=mode: look_up(t, i, m), normal(512, 2), byte
            yield lambda t, i, m=mode: t.at[i].add(1.0, mode=m), normal(512, 2), byte
    yield lambda t, i: lax_take(t, i, 5.0), table, outside
    yield lambda t, i: lax_take(t, i, None), table, outside
    yield lambda t, i: lax_take(t, i, -1), integers(9, 16, 8), outside
    yield lambda t, i: t[i], normal(16) > 0, ids
    yield grad(lambda t, i, j: t[i, j]), normal(8, 4, 2), integers(8, 4), integers(4, 4)
    yield grad(lambda t, i: t[:, i]), normal(4, 8, 2), integers(8, 4)
    yield grad(lambda x, i: jnp.take_along_axis(x, i, -1)), normal(2, 4, 8), integers(8, 2, 4, 2)
    yield grad(lambda x, i: jnp.take_along_axis(x, i, 0)), normal(8, 4), integers(8, 2, 4)
    yield lambda x, i: jax.vmap(lambda a, b: a[b])(x, i), normal(4, 8, 2), integers(8, 4, 4)
    yield lambda x, i: lax.dynamic_index_in_dim(x, i[0], 0), normal(4, 8), integers(4, 1)
    yield windows, normal(8, 8), integers(6, 4, 1)
    for number, update in enumerate(("set", "add", "subtract", "multiply", "max", "min")):
        function = partial(scattered, update=update, mode=MODES[number % 3])
        yield function, table, ids[:, 0], normal(4, 8)
    for function in (bind_scatter("scatter-sub"), bind_scatter("scatter-mul")):
        yield function, table, ids, normal(4, 2, 8)
    yield jax.grad(cross_entropy), normal(4, 2, 8), integers(8, 4, 2)


def look_up(table: Any, ids: Any, mode: str) -> Any:
    """Without jnp's handling of negative ids, so that they reach the primitive."""
    return lax_take(table, ids, None if mode == "clip" else jnp.nan, mode)


def lax_take(table: Any, ids: Any, fill: Any, mode: str = "fill") -> Any:
    numbers = lax.GatherDimensionNumbers(
        offset_dims=(ids.ndim,), collapsed_slice_dims=(0,), start_index_map=(0,)
    )
    if jnp.issubdtype(table.dtype, jnp.integer) and fill is not None:
        fill = -1
    sizes = (1, table.shape[1])
    return lax.gather(table, ids[..., None], numbers, sizes, mode=mode, fill_value=fill)


def windows(x: Any, i: Any) -> Any:
    """Slices longer than one."""
    numbers = lax.GatherDimensionNumbers((1, 2), (), (0,))
    return lax.gather(x, i, numbers, (3, 8), mode="clip")


def scattered(table: Any, ids: Any, given: Any, update: str, mode: str) -> Any:
    return getattr(table.at[ids], update)(given, mode=mode)


def bind_scatter(kind: str) -> Callable[..., Any]:
    numbers = lax.ScatterDimensionNumbers((2,), (0,), (0,))
    function = {"scatter-sub": lax.scatter_sub, "scatter-mul": lax.scatter_mul}[kind]
    return lambda table, ids, given: function(table, ids[..., None], given, numbers)


def cross_entropy(logits: Any, labels: Any) -> Any:
    likely = jax.nn.log_softmax(logits)
    return -jnp.take_along_axis(likely, labels[..., None], -1).mean()


def _linalg() -> Iterator[tuple[Any, ...]]:
    many = normal(4, 6, 6)
    whole = many @ many.swapaxes(-1, -2) + 6 * jnp.eye(6)
    yield lambda a: jnp.linalg.cholesky(a), whole
    yield (
        lambda a: (jnp.linalg.eigh(a), jnp.linalg.qr(a), jnp.linalg.svd(a), jnp.linalg.eig(a)),
        whole,
    )
    yield (
        lambda a: (
            lax.linalg.lu(a),
            lax.linalg.schur(a),
            lax.linalg.hessenberg(a),
            lax.linalg.tridiagonal(a),
        ),
        whole,
    )
    yield lambda a: lax.linalg.qr(a, pivoting=True), whole
    yield lambda a, c: lax.linalg.symmetric_product(a, c, symmetrize_output=False), many, whole
    for left in (True, False):
        solve = partial(lax.linalg.triangular_solve, left_side=left, lower=True)
        yield solve, whole, normal(4, 6, 8) if left else normal(4, 8, 6)
    yield lambda p: lax.linalg.lu_pivots_to_permutation(p, 6), integers(6, 4, 6)
    yield bind("geqrf"), whole
    yield lambda a: bind("geqp3", use_magma=None)(a, jnp.zeros((4, 6), jnp.int32)), whole
    yield lax.linalg.householder_product, many, uniform(4, 6)
    yield (
        lax.linalg.tridiagonal_solve,
        uniform(4, 6),
        uniform(4, 6) + 4,
        uniform(4, 6),
        normal(4, 6, 2),
    )
    yield jnp.fft.fft, normal(4, 8)
    yield lambda x: jnp.fft.irfft2(jnp.fft.rfft2(x)), normal(4, 6, 8)


def _rest() -> Iterator[tuple[Any, ...]]:
    yield lambda x: (jnp.sort(x, 1), jnp.argsort(x, 0)), normal(4, 8)
    yield grad(lambda x: lax.top_k(x, 2)[0]), normal(4, 8)
    yield lambda x: lax.approx_max_k(x, 2), normal(4, 8)
    yield grad(lambda x, y: lax.optimization_barrier((x, y))[0]), normal(4, 8), normal(2)
    key = jax.random.key(0)
    keys = jax.random.split(key, 4)
    yield lambda k: (jax.random.bits(k, (4, 8)), jax.random.split(k)), key
    yield jax.vmap(lambda k: (jax.random.bits(k, (8,)), jax.random.split(k, (4, 2)))), keys
    yield from ((jax.random.bits, key, (4, 3, 8), f"uint{width}") for width in (8, 16))
    yield lambda k: (jax.random.bits(k, (4, 8)), jax.random.split(k)), jax.random.key(0, impl="rbg")
    yield jax.vmap(jax.random.fold_in), keys, jnp.arange(4)
    yield lambda k: jax.random.wrap_key_data(jax.random.key_data(k)), keys
    yield jax.vmap(jax.random.key), jnp.arange(4)
    yield jax.random.clone, keys
    yield lambda k: lax.rng_bit_generator(k, (4, 8)), jnp.arange(4, dtype=jnp.uint32)
    yield lambda a, b: lax.rng_uniform(a, b, (4, 8)), jnp.float32(0), jnp.float32(1)
    yield lambda k, a: bind("random_gamma", log_space=False)(k, a), keys, uniform(4)
    words = integers(99, 8, dtype=jnp.uint32)
    yield bind("threefry2x32"), words, words + 1, words + 2, words + 3
    yield jax.random.normal, key, (4, 8)
    yield grad(layer_norm, 0, 1), normal(2, 4, 8), normal(8)
    yield grad(jax.nn.gelu), normal(4, 8)
    yield grad(jax.nn.softmax), normal(4, 8)
    yield grad(scaled_by_hand, 0, 1), normal(4, 8, 2), normal(8, 2)


scaled_by_hand = by_hand(
    lambda x, w: jnp.sin(x) * w.sum(1)[:, None], rule="b d e, d f -> b d e", cut="b d", flop=1
)


def layer_norm(x: Any, scale: Any) -> Any:
    centred = x - x.mean(-1, keepdims=True)
    return scale * centred * lax.rsqrt(centred.var(-1, keepdims=True) + 1e-5)


FAMILIES = {
    "elementwise": _elementwise,
    "shape": _shape,
    "contraction": _contraction,
    "reduction": _reduction,
    "indexing": _indexing,
    "linalg": _linalg,
    "rest": _rest,
}


@cache
def family(name: str) -> tuple[Sample, ...]:
    """The samples of a family, one per (kind, attrs, types). Gradients leave behind ops
    of other families, which have samples of their own; whole layers keep everything."""
    found: dict[Any, Sample] = {}
    for function, *args in FAMILIES[name]():
        static = [a for a in args if isinstance(a, (tuple, str))]
        arrays = [a for a in args if not isinstance(a, (tuple, str))]
        for one in samples(lambda *a, f=function, s=static: f(*a, *s), *arrays):
            if name == "rest" or home(one.op.kind) == name:
                found.setdefault((one.op.kind, one.op.attrs, tuple(one.types.items())), one)
    return tuple(found.values())


def home(kind: str) -> str:
    """The family of a kind: the file its rule is written in."""
    return WRITERS[kind].__module__.rpartition(".")[2] if kind in WRITERS else ""
