"""A user's own kernel as one op with a declared rule: `mw.kernel(rule=..., cut=..., flop=...)`.

    @mw.kernel(rule="b h q d, b h k d, b h k d -> b h q d", cut="b h", flop=lambda q, k, v: 4 * q.size * k.shape[2])
    def attention(q, k, v): ...      # pallas, a custom call, a custom_vjp; called on the part that a device has

The function and its gradient are one op each. The gradient runs the function again for what it keeps, so no array
without a name crosses from one pass to the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import update_wrapper
from itertools import count
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import ShapedArray
from jax.extend.core import Primitive
from jax.interpreters import batching, mlir

from ...ir.errors import UsageError
from ...ir.rules.user_kernel import KIND

Names = tuple[str, ...]
Count = float | Callable[..., float]


@dataclass(frozen=True)
class UserFunction:
    """What an op runs on its local operands, under the name that plans and fingerprints know it by."""

    name: str
    run: Callable[..., Sequence[jax.Array]]


@dataclass(frozen=True)
class Declared:
    """The rule of a kernel: names of dims, by operand and by result; which of them may be cut."""

    operands: tuple[Names, ...]
    results: tuple[Names, ...]
    cut: Names


def kernel(
    function: Callable[..., Any] | None = None, *, rule: str, cut: str, flop: Count, nbytes: Count | None = None,
    gradient_flop: Count | None = None,
) -> Callable[..., Any]:  # fmt: skip
    """A function of arrays as one op of a plan, and its gradient as another.

    Args:
        function: of arrays, positional, to an array or a tuple of them; run on the part of each that a device has.
        rule: names of dims, by operand and result: `b h q d, b h k d, b h k d -> b h q d`. A name has one size.
        cut: names along which parts do not depend on each other, `b h`; every result has them. Others are never cut.
        flop: of one call on whole arrays, or a function of the operands (with `shape`, `dtype`, `size`) that gives
            it. Priced at the rate of fused attention (`attention_efficiency` of the cluster).
        nbytes: read and written by a call, likewise; by default all operands and results once.
        gradient_flop: of the gradient, likewise, the function's own run included; by default 3.5 times `flop`, as for
            attention: five products for two, and the two again.

    Raises:
        UsageError: the rule cannot be read, or does not fit the arrays or what the function gives.
    """
    declared = _parsed(rule, cut)
    if function is not None and not callable(function):
        raise _wrong(f"a kernel is a function, not {function!r}.", "@mw.kernel(...) above a def")
    if function is None:
        return lambda f: kernel(
            f, rule=rule, cut=cut, flop=flop, nbytes=nbytes, gradient_flop=gradient_flop
        )
    made = _Kernel(function, declared, rule, flop, nbytes, gradient_flop)
    return update_wrapper(made.differentiable(), function)


def _parsed(rule: str, cut: str) -> Declared:
    sides = rule.split("->") if isinstance(rule, str) else []
    if len(sides) != 2:
        raise _wrong(f"rule `{rule}` has not one `->`.", "`b h q d, b h k d, b h k d -> b h q d`")
    operands, results = (tuple(tuple(each.split()) for each in side.split(",")) for side in sides)
    for names in (*operands, *results):
        if len({*names}) != len(names) or not all(name.isidentifier() for name in names):
            raise _wrong(
                f"`{' '.join(names)}` in rule `{rule}` is no list of different names.",
                "a name for each dim, `b h q d`",
            )
    if not isinstance(cut, str):
        raise _wrong(
            f"cut cannot be {cut!r}.", "names with spaces between, `b h`, or an empty text"
        )
    free = tuple(cut.split())
    for name in free:
        if not any(name in names for names in operands):
            known = " ".join(dict.fromkeys(n for names in operands for n in names))
            raise _wrong(
                f"`{name}` of cut `{cut}` is no name of an operand in rule `{rule}`.",
                f"names with spaces between, of `{known}`",
            )
        if not all(name in names for names in results):
            raise _wrong(
                f"`{name}` cannot be cut by rule `{rule}`: a result is without it.",
                "names that all results have, or none",
            )
    return Declared(operands, results, free)


def _wrong(what: str, fix: str, where: str = "mw.kernel") -> UsageError:
    return UsageError(what, where=where, fix=fix)


@dataclass(frozen=True)
class _Kernel:
    function: Callable[..., Any]
    declared: Declared
    rule: str
    flop: Count
    nbytes: Count | None
    gradient_flop: Count | None

    @property
    def name(self) -> str:
        return getattr(self.function, "__name__", type(self.function).__name__)

    @property
    def where(self) -> str:
        return f"mw.kernel of `{self.name}`, rule `{self.rule}`"

    def differentiable(self) -> Callable[..., Any]:
        call = jax.custom_vjp(self._call)
        call.defvjp(lambda *arrays: (self._call(*arrays), arrays), self._pulled)

        def wrapped(*arrays: Any, **named: Any) -> Any:
            if named:
                raise _wrong(
                    f"`{next(iter(named))}` is given by its name.",
                    "arrays in the order of the rule; options by functools.partial before mw.kernel", self.where,
                )  # fmt: skip
            given = [jnp.asarray(a) for a in arrays]
            self._check(given)
            return call(*given)

        return wrapped

    def _call(self, *arrays: Any) -> Any:
        found = self._bind(self.declared, self._forward, arrays, self.flop, self.name)
        return found[0] if len(self.declared.results) == 1 else tuple(found)

    def _forward(self, *arrays: Any) -> Sequence[Any]:
        found = self.function(*arrays)
        several = list(found) if isinstance(found, tuple | list) else [found]
        for each in several:
            if not hasattr(each, "shape"):
                raise _wrong(
                    f"a result is of type {type(each).__name__}.", "an array, or a tuple of arrays", self.where
                )  # fmt: skip
        return several

    def _pulled(self, arrays: Sequence[Any], grads: Any) -> tuple[Any, ...]:
        """Gradients of the operands that are no integers, by those of such results."""
        grads = [grads] if len(self.declared.results) == 1 else list(grads)
        floats = [k for k, a in enumerate(arrays) if jnp.issubdtype(a.dtype, jnp.floating)]
        led = [k for k, g in enumerate(grads) if g.dtype != jax.dtypes.float0]
        many = len(arrays)

        def gradient(*given: Any) -> Sequence[Any]:
            made, pull = jax.vjp(self._forward, *given[:many])
            seeds = [np.zeros(each.shape, jax.dtypes.float0) for each in made]
            for k, seed in zip(led, given[many:], strict=True):
                seeds[k] = seed
            found = pull(seeds)
            return [found[k] for k in floats]

        operands, results = self.declared.operands, self.declared.results
        declared = Declared(
            (*operands, *(results[k] for k in led)), tuple(operands[k] for k in floats), self.declared.cut
        )  # fmt: skip
        flop = self.gradient_flop or (lambda *given: 3.5 * _count("flop", self.flop, given[:many]))
        given = (*arrays, *(grads[k] for k in led))
        found = iter(self._bind(declared, gradient, given, flop, f"{self.name}_gradient"))
        return tuple(
            next(found) if k in floats else np.zeros(a.shape, jax.dtypes.float0)
            for k, a in enumerate(arrays)
        )

    def _bind(
        self, declared: Declared, run: Callable[..., Sequence[Any]], arrays: Sequence[Any], flop: Count, name: str
    ) -> list[Any]:  # fmt: skip
        given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        moved = (
            self.nbytes
            if self.nbytes is not None and declared == self.declared
            else _all_bytes(run)
        )
        return kernel_p.bind(
            *arrays, function=UserFunction(name, run), program=jax.make_jaxpr(run)(*given), operands=declared.operands,
            results=declared.results, cut=declared.cut, flop=int(_count("flop", flop, given)),
            nbytes=int(_count("nbytes", moved, given)),
        )  # fmt: skip

    # ------------------------------------------------------------ whether the rule fits

    def _check(self, arrays: Sequence[Any]) -> None:
        declared = self.declared
        if len(arrays) != len(declared.operands):
            many = f"{len(declared.operands)} operands in the rule, {len(arrays)} given."
            raise _wrong(many, "one list of names for each array", self.where)
        sizes: dict[str, int] = {}
        for k, (array, names) in enumerate(zip(arrays, declared.operands, strict=True)):
            self._fits(f"operand {k}", array.shape, names, sizes)
        whole = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in arrays]
        self._check_results(whole, sizes, "")
        for name in declared.cut:
            if sizes[name] % 2 == 0:
                halves = {**sizes, name: sizes[name] // 2}
                part = [
                    jax.ShapeDtypeStruct(tuple(halves[n] for n in names), a.dtype)
                    for a, names in zip(arrays, declared.operands, strict=True)
                ]
                self._check_results(part, halves, f" on half of `{name}`")

    def _check_results(self, given: Sequence[Any], sizes: dict[str, int], part: str) -> None:
        try:
            found = jax.eval_shape(self._forward, *given)
        except (TypeError, ValueError) as error:
            if not part:
                raise
            shapes = ", ".join(str(a.shape) for a in given)
            raise _wrong(
                f"the function cannot run{part}, on {shapes}: {str(error).splitlines()[0]}",
                "a function that takes its sizes from the arrays, or fewer names to cut", self.where,
            ) from error  # fmt: skip
        if len(found) != len(self.declared.results):
            many = f"{len(self.declared.results)} results in the rule, {len(found)} made."
            raise _wrong(many, "one list of names for each result", self.where)
        for k, (array, names) in enumerate(zip(found, self.declared.results, strict=True)):
            self._fits(f"result {k}{part}", array.shape, names, dict(sizes))

    def _fits(self, what: str, shape: tuple[int, ...], names: Names, sizes: dict[str, int]) -> None:
        if len(shape) != len(names):
            raise _wrong(
                f"{what} has {len(shape)} dims {shape}, the rule names {len(names)}: `{' '.join(names)}`.",
                "a name for each dim", self.where,
            )  # fmt: skip
        for name, size in zip(names, shape, strict=True):
            if sizes.setdefault(name, size) != size:
                raise _wrong(
                    f"`{name}` is {size} in {what} {shape}, {sizes[name]} before.",
                    "another name for a dim of another size", self.where,
                )  # fmt: skip


def _count(what: str, count: Count, given: Sequence[Any]) -> float:
    found = count(*given) if callable(count) else count
    if not isinstance(found, int | float) or not math.isfinite(found) or found < 0:
        raise _wrong(f"{what} of a kernel cannot be {found!r}.", "a finite number, 0 or more")
    return float(found)


def _all_bytes(run: Callable[..., Any]) -> Callable[..., float]:
    def total(*given: Any) -> float:
        return sum(a.size * a.dtype.itemsize for a in (*given, *jax.eval_shape(run, *given)))

    return total


kernel_p = Primitive(KIND)
kernel_p.multiple_results = True


@kernel_p.def_abstract_eval
def _types(*avals: Any, function: UserFunction, **_: Any) -> list[Any]:
    given = [jax.ShapeDtypeStruct(a.shape, a.dtype) for a in avals]
    return [ShapedArray(a.shape, a.dtype) for a in jax.eval_shape(function.run, *given)]


@kernel_p.def_impl
def _run(*arrays: Any, function: UserFunction, **_: Any) -> Any:
    return jax.jit(function.run)(*arrays)


def _inline(*arrays: Any, function: UserFunction, **_: Any) -> Any:
    return function.run(*arrays)


def _batched(
    arrays: Any, dims: Any, *, function: UserFunction, operands: Any, results: Any, cut: Names,
    flop: int, nbytes: int, **_: Any,
) -> Any:  # fmt: skip
    """Under `vmap` the rule has one name more, which may be cut: examples do not depend on each other."""
    sizes = {a.shape[d] for a, d in zip(arrays, dims, strict=True) if d is not None}
    (size,) = sizes
    used = {name for names in operands for name in names}
    name = next(each for n in count() if (each := f"batch{n}") not in used)
    run = jax.vmap(function.run, dims)
    named = tuple(
        names if d is None else (*names[:d], name, *names[d:])
        for names, d in zip(operands, dims, strict=True)
    )
    found = kernel_p.bind(
        *arrays, function=UserFunction(function.name, run), program=jax.make_jaxpr(run)(*arrays), operands=named,
        results=tuple((name, *names) for names in results), cut=(*cut, name), flop=flop * size, nbytes=nbytes * size,
    )  # fmt: skip
    return found, [0] * len(found)


mlir.register_lowering(kernel_p, mlir.lower_fun(_inline, multiple_results=True))
batching.primitive_batchers[kernel_p] = _batched
